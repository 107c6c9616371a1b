//! Looks for signatures on a disk that holds arbitrary bytes.
#![no_main]

use engine::store::{BlockStore, MemoryStore};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let disk = MemoryStore::from(bytes.to_vec());
    let _ = engine::signature::examine(&disk as &dyn BlockStore).expect("memory never fails");
});

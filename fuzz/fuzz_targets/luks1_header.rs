//! Reads arbitrary bytes as a LUKS1 header. The header is refused or parsed. A parsed header is displayed and tried with a
//! passphrase. If it is encoded and parsed again, the result is the same header. A repaired header needs no second repair.
#![no_main]

use engine::key::Passphrase;
use engine::luks::luks1::{self, Header, Locked};
use engine::luks::{DataDisk, Limits, dump};
use engine::store::MemoryStore;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let repaired = MemoryStore::from(bytes.to_vec());
    if luks1::repair(&repaired).is_ok() {
        assert_eq!(luks1::repair(&repaired).ok(), Some(Vec::new()));
    }
    let Ok(header) = Header::parse(bytes) else { return };
    assert_eq!(Header::parse(&header.to_bytes()).ok().as_ref(), Some(&header));
    let store = MemoryStore::from(bytes.to_vec());
    let disk = DataDisk { len: u64::MAX, is_detached: bytes.len() % 2 == 0 };
    let _ = dump(&store).map(|dump| dump.display("it"));
    let limits = Limits { iterations: std::num::NonZeroU32::MIN, ..Limits::default() };
    let _ = Locked::new(header, disk, &limits).map(|locked| locked.unlock(&store, &Passphrase::new(Vec::new())));
});

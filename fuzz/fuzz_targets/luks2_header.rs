//! Reads arbitrary bytes as a disk with LUKS2 headers and as a detached header. The header is refused, or displayed and
//! tried with a passphrase.
#![no_main]

use engine::key::Passphrase;
use engine::luks::{self, Disks, Limits};
use engine::store::MemoryStore;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let disk = MemoryStore::from(bytes.to_vec());
    let _ = luks::dump(&disk).map(|dump| dump.display("it"));
    let limits = Limits { iterations: std::num::NonZeroU32::MIN, argon2_memory: 1024, argon2_time: 4, argon2_lanes: 1 };
    let data = MemoryStore::zeroed(8192);
    for disks in [Disks::from(&disk), Disks::detached(&disk, &data)] {
        let _ = luks::read(disks, &limits).map(|volume| volume.unlock(&disk, &Passphrase::new(Vec::new())));
    }
});

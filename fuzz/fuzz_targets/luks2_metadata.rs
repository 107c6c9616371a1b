//! Reads arbitrary bytes as the JSON of a LUKS2 header. The JSON is refused, or displayed and tried with a passphrase.
#![no_main]

use engine::key::Passphrase;
use engine::luks::luks2::{BinaryHeader, Header, Label, Locked, Metadata};
use engine::luks::{DataDisk, HashAlgorithm, Limits};
use engine::store::MemoryStore;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let binary = BinaryHeader {
        header_size: 16384,
        sequence_id: 1,
        label: Label::default(),
        subsystem: Label::default(),
        checksum_algorithm: HashAlgorithm::Sha256,
        uuid: Default::default(),
    };
    let Ok(metadata) = Metadata::parse(&binary, &[bytes, b"\0"].concat()) else { return };
    let header = Header { binary, metadata };
    let _ = header.to_string();
    let store = MemoryStore::from(bytes.to_vec());
    let disk = DataDisk { len: u64::MAX, is_detached: bytes.len() % 2 == 0 };
    let _ =
        Locked::new(header, disk, &Limits::default()).map(|locked| locked.unlock(&store, &Passphrase::new(Vec::new())));
});

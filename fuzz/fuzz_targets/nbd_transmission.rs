//! Any bytes behind a good handshake: no panic, the same answers however they are cut, and no request past the end.
#![no_main]

use nbd_server::proto::transcript::{GOOD_HANDSHAKE, Transcript, example_exports};

libfuzzer_sys::fuzz_target!(|input: (u8, Vec<u8>)| {
    let (size, bytes) = input;
    let whole = Transcript::of(&example_exports(), [GOOD_HANDSHAKE, bytes.as_slice()]);
    let cut = std::iter::once(GOOD_HANDSHAKE).chain(bytes.chunks(usize::from(size).max(1)));
    assert_eq!(whole, Transcript::of(&example_exports(), cut));
    assert!(whole.commands.iter().filter_map(|command| command.range()).all(|range| range.offset + range.len <= 1 << 20));
});

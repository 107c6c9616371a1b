//! Sends arbitrary bytes to the server after a valid handshake, once for each form of headers. The answers do not depend on
//! how the bytes are split, no request reaches past the end, and each request has one reply as the document requires.
#![no_main]

use nbd_server::proto::transcript::{HANDSHAKES, Transcript, example_exports};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let [kind, size, bytes @ ..] = input else { return };
    let handshake = HANDSHAKES[usize::from(*kind) % HANDSHAKES.len()];
    let whole = Transcript::of(&example_exports(), [handshake, bytes]);
    let cut = std::iter::once(handshake).chain(bytes.chunks(usize::from(*size).max(1)));
    assert_eq!(whole, Transcript::of(&example_exports(), cut));
    assert!(
        whole.commands.iter().filter_map(|command| command.range()).all(|range| range.offset + range.len <= 1 << 20)
    );
    whole.check_replies().unwrap();
});

//! Sends arbitrary bytes to the server, as all that a client sends. The answers do not depend on how the bytes are split,
//! and each request has one reply.
#![no_main]

use nbd_server::proto::transcript::{Transcript, example_exports};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let [size, bytes @ ..] = input else { return };
    let whole = Transcript::of(&example_exports(), [bytes]);
    assert_eq!(whole, Transcript::of(&example_exports(), bytes.chunks(usize::from(*size).max(1))));
    whole.check_replies().unwrap();
});

//! Any bytes as all that a client ever says: no panic, the same answers however they are cut, and one to each request.
#![no_main]

use nbd_server::proto::transcript::{Transcript, example_exports};

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let [size, bytes @ ..] = input else { return };
    let whole = Transcript::of(&example_exports(), [bytes]);
    assert_eq!(whole, Transcript::of(&example_exports(), bytes.chunks(usize::from(*size).max(1))));
    whole.check_replies().unwrap();
});

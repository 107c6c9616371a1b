//! A whole conversation without a connection: what a client that sends given bytes is told, and what it asked for. For
//! tests and fuzzers, which ask whether any bytes, cut anywhere, do harm.

use super::handshake::{ExportInfo, Handshake, HandshakeError, Next, TlsPolicy};
use super::transmission::{ExpectRequest, Received, TransmissionError};
use super::{Answer, Command, ErrorCode};

/// A client's side of a handshake that ends in transmission with the default export: flags, then `NBD_OPT_GO`.
pub const GOOD_HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// Two exports of a megabyte, the second read-only.
pub fn example_exports() -> [ExportInfo; 2] {
    let export = |name: &str, read_only| ExportInfo {
        name: name.to_owned(),
        description: format!("the export {name}"),
        size: 1 << 20,
        read_only,
        discards: true,
        preferred_block: 4096,
    };
    [export("disk", false), export("fixed", true)]
}

/// What came of a client's bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// All that the server said. A read that was asked for is answered with success and zeroes, left out here.
    pub sent: Vec<u8>,
    /// The requests to be carried out, in order.
    pub commands: Vec<Command>,
    /// The payloads of the writes among them, one after the other.
    pub payload: Vec<u8>,
    /// How the conversation ended.
    pub end: End,
}

/// How a conversation ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum End {
    /// It did not: the server waits for more.
    #[default]
    Waiting,
    /// The client took its leave.
    Disconnected,
    /// The client was cut off during the handshake.
    Handshake(HandshakeError),
    /// The client was cut off in transmission.
    Transmission(TransmissionError),
}

enum State {
    Handshake(Handshake),
    Transmission(ExpectRequest),
    Skip(super::ExpectSkipped),
    Payload(super::ExpectPayload),
    Ended,
}

impl Transcript {
    /// Plays the client's bytes, which arrive in these pieces, to a server of these exports. Each write, trim and so on
    /// succeeds.
    pub fn of<'a>(exports: &[ExportInfo], pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self::with_tls(TlsPolicy::Off, exports, pieces)
    }

    /// The same with a server that offers or requires TLS. Where TLS begins, the bytes that follow stand for what comes
    /// out of it.
    pub fn with_tls<'a>(tls: TlsPolicy, exports: &[ExportInfo], pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut transcript = Self::default();
        let mut state = State::Handshake(Handshake::greeting(tls, &mut transcript.sent));
        let mut held = Vec::new();
        for piece in pieces {
            held.extend_from_slice(piece);
            let mut at = 0;
            loop {
                let wanted = match &state {
                    State::Handshake(handshake) => handshake.wanted(),
                    State::Transmission(expect) => expect.header_len(),
                    State::Skip(expect) => expect.left().min((held.len() - at).max(1)),
                    State::Payload(expect) => expect.len(),
                    State::Ended => return transcript,
                };
                let Some(bytes) = held.get(at..at + wanted) else { break };
                state = transcript.step(state, bytes, exports);
                at += wanted;
            }
            held.drain(..at);
        }
        transcript
    }

    fn step(&mut self, state: State, bytes: &[u8], exports: &[ExportInfo]) -> State {
        match state {
            State::Handshake(handshake) => match handshake.handle(bytes, exports, &mut self.sent) {
                Ok(Next::Continue(next) | Next::StartTls(next)) => State::Handshake(next),
                Ok(Next::Transmission(negotiated)) => {
                    State::Transmission(ExpectRequest::new(&exports[negotiated.export], &negotiated))
                }
                Ok(Next::Aborted) => self.ended(End::Disconnected),
                Err(error) => self.ended(End::Handshake(error)),
            },
            State::Transmission(expect) => match expect.handle(bytes) {
                Ok(Received::Request(request, next)) => {
                    self.carry_out(request);
                    State::Transmission(next)
                }
                Ok(Received::Payload(expect)) => State::Payload(expect),
                Ok(Received::Refused(reply, next)) => {
                    reply.encode(&mut self.sent);
                    State::Transmission(next)
                }
                Ok(Received::Skip(reply, next)) => {
                    reply.encode(&mut self.sent);
                    State::Skip(next)
                }
                Ok(Received::Disconnect) => self.ended(End::Disconnected),
                Err(error) => self.ended(End::Transmission(error)),
            },
            State::Payload(expect) => {
                self.payload.extend_from_slice(bytes);
                let (request, next) = expect.received();
                self.carry_out(request);
                State::Transmission(next)
            }
            State::Skip(expect) => match expect.skipped(bytes.len()) {
                Ok(next) => State::Transmission(next),
                Err(more) => State::Skip(more),
            },
            State::Ended => State::Ended,
        }
    }

    fn carry_out(&mut self, request: super::Request) {
        let command = *request.command();
        self.commands.push(command);
        let outcome = match command {
            Command::WriteZeroes { fast: true, .. } => Err(ErrorCode::NotSup),
            _ => Ok(Answer::Done),
        };
        request.finish(outcome).encode(&mut self.sent);
    }

    fn ended(&mut self, end: End) -> State {
        self.end = end;
        State::Ended
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::wire::*;
    use super::*;

    /// What clients say, some of it nonsense.
    fn message() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop_oneof![0..9u16, any::<u16>()];
        let flags = prop_oneof![4 => Just(0), 1 => 0..64u16];
        let len = prop_oneof![0..3000u32, Just(1 << 20), Just(u32::MAX)];
        let offset = prop_oneof![0..1u64 << 21, any::<u64>()];
        prop_oneof![
            8 => (flags, kind, any::<u64>(), offset, len).prop_map(|(flags, kind, cookie, offset, len)| {
                let mut bytes = NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
                bytes.extend(flags.to_be_bytes());
                bytes.extend(kind.to_be_bytes());
                bytes.extend(cookie.to_be_bytes());
                bytes.extend(offset.to_be_bytes());
                bytes.extend(len.to_be_bytes());
                if kind == NBD_CMD_WRITE && len < 3000 {
                    bytes.resize(bytes.len() + len as usize, 0xda);
                }
                bytes
            }),
            1 => prop::collection::vec(any::<u8>(), 0..40),
        ]
    }

    fn option() -> impl Strategy<Value = Vec<u8>> {
        let data = prop_oneof![Just(vec![0; 6]), Just(vec![]), prop::collection::vec(any::<u8>(), 0..5000)];
        let kind = prop_oneof![0..12u32, any::<u32>()];
        (kind, data).prop_map(|(kind, data)| {
            let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
            bytes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn bytes_may_arrive_cut_anywhere(
            options in prop::collection::vec(option(), 0..5),
            messages in prop::collection::vec(message(), 0..20),
            mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        ) {
            let mut bytes = GOOD_HANDSHAKE[..4].to_vec();
            bytes.extend(options.concat());
            bytes.extend(&GOOD_HANDSHAKE[4..]);
            bytes.extend(messages.concat());
            let exports = example_exports();
            let whole = Transcript::of(&exports, [bytes.as_slice()]);
            cuts.sort_by_key(|cut| cut.index(bytes.len()));
            let mut pieces = Vec::new();
            let mut at = 0;
            for cut in cuts {
                let next = cut.index(bytes.len());
                pieces.push(&bytes[at..next]);
                at = next;
            }
            pieces.push(&bytes[at..]);
            prop_assert_eq!(&whole, &Transcript::of(&exports, pieces));
            prop_assert_eq!(&whole, &Transcript::of(&exports, bytes.chunks(1)));
            for range in whole.commands.iter().filter_map(Command::range) {
                prop_assert!(range.offset + range.len <= 1 << 20);
            }
        }
    }

    #[test]
    fn a_whole_conversation_goes_word_for_word() {
        let mut bytes = GOOD_HANDSHAKE.to_vec();
        bytes.extend(b"\x25\x60\x95\x13\0\0\0\x01COOKIE01\0\0\0\0\0\0\x10\0\0\0\0\x05hello");
        bytes.extend(b"\x25\x60\x95\x13\0\0\0\x01COOKIE02\0\0\0\0\0\x10\0\0\0\0\0\x05hello");
        bytes.extend(b"\x25\x60\x95\x13\0\0\0\x02COOKIE03\0\0\0\0\0\0\0\0\0\0\0\0");
        let transcript = Transcript::of(&example_exports(), [bytes.as_slice()]);
        let sent = [
            &b"NBDMAGICIHAVEOPT\0\x03"[..],
            b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x10\0\0\x0d\x6d",
            b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0",
            b"\x67\x44\x66\x98\0\0\0\0COOKIE01",
            b"\x67\x44\x66\x98\0\0\0\x1cCOOKIE02",
        ]
        .concat();
        assert_eq!(transcript.sent, sent);
        let range = super::super::Range { offset: 0x1000, len: 5 };
        assert_eq!(transcript.commands, [Command::Write { range, fua: false }]);
        assert_eq!(transcript.payload, b"hello");
        assert_eq!(transcript.end, End::Disconnected);
    }
}

//! A complete conversation without a connection: what the server answers to the bytes of a client, and which requests it takes
//! from them. Tests and fuzzers use it to check that no bytes do harm, however they are split.

use super::handshake::{ExportInfo, Handshake, HandshakeError, Next, TlsPolicy};
use super::reply::Reply;
use super::transmission::{ExpectRequest, Received, TransmissionError};
use super::{Answer, Command, ErrorCode, Extent, referee};

/// The client's side of a handshake that chooses the default export: flags, then `NBD_OPT_GO`.
pub const GOOD_HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// As [`GOOD_HANDSHAKE`], with structured replies and `base:allocation`.
pub const STRUCTURED_HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation\
    IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// As [`GOOD_HANDSHAKE`], with extended headers and `base:allocation`.
pub const EXTENDED_HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation\
    IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// One handshake for each form of headers.
pub const HANDSHAKES: [&[u8]; 3] = [GOOD_HANDSHAKE, STRUCTURED_HANDSHAKE, EXTENDED_HANDSHAKE];

/// Returns two exports of 1 MiB. The second is read-only.
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

/// The result of sending a client's bytes to a server.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// The bytes that the server took from the client. The server does not take an incomplete message at the end, or
    /// anything after the end of the conversation.
    pub heard: Vec<u8>,
    /// The bytes that the server sent. Every read succeeds with zeroes, which are left out here.
    pub sent: Vec<u8>,
    /// The replies in [`Transcript::sent`], in order.
    pub replies: Vec<ReplyPosition>,
    /// The number of requests that arrived completely, with their payload, or that were refused before their payload.
    /// `NBD_CMD_DISC` does not count.
    pub requests: usize,
    /// The commands to be carried out, in order.
    pub commands: Vec<Command>,
    /// The payloads of all writes, one after the other.
    pub payload: Vec<u8>,
    /// How the conversation ended.
    pub end: End,
}

/// The position of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyPosition {
    /// The offset of its first byte in [`Transcript::sent`]. The reply ends where the next reply begins.
    pub at: usize,
    /// The number of payload bytes that `sent` leaves out.
    pub payload: usize,
}

/// How a conversation ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum End {
    /// It has not ended: the server waits for more bytes.
    #[default]
    Waiting,
    /// The client disconnected.
    Disconnected,
    /// The server disconnected the client during the handshake.
    Handshake(HandshakeError),
    /// The server disconnected the client during transmission.
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
    /// Sends the client's bytes, in the given pieces, to a server with these exports. Every write, trim and so on succeeds.
    pub fn of<'a>(exports: &[ExportInfo], pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self::with_tls(TlsPolicy::Off, exports, pieces)
    }

    /// Does what [`Transcript::of`] does, with a server that offers or requires TLS. The bytes after the start of TLS
    /// stand for the bytes that TLS has decrypted.
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
                transcript.heard.extend_from_slice(bytes);
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
                Ok(Next::Continue(next)) => State::Handshake(next),
                Ok(Next::StartTls(expect)) => State::Handshake(expect.established()),
                Ok(Next::Transmission(negotiated)) => {
                    State::Transmission(ExpectRequest::new(&exports[negotiated.export], &negotiated))
                }
                Ok(Next::Aborted) => self.ended(End::Disconnected),
                Err(error) => self.ended(End::Handshake(error)),
            },
            State::Transmission(expect) => match expect.handle(bytes) {
                Ok(Received::Request(request, next)) => {
                    self.requests += 1;
                    self.carry_out(request);
                    State::Transmission(next)
                }
                Ok(Received::Payload(expect)) => State::Payload(expect),
                Ok(Received::Refused(reply, next)) => {
                    self.requests += 1;
                    self.reply(&reply);
                    State::Transmission(next)
                }
                Ok(Received::Skip(reply, next)) => {
                    self.requests += 1;
                    self.reply(&reply);
                    State::Skip(next)
                }
                Ok(Received::Disconnect) => self.ended(End::Disconnected),
                Err(error) => self.ended(End::Transmission(error)),
            },
            State::Payload(expect) => {
                self.payload.extend_from_slice(bytes);
                self.requests += 1;
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
            // A hole, followed by data if there is room for it.
            Command::BlockStatus { range, one } => {
                let hole = range.len.div_ceil(2);
                let extents = [(hole, true), (range.len - hole, false)];
                let extents = extents.into_iter().take(if one { 1 } else { 2 }).filter(|(len, _)| *len > 0);
                Ok(Answer::Extents(extents.map(|(len, hole)| Extent { len, hole, zero: hole }).collect()))
            }
            _ => Ok(Answer::Done),
        };
        self.reply(&request.finish(outcome));
    }

    fn reply(&mut self, reply: &Reply) {
        self.replies.push(ReplyPosition { at: self.sent.len(), payload: reply.payload_len() });
        reply.encode(&mut self.sent);
    }

    /// Checks that the server sent what the NBD specification requires. Each option must have replies with the option's number
    /// and of types that belong to this option. The last reply is an acknowledgement or an error. Each request must have one
    /// reply of the negotiated kind. The reply must repeat the fields that the NBD specification names, and contain exactly what
    /// was requested.
    ///
    /// # Errors
    /// A description of the first mistake.
    pub fn check_replies(&self) -> Result<(), String> {
        if self.replies.len() != self.requests {
            return Err(format!("{} replies to {} requests", self.replies.len(), self.requests));
        }
        referee::judge(self)
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

    /// Messages of a client, some of them nonsense.
    fn message(extended: bool) -> impl Strategy<Value = Vec<u8>> {
        let kind = prop_oneof![0..9u16, any::<u16>()];
        let flags = prop_oneof![4 => Just(0), 1 => 0..64u16];
        let len = prop_oneof![0..3000u32, Just(1 << 20), Just(u32::MAX)];
        let offset = prop_oneof![0..1u64 << 21, any::<u64>()];
        prop_oneof![
            8 => (flags, kind, any::<u64>(), offset, len).prop_map(move |(flags, kind, cookie, offset, len)| {
                let magic = if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC };
                let mut bytes = magic.to_be_bytes().to_vec();
                bytes.extend(flags.to_be_bytes());
                bytes.extend(kind.to_be_bytes());
                bytes.extend(cookie.to_be_bytes());
                bytes.extend(offset.to_be_bytes());
                if extended {
                    bytes.extend(u64::from(len).to_be_bytes());
                } else {
                    bytes.extend(len.to_be_bytes());
                }
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
        fn bytes_may_be_split_anywhere(
            handshake in prop::sample::select(&HANDSHAKES[..]),
            options in prop::collection::vec(option(), 0..5),
            messages in prop::collection::vec(message(false), 0..20),
            extended in prop::collection::vec(message(true), 0..20),
            mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        ) {
            let mut bytes = handshake[..4].to_vec();
            bytes.extend(options.concat());
            bytes.extend(&handshake[4..]);
            bytes.extend(if handshake == EXTENDED_HANDSHAKE { extended } else { messages }.concat());
            let exports = example_exports();
            let whole = Transcript::of(&exports, [bytes.as_slice()]);
            prop_assert_eq!(whole.check_replies(), Ok(()));
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

    /// Returns a request for ten bytes at offset 512, with these flags.
    fn request(extended: bool, flags: u16, kind: u16) -> Vec<u8> {
        let magic = if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC };
        let len: &[u8] = if extended { &10u64.to_be_bytes() } else { &10u32.to_be_bytes() };
        [&magic.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), b"COOKIE01", &512u64.to_be_bytes(), len]
            .concat()
    }

    #[test]
    fn each_handshake_leads_to_its_own_kind_of_replies() {
        for (handshake, magic, with_status) in [
            (GOOD_HANDSHAKE, NBD_SIMPLE_REPLY_MAGIC, false),
            (STRUCTURED_HANDSHAKE, NBD_STRUCTURED_REPLY_MAGIC, true),
            (EXTENDED_HANDSHAKE, NBD_EXTENDED_REPLY_MAGIC, true),
        ] {
            let extended = handshake == EXTENDED_HANDSHAKE;
            let mut bytes = handshake.to_vec();
            for kind in [NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, NBD_CMD_TRIM, NBD_CMD_CACHE] {
                bytes.extend(request(extended, 0, kind));
            }
            bytes.extend(request(extended, NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_WRITE_ZEROES));
            let transcript = Transcript::of(&example_exports(), [bytes.as_slice()]);
            assert_eq!(transcript.check_replies(), Ok(()));
            assert_eq!((transcript.requests, transcript.end), (5, End::Waiting));
            assert_eq!(transcript.replies[0].payload, 10);
            // With structured replies, success without content is a simple reply. (The last request is refused.)
            let without = if extended { NBD_EXTENDED_REPLY_MAGIC } else { NBD_SIMPLE_REPLY_MAGIC };
            let found =
                transcript.replies.iter().map(|position| *transcript.sent[position.at..].first_chunk().unwrap());
            let expected = [magic, magic, without, without, magic].map(u32::to_be_bytes);
            assert_eq!(found.collect::<Vec<_>>(), expected);
            let statuses = transcript.commands.iter().filter(|command| matches!(command, Command::BlockStatus { .. }));
            assert_eq!(statuses.count(), usize::from(with_status));
        }
    }

    /// Replaces one byte that the server sent and returns the mistake that is found.
    fn altered(mut transcript: Transcript, at: usize, byte: u8) -> String {
        assert_eq!(transcript.check_replies(), Ok(()));
        assert_ne!(transcript.sent[at], byte, "byte {at} is not changed");
        transcript.sent[at] = byte;
        transcript.check_replies().expect_err("a wrong byte must be found")
    }

    #[test]
    fn a_wrong_reply_is_found() {
        let cookie = "another request's cookie";
        let kind = "not the negotiated kind";
        let length = "its length is wrong";
        let extents = "extents past the end of the request";
        let several = "several although one was asked for";
        let (read, status, one) = (NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE);
        // Offsets in a structured reply: magic number 0, flags 4, type 6, cookie 8, length 16, content 20. An extended reply
        // has the offset at 16, the length at 24 and the content at 32.
        for (handshake, flags, command, byte, value, why) in [
            (GOOD_HANDSHAKE, 0, read, 0, 0, kind),
            (GOOD_HANDSHAKE, 0, read, 7, 22, "wrong number of bytes"),
            (GOOD_HANDSHAKE, 0, NBD_CMD_TRIM, 7, 2, "does not define"),
            (GOOD_HANDSHAKE, 0, NBD_CMD_TRIM, 7, 95, "NBD_ENOTSUP"),
            (GOOD_HANDSHAKE, 0, read, 15, 0, cookie),
            (STRUCTURED_HANDSHAKE, 0, read, 3, 0, kind),
            (STRUCTURED_HANDSHAKE, 0, read, 5, 0, "not the last"),
            (STRUCTURED_HANDSHAKE, 0, read, 7, 2, "without data"),
            (STRUCTURED_HANDSHAKE, 0, read, 8, 0, cookie),
            (STRUCTURED_HANDSHAKE, 0, read, 19, 19, length),
            (STRUCTURED_HANDSHAKE, 0, read, 27, 1, "not the data"),
            (STRUCTURED_HANDSHAKE, 0, NBD_CMD_TRIM, 7, 95, "NBD_ENOTSUP"),
            (STRUCTURED_HANDSHAKE, 0, NBD_CMD_TRIM, 8, 0, cookie),
            (EXTENDED_HANDSHAKE, 0, NBD_CMD_TRIM, 7, 6, "wrong for the request"),
            (STRUCTURED_HANDSHAKE, 0, status, 7, 6, "wrong for the request"),
            (STRUCTURED_HANDSHAKE, 0, status, 19, 1, length),
            (STRUCTURED_HANDSHAKE, 0, status, 23, 2, "not selected"),
            (STRUCTURED_HANDSHAKE, 0, status, 27, 6, extents),
            (STRUCTURED_HANDSHAKE, 0, status, 27, 0, "an empty extent"),
            (STRUCTURED_HANDSHAKE, 0, status, 31, 4, "does not define"),
            (STRUCTURED_HANDSHAKE, one, status, 27, 11, extents),
            (STRUCTURED_HANDSHAKE, 0, 99, 23, 75 + 1, "does not define"),
            (STRUCTURED_HANDSHAKE, 0, 99, 25, 200, "too short"),
            (EXTENDED_HANDSHAKE, 0, read, 23, 1, "another request's offset"),
            (EXTENDED_HANDSHAKE, 0, read, 3, 0, kind),
            (EXTENDED_HANDSHAKE, 0, status, 7, 5, "wrong for the request"),
            (EXTENDED_HANDSHAKE, 0, status, 39, 1, "wrong number of extents"),
            (EXTENDED_HANDSHAKE, 0, status, 47, 6, extents),
        ] {
            let bytes = [handshake, &request(handshake == EXTENDED_HANDSHAKE, flags, command)].concat();
            let transcript = Transcript::of(&example_exports(), [bytes.as_slice()]);
            let at = transcript.replies[0].at + byte;
            let found = altered(transcript, at, value);
            assert!(found.contains(why), "command {command}, byte {byte}: {found}");
        }

        // The client asked for one extent, but two were sent. To make this mistake, the test sets the flag in the recorded
        // request after the server has answered the request.
        let bytes = [STRUCTURED_HANDSHAKE, &request(false, 0, status)].concat();
        let mut transcript = Transcript::of(&example_exports(), [bytes.as_slice()]);
        let flags = STRUCTURED_HANDSHAKE.len() + 5;
        transcript.heard[flags] = u8::try_from(one).unwrap();
        assert!(transcript.check_replies().unwrap_err().contains(several));
        transcript.heard[flags] = 0;
        transcript.replies[0].payload = 1;
        assert!(transcript.check_replies().unwrap_err().contains(length));
        transcript.replies.clear();
        assert!(transcript.check_replies().is_err(), "no reply");
        transcript.requests = 0;
        assert!(transcript.check_replies().is_err(), "no reply, and no request is counted");
    }

    #[test]
    fn data_of_a_wrong_length_is_found() {
        for handshake in HANDSHAKES {
            let bytes = [handshake, &request(handshake == EXTENDED_HANDSHAKE, 0, NBD_CMD_READ)].concat();
            let good = Transcript::of(&example_exports(), [bytes.as_slice()]);
            assert_eq!(good.replies[0].payload, 10);
            for (asked, done) in [(9, false), (10, true), (11, false)] {
                let mut heard =
                    Transcript { heard: bytes.clone(), ..Transcript::of(&example_exports(), [bytes.as_slice()]) };
                *heard.heard.last_mut().unwrap() = asked;
                assert_eq!(heard.check_replies().is_ok(), done, "{asked} bytes");
            }
        }
    }

    #[test]
    fn an_impossible_success_is_found() {
        let write = |export: &str, offset: u64| {
            let name = u8::try_from(export.len()).unwrap();
            let go =
                [&b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0"[..], &[6 + name, 0, 0, 0, name], export.as_bytes(), &[0, 0]];
            let mut zeroes = request(false, 0, NBD_CMD_WRITE_ZEROES);
            zeroes[16..24].copy_from_slice(&offset.to_be_bytes());
            let bytes = [go.concat(), zeroes].concat();
            Transcript::of(&example_exports(), [bytes.as_slice()])
        };
        for (export, offset, why) in [("fixed", 0, "a read-only export"), ("disk", 1 << 20, "past the end")] {
            let transcript = write(export, offset);
            let error = transcript.replies[0].at + 7;
            let found = altered(transcript, error, 0);
            assert!(found.contains(why), "{found}");
        }
    }

    #[test]
    fn a_wrong_option_reply_is_found() {
        let option = |number: u8, data: &[u8]| {
            [&b"IHAVEOPT\0\0\0"[..], &[number, 0, 0, 0], &[u8::try_from(data.len()).unwrap()], data].concat()
        };
        let after = |options: &[Vec<u8>]| {
            let bytes = [&GOOD_HANDSHAKE[..4], &options.concat()].concat();
            Transcript::of(&example_exports(), [bytes.as_slice()])
        };
        // The greeting has 18 bytes. Offsets in an option reply: magic number 0, option 8, type 12, length 16, data 20.
        let query = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
        for (options, byte, value, why) in [
            (vec![option(3, b"")], 0, 1, "magic number"),
            (vec![option(3, b"")], 11, 7, "a reply to another option"),
            (vec![option(3, b"")], 15, 3, "another option's"),
            (vec![option(3, b"")], 15, 9, "of an unknown type"),
            (vec![option(3, b"")], 23, 200, "too short for its type"),
            (vec![option(6, &[0; 6])], 15, 2, "another option's"),
            (vec![option(6, &[0; 6])], 21, 9, "of an unknown type"),
            (vec![option(6, &[0; 6])], 21, 1, "NUL"),
            (vec![option(8, b"")], 19, 1, "end with neither"),
            (vec![option(8, b""), option(10, query)], 20 + 15, 3, "another option's"),
            (vec![option(99, b"")], 12, 0, "NBD_REP_ACK with data"),
            (vec![option(99, b"")], 15, 99, "of an unknown type"),
            // NBD_FLAG_SEND_DF although replies do not come in chunks.
            (vec![option(7, &[0; 6])], 31, 0xed, "in chunks"),
        ] {
            let found = altered(after(&options), 18 + byte, value);
            assert!(found.contains(why), "byte {byte}: {found}");
        }

        let list = [option(3, b"")];
        let mut cut = after(&list);
        cut.sent.truncate(cut.sent.len() - 20);
        assert!(cut.check_replies().unwrap_err().contains("end with neither"));
        let mut silent = after(&list);
        silent.sent.truncate(18);
        assert!(silent.check_replies().unwrap_err().contains("no reply to option 3"));
        let mut twice = after(&list);
        twice.sent.extend_from_within(18..);
        assert!(twice.check_replies().unwrap_err().contains("unrequested"));
        let mut dataless = after(&[option(6, &[0; 6])]);
        dataless.sent.drain(18..18 + 32);
        assert!(dataless.check_replies().unwrap_err().contains("without NBD_INFO_EXPORT"));
    }

    #[test]
    fn a_complete_conversation_matches_byte_for_byte() {
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

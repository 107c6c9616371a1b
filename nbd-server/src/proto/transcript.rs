//! A whole conversation without a connection: what a client that sends given bytes is told, and what it asked for. For
//! tests and fuzzers, which ask whether any bytes, cut anywhere, do harm.

use super::handshake::{ExportInfo, Handshake, HandshakeError, Next, TlsPolicy};
use super::reader::Reader;
use super::reply::Reply;
use super::transmission::{ExpectRequest, Received, TransmissionError};
use super::wire::*;
use super::{Answer, Command, ErrorCode, Extent};

/// A client's side of a handshake that ends in transmission with the default export: flags, then `NBD_OPT_GO`.
pub const GOOD_HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// The same with structured replies and `base:allocation`.
pub const STRUCTURED_HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation\
    IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// The same with extended headers and `base:allocation`.
pub const EXTENDED_HANDSHAKE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation\
    IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";

/// One for each kind of headers.
pub const HANDSHAKES: [&[u8]; 3] = [GOOD_HANDSHAKE, STRUCTURED_HANDSHAKE, EXTENDED_HANDSHAKE];

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
    /// The replies in it, in order.
    pub replies: Vec<Place>,
    /// Requests that came whole, payload and all, or were refused before it; leave-taking is none.
    pub requests: usize,
    /// The requests to be carried out, in order.
    pub commands: Vec<Command>,
    /// The payloads of the writes among them, one after the other.
    pub payload: Vec<u8>,
    /// How the conversation ended.
    pub end: End,
}

/// Where a reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its first byte in [`Transcript::sent`]; it ends where the next one begins.
    pub at: usize,
    /// Bytes that were read, left out there.
    pub payload: usize,
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
            // A hole, and if there is more, data.
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
        self.replies.push(Place { at: self.sent.len(), payload: reply.payload_len() });
        reply.encode(&mut self.sent);
    }

    /// Whether each request has one reply, and each reply is as the document has it: its lengths fit, a chunk holds what its
    /// type says, and all are of one kind.
    ///
    /// # Errors
    /// What is wrong with which reply.
    pub fn check_replies(&self) -> Result<(), String> {
        if self.replies.len() != self.requests {
            return Err(format!("{} replies to {} requests", self.replies.len(), self.requests));
        }
        let ends = self.replies.iter().skip(1).map(|place| place.at).chain([self.sent.len()]);
        let mut kind = None;
        for (number, (place, end)) in self.replies.iter().zip(ends).enumerate() {
            let wrong = |why: &str| format!("reply {number}: {why}: {:02x?}", &self.sent[place.at..end]);
            let reply = parse_reply(&self.sent[place.at..end], place.payload as u64).map_err(wrong)?;
            if *kind.get_or_insert(reply) != reply {
                return Err(wrong("of another kind than the first"));
            }
        }
        Ok(())
    }

    fn ended(&mut self, end: End) -> State {
        self.end = end;
        State::Ended
    }
}

/// Reads one reply, all of it, as a client would; returns its magic number.
fn parse_reply(bytes: &[u8], payload: u64) -> Result<u32, &'static str> {
    let mut reader = Reader::new(bytes);
    let short = |_| "it is too short";
    let magic = reader.u32().map_err(short)?;
    if magic == NBD_SIMPLE_REPLY_MAGIC {
        let error = reader.u32().map_err(short)?;
        reader.u64().map_err(short)?;
        return match (reader.left(), error) {
            (0, 0) => Ok(magic),
            (0, _) if payload == 0 => Ok(magic),
            _ => Err("a simple reply with more than its header"),
        };
    }
    let flags = reader.u16().map_err(short)?;
    let kind = reader.u16().map_err(short)?;
    reader.u64().map_err(short)?;
    let len = match magic {
        NBD_STRUCTURED_REPLY_MAGIC => u64::from(reader.u32().map_err(short)?),
        NBD_EXTENDED_REPLY_MAGIC => {
            reader.u64().map_err(short)?;
            reader.u64().map_err(short)?
        }
        _ => return Err("no reply's magic number"),
    };
    if flags != NBD_REPLY_FLAG_DONE {
        return Err("not the only chunk");
    }
    if len != reader.left() as u64 + payload {
        return Err("its length is another");
    }
    if kind != NBD_REPLY_TYPE_OFFSET_DATA && payload > 0 {
        return Err("data in a chunk that holds none");
    }
    let extended = magic == NBD_EXTENDED_REPLY_MAGIC;
    match kind {
        NBD_REPLY_TYPE_NONE if len == 0 => {}
        NBD_REPLY_TYPE_OFFSET_DATA if payload > 0 => drop(reader.u64().map_err(short)?),
        NBD_REPLY_TYPE_BLOCK_STATUS if !extended => {
            reader.u32().map_err(short)?;
            if reader.left() == 0 {
                return Err("no extents");
            }
            while reader.left() > 0 {
                if reader.u32().map_err(short)? == 0 {
                    return Err("an extent of nothing");
                }
                reader.u32().map_err(short)?;
            }
        }
        NBD_REPLY_TYPE_BLOCK_STATUS_EXT if extended => {
            reader.u32().map_err(short)?;
            let count = reader.u32().map_err(short)?;
            if count == 0 || reader.left() as u64 != 16 * u64::from(count) {
                return Err("another number of extents than it says");
            }
            for _ in 0..count {
                if reader.u64().map_err(short)? == 0 {
                    return Err("an extent of nothing");
                }
                reader.u64().map_err(short)?;
            }
        }
        NBD_REPLY_TYPE_ERROR | NBD_REPLY_TYPE_ERROR_OFFSET => {
            if reader.u32().map_err(short)? == 0 {
                return Err("an error that is none");
            }
            let message = reader.u16().map_err(short)?;
            reader.bytes(usize::from(message)).map_err(short)?;
            if kind == NBD_REPLY_TYPE_ERROR_OFFSET {
                reader.u64().map_err(short)?;
            }
        }
        _ => return Err("a chunk of no such type, or with the wrong content"),
    }
    if reader.left() == 0 { Ok(magic) } else { Err("bytes are left over") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What clients say, some of it nonsense.
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
        fn bytes_may_arrive_cut_anywhere(
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

    /// A request of ten bytes at offset 512, with these flags.
    fn request(extended: bool, flags: u16, kind: u16) -> Vec<u8> {
        let magic = if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC };
        let len: &[u8] = if extended { &10u64.to_be_bytes() } else { &10u32.to_be_bytes() };
        [&magic.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes(), b"COOKIE01", &512u64.to_be_bytes(), len]
            .concat()
    }

    #[test]
    fn each_handshake_leads_to_replies_of_its_own_kind() {
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
            assert!(
                transcript.replies.iter().all(|place| transcript.sent[place.at..].starts_with(&magic.to_be_bytes()))
            );
            let statuses = transcript.commands.iter().filter(|command| matches!(command, Command::BlockStatus { .. }));
            assert_eq!(statuses.count(), usize::from(with_status));
        }
    }

    #[test]
    fn a_reply_that_is_wrong_is_found_out() {
        let mut bytes = STRUCTURED_HANDSHAKE.to_vec();
        bytes.extend(request(false, 0, NBD_CMD_BLOCK_STATUS));
        let good = || Transcript::of(&example_exports(), [bytes.as_slice()]);
        assert_eq!(good().check_replies(), Ok(()));
        let at = good().replies[0].at;
        // The magic number, the flag for the last chunk, the type, the length, and an extent's length.
        for (place, byte) in [(0, 0), (5, 0), (7, 1), (19, 1), (27, 0)] {
            let mut spoilt = good();
            spoilt.sent[at + place] = byte;
            assert!(spoilt.check_replies().is_err(), "byte {place}");
        }
        let mut silent = good();
        silent.replies.clear();
        assert!(silent.check_replies().is_err());
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

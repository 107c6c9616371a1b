//! Whatever one client gets wrong, it is told what the document names for it, or dropped, and another client of the same
//! server notices nothing: each mistake by itself, with every kind of header, by both sessions. In the manner of libnbd's
//! `errors-*` tests.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use engine::sector::SectorSize;
use engine::store::MemoryStore;
use harness::nbd::{RawClient, TestServer, encrypted, option_bytes, query};
use harness::nbd_chunks::{ChunkClient, contexts, haggling};
use nbd_server::proto::wire::*;
use nbd_server::proto::{ErrorCode, Headers, MAX_PAYLOAD};
use nbd_server::{Export, SessionKind};

/// More than the longest payload, so that a request can be too long and yet within the export.
const SIZE: u64 = 40 << 20;
const HEADERS: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

/// A server, and a client of it that does all right and must notice nothing.
struct Scene {
    server: TestServer,
    witness: RawClient<UnixStream>,
    seen: u64,
}

impl Scene {
    fn new(session: SessionKind) -> Self {
        let volume = encrypted(Arc::new(MemoryStore::zeroed(40 << 20)), SectorSize::B512);
        let server = TestServer::on(session, [Export::new("disk", Arc::new(volume))]);
        let mut witness = server.connect();
        witness.enter("disk");
        assert_eq!(witness.write(0, SIZE - 4096, &[0x77; 4096]), 0);
        Self { server, witness, seen: 0 }
    }

    /// The witness is served as ever, and what it wrote is there.
    #[track_caller]
    fn is_calm(&mut self) {
        self.seen += 1;
        assert_eq!(self.witness.read(SIZE - 4096, 4096), Ok(vec![0x77; 4096]));
        assert_eq!(self.witness.write(0, SIZE - 8192, &self.seen.to_le_bytes()), 0);
        assert_eq!(self.witness.read(SIZE - 8192, 8), Ok(self.seen.to_le_bytes().to_vec()));
    }
}

/// A client with any kind of header.
enum Client {
    Simple(RawClient<UnixStream>),
    Chunks(ChunkClient),
}

impl Client {
    fn enter(scene: &Scene, headers: Headers) -> Self {
        if headers == Headers::Simple {
            let mut raw = scene.server.connect();
            raw.enter("disk");
            return Self::Simple(raw);
        }
        Self::Chunks(ChunkClient::enter(&scene.server, "disk", headers))
    }

    fn raw(&mut self) -> &mut RawClient<UnixStream> {
        match self {
            Self::Simple(raw) => raw,
            Self::Chunks(client) => &mut client.raw,
        }
    }

    fn send_request(&mut self, flags: u16, kind: u16, offset: u64, len: u64) -> u64 {
        match self {
            Self::Simple(raw) => raw.send_request(flags, kind, offset, u32::try_from(len).unwrap()),
            Self::Chunks(client) => client.send_request(flags, kind, offset, len),
        }
    }

    /// The error in the reply to the request with this cookie.
    #[track_caller]
    fn error(&mut self, offset: u64, cookie: u64) -> u32 {
        match self {
            Self::Simple(raw) => {
                let reply = raw.reply();
                assert_eq!(reply.cookie, cookie);
                reply.error
            }
            Self::Chunks(client) => client.answer(offset).error().code,
        }
    }

    /// The error of a request without payload.
    #[track_caller]
    fn refused(&mut self, flags: u16, kind: u16, offset: u64, len: u64) -> u32 {
        let cookie = self.send_request(flags, kind, offset, len);
        self.error(offset, cookie)
    }

    /// The error of a write.
    #[track_caller]
    fn refused_write(&mut self, flags: u16, offset: u64, payload: &[u8]) -> u32 {
        let cookie = self.send_request(flags, NBD_CMD_WRITE, offset, payload.len() as u64);
        self.raw().send(payload);
        self.error(offset, cookie)
    }

    /// The stream is in step still, and requests are served.
    #[track_caller]
    fn is_served(&mut self) {
        match self {
            Self::Simple(raw) => {
                assert_eq!(raw.write(0, 99, b"right"), 0);
                assert_eq!(raw.read(99, 5), Ok(b"right".to_vec()));
            }
            Self::Chunks(client) => {
                assert!(client.write(0, 99, b"right").is_done());
                assert_eq!(client.read(0, 99, 5), b"right");
            }
        }
    }
}

fn a_request_longer_than_allowed(session: SessionKind) {
    let mut scene = Scene::new(session);
    for headers in HEADERS {
        let mut client = Client::enter(&scene, headers);
        let too_long = if headers == Headers::Simple { ErrorCode::Inval } else { ErrorCode::Overflow };
        for len in [MAX_PAYLOAD + 1, 36 << 20, 40 << 20] {
            assert_eq!(client.refused(0, NBD_CMD_READ, 0, len.into()), too_long.code(), "{headers:?} {len}");
            client.is_served();
            scene.is_calm();
        }
        if headers != Headers::Extended {
            // Read to its end and thrown away. "SHOULD NOT return NBD_EOVERFLOW except [...] in response to NBD_CMD_READ [...], or
            // when a command without payload requests a length larger" than allowed.
            let payload = vec![0xee; MAX_PAYLOAD as usize + 1];
            assert_eq!(client.refused_write(0, 0, &payload), ErrorCode::Inval.code());
            client.is_served();
            scene.is_calm();
        }
        // Longer than anybody would skip.
        for len in [MAX_PAYLOAD * 2 + 1, u32::MAX] {
            let mut client = Client::enter(&scene, headers);
            client.send_request(0, NBD_CMD_WRITE, 0, len.into());
            assert!(client.raw().is_closed(), "{headers:?} {len}");
            scene.is_calm();
        }
    }
}

fn an_offset_past_the_end_or_a_sum_past_all_numbers(session: SessionKind) {
    let mut scene = Scene::new(session);
    let (inval, nospc) = (ErrorCode::Inval.code(), ErrorCode::NoSpc.code());
    let ranges = [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE + 1, 512),
        (1 << 40, 4096),
        (i64::MAX as u64, 512),
        (1 << 63, 512),
        // The sum overflows; cut to 64 bits, it would be a good range.
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 510, 512),
        (u64::MAX - 4095, 4096),
        (u64::MAX - 4095, 8192),
    ];
    for headers in HEADERS {
        let mut client = Client::enter(&scene, headers);
        for (offset, len) in ranges {
            for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_BLOCK_STATUS] {
                assert_eq!(client.refused(0, kind, offset, len), inval, "{headers:?} {kind} {offset} {len}");
            }
            assert_eq!(client.refused(0, NBD_CMD_WRITE_ZEROES, offset, len), nospc);
            for flags in [0, NBD_CMD_FLAG_FUA] {
                assert_eq!(client.refused_write(flags, offset, &vec![0xee; usize::try_from(len).unwrap()]), nospc);
            }
            client.is_served();
            scene.is_calm();
        }
        // A payload that is received by itself, refused.
        assert_eq!(client.refused_write(0, SIZE - 512, &vec![0xee; 1 << 20]), nospc);
        client.is_served();
        scene.is_calm();
    }
}

fn an_unknown_command(session: SessionKind) {
    let mut scene = Scene::new(session);
    for headers in HEADERS {
        let mut client = Client::enter(&scene, headers);
        // 8 was NBD_CMD_RESIZE once.
        for kind in (8..64).chain([255, 256, 0x7fff, 0x8000, u16::MAX]) {
            assert_eq!(client.refused(0, kind, 0, 512), ErrorCode::Inval.code(), "{headers:?} {kind}");
        }
        client.is_served();
        scene.is_calm();
    }
}

fn an_unknown_flag_and_one_that_the_command_does_not_take(session: SessionKind) {
    let mut scene = Scene::new(session);
    let takes = |headers: Headers, kind: u16| {
        NBD_CMD_FLAG_FUA
            | match kind {
                NBD_CMD_READ if headers != Headers::Simple => NBD_CMD_FLAG_DF,
                NBD_CMD_WRITE if headers == Headers::Extended => NBD_CMD_FLAG_PAYLOAD_LEN,
                NBD_CMD_WRITE_ZEROES => NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                NBD_CMD_BLOCK_STATUS if headers != Headers::Simple => NBD_CMD_FLAG_REQ_ONE,
                _ => 0,
            }
    };
    for headers in HEADERS {
        let mut client = Client::enter(&scene, headers);
        let kinds =
            [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS];
        for flag in (0..16).map(|bit| 1u16 << bit) {
            // With a payload length, bytes follow: nbd_chunks has those.
            let has_payload = headers == Headers::Extended && flag == NBD_CMD_FLAG_PAYLOAD_LEN;
            for kind in kinds.into_iter().filter(|kind| takes(headers, *kind) & flag == 0 && !has_payload) {
                let len = if kind == NBD_CMD_FLUSH { 0 } else { 512 };
                assert_eq!(client.refused(flag, kind, 0, len), ErrorCode::Inval.code(), "{headers:?} {kind} {flag:#x}");
            }
            if takes(headers, NBD_CMD_WRITE) & flag == 0 {
                for len in [512, 100_000] {
                    let error = client.refused_write(flag, 0, &vec![0xee; len]);
                    assert_eq!(error, ErrorCode::Inval.code(), "{headers:?} {flag:#x}");
                }
            }
        }
        client.is_served();
        scene.is_calm();
        if let Client::Simple(raw) = &mut client {
            assert_ne!(raw.read(0, 16), Ok(vec![0xee; 16]), "nothing was written");
        }
    }
}

fn an_option_with_a_wrong_length(session: SessionKind) {
    let mut scene = Scene::new(session);
    let longer = |data: &[u8]| [data, &[0]].concat();
    let go = query("disk", &[NBD_INFO_BLOCK_SIZE]);
    let set = contexts("disk", &[BASE_ALLOCATION]);
    let mut options = vec![
        (NBD_OPT_LIST, vec![0]),
        (NBD_OPT_STARTTLS, vec![0; 3]),
        (NBD_OPT_STRUCTURED_REPLY, vec![1]),
        (NBD_OPT_EXTENDED_HEADERS, vec![0; 9]),
    ];
    for (option, good) in
        [(NBD_OPT_INFO, &go), (NBD_OPT_GO, &go), (NBD_OPT_LIST_META_CONTEXT, &set), (NBD_OPT_SET_META_CONTEXT, &set)]
    {
        options.push((option, longer(good)));
        options.extend((0..good.len()).map(|len| (option, good[..len].to_vec())));
    }
    for (option, data) in options {
        let mut raw = haggling(&scene.server, Headers::Structured);
        let replies = raw.option(option, &data);
        let told: Vec<_> = replies.iter().map(|reply| (reply.option, reply.kind)).collect();
        assert_eq!(told, [(option, NBD_REP_ERR_INVALID)], "{data:?}");
        // The haggling goes on where it was.
        let mut client = Client::Chunks(ChunkClient::go(raw, "disk", Headers::Structured));
        client.is_served();
    }
    scene.is_calm();
    // What EXPORT_NAME gets wrong can't be told.
    for name in [&b"d\0sk"[..], &[0xff], &[b'n'; 4097]] {
        let mut raw = haggling(&scene.server, Headers::Simple);
        raw.send_option(NBD_OPT_EXPORT_NAME, name);
        assert!(raw.is_closed());
    }
    // Announced and not sent: the server waits for the rest, and others do not wait for it.
    let mut raw = haggling(&scene.server, Headers::Simple);
    raw.send(&option_bytes(NBD_OPT_GO, &go)[..20]);
    scene.is_calm();
    raw.send(&option_bytes(NBD_OPT_GO, &go)[20..]);
    assert_eq!(raw.option_reply().kind, NBD_REP_INFO);
}

fn a_payload_for_an_option_that_nobody_knows(session: SessionKind) {
    let mut scene = Scene::new(session);
    for option in [0, 4, 12, 99, 0x7fff_ffff, 1 << 31, u32::MAX] {
        let mut raw = haggling(&scene.server, Headers::Simple);
        for len in [0, 1, 4096, 16 << 10, (16 << 10) + 1, 1 << 20] {
            let replies = raw.option(option, &vec![0xee; len]);
            assert_eq!((replies.len(), replies[0].kind), (1, NBD_REP_ERR_UNSUP), "{option} {len}");
        }
        raw.option(NBD_OPT_GO, &query("disk", &[]));
        Client::Simple(raw).is_served();
        // More than anybody would skip.
        for announced in [(1 << 20) + 1, u32::MAX] {
            let mut raw = haggling(&scene.server, Headers::Simple);
            let mut header = option_bytes(option, &[]);
            header[12..].copy_from_slice(&announced.to_be_bytes());
            raw.send(&header);
            assert!(raw.is_closed());
        }
        scene.is_calm();
    }
}

harness::on_both_sessions! {
    a_request_longer_than_allowed,
    an_offset_past_the_end_or_a_sum_past_all_numbers,
    an_unknown_command,
    an_unknown_flag_and_one_that_the_command_does_not_take,
    an_option_with_a_wrong_length,
    a_payload_for_an_option_that_nobody_knows,
}

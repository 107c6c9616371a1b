//! If a client makes a mistake, it gets the error that the NBD specification names, or it is disconnected. Another client of the
//! same server notices nothing. Each mistake is made with every kind of header and with both kinds of session, as in libnbd's
//! `errors-*` tests.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use engine::sector::SectorSize;
use engine::store::MemoryStore;
use harness::nbd::{RawClient, TestServer, encrypted, option_bytes, query};
use harness::nbd_chunks::{ChunkClient, contexts, negotiated};
use nbd_server::proto::wire::*;
use nbd_server::proto::{ErrorCode, Headers, MAX_PAYLOAD};
use nbd_server::{Export, SessionKind};

/// Larger than the payload limit, so that a request can exceed the limit and still be within the export.
const SIZE: u64 = 40 << 20;
const HEADERS: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

/// A server, and a witness: a correct client that must notice nothing.
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

    /// Checks that the witness is still served and that its data is still there.
    #[track_caller]
    fn assert_undisturbed(&mut self) {
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

    /// Receives the reply to the request with this cookie and returns its error.
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

    /// Sends a request without payload and returns the error of the reply.
    #[track_caller]
    fn refused(&mut self, flags: u16, kind: u16, offset: u64, len: u64) -> u32 {
        let cookie = self.send_request(flags, kind, offset, len);
        self.error(offset, cookie)
    }

    /// Sends a write and returns the error of the reply.
    #[track_caller]
    fn refused_write(&mut self, flags: u16, offset: u64, payload: &[u8]) -> u32 {
        let cookie = self.send_request(flags, NBD_CMD_WRITE, offset, payload.len() as u64);
        self.raw().send(payload);
        self.error(offset, cookie)
    }

    /// Checks that client and server are still in sync and that requests are served.
    #[track_caller]
    fn assert_served(&mut self) {
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

fn a_request_longer_than_allowed_is_refused(session: SessionKind) {
    let mut scene = Scene::new(session);
    for headers in HEADERS {
        let mut client = Client::enter(&scene, headers);
        let too_long = if headers == Headers::Simple { ErrorCode::Inval } else { ErrorCode::Overflow };
        for len in [MAX_PAYLOAD + 1, 36 << 20, 40 << 20] {
            assert_eq!(client.refused(0, NBD_CMD_READ, 0, len.into()), too_long.code(), "{headers:?} {len}");
            client.assert_served();
            scene.assert_undisturbed();
        }
        if headers != Headers::Extended {
            // The server reads the payload to its end and drops it. "SHOULD NOT return NBD_EOVERFLOW except [...] in
            // response to NBD_CMD_READ [...], or when a command without payload requests a length larger" than allowed.
            let payload = vec![0xee; MAX_PAYLOAD as usize + 1];
            assert_eq!(client.refused_write(0, 0, &payload), ErrorCode::Inval.code());
            client.assert_served();
            scene.assert_undisturbed();
        }
        // Too long for the server to skip.
        for len in [MAX_PAYLOAD * 2 + 1, u32::MAX] {
            let mut client = Client::enter(&scene, headers);
            client.send_request(0, NBD_CMD_WRITE, 0, len.into());
            assert!(client.raw().is_closed(), "{headers:?} {len}");
            scene.assert_undisturbed();
        }
    }
}

fn a_range_past_the_end_is_refused(session: SessionKind) {
    let mut scene = Scene::new(session);
    let (inval, nospc) = (ErrorCode::Inval.code(), ErrorCode::NoSpc.code());
    let ranges = [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE + 1, 512),
        (1 << 40, 4096),
        (i64::MAX as u64, 512),
        (1 << 63, 512),
        // The sum of offset and length overflows. Cut to 64 bits, the range would be valid.
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
            client.assert_served();
            scene.assert_undisturbed();
        }
        // The server receives the payload before it refuses the write.
        assert_eq!(client.refused_write(0, SIZE - 512, &vec![0xee; 1 << 20]), nospc);
        client.assert_served();
        scene.assert_undisturbed();
    }
}

fn an_unknown_command_is_refused(session: SessionKind) {
    let mut scene = Scene::new(session);
    for headers in HEADERS {
        let mut client = Client::enter(&scene, headers);
        // 8 used to be NBD_CMD_RESIZE.
        for kind in (8..64).chain([255, 256, 0x7fff, 0x8000, u16::MAX]) {
            assert_eq!(client.refused(0, kind, 0, 512), ErrorCode::Inval.code(), "{headers:?} {kind}");
        }
        client.assert_served();
        scene.assert_undisturbed();
    }
}

fn unknown_and_inapplicable_flags_are_refused(session: SessionKind) {
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
            // With the payload-length flag a payload follows. `nbd_chunks` tests that.
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
        client.assert_served();
        scene.assert_undisturbed();
        if let Client::Simple(raw) = &mut client {
            assert_ne!(raw.read(0, 16), Ok(vec![0xee; 16]), "nothing was written");
        }
    }
}

fn an_option_with_a_wrong_length_is_refused(session: SessionKind) {
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
        let mut raw = negotiated(&scene.server, Headers::Structured);
        let replies = raw.option(option, &data);
        let told: Vec<_> = replies.iter().map(|reply| (reply.option, reply.kind)).collect();
        assert_eq!(told, [(option, NBD_REP_ERR_INVALID)], "{data:?}");
        // The handshake goes on at the same point.
        let mut client = Client::Chunks(ChunkClient::go(raw, "disk", Headers::Structured));
        client.assert_served();
    }
    scene.assert_undisturbed();
    // EXPORT_NAME has no error reply.
    for name in [&b"d\0sk"[..], &[0xff], &[b'n'; 4097]] {
        let mut raw = negotiated(&scene.server, Headers::Simple);
        raw.send_option(NBD_OPT_EXPORT_NAME, name);
        assert!(raw.is_closed());
    }
    // The client announces data and does not send it. The server waits for the rest, but other clients need not wait.
    let mut raw = negotiated(&scene.server, Headers::Simple);
    raw.send(&option_bytes(NBD_OPT_GO, &go)[..20]);
    scene.assert_undisturbed();
    raw.send(&option_bytes(NBD_OPT_GO, &go)[20..]);
    assert_eq!(raw.option_reply().kind, NBD_REP_INFO);
}

fn an_unknown_option_with_data_is_refused(session: SessionKind) {
    let mut scene = Scene::new(session);
    for option in [0, 4, 12, 99, 0x7fff_ffff, 1 << 31, u32::MAX] {
        let mut raw = negotiated(&scene.server, Headers::Simple);
        for len in [0, 1, 4096, 16 << 10, (16 << 10) + 1, 1 << 20] {
            let replies = raw.option(option, &vec![0xee; len]);
            assert_eq!((replies.len(), replies[0].kind), (1, NBD_REP_ERR_UNSUP), "{option} {len}");
        }
        raw.option(NBD_OPT_GO, &query("disk", &[]));
        Client::Simple(raw).assert_served();
        // Too much for the server to skip.
        for announced in [(1 << 20) + 1, u32::MAX] {
            let mut raw = negotiated(&scene.server, Headers::Simple);
            let mut header = option_bytes(option, &[]);
            header[12..].copy_from_slice(&announced.to_be_bytes());
            raw.send(&header);
            assert!(raw.is_closed());
        }
        scene.assert_undisturbed();
    }
}

harness::on_both_sessions! {
    a_request_longer_than_allowed_is_refused,
    a_range_past_the_end_is_refused,
    an_unknown_command_is_refused,
    unknown_and_inapplicable_flags_are_refused,
    an_option_with_a_wrong_length_is_refused,
    an_unknown_option_with_data_is_refused,
}

//! Checks that an export behaves as a block device: random requests, aligned and not, over several connections, against a
//! `Vec<u8>`.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};

use engine::sector::SectorSize;
use engine::store::{Access, BlockStore, BusErrorsCaught, Caching, FileStore, MemoryStore};
use harness::luks::noise;
use harness::nbd::{RawClient, TestServer, encrypted, request_bytes};
use nbd_server::proto::wire::*;
use nbd_server::{Export, SessionKind, Settings};
use proptest::prelude::*;

const SIZE: usize = 256 * 1024;
/// From the section "Error values" of the NBD specification.
const EIO: u32 = 5;

#[derive(Debug, Clone)]
enum Step {
    Read { at: usize, len: usize },
    Write { at: usize, len: usize, byte: u8, fua: bool },
    Zero { at: usize, len: usize, no_hole: bool },
    Flush,
}

fn range() -> impl Strategy<Value = (usize, usize)> {
    let anywhere = (0..SIZE, 0..40_000usize);
    let aligned = (0..SIZE / 4096, 0..16usize).prop_map(|(block, blocks)| (block * 4096, blocks * 4096));
    let near_a_boundary = (1..SIZE / 512, 0..40usize, 1..600usize).prop_map(|(n, back, len)| (n * 512 - back, len));
    prop_oneof![anywhere, aligned, near_a_boundary].prop_map(|(at, len)| (at, len.min(SIZE - at)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range().prop_map(|(at, len)| Step::Read { at, len }),
        4 => (range(), any::<u8>(), any::<bool>())
            .prop_map(|((at, len), byte, fua)| Step::Write { at, len, byte, fua }),
        1 => (range(), any::<bool>()).prop_map(|((at, len), no_hole)| Step::Zero { at, len, no_hole }),
        1 => Just(Step::Flush),
    ]
}

/// Where the ciphertext is stored. This decides how the server reads and writes it.
#[derive(Debug, Clone, Copy)]
enum Medium {
    Memory,
    PageCache,
    Direct,
    /// A file on tmpfs that is mapped.
    Mapped,
}

fn store(medium: Medium) -> (Arc<dyn BlockStore>, Option<tempfile::NamedTempFile>) {
    let caching = match medium {
        Medium::Memory => return (Arc::new(MemoryStore::zeroed(SIZE)), None),
        Medium::PageCache => Caching::PageCache,
        Medium::Direct => Caching::Direct,
        Medium::Mapped => {
            let (store, file) = mapped(SIZE);
            return (Arc::new(store), Some(file));
        }
    };
    // The target folder lies on a real disk, unlike tmpfs, which is memory.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(SIZE as u64).unwrap();
    let store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
    (Arc::new(store), Some(file))
}

/// Makes a fully allocated file in memory, which is accessed without system calls.
fn mapped(size: usize) -> (FileStore, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(file.path(), vec![0; size]).unwrap();
    let store = FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap();
    let store = store.mapped(BusErrorsCaught::new().unwrap());
    assert!(store.is_mapped(), "/dev/shm is not a tmpfs");
    (store, file)
}

/// Returns bytes that depend on their offset, so that misplaced data is detected.
fn pattern(at: usize, len: usize, byte: u8) -> Vec<u8> {
    (at..at + len).map(|place| byte ^ (place % 251).to_le_bytes()[0]).collect()
}

fn int(len: usize) -> u32 {
    u32::try_from(len).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn reads_return_what_was_written(
        steps in prop::collection::vec((step(), 0..3usize), 1..60),
        sector_size in prop::sample::select(SectorSize::ALL.to_vec()),
        start in any::<u8>(),
        medium in prop::sample::select(vec![Medium::Memory, Medium::PageCache, Medium::Direct, Medium::Mapped]),
        session in prop::sample::select(vec![SessionKind::IoUring, SessionKind::Tokio]),
    ) {
        let (store, _file) = store(medium);
        let volume = encrypted(store, sector_size);
        let mut model = pattern(0, SIZE, start);
        volume.write(0, &mut model.clone()).unwrap();
        let settings = Settings { workers: 4, session, ..Settings::default() };
        let server = TestServer::with_settings([Export::new("", Arc::new(volume))], settings);
        let mut clients: Vec<_> = (0..3).map(|_| server.client()).collect();
        for (step, client) in steps {
            let client = &mut clients[client];
            match step {
                Step::Read { at, len } => prop_assert!(client.read(at as u64, int(len)).unwrap() == model[at..at + len]),
                Step::Write { at, len, byte, fua } => {
                    let data = pattern(at, len, byte);
                    let flags = if fua { NBD_CMD_FLAG_FUA } else { 0 };
                    prop_assert_eq!(client.write(flags, at as u64, &data), 0);
                    model[at..at + len].copy_from_slice(&data);
                }
                Step::Zero { at, len, no_hole } => {
                    let flags = if no_hole { NBD_CMD_FLAG_NO_HOLE } else { 0 };
                    prop_assert_eq!(client.request(flags, NBD_CMD_WRITE_ZEROES, at as u64, int(len)), 0);
                    model[at..at + len].fill(0);
                }
                Step::Flush => prop_assert_eq!(client.flush(), 0),
            }
        }
        for client in &mut clients {
            prop_assert!(client.read(0, int(SIZE)).unwrap() == model);
        }
    }
}

/// Cuts the volume into pieces whose length is not a multiple of any sector size, so that several clients write to each
/// sector. Each client owns every `CLIENTS`th piece and writes all its pieces at once. At the end every piece must be
/// there, in whatever order the requests are carried out.
fn writes_of_interleaved_pieces_lose_nothing(
    session: SessionKind,
    store: Arc<dyn BlockStore>,
    sector_size: SectorSize,
) {
    const CLIENTS: usize = 4;
    const PIECE: usize = 601;
    let server = TestServer::of(session, encrypted(store, sector_size));
    let pieces = SIZE / PIECE;
    std::thread::scope(|scope| {
        for owner in 0..CLIENTS {
            let mut client = server.client();
            scope.spawn(move || {
                for round in 0..3u8 {
                    let mine: Vec<usize> = (owner..pieces).step_by(CLIENTS).collect();
                    for group in mine.chunks(16) {
                        for piece in group {
                            client.send_request(0, NBD_CMD_WRITE, (piece * PIECE) as u64, int(PIECE));
                            client.send(&pattern(piece * PIECE, PIECE, round));
                        }
                        for _ in group {
                            assert_eq!(client.reply().error, 0);
                        }
                    }
                }
            });
        }
    });
    let written = pieces * PIECE;
    assert!(server.client().read(0, int(written)).unwrap() == pattern(0, written, 2));
}

fn concurrent_unaligned_writes_lose_nothing_in_memory(session: SessionKind) {
    for sector_size in SectorSize::ALL {
        writes_of_interleaved_pieces_lose_nothing(session, Arc::new(MemoryStore::zeroed(SIZE)), sector_size);
    }
}

fn concurrent_unaligned_writes_lose_nothing_in_a_file(session: SessionKind) {
    for caching in [Caching::Direct, Caching::PageCache] {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE as u64).unwrap();
        let store = Arc::new(FileStore::open(file.path(), Access::ReadWrite, caching).unwrap());
        writes_of_interleaved_pieces_lose_nothing(session, store, SectorSize::B4096);
    }
}

fn concurrent_unaligned_writes_lose_nothing_in_mapped_memory(session: SessionKind) {
    for sector_size in SectorSize::ALL {
        let (store, _file) = mapped(SIZE);
        writes_of_interleaved_pieces_lose_nothing(session, Arc::new(store), sector_size);
    }
}

fn a_truncated_file_fails_only_its_own_requests(session: SessionKind) {
    const LARGE: usize = 4 << 20;
    let (one, file) = mapped(LARGE);
    let (two, _other) = mapped(LARGE);
    let volume = |store| Arc::new(encrypted(Arc::new(store), SectorSize::B4096));
    let server = TestServer::on(session, [Export::new("one", volume(one)), Export::new("two", volume(two))]);
    let client = |name| {
        let mut client = server.connect();
        client.enter(name);
        client
    };
    let (mut one, mut two) = (client("one"), client("two"));
    let data = pattern(0, 1 << 20, 3);
    for client in [&mut one, &mut two] {
        assert_eq!(client.write(0, 2 << 20, &data), 0);
        assert_eq!(client.read(2 << 20, 1 << 20).as_ref(), Ok(&data));
    }
    file.as_file().set_len(1 << 20).unwrap();
    assert_eq!(one.read(2 << 20, 1 << 20), Err(EIO));
    assert_eq!(one.read(3 << 20, 4096), Err(EIO));
    assert_eq!(one.read(0, 4096).map(|bytes| bytes.len()), Ok(4096));
    assert_eq!(two.read(2 << 20, 1 << 20), Ok(data));
}

fn two_concurrent_unaligned_writes_to_one_sector_lose_nothing(session: SessionKind) {
    let server = TestServer::of(session, encrypted(Arc::new(MemoryStore::zeroed(SIZE)), SectorSize::B4096));
    let (mut one, mut other) = (server.client(), server.client());
    let send = |client: &mut RawClient<_>, at: u64, byte: u8| {
        client.send_request(0, NBD_CMD_WRITE, at, 100);
        client.send(&[byte; 100]);
    };
    for round in 0..200u8 {
        send(&mut one, 1000, round);
        send(&mut other, 1100, !round);
        assert_eq!((one.reply().error, other.reply().error), (0, 0));
        let expected = [[round; 100], [!round; 100]].concat();
        assert_eq!(one.read(1000, 200), Ok(expected));
    }
}

/// What the disk should hold while many clients write to it.
struct Model {
    /// `None` in trimmed blocks, where any byte is correct.
    bytes: Vec<Option<u8>>,
    /// Offsets and lengths of the requests in flight. They do not overlap, but they may share sectors.
    in_flight: Vec<(usize, usize)>,
}

impl Model {
    /// Reserves the range for one request, unless it overlaps the range of another request in flight.
    fn claim(&mut self, at: usize, len: usize) -> bool {
        let is_free = self.in_flight.iter().all(|(other, other_len)| at + len <= *other || other + other_len <= at);
        if is_free {
            self.in_flight.push((at, len));
        }
        is_free
    }

    fn release(&mut self, at: usize, len: usize) {
        let place = self.in_flight.iter().position(|claimed| *claimed == (at, len)).expect("the range was reserved");
        self.in_flight.swap_remove(place);
    }

    /// Checks the bytes found at `at`. No request may be in flight there.
    fn assert_holds(&self, at: usize, found: &[u8]) {
        let differs =
            self.bytes[at..].iter().zip(found).position(|(byte, found)| byte.is_some_and(|byte| byte != *found));
        assert_eq!(differs, None, "offset of the first wrong byte, counted from {at}, in {} bytes", found.len());
    }
}

/// A request in flight.
struct Asked {
    kind: u16,
    at: usize,
    len: usize,
}

/// Runs a client that keeps `DEPTH` random requests in flight and checks everything that it reads.
fn talk(mut client: RawClient<UnixStream>, seed: u64, block: usize, model: &Mutex<Model>) {
    const REQUESTS: u64 = 400;
    const DEPTH: usize = 12;
    let mut noise = noise(seed);
    let mut random = move |below: usize| {
        let mut bytes = [0; 8];
        noise(&mut bytes).unwrap();
        usize::try_from(u64::from_le_bytes(bytes) >> 1).unwrap() % below
    };
    let mut sender = client.stream.try_clone().unwrap();
    let asked = Mutex::new(HashMap::new());
    let (sent, taken) = mpsc::sync_channel(DEPTH - 1);
    std::thread::scope(|scope| {
        let asked = &asked;
        scope.spawn(move || {
            for cookie in 0..REQUESTS {
                sent.send(()).unwrap();
                let kinds =
                    [NBD_CMD_WRITE, NBD_CMD_WRITE, NBD_CMD_READ, NBD_CMD_READ, NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM];
                let kind = if random(20) == 0 { NBD_CMD_FLUSH } else { kinds[random(kinds.len())] };
                let flags = if random(8) == 0 { NBD_CMD_FLAG_FUA } else { 0 };
                let (at, len) = loop {
                    let (at, len) = match random(4) {
                        _ if kind == NBD_CMD_FLUSH => break (0, 0),
                        0 => (random(SIZE / block) * block, (random(16) + 1) * block),
                        1 => (random(SIZE), random(40_000) + 1),
                        // Ranges within one or two sectors.
                        _ => (random(SIZE), random(700) + 1),
                    };
                    let len = len.min(SIZE - at);
                    if model.lock().unwrap().claim(at, len) {
                        break (at, len);
                    }
                };
                let payload = pattern(at, if kind == NBD_CMD_WRITE { len } else { 0 }, random(256).to_le_bytes()[0]);
                let mut held = model.lock().unwrap();
                match kind {
                    NBD_CMD_WRITE => {
                        held.bytes[at..at + len].iter_mut().zip(&payload).for_each(|(to, from)| *to = Some(*from))
                    }
                    NBD_CMD_WRITE_ZEROES => held.bytes[at..at + len].fill(Some(0)),
                    NBD_CMD_TRIM => {
                        let whole = at.next_multiple_of(block)..(at + len) / block * block;
                        held.bytes.get_mut(whole).into_iter().flatten().for_each(|byte| *byte = None);
                    }
                    _ => {}
                }
                drop(held);
                asked.lock().unwrap().insert(cookie, Asked { kind, at, len });
                let mut bytes = request_bytes(flags, kind, cookie, at as u64, int(len));
                bytes.extend(payload);
                sender.write_all(&bytes).unwrap();
            }
        });
        for () in taken {
            let reply = client.reply();
            let Asked { kind, at, len } =
                asked.lock().unwrap().remove(&reply.cookie).expect("a reply to a request that is still unanswered");
            assert_eq!(reply.error, 0, "command {kind} at {at}");
            let found = if kind == NBD_CMD_READ { client.receive(len) } else { Vec::new() };
            if kind != NBD_CMD_FLUSH {
                let mut model = model.lock().unwrap();
                model.assert_holds(at, &found);
                model.release(at, len);
            }
        }
    });
}

/// Runs four clients at once. Each has requests of any length in flight, and they share sectors with the other clients'
/// requests. Each read must return what was written there last. This must still hold when another server serves the
/// disk after this one has stopped.
fn random_concurrent_requests_touch_only_their_bytes(session: SessionKind, medium: Medium) {
    for sector_size in [SectorSize::B512, SectorSize::B4096] {
        let (store, file) = store(medium);
        let volume = encrypted(store, sector_size);
        let block = usize::try_from(volume.block_size()).unwrap();
        let start = pattern(0, SIZE, 77);
        volume.write(0, &mut start.clone()).unwrap();
        let model = Mutex::new(Model { bytes: start.into_iter().map(Some).collect(), in_flight: Vec::new() });
        let server = TestServer::of(session, volume);
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (client, model) = (server.client(), &model);
                scope.spawn(move || talk(client, seed, block, model));
            }
        });
        let model = model.into_inner().unwrap();
        model.assert_holds(0, &server.client().read(0, int(SIZE)).unwrap());
        server.join().unwrap();
        let file = file.expect("the medium is a file");
        let store = FileStore::open(file.path(), Access::ReadOnly, Caching::PageCache).unwrap();
        let server = TestServer::of(session, encrypted(Arc::new(store), sector_size));
        model.assert_holds(0, &server.client().read(0, int(SIZE)).unwrap());
    }
}

fn random_concurrent_requests_in_memory(session: SessionKind) {
    random_concurrent_requests_touch_only_their_bytes(session, Medium::Mapped);
}

fn random_concurrent_requests_in_a_cached_file(session: SessionKind) {
    random_concurrent_requests_touch_only_their_bytes(session, Medium::PageCache);
}

fn random_concurrent_requests_in_a_file(session: SessionKind) {
    random_concurrent_requests_touch_only_their_bytes(session, Medium::Direct);
}

harness::on_both_sessions! {
    concurrent_unaligned_writes_lose_nothing_in_memory,
    concurrent_unaligned_writes_lose_nothing_in_a_file,
    concurrent_unaligned_writes_lose_nothing_in_mapped_memory,
    a_truncated_file_fails_only_its_own_requests,
    two_concurrent_unaligned_writes_to_one_sector_lose_nothing,
    random_concurrent_requests_in_memory,
    random_concurrent_requests_in_a_cached_file,
    random_concurrent_requests_in_a_file,
}

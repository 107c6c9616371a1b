//! Whatever some clients do, other clients of the same server notice nothing. Tests both kinds of session. `nbd_memory`
//! measures the memory that this takes, on a server in a process of its own.

use std::io::{self, ErrorKind, Write};
use std::net::{Shutdown as Direction, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use engine::sector::SectorSize;
use engine::store::{Access, BusErrorsCaught, Caching, FaultyStore, FileStore, MemoryStore, Operation};
use engine::volume::Volume;
use harness::nbd::{RawClient, TestServer, connect, encrypted, request_bytes};
use nbd_server::proto::ErrorCode;
use nbd_server::proto::wire::*;
use nbd_server::statistics::Blame;
use nbd_server::statistics::latency::Class;
use nbd_server::{Export, Exports, Listener, Server, SessionKind, Settings};

const SIZE: usize = 8 << 20;

fn volume() -> Volume {
    encrypted(Arc::new(MemoryStore::zeroed(SIZE)), SectorSize::B512)
}

/// Returns whether the server serves a new client correctly.
fn is_served(server: &TestServer) -> bool {
    let mut client = server.client();
    client.write(0, 777, b"still here") == 0 && client.read(777, 10) == Ok(b"still here".to_vec())
}

/// A gate that disk operations wait at while it is shut.
#[derive(Default)]
struct Gate {
    shut: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let shut = self.shut.lock().unwrap();
        drop(self.opened.wait_while(shut, |shut| *shut).unwrap());
    }

    fn set(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.opened.notify_all();
    }
}

/// Makes a volume whose writes wait at the gate.
fn gated(gate: &Arc<Gate>) -> Volume {
    let gate = Arc::clone(gate);
    let store = FaultyStore::new(MemoryStore::zeroed(SIZE), move |operation| {
        if matches!(operation, Operation::Write(..)) {
            gate.pass();
        }
        None
    });
    encrypted(Arc::new(store), SectorSize::B512)
}

fn a_disk_error_becomes_eio_and_keeps_the_connection(session: SessionKind) {
    let broken = Arc::new(AtomicBool::new(false));
    let store = {
        let broken = Arc::clone(&broken);
        FaultyStore::new(MemoryStore::zeroed(SIZE), move |_| broken.load(Ordering::SeqCst).then_some(ErrorKind::Other))
    };
    let server = TestServer::of(session, encrypted(Arc::new(store), SectorSize::B512));
    let mut client = server.client();
    assert_eq!(client.write(0, 0, &[5; 8192]), 0);
    broken.store(true, Ordering::SeqCst);
    let io = ErrorCode::Io.code();
    assert_eq!(client.read(0, 8192), Err(io));
    assert_eq!(client.write(0, 100, &[6; 5000]), io);
    assert_eq!(client.request(0, NBD_CMD_TRIM, 0, 4096), io);
    assert_eq!(client.request(0, NBD_CMD_WRITE_ZEROES, 0, 4096), io);
    assert_eq!(client.flush(), io);
    broken.store(false, Ordering::SeqCst);
    assert_eq!(client.read(0, 8192), Ok(vec![5; 8192]));
    let statistics = server.server().exports().all()[0].statistics();
    assert_eq!(statistics.snapshot().errors, 5);
    let failed: Vec<_> = statistics.failed().iter().map(|failed| (failed.operation.name(), failed.count)).collect();
    assert_eq!(failed, [("read", 1), ("write", 1), ("flush", 1), ("discard", 1), ("write-zeroes", 1)]);
    assert!(statistics.failed().iter().all(|failed| (failed.error, failed.blame) == ("EIO", Blame::Disk)));
    assert!(statistics.last_failure_of_disk().is_some());
}

fn a_panic_becomes_eio_and_keeps_the_connection(session: SessionKind) {
    let store = FaultyStore::new(MemoryStore::zeroed(SIZE), |operation| {
        assert!(!matches!(operation, Operation::Write(0, _)), "a simulated bug");
        None
    });
    let server = TestServer::of(session, Volume::plaintext(Arc::new(store), SectorSize::B512).unwrap());
    let mut client = server.client();
    assert_eq!(client.write(0, 0, &[5; 512]), ErrorCode::Io.code());
    assert_eq!(client.write(0, 512, &[5; 512]), 0);
    assert_eq!(client.read(512, 512), Ok(vec![5; 512]));
}

fn two_hundred_clients_are_served_at_once(session: SessionKind) {
    let server = TestServer::of(session, volume());
    let mut clients: Vec<_> = (0..200).map(|_| server.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.send_request(0, NBD_CMD_WRITE, number as u64 * 1000, 1000);
        client.send(&vec![u8::try_from(number).unwrap(); 1000]);
    }
    for client in &mut clients {
        assert_eq!(client.reply().error, 0);
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let expected = vec![u8::try_from(number).unwrap(); 1000];
        assert_eq!(client.read(number as u64 * 1000, 1000), Ok(expected));
    }
    let counters = server.server().exports().all()[0].statistics();
    let measured = [Class::Read, Class::Write, Class::Flush].map(|class| counters.latency().times(class).requests());
    assert_eq!(measured, [200, 200, 0]);
    let statistics = counters.snapshot();
    assert_eq!((statistics.connections, statistics.connections_total), (200, 200));
    assert_eq!((statistics.requests, statistics.bytes_read, statistics.bytes_written), (400, 200_000, 200_000));
}

fn ten_thousand_clients_are_served_in_turn(session: SessionKind) {
    let server = TestServer::of(session, volume());
    for number in 0..10_000 {
        match number % 4 {
            // Some clients disconnect at once, some stop half-way, some are served.
            0 => drop(server.connect()),
            1 => server.connect().start_handshake(NBD_FLAG_C_FIXED_NEWSTYLE).send_option(NBD_OPT_LIST, &[]),
            2 => assert_eq!(server.client().read(0, 16).map(|bytes| bytes.len()), Ok(16)),
            _ => {
                let mut client = server.client();
                client.send_request(0, NBD_CMD_DISC, 0, 0);
                assert!(client.is_closed());
            }
        }
    }
    assert!(is_served(&server));
    let statistics = Arc::clone(server.server().exports().all()[0].statistics());
    // Waits for every connection to end.
    server.join().unwrap();
    let statistics = statistics.snapshot();
    assert_eq!((statistics.connections, statistics.connections_total), (0, 5001));
}

fn clients_above_the_limit_wait_for_their_turn(session: SessionKind) {
    let settings = Settings { max_connections: 2, workers: 2, session, ..Settings::default() };
    let server = TestServer::with_settings([Export::new("", Arc::new(volume()))], settings);
    let (first, mut second) = (server.client(), server.client());
    let mut third = server.connect();
    third.stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let error = io::Read::read(&mut third.stream, &mut [0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    third.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    drop(first);
    third.enter("");
    assert_eq!((second.flush(), third.flush()), (0, 0));
}

fn a_slow_handshake_is_disconnected(session: SessionKind) {
    let settings =
        Settings { handshake_timeout: Duration::from_millis(200), workers: 2, session, ..Settings::default() };
    let server = TestServer::with_settings([Export::new("", Arc::new(volume()))], settings);
    let mut silent = server.connect();
    silent.greeting();
    let mut dribbling = server.connect();
    dribbling.start_handshake(NBD_FLAG_C_FIXED_NEWSTYLE);
    dribbling.send(&IHAVEOPT.to_be_bytes());
    assert!(silent.is_closed());
    assert!(dribbling.is_closed());
    // In the transmission phase there is no time limit.
    let mut idle = server.client();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(idle.flush(), 0);
}

fn a_disconnect_within_a_message_harms_no_other_client(session: SessionKind) {
    let server = TestServer::of(session, volume());
    let mut half_a_header = server.client();
    half_a_header.send(&request_bytes(0, NBD_CMD_WRITE, 1, 0, 4096)[..11]);
    let mut half_a_payload = server.client();
    half_a_payload.send_request(0, NBD_CMD_WRITE, 0, 1 << 20);
    half_a_payload.send(&[0xee; 300_000]);
    let mut half_a_refused_payload = server.client();
    half_a_refused_payload.send_request(0, NBD_CMD_WRITE, u64::MAX, 1 << 20);
    half_a_refused_payload.send(&[0xee; 300_000]);
    assert_eq!(half_a_refused_payload.reply().error, ErrorCode::NoSpc.code());
    for mut client in [half_a_header, half_a_payload, half_a_refused_payload] {
        client.stream.shutdown(Direction::Write).unwrap();
        assert!(client.is_closed());
    }
    assert!(is_served(&server));
    assert_ne!(server.client().read(0, 16), Ok(vec![0xee; 16]), "half a write must not be carried out");
}

/// The client disconnects with replies outstanding and a payload half sent.
fn a_client_that_vanishes_within_a_payload_is_forgotten(session: SessionKind) {
    let server = TestServer::of(session, volume());
    for _ in 0..20 {
        let mut client = server.client();
        for _ in 0..20 {
            client.send_request(0, NBD_CMD_READ, 0, 1 << 20);
        }
        client.send_request(0, NBD_CMD_WRITE, 0, 1 << 20);
        client.send(&[1; 100_000]);
    }
    let statistics = server.server().exports().all()[0].statistics();
    while statistics.snapshot().connections > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(is_served(&server));
}

fn clients_silent_within_a_message_harm_no_other_client(session: SessionKind) {
    let server = TestServer::of(session, volume());
    let mut quiet: Vec<_> = (0..20).map(|_| server.client()).collect();
    for (cut, client) in quiet.iter_mut().enumerate() {
        client.send(&request_bytes(0, NBD_CMD_READ, 1, 0, 4096)[..cut]);
    }
    assert!(is_served(&server));
    // A client can still finish a message that it began.
    for (cut, client) in quiet.iter_mut().enumerate() {
        client.send(&request_bytes(0, NBD_CMD_READ, 1, 0, 4096)[cut..]);
        assert_eq!(client.reply().error, 0);
        client.receive(4096);
    }
}

/// The server stops reading from a client that never reads its replies. Other clients are still served.
fn requests_of_a_client_that_reads_no_replies_wait(session: SessionKind) {
    let server = TestServer::of(session, volume());
    let mut deaf = server.client();
    deaf.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let requests: Vec<u8> = (0..2000).flat_map(|cookie| request_bytes(0, NBD_CMD_READ, cookie, 0, 1 << 20)).collect();
    // The client requests 2000 megabytes. Most requests stay in the sockets, and sending stops when those are full.
    let mut sent = 0;
    while sent < 20 {
        match deaf.stream.write_all(&requests) {
            Ok(()) => sent += 1,
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
                break;
            }
        }
    }
    assert!(is_served(&server));
    let served = server.server().exports().all()[0].statistics().snapshot().bytes_read;
    assert!(served < 128 << 20, "{served} bytes were read for a client that reads no replies");
    // When the client finally reads, it gets what it requested.
    for _ in 0..100 {
        assert_eq!(deaf.reply().error, 0);
        deaf.receive(1 << 20);
    }
}

fn requests_to_a_stuck_disk_take_bounded_memory(session: SessionKind) {
    let gate = Arc::new(Gate::default());
    let server = TestServer::of(session, gated(&gate));
    gate.set(true);
    let mut flooding = server.client();
    flooding.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut bytes = request_bytes(0, NBD_CMD_WRITE, 7, 4096, 1 << 20);
    bytes.resize(bytes.len() + (1 << 20), 0xaa);
    let taken = (0..512).take_while(|_| flooding.stream.write_all(&bytes).is_ok()).count();
    gate.set(false);
    // A connection may hold 32 MiB of payload, and its socket some more.
    assert!(taken <= 32 + 4 + 4, "the server took in {taken} MiB while the disk was stuck");
    assert!(is_served(&server));
}

fn garbage_is_disconnected_and_harms_no_other_client(session: SessionKind) {
    let server = TestServer::of(session, volume());
    let garbage: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect();
    for len in [1, 4, 15, 16, 17, 27, 28, 29, 1000, 100_000] {
        for mut client in [server.connect(), server.client()] {
            // The server may close the connection before everything is sent.
            let _ = client.stream.write_all(&garbage[..len]);
            let _ = client.stream.shutdown(Direction::Write);
            client.receive_rest();
        }
    }
    assert!(is_served(&server));
}

fn a_shutdown_answers_requests_in_flight_and_refuses_later_ones(session: SessionKind) {
    let gate = Arc::new(Gate::default());
    let server = TestServer::of(session, gated(&gate));
    let mut client = server.client();
    gate.set(true);
    let cookie = client.send_request(0, NBD_CMD_WRITE, 0, 4096);
    client.send(&[9; 4096]);
    // The reply to this read shows that the server has accepted the write before it.
    assert!(client.read(0, 512).is_ok());
    server.stop();
    let refused = loop {
        match client.read(0, 512) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(refused, ErrorCode::Shutdown.code());
    gate.set(false);
    let reply = client.reply();
    assert_eq!((reply.cookie, reply.error), (cookie, 0));
    assert!(client.is_closed());
    let volume = Arc::clone(server.server().exports().all()[0].volume());
    server.join().unwrap();
    let mut back = [0; 4096];
    volume.read(0, &mut back).unwrap();
    assert_eq!(back, [9; 4096]);
}

fn a_shutdown_flushes_and_refuses_new_clients(session: SessionKind) {
    let flushed = Arc::new(AtomicBool::new(false));
    let store = {
        let flushed = Arc::clone(&flushed);
        FaultyStore::new(MemoryStore::zeroed(SIZE), move |operation| {
            flushed.fetch_or(operation == Operation::Flush, Ordering::SeqCst);
            None
        })
    };
    let server = TestServer::of(session, encrypted(Arc::new(store), SectorSize::B512));
    let mut idle = server.client();
    let mut halfway = server.connect();
    halfway.greeting();
    let keep = server.server().clone();
    let socket = server.socket();
    server.stop();
    assert!(idle.is_closed() && halfway.is_closed(), "idle clients are disconnected");
    assert!(!socket.exists() || UnixStream::connect(&socket).is_err());
    server.join().unwrap();
    assert!(flushed.load(Ordering::SeqCst));
    drop(keep);
}

fn a_shutdown_does_not_wait_for_an_unfinished_payload(session: SessionKind) {
    let server = TestServer::of(session, volume());
    let mut client = server.client();
    client.send_request(0, NBD_CMD_WRITE, 0, 1 << 20);
    client.send(&[1; 100_000]);
    // The server needs time to accept the write. A write that arrives after the shutdown is refused with a reply.
    std::thread::sleep(Duration::from_millis(200));
    server.stop();
    assert!(client.is_closed());
    server.join().unwrap();
}

fn tcp_clients_are_served(session: SessionKind) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let exports = Exports::new([Export::new("", Arc::new(volume()))]).unwrap();
    let server = Server::new(exports, Settings { workers: 2, session, ..Settings::default() }).unwrap();
    let (trigger, shutdown) = nbd_server::shutdown();
    let running = runtime.spawn(async move { server.run(listener, shutdown).await });
    let mut client = RawClient::new(TcpStream::connect(address).unwrap());
    client.enter("");
    assert_eq!(client.write(0, 12345, &[8; 1 << 20]), 0);
    assert_eq!(client.read(12345, 1 << 20), Ok(vec![8; 1 << 20]));
    trigger.stop();
    runtime.block_on(running).unwrap().unwrap();
}

/// Clients of one socket that wait to be accepted do not keep out the clients of another socket.
fn several_sockets_are_served_in_turn(session: SessionKind) {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let (listeners, mut of_unix, mut of_tcp) = {
        let _inside = runtime.enter();
        let [a, b] = [&paths[0], &paths[1]].map(|path| tokio::net::UnixListener::bind(path).unwrap());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let of_unix = [0, 0, 0, 1].map(|socket: usize| RawClient::new(connect(&paths[socket])));
        let client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let tcp = tokio::net::TcpListener::from_std(tcp).unwrap();
        (vec![Listener::from(a), b.into(), tcp.into()], Vec::from(of_unix), RawClient::new(client))
    };
    let exports = Exports::new([Export::new("", Arc::new(volume()))]).unwrap();
    let settings = Settings { workers: 2, session, max_connections: 1, ..Settings::default() };
    let server = Server::new(exports, settings).unwrap();
    let (trigger, shutdown) = nbd_server::shutdown();
    let running = runtime.spawn(async move { server.run(listeners, shutdown).await });
    let (mut of_b, mut of_a) = (of_unix.pop().unwrap(), of_unix.remove(0));
    of_a.enter("");
    drop(of_a);
    of_b.enter("");
    drop(of_b);
    of_tcp.enter("");
    drop(of_tcp);
    of_unix[0].enter("");
    trigger.stop();
    runtime.block_on(running).unwrap().unwrap();
}

fn a_socketpair_is_served_without_a_handshake(session: SessionKind) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let export = Export::new("", Arc::new(volume()));
    let exports = Exports::new([export.clone()]).unwrap();
    let server = Server::new(exports, Settings { workers: 2, session, ..Settings::default() }).unwrap();
    let (theirs, ours) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let (_trigger, shutdown) = nbd_server::shutdown();
    let running = runtime.spawn(async move {
        let stream = tokio::net::UnixStream::from_std(ours).unwrap();
        server.serve_socket_transmission(stream, &export, shutdown).await
    });
    let mut kernel = RawClient::new(theirs);
    assert_eq!(kernel.write(0, 512, &[4; 1024]), 0);
    assert_eq!(kernel.read(0, 2048).map(|bytes| bytes[512..1536].to_vec()), Ok(vec![4; 1024]));
    kernel.send_request(0, NBD_CMD_DISC, 0, 0);
    assert!(kernel.is_closed());
    runtime.block_on(running).unwrap().unwrap();
}

/// Waits until there are replies to read.
fn wait_for_replies(client: &RawClient<UnixStream>) {
    let begun = std::time::Instant::now();
    while rustix::io::ioctl_fionread(&client.stream).unwrap() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "no reply");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The server collects requests only while the client has replies to read, and only with io_uring.
fn requests_are_collected_while_replies_are_unread(session: SessionKind) {
    let export = Export::new("", Arc::new(volume()));
    let server = TestServer::on(session, [export.clone()]);
    let mut client = server.client();
    for _ in 0..100 {
        assert_eq!(client.read(0, 4096).map(|bytes| bytes.len()), Ok(4096));
    }
    assert_eq!(export.statistics().pauses(), 0, "no pauses, because the client waits for each reply");

    let mut client = server.client();
    client.send_request(0, NBD_CMD_READ, 0, 4096);
    wait_for_replies(&client);
    let cookies: Vec<u64> = (0..20)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            client.send_request(0, NBD_CMD_READ, 0, 512)
        })
        .collect();
    assert_eq!(client.reply().error, 0);
    client.receive(4096);
    for cookie in cookies {
        assert_eq!(client.reply().cookie, cookie);
        client.receive(512);
    }
    let pauses = export.statistics().pauses();
    match session {
        SessionKind::IoUring => assert!((1..=20).contains(&pauses), "{pauses}"),
        _ => assert_eq!(pauses, 0),
    }
}

/// A write needs all of a connection's buffer space. The reply to an earlier read is not sent yet, and the client still
/// has another reply to read. The server must accept the write as soon as there is space.
fn a_space_filling_write_waits_only_for_earlier_replies(session: SessionKind) {
    let len = (16 << 20) + 512;
    let server = TestServer::of(session, encrypted(Arc::new(MemoryStore::zeroed(2 * len)), SectorSize::B512));
    for round in 0..20 {
        let mut client = server.client();
        client.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let first = client.send_request(0, NBD_CMD_READ, 0, 4096);
        wait_for_replies(&client);
        let mut both = request_bytes(0, NBD_CMD_READ, 101, 4096, 4096);
        both.extend(request_bytes(0, NBD_CMD_WRITE, 102, 8192, u32::try_from(len).unwrap()));
        client.stream.write_all(&both).unwrap();
        let mut writer = client.stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&vec![round; len]));
        for cookie in [first, 101] {
            let reply = client.reply();
            assert_eq!((reply.cookie, reply.error), (cookie, 0));
            client.receive(4096);
        }
        let reply = client.reply();
        assert_eq!((reply.cookie, reply.error), (102, 0), "round {round}");
        writing.join().unwrap().unwrap();
        assert_eq!(client.read(8192 + len as u64 - 512, 512), Ok(vec![round; 512]));
    }
}

/// Starts a server with a disk that io_uring reads and writes.
fn serve_a_file(session: SessionKind) -> TestServer {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(SIZE as u64).unwrap();
    let store = FileStore::open(file.path(), Access::ReadWrite, Caching::Direct).unwrap();
    TestServer::of(session, encrypted(Arc::new(store), SectorSize::B512))
}

/// Receives the replies to `reads`, of `len` bytes each, and to one other request, in any order. Returns the other
/// request's error.
fn replies(client: &mut RawClient<UnixStream>, reads: &[u64], len: usize, other: u64) -> u32 {
    let (mut left, mut found) = (reads.to_vec(), None);
    while !left.is_empty() || found.is_none() {
        let reply = client.reply();
        if reply.cookie == other {
            assert!(found.replace(reply.error).is_none(), "the request was answered twice");
            continue;
        }
        let place =
            left.iter().position(|cookie| *cookie == reply.cookie).expect("a reply to a read that is still unanswered");
        left.swap_remove(place);
        assert_eq!(reply.error, 0);
        client.receive(len);
    }
    found.unwrap()
}

fn a_large_write_behind_unread_replies_is_answered(session: SessionKind) {
    let server = serve_a_file(session);
    for round in 0..20 {
        let mut client = server.client();
        let reads: Vec<_> = (0..60).map(|_| client.send_request(0, NBD_CMD_READ, 0, 256 << 10)).collect();
        let payload = vec![round; 100 << 10];
        let write = client.send_request(0, NBD_CMD_WRITE, 4 << 20, 100 << 10);
        // The last byte is sent separately, while the socket does not accept the replies that are ready.
        client.send(&payload[1..]);
        std::thread::sleep(Duration::from_millis(u64::from(round) % 5));
        client.send(&payload[..1]);
        assert_eq!(replies(&mut client, &reads, 256 << 10, write), 0);
        assert_eq!(client.read(4 << 20, 100 << 10), Ok(payload));
    }
}

fn a_refused_write_behind_unread_replies_is_skipped(session: SessionKind) {
    let server = serve_a_file(session);
    let mut client = server.client();
    let reads: Vec<_> = (0..60).map(|_| client.send_request(0, NBD_CMD_READ, 0, 256 << 10)).collect();
    let sender = client.stream.try_clone().unwrap();
    let past_the_end = client.send_request(0, NBD_CMD_WRITE, SIZE as u64, 4 << 20);
    std::thread::scope(|scope| {
        scope.spawn(move || (&sender).write_all(&vec![1; 4 << 20]).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(replies(&mut client, &reads, 256 << 10, past_the_end), ErrorCode::NoSpc.code());
    });
    assert_eq!(client.flush(), 0);
}

fn reads_of_length_zero_take_no_memory(session: SessionKind) {
    let server = serve_a_file(session);
    let mut client = server.client();
    for _ in 0..2000 {
        let cookie = client.send_request(0, NBD_CMD_READ, 0, 0);
        assert_eq!(replies(&mut client, &[], 0, cookie), 0);
    }
}

fn a_disk_that_gets_stuck_delays_no_other_client(session: SessionKind) {
    let gate = Arc::new(Gate::default());
    let exports = [("stuck", gated(&gate)), ("other", volume())].map(|(name, disk)| Export::new(name, Arc::new(disk)));
    let server = TestServer::on(session, exports);
    let client = |export: &str| {
        let mut client = server.connect();
        client.enter(export);
        client
    };
    // There are more of these clients than the server's event loop has threads.
    let mut stuck: Vec<_> = (0..4).map(|_| client("stuck")).collect();
    for client in &mut stuck {
        (0..300).for_each(|_| assert_eq!(client.write(0, 0, &[1; 512]), 0));
    }
    gate.set(true);
    for client in &mut stuck {
        client.send_request(0, NBD_CMD_WRITE, 0, 512);
        client.send(&[1; 512]);
    }
    std::thread::sleep(Duration::from_millis(100));
    let mut other = client("other");
    assert_eq!(other.write(0, 0, &[2; 512]), 0);
    assert_eq!(other.read(0, 512), Ok(vec![2; 512]));
    gate.set(false);
    stuck.iter_mut().for_each(|client| assert_eq!(client.reply().error, 0));
}

fn zeroing_whole_disks_delays_no_small_request(session: SessionKind) {
    let large = 64 << 20;
    let gate = Arc::new(Gate::default());
    let through = |gate: &Arc<Gate>| {
        let gate = Arc::clone(gate);
        FaultyStore::new(MemoryStore::zeroed(large), move |operation| {
            if matches!(operation, Operation::Write(..)) {
                gate.pass();
            }
            None
        })
    };
    let export = |name: &str, gate| Export::new(name, Arc::new(encrypted(Arc::new(through(gate)), SectorSize::B512)));
    let server = TestServer::on(session, [export("stuck", &gate), export("other", &Arc::default())]);
    let client = |export: &str| {
        let mut client = server.connect();
        client.enter(export);
        client
    };
    gate.set(true);
    let mut stuck = client("stuck");
    for _ in 0..20 {
        stuck.send_request(NBD_CMD_FLAG_NO_HOLE, NBD_CMD_WRITE_ZEROES, 0, u32::try_from(large).unwrap());
    }
    let mut other = client("other");
    for _ in 0..20 {
        assert_eq!(other.write(0, 777, b"still here"), 0);
        assert_eq!(other.read(777, 10), Ok(b"still here".to_vec()));
        assert_eq!(other.flush(), 0);
    }
    gate.set(false);
    (0..20).for_each(|_| assert_eq!(stuck.reply().error, 0));
}

fn zeroing_a_whole_disk_stops_when_its_client_leaves(session: SessionKind) {
    // Each mebibyte takes a while, as on a slow disk.
    let pieces = Arc::new(AtomicUsize::new(0));
    let written = Arc::clone(&pieces);
    let store = FaultyStore::new(MemoryStore::zeroed(SIZE), move |operation| {
        if matches!(operation, Operation::Write(..)) {
            written.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(150));
        }
        None
    });
    let volume = encrypted(Arc::new(store), SectorSize::B512);
    let settings = Settings { workers: 2, session, ..Settings::default() };
    let server = TestServer::with_settings([Export::new("", Arc::new(volume))], settings);
    let mut client = server.client();
    for _ in 0..40 {
        client.send_request(0, NBD_CMD_WRITE_ZEROES, 0, u32::try_from(SIZE).unwrap());
    }
    drop(client);
    server.join().unwrap();
    // All 40 requests are 320 pieces: eight each.
    let pieces = pieces.load(Ordering::Relaxed);
    assert!(pieces < 160, "{pieces} pieces were written");
}

/// A write beyond the new end would make the file long again and leave a hole that decrypts to noise.
fn a_truncated_file_stays_short_and_returns_eio(session: SessionKind) {
    let on_disk = env!("CARGO_TARGET_TMPDIR");
    let len = SIZE as u64;
    for (place, caching, is_mapped) in [
        (on_disk, Caching::Direct, false),
        (on_disk, Caching::PageCache, false),
        ("/dev/shm", Caching::PageCache, false),
        ("/dev/shm", Caching::Direct, true),
    ] {
        // The last of these ends is within a page. A mapping would still show the rest of that page.
        for end in [len / 2, 3 << 20, len - 4096, len - 512] {
            let what = format!("{place}, {caching:?}, {end} bytes");
            let file = tempfile::NamedTempFile::new_in(place).unwrap();
            std::fs::write(file.path(), vec![0x77; SIZE]).unwrap();
            let mut store = FileStore::open(file.path(), Access::ReadWrite, caching).unwrap();
            if is_mapped {
                store = store.mapped(BusErrorsCaught::new().unwrap());
            }
            let server = TestServer::of(session, encrypted(Arc::new(store), SectorSize::B512));
            let mut client = server.client();
            assert_eq!(client.write(0, 0, &[5; 4096]), 0);
            assert_eq!(client.write(0, len - (1 << 20), &[6; 1 << 20]), 0);
            file.as_file().set_len(end).unwrap();

            let io = ErrorCode::Io.code();
            let mut other = server.client();
            for client in [&mut client, &mut other] {
                assert_eq!(client.read(len - 512, 512), Err(io), "{what}");
                assert_eq!(client.read(end & !4095, 4096), Err(io), "{what}");
                for data in [&[1; 512][..], &[2; 100], &[3; 1 << 20]] {
                    assert_eq!(client.write(0, len - data.len() as u64, data), io, "{what}");
                    assert_eq!(client.write(NBD_CMD_FLAG_FUA, len - data.len() as u64, data), io, "{what}");
                }
                assert_eq!(client.request(0, NBD_CMD_WRITE_ZEROES, len - 4096, 4096), io, "{what}");
                assert_eq!(client.request(0, NBD_CMD_TRIM, len - 4096, 4096), io, "{what}");
                assert_eq!(file.as_file().metadata().unwrap().len(), end, "{what}");
            }
            // The rest is served as before, and what was lost does not come back.
            assert_eq!(client.read(0, 4096), Ok(vec![5; 4096]), "{what}");
            assert_eq!(client.write(0, 0, &[7; 8192]), 0, "{what}");
            assert_eq!(other.read(0, 8192), Ok(vec![7; 8192]), "{what}");
            assert_eq!(client.flush(), 0, "{what}");
            file.as_file().set_len(len).unwrap();
            assert_eq!(client.read(len - 512, 512), Err(io), "{what}");
            assert_eq!(client.write(0, len - 512, &[1; 512]), io, "{what}");
        }
    }
}

harness::on_both_sessions! {
    a_truncated_file_stays_short_and_returns_eio,
    a_disk_error_becomes_eio_and_keeps_the_connection,
    a_panic_becomes_eio_and_keeps_the_connection,
    two_hundred_clients_are_served_at_once,
    ten_thousand_clients_are_served_in_turn,
    clients_above_the_limit_wait_for_their_turn,
    a_slow_handshake_is_disconnected,
    a_disconnect_within_a_message_harms_no_other_client,
    a_client_that_vanishes_within_a_payload_is_forgotten,
    clients_silent_within_a_message_harm_no_other_client,
    requests_of_a_client_that_reads_no_replies_wait,
    requests_to_a_stuck_disk_take_bounded_memory,
    garbage_is_disconnected_and_harms_no_other_client,
    a_shutdown_answers_requests_in_flight_and_refuses_later_ones,
    a_shutdown_flushes_and_refuses_new_clients,
    a_shutdown_does_not_wait_for_an_unfinished_payload,
    tcp_clients_are_served,
    several_sockets_are_served_in_turn,
    a_socketpair_is_served_without_a_handshake,
    requests_are_collected_while_replies_are_unread,
    a_space_filling_write_waits_only_for_earlier_replies,
    a_large_write_behind_unread_replies_is_answered,
    a_refused_write_behind_unread_replies_is_skipped,
    reads_of_length_zero_take_no_memory,
    a_disk_that_gets_stuck_delays_no_other_client,
    zeroing_whole_disks_delays_no_small_request,
    zeroing_a_whole_disk_stops_when_its_client_leaves,
}

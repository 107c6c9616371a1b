//! Measures how much memory a server process takes while clients send as many requests as they can. Tests both kinds of
//! session, with the disk in memory and in a file with direct I/O.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::sync::mpsc;
use std::time::Duration;

use harness::nbd::{RawClient, connect, request_bytes};
use harness::nbdcrypt::binary;
use nbd_server::SessionKind;
use nbd_server::proto::wire::*;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const CONNECTIONS: usize = 4;
const DEPTH: usize = 128;
/// The length of each client's own part of the disk.
const PART: u64 = 12 * MIB;
/// The limit that docs/serve.md promises.
const BOUND: u64 = 256 * MIB;

/// A server process for a volume whose header needs almost no memory to open.
struct Server {
    child: Child,
    folder: TempDir,
}

impl Server {
    fn start(session: SessionKind, place: &Path) -> Self {
        let folder = tempfile::tempdir_in(place).unwrap();
        let key = folder.path().join("key");
        fs::write(&key, "ThisIs-a-SecretPassword").unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        let size = (CONNECTIONS as u64 * PART + 4 * MIB).to_string();
        let cheap = ["--type", "luks1", "--pbkdf-force-iterations", "1000"];
        let format = ["format", "--key-file", "key", "--size", &size, "disk"];
        let formatted = Command::new(binary()).current_dir(folder.path()).args(format).args(cheap).output().unwrap();
        assert!(formatted.status.success(), "{}", harness::nbdcrypt::told(&formatted));
        let session = match session {
            SessionKind::Tokio => "tokio",
            _ => "io-uring",
        };
        let mut child = Command::new(binary())
            .args(["serve", "--key-file", "key", "--socket", "socket", "--session", session, "disk"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("nbd+unix:"), "the server did not start");
        Self { child, folder }
    }

    fn client(&self) -> RawClient<UnixStream> {
        let mut client = RawClient::new(connect(&self.folder.path().join("socket")));
        client.enter("");
        client
    }

    /// Returns the server's peak resident memory in bytes.
    fn peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// Returns the server's memory in bytes, without the mapped pages of a disk in memory. Those pages exist without
    /// the server too, and stay mapped after the first access.
    fn memory(&self, which: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let kib = |name| {
            let kib = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
            kib.unwrap_or_else(|| panic!("no {name} in {status}")).trim().parse::<u64>().unwrap()
        };
        kib(which).saturating_sub(kib("RssShmem:")) << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A read or write request.
#[derive(Clone, Copy)]
struct Ask {
    write: bool,
    offset: u64,
    len: u32,
}

/// Sends the requests and receives the replies at the same time, with at most `depth` requests in flight.
fn pump(client: &mut RawClient<UnixStream>, depth: usize, asks: impl Iterator<Item = Ask> + Send) {
    let mut sender = client.stream.try_clone().unwrap();
    let (sent, taken) = mpsc::sync_channel(depth - 1);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let payload = vec![0xa5; 1 << 20];
            for Ask { write, offset, len } in asks {
                sent.send(()).unwrap();
                // The cookie holds the length of the reply's data.
                let (kind, cookie) = if write { (NBD_CMD_WRITE, 0) } else { (NBD_CMD_READ, len.into()) };
                sender.write_all(&request_bytes(0, kind, cookie, offset, len)).unwrap();
                if write {
                    sender.write_all(&payload[..len as usize]).unwrap();
                }
            }
        });
        for () in taken {
            take_reply(client);
        }
    });
}

fn take_reply(client: &mut RawClient<UnixStream>) {
    let reply = client.reply();
    assert_eq!(reply.error, 0);
    client.receive(reply.cookie.try_into().unwrap());
}

/// Runs `work` once per client. Each client has its own thread and its own part of the disk.
fn each(server: &Server, work: impl Fn(RawClient<UnixStream>, u64) + Sync) {
    let work = &work;
    std::thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            let client = server.client();
            scope.spawn(move || work(client, number as u64 * PART));
        }
    });
}

/// Checks the peak memory while each connection has `DEPTH` requests of one mebibyte in flight, both aligned and unaligned. If
/// the server held all their data at once, it would take more than a gigabyte.
fn check_peak_memory(session: SessionKind, place: &str) {
    let server = Server::start(session, Path::new(place));
    let all_asked = Barrier::new(CONNECTIONS);
    each(&server, |mut client, part| {
        // For a while, no connection reads any replies.
        for number in 0..DEPTH as u64 {
            client.send(&request_bytes(0, NBD_CMD_READ, MIB, part + number % 8 * MIB, 1 << 20));
        }
        all_asked.wait();
        std::thread::sleep(Duration::from_millis(300));
        (0..DEPTH).for_each(|_| take_reply(&mut client));
        // First writes, then half writes and half reads, then reads. Every second request is not aligned to blocks.
        let third = DEPTH as u64 / 2;
        let asks = (0..3 * third).map(|number| Ask {
            write: number < third || number < 2 * third && number % 4 < 2,
            offset: part + number % 8 * MIB + number % 2 * 777,
            len: 1 << 20,
        });
        pump(&mut client, DEPTH, asks);
    });
    let peak = server.peak();
    assert!(peak <= BOUND, "{} MiB", peak / MIB);
}

fn memory_is_bounded_for_a_disk_in_memory(session: SessionKind) {
    check_peak_memory(session, "/dev/shm");
}

fn memory_is_bounded_for_a_disk_in_a_file(session: SessionKind) {
    check_peak_memory(session, env!("CARGO_TARGET_TMPDIR"));
}

/// The server holds thousands of small payloads for clients that read no replies. Then the clients disconnect.
fn memory_is_freed_when_stalled_clients_disconnect(session: SessionKind) {
    const CLIENTS: usize = 32;
    let server = Server::start(session, Path::new(env!("CARGO_TARGET_TMPDIR")));
    let mut first = server.client();
    assert_eq!(first.read(0, 4096).map(|data| data.len()), Ok(4096));
    let before = server.memory("VmRSS:");
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| server.client()).collect();
    for client in &mut clients {
        for number in 0..512 {
            client.send(&request_bytes(
                0,
                NBD_CMD_READ,
                number,
                number * 32768 % (8 * MIB),
                if number % 2 == 0 { 4096 } else { 32768 },
            ));
        }
    }
    // The clients send until the server accepts no more.
    let mut held = 0;
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(50));
        let now = server.memory("VmRSS:");
        if now <= held && held > before + 32 * MIB {
            break;
        }
        held = held.max(now);
    }
    assert!(held > before + 32 * MIB, "the server held only {} MiB, and {} MiB before", held / MIB, before / MIB);
    drop(clients);
    let mut after = held;
    for _ in 0..300 {
        after = server.memory("VmRSS:");
        if after < before + 16 * MIB {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{} MiB before, {} MiB held, {} MiB after", before / MIB, held / MIB, after / MIB);
}

harness::on_both_sessions! {
    memory_is_freed_when_stalled_clients_disconnect,
    memory_is_bounded_for_a_disk_in_memory,
    memory_is_bounded_for_a_disk_in_a_file,
}

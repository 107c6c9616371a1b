//! What a server takes in memory while clients ask for as much as they can, measured on a process of its own: by both
//! sessions, with the disk in memory, and in a file past the page cache.

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
/// Each client's own part of the disk.
const PART: u64 = 12 * MIB;
/// What README.md promises.
const BOUND: u64 = 256 * MIB;

/// A process that serves a volume whose header takes next to no memory to open.
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
        assert!(address.starts_with("nbd+unix:"), "the server did not come up");
        Self { child, folder }
    }

    fn client(&self) -> RawClient<UnixStream> {
        let mut client = RawClient::new(connect(&self.folder.path().join("socket")));
        client.enter("");
        client
    }

    /// The most memory that it ever had resident, in bytes, less the pages of a disk in memory that it has mapped: those
    /// are there without it, and stay mapped once they are.
    fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let kib = |name| {
            let kib = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
            kib.unwrap_or_else(|| panic!("no {name} in {status}")).trim().parse::<u64>().unwrap()
        };
        (kib("VmHWM:") - kib("RssShmem:")) << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request of which many are sent.
#[derive(Clone, Copy)]
struct Ask {
    write: bool,
    offset: u64,
    len: u32,
}

/// Sends the requests, and takes the replies meanwhile, so many of them in flight.
fn pump(client: &mut RawClient<UnixStream>, depth: usize, asks: impl Iterator<Item = Ask> + Send) {
    let mut sender = client.stream.try_clone().unwrap();
    let (sent, taken) = mpsc::sync_channel(depth - 1);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let payload = vec![0xa5; 1 << 20];
            for Ask { write, offset, len } in asks {
                sent.send(()).unwrap();
                // The cookie says how many bytes the reply brings.
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

/// Each client on a thread of its own, with a part of the disk of its own.
fn each(server: &Server, work: impl Fn(RawClient<UnixStream>, u64) + Sync) {
    let work = &work;
    std::thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            let client = server.client();
            scope.spawn(move || work(client, number as u64 * PART));
        }
    });
}

/// `DEPTH` requests of a mebibyte that each of the connections has under way, in whole blocks and not: more than a
/// gigabyte, were all of it taken in.
fn as_much_as_clients_can_ask_for(session: SessionKind, place: &str) {
    let server = Server::start(session, Path::new(place));
    let all_asked = Barrier::new(CONNECTIONS);
    each(&server, |mut client, part| {
        // None of the replies is taken for a while, on any connection.
        for number in 0..DEPTH as u64 {
            client.send(&request_bytes(0, NBD_CMD_READ, MIB, part + number % 8 * MIB, 1 << 20));
        }
        all_asked.wait();
        std::thread::sleep(Duration::from_millis(300));
        (0..DEPTH).for_each(|_| take_reply(&mut client));
        // Writes, then half of each, then reads: in whole blocks, and not.
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

fn four_clients_with_128_requests_of_a_mebibyte_each_on_memory(session: SessionKind) {
    as_much_as_clients_can_ask_for(session, "/dev/shm");
}

fn four_clients_with_128_requests_of_a_mebibyte_each_on_a_file(session: SessionKind) {
    as_much_as_clients_can_ask_for(session, env!("CARGO_TARGET_TMPDIR"));
}

harness::on_both_sessions! {
    four_clients_with_128_requests_of_a_mebibyte_each_on_memory,
    four_clients_with_128_requests_of_a_mebibyte_each_on_a_file,
}

//! A server under the system's resource limits. The server works within a limit, or fails with an error that names it.
//! Nothing panics, and no signal ends the process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use harness::nbd::{RawClient, connect};
use harness::nbdcrypt::{binary, copy_binary, told};
use nbd_server::proto::ErrorCode;
use nbd_server::proto::wire::*;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const SESSIONS: [&str; 2] = ["io-uring", "tokio"];

struct Folder(TempDir);

impl Folder {
    /// Makes a folder with a volume `disk` of at least 14 MiB of data.
    fn new_in(place: &str) -> Self {
        let folder = Self(tempfile::tempdir_in(place).unwrap());
        fs::write(folder.path("key"), "ThisIs-a-SecretPassword").unwrap();
        fs::set_permissions(folder.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        folder.format(&["--type", "luks1", "--pbkdf-force-iterations", "1000"]);
        folder
    }

    fn new() -> Self {
        Self::new_in(env!("CARGO_TARGET_TMPDIR"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn format(&self, how: &[&str]) {
        let _ = fs::remove_file(self.path("disk"));
        let format = ["format", "--key-file", "key", "--size", "32M", "disk"];
        let output = self.run(&[], &[&format, how].concat()).output().unwrap();
        assert!(output.status.success(), "{}", told(&output));
    }

    /// Returns a command that runs the program through the command `before`.
    fn run(&self, before: &[&str], args: &[&str]) -> Command {
        self.run_as(&[before, &[binary().to_str().unwrap()]].concat(), args)
    }

    fn run_as(&self, words: &[&str], args: &[&str]) -> Command {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(args).current_dir(self.0.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Serves the disk under a limit. Returns the output if the server fails.
    fn serve(&self, before: &[&str], more: &[&str]) -> Result<Server, Output> {
        self.serve_as(&[before, &[binary().to_str().unwrap()]].concat(), more)
    }

    /// Serves the disk with the command `words`. Returns the output if the server fails.
    fn serve_as(&self, words: &[&str], more: &[&str]) -> Result<Server, Output> {
        let serve = ["serve", "--key-file", "key", "--socket", "socket", "disk"];
        let mut command = self.run_as(words, &[&serve, more].concat());
        let mut child = command.stderr(File::create(self.path("log")).unwrap()).spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        if address.is_empty() {
            let status = child.wait().unwrap();
            return Err(Output { status, stdout: Vec::new(), stderr: fs::read(self.path("log")).unwrap() });
        }
        Ok(Server { child, socket: self.path("socket"), log: self.path("log") })
    }
}

struct Server {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Server {
    fn client(&self) -> RawClient<UnixStream> {
        let mut client = RawClient::new(connect(&self.socket));
        client.enter("");
        client
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Stops the server as a service manager would. The server must have run until then.
    #[track_caller]
    fn stop(mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "the server has ended: {}", self.log());
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
        assert!(!self.log().contains("panicked"), "{}", self.log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Checks that the program exited normally, without a signal, and that its error names the limit.
#[track_caller]
fn assert_names(output: &Output, limit: &str, when: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{when}: {}", told(output));
    assert!(said.contains(limit) && !said.contains("panicked"), "{when}: {said}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs prlimit: run `make test`")]
fn a_write_beyond_the_file_size_limit_is_enospc() {
    let folder = Folder::new();
    for session in SESSIONS {
        for more in [&["--session", session][..], &["--session", session, "--page-cache"]] {
            let server = folder.serve(&["prlimit", "--fsize=8388608"], more).unwrap();
            let mut client = server.client();
            let full = ErrorCode::NoSpc.code();
            for len in [4096, 100, 1 << 20] {
                assert_eq!(client.write(0, 12 * MIB, &vec![1; len]), full, "{more:?}, {len}");
                assert_eq!(client.write(NBD_CMD_FLAG_FUA, 12 * MIB, &vec![1; len]), full, "{more:?}, {len}");
                assert_eq!(client.write(0, MIB, &vec![2; len]), 0);
                assert_eq!(server.client().read(MIB, len.try_into().unwrap()), Ok(vec![2; len]));
            }
            assert_eq!(client.flush(), 0, "a failed write must not fail the flush");
            drop(client);
            server.stop();
        }
    }
}

/// Sends large requests from several clients. Each request is carried out, or it fails because there is no memory for it,
/// or the connection ends.
fn ask_for_much(server: &Server) {
    let mut clients: Vec<_> = (0..4).map(|_| connect(&server.socket)).collect();
    for stream in &mut clients {
        let mut session = || -> std::io::Result<()> {
            use std::io::{Read, Write};
            let mut greeting = [0; 18];
            stream.read_exact(&mut greeting)?;
            stream.write_all(&3u32.to_be_bytes())?;
            stream.write_all(&harness::nbd::option_bytes(NBD_OPT_EXPORT_NAME, b""))?;
            stream.read_exact(&mut [0; 10])?;
            for (kind, len) in
                [(NBD_CMD_READ, 1 << 20), (NBD_CMD_READ, 8192), (NBD_CMD_WRITE, 1 << 20), (NBD_CMD_WRITE, 8192)]
            {
                let is_read = kind == NBD_CMD_READ;
                let request =
                    |number| harness::nbd::request_bytes(0, kind, number, number % 8 * MIB + number % 2 * 777, len);
                for number in 0..16 {
                    stream.write_all(&request(number))?;
                    if !is_read {
                        stream.write_all(&vec![1; len as usize])?;
                        take_reply(stream, 0)?;
                    }
                }
                for _ in 0..if is_read { 16 } else { 0 } {
                    take_reply(stream, len)?;
                }
            }
            Ok(())
        };
        let _ = session();
    }
}

fn take_reply(stream: &mut UnixStream, payload: u32) -> std::io::Result<()> {
    use std::io::Read;
    let mut reply = [0; 16];
    stream.read_exact(&mut reply)?;
    match harness::nbd::be32(&reply[4..8]) {
        0 => stream.read_exact(&mut vec![0; payload as usize]),
        error => {
            assert_eq!(error, ErrorCode::NoMem.code());
            Ok(())
        }
    }
}

/// The server works if the limit is high enough. If not, the error names the limit.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs prlimit: run `make test`")]
fn too_little_address_space_is_reported_with_the_limit() {
    let (on_disk, in_memory) = (Folder::new(), Folder::new_in("/dev/shm"));
    let limit = |space: u64| format!("--as={space}");
    // With less address space, the program is not even loaded.
    let loads = |space: &u64| {
        on_disk.run(&["prlimit", &limit(*space)], &["--version"]).output().is_ok_and(|output| output.status.success())
    };
    let least = (1..).map(|step| step * 8 * MIB).find(loads).unwrap();
    let (mut served, mut refused) = (0, 0);
    let sessions: Vec<_> = SESSIONS.into_iter().flat_map(|disk| SESSIONS.map(|memory| (disk, memory))).collect();
    for (step, (disk, memory)) in (0..16).zip(sessions.iter().copied().cycle()) {
        let space = least + step * step * 2 * MIB;
        for (folder, session) in [(&on_disk, disk), (&in_memory, memory)] {
            match folder.serve(&["prlimit", &limit(space)], &["--session", session]) {
                Ok(server) => {
                    ask_for_much(&server);
                    server.stop();
                    served += 1;
                }
                Err(output) => {
                    assert_names(&output, "ulimit -v", &format!("{} MiB, {session}", space / MIB));
                    refused += 1;
                }
            }
        }
    }
    assert!(served > 4 && refused > 4, "{served} runs served, {refused} runs refused");
    // The memory for a keyslot is named too.
    on_disk.format(&[
        "--pbkdf",
        "argon2id",
        "--pbkdf-memory",
        "262144",
        "--pbkdf-parallel",
        "2",
        "--pbkdf-force-iterations",
        "4",
    ]);
    let output = on_disk.serve(&["prlimit", &limit(least + 200 * MIB)], &[]).map(Server::stop).unwrap_err();
    assert_names(&output, "ulimit -v", "Argon2");
}

/// The server works if the limit is high enough. If not, the error names the limit.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, prlimit and setpriv: run `make test`")]
fn too_few_threads_are_reported_with_the_limit() {
    let folder = Folder::new_in("/tmp");
    // The limit counts this user's processes, and no other process has this user. The user must be able to read the program
    // and its libraries.
    let user = 61_234;
    let program = folder.path("nbdcrypt");
    copy_binary(&program);
    for file in [folder.0.path(), &folder.path("disk"), &folder.path("key"), &program] {
        chown(file, Some(user), Some(user)).unwrap();
    }
    let (mut served, mut refused) = (0, 0);
    for threads in [1, 2, 3, 8, 16, 17, 18, 19, 20, 22, 26, 34] {
        for session in ["auto", "tokio"] {
            let nproc = format!("--nproc={threads}");
            let ids = format!("--reuid={user}");
            let before = ["prlimit", &nproc, "setpriv", &ids, "--clear-groups", program.to_str().unwrap()];
            match folder.serve_as(&before, &["--session", session]) {
                Ok(server) => {
                    let mut clients: Vec<_> = (0..8).map(|_| server.client()).collect();
                    for client in &mut clients {
                        assert_eq!(client.write(0, 0, &[1; 4096]), 0);
                        assert_eq!(client.read(0, 4096), Ok(vec![1; 4096]));
                    }
                    drop(clients);
                    server.stop();
                    served += 1;
                }
                Err(output) => {
                    assert_names(&output, "ulimit -u", &format!("{threads} threads, {session}"));
                    refused += 1;
                }
            }
        }
    }
    assert!(served > 2 && refused > 8, "{served} runs served, {refused} runs refused");
}

/// Lets io_uring_setup(2) through and answers io_uring_enter(2) (426) with EPERM, as some containers' filters do.
const FILTER: &str = r#"
import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 426), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)]
steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(len(code), ctypes.addressof(steps))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
"#;

/// The server notices the filter once and then serves without io_uring.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs python3: run `make test`")]
fn clients_are_served_if_a_filter_denies_io_uring_enter() {
    let folder = Folder::new();
    fs::write(folder.path("filter.py"), FILTER).unwrap();
    let server = folder.serve(&["python3", "filter.py"], &[]).unwrap();
    let mut clients: Vec<_> = (0..3).map(|_| server.client()).collect();
    for client in &mut clients {
        assert_eq!(client.write(NBD_CMD_FLAG_FUA, 0, &[1; 4096]), 0);
        assert_eq!(client.read(0, 4096), Ok(vec![1; 4096]));
    }
    assert_eq!(server.log().matches("io_uring").count(), 1, "{}", server.log());
    drop(clients);
    server.stop();
    let output = folder.serve(&["python3", "filter.py"], &["--session", "io-uring"]).map(Server::stop).unwrap_err();
    assert_names(&output, "`--session io-uring`", "by name");
}

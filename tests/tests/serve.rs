//! `nbdcrypt format` and `nbdcrypt serve` with other programs on the same volumes: each reads what the other wrote.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use harness::nbd::{RawClient, connect};
use harness::nbdcrypt::{binary, told};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const DISK: u64 = 16 << 20;
const DATA: usize = 14 << 20;

struct Folder(TempDir);

impl Folder {
    /// Makes a folder with a key file and plaintext data to write.
    fn new() -> Self {
        Self::in_folder(&std::env::temp_dir())
    }

    fn in_folder(parent: &Path) -> Self {
        let folder = Self(tempfile::tempdir_in(parent).unwrap());
        fs::write(folder.path("key"), "ThisIs-a-SecretPassword").unwrap();
        fs::set_permissions(folder.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        // All sectors differ. The first and the last sector contain their names.
        let mut data: Vec<u8> =
            (0..DATA / 8).flat_map(|n| (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()).collect();
        data[..16].copy_from_slice(b"the first sector");
        data[DATA - 15..].copy_from_slice(b"the last sector");
        fs::write(folder.path("data"), data).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Runs a program in the folder. It must succeed.
    #[track_caller]
    fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.try_run(program, args);
        assert!(output.status.success(), "{program} {args:?}: {}", told(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn try_run(&self, program: &str, args: &[&str]) -> Output {
        let program = if program == "nbdcrypt" { binary() } else { Path::new(program) };
        Command::new(program)
            .args(args)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
    }

    /// Makes a volume with nbdcrypt.
    #[track_caller]
    fn format(&self) {
        let said = self.run(
            "nbdcrypt",
            &[
                "format",
                "--key-file",
                "key",
                "--size",
                "16M",
                "--type",
                "luks1",
                "--pbkdf-force-iterations",
                "1000",
                "disk",
            ],
        );
        assert!(said.contains("AES-256-XTS"), "{said}");
    }

    /// Makes a volume with cryptsetup.
    #[track_caller]
    fn luks_format(&self, key_bits: &str, hash: &str) {
        File::create(self.path("disk")).unwrap().set_len(DISK).unwrap();
        self.run(
            "cryptsetup",
            &[
                "luksFormat",
                "--batch-mode",
                "--type",
                "luks1",
                "--cipher",
                "aes-xts-plain64",
                "--key-size",
                key_bits,
                "--hash",
                hash,
                "--pbkdf-force-iterations",
                "1000",
                "--key-file",
                "key",
                "disk",
            ],
        );
    }

    #[track_caller]
    fn serve(&self, more: &[&str]) -> Server {
        let mut args = vec!["serve", "--key-file", "key", "--socket", "socket", "disk"];
        args.extend(more);
        let mut child = Command::new(binary())
            .args(args)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        let expected = format!("nbd+unix:///?socket={}", self.text("socket"));
        assert_eq!(address.trim(), expected, "the server did not start");
        Server(child)
    }
}

/// A running `nbdcrypt serve`.
struct Server(Child);

impl Server {
    /// Stops the server as a service manager would, and waits.
    #[track_caller]
    fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only a failed test leaves a running server.
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

const URI: &str = "nbd+unix:///?socket=socket";

#[track_caller]
fn assert_same(folder: &Folder, name: &str) {
    let (expected, got) = (fs::read(folder.path("data")).unwrap(), fs::read(folder.path(name)).unwrap());
    assert_eq!(got.len(), expected.len(), "{name}");
    let differs = expected.iter().zip(&got).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{name} differs from the data that was written");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs nbdcopy: run `make test`")]
fn unaligned_data_is_served_on_every_filesystem() {
    for memory in [false, true] {
        let parent = if memory { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let folder = Folder::in_folder(&parent);
        folder.format();
        // The payload begins 512 bytes later (LUKS1 specification, figure 1: payload-offset).
        let disk = File::options().write(true).open(folder.path("disk")).unwrap();
        disk.write_all_at(&4097_u32.to_be_bytes(), 104).unwrap();
        fs::OpenOptions::new().write(true).open(folder.path("data")).unwrap().set_len(DATA as u64 - 512).unwrap();
        for more in [&["--session", "io-uring"][..], &["--session", "tokio"]] {
            let server = folder.serve(more);
            folder.run("nbdcopy", &["data", "nbd+unix:///?socket=socket"]);
            server.stop();
            let volume = harness::luks::open(&folder.path("disk"));
            let mut back = vec![0; DATA - 512];
            volume.read(0, &mut back).unwrap();
            assert!(back == fs::read(folder.path("data")).unwrap(), "{more:?}, in memory: {memory}");
            volume.write(0, &mut vec![0; DATA - 512]).unwrap();
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup, qemu-img, nbdkit and nbdcopy: run `make test`")]
fn other_programs_read_our_volumes_without_us() {
    let folder = Folder::new();
    folder.format();
    let server = folder.serve(&[]);
    folder.run("nbdcopy", &["--threads=4", "--connections=4", "data", URI]);
    folder.run("nbdcopy", &["--threads=4", "--connections=4", URI, "ours"]);
    server.stop();
    assert_same(&folder, "ours");
    assert!(!folder.path("socket").exists());

    folder.run("cryptsetup", &["isLuks", "--type", "luks1", "disk"]);
    folder.run("cryptsetup", &["open", "--test-passphrase", "--key-file", "key", "disk"]);
    let secret = format!("secret,id=key,file={}", folder.text("key"));
    let image = format!("driver=luks,key-secret=key,file.filename={}", folder.text("disk"));
    folder.run("qemu-img", &["convert", "--object", &secret, "--image-opts", &image, "-O", "raw", "qemu"]);
    assert_same(&folder, "qemu");
    folder.run(
        "nbdkit",
        &[
            "--filter=luks",
            "file",
            "disk",
            &format!("passphrase=+{}", folder.text("key")),
            "--run",
            "nbdcopy \"$uri\" nbdkit",
        ],
    );
    assert_same(&folder, "nbdkit");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup, nbdkit, qemu-img and nbdcopy: run `make test`")]
fn volumes_of_cryptsetup_written_by_others_are_readable() {
    for (key_bits, hash) in [("512", "sha256"), ("256", "sha1"), ("512", "sha512")] {
        let folder = Folder::new();
        folder.luks_format(key_bits, hash);
        // nbdkit writes and nbdcrypt reads.
        folder.run(
            "nbdkit",
            &[
                "--filter=luks",
                "file",
                "disk",
                &format!("passphrase=+{}", folder.text("key")),
                "--run",
                "nbdcopy data \"$uri\"",
            ],
        );
        let server = folder.serve(&["--read-only"]);
        folder.run("nbdcopy", &[URI, "ours"]);
        assert_same(&folder, "ours");
        // The export is read-only for every client.
        assert!(folder.run("nbdinfo", &[URI]).contains("is_read_only: true"));
        assert!(!folder.try_run("nbdcopy", &["data", URI]).status.success());
        server.stop();
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs qemu-img and nbdcopy: run `make test`")]
fn volumes_that_qemu_writes_are_readable() {
    let folder = Folder::new();
    let secret = format!("secret,id=key,file={}", folder.text("key"));
    folder.run(
        "qemu-img",
        &["convert", "--object", &secret, "-O", "luks", "-o", "key-secret=key,iter-time=10", "data", "disk"],
    );
    let server = folder.serve(&["--page-cache"]);
    folder.run("nbdcopy", &[URI, "ours"]);
    assert_same(&folder, "ours");
    server.stop();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs qemu-img and qemu-io: run `make test`")]
fn qemu_img_and_its_luks_driver_agree_with_us() {
    for session in ["io-uring", "tokio"] {
        let folder = Folder::new();
        folder.format();
        let server = folder.serve(&["--session", session]);
        folder.run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", "data", URI]);
        let compared = folder.run("qemu-img", &["compare", "-f", "raw", "-F", "raw", "data", URI]);
        assert!(compared.contains("identical"), "{compared}");
        folder.run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", URI, "copy.qcow2"]);
        folder.run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "data", "copy.qcow2"]);
        // A single changed byte is detected.
        folder.run("qemu-io", &["-f", "raw", "-c", "write -P 1 5000000 1", URI]);
        assert!(!folder.try_run("qemu-img", &["compare", "-f", "raw", "-F", "raw", "data", URI]).status.success());
        folder.run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", "copy.qcow2", URI]);
        server.stop();
        let secret = format!("secret,id=key,file={}", folder.text("key"));
        let luks = format!("driver=luks,key-secret=key,file.filename={}", folder.text("disk"));
        let data = format!("driver=raw,file.driver=file,file.filename={}", folder.text("data"));
        let compared = folder.run("qemu-img", &["compare", "--object", &secret, "--image-opts", &luks, &data]);
        assert!(compared.contains("identical"), "{compared}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs fio: run `make test`")]
fn fio_verifies_what_it_wrote() {
    let folder = Folder::new();
    folder.format();
    let server = folder.serve(&[]);
    folder.run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            "--uri=nbd+unix:///?socket=socket",
            "--rw=randrw",
            "--bsrange=512-65536",
            "--bs_unaligned=1",
            "--iodepth=32",
            "--size=8m",
            "--verify=crc32c",
            "--verify_state_save=0",
        ],
    );
    server.stop();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup and nbdcopy: run `make test`")]
fn flushed_data_survives_a_killed_server() {
    let folder = Folder::new();
    folder.format();
    let mut server = folder.serve(&[]);
    folder.run("nbdcopy", &["--flush", "data", URI]);
    server.0.kill().unwrap();
    server.0.wait().unwrap();
    // The socket file of the killed server is still there and does not prevent a new start.
    let server = folder.serve(&[]);
    folder.run("nbdcopy", &[URI, "ours"]);
    assert_same(&folder, "ours");
    server.stop();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs nbdinfo: run `make test`")]
fn a_tcp_port_serves_as_a_socket_does() {
    let folder = Folder::new();
    folder.format();
    let mut child = Command::new(binary())
        .args(["serve", "--key-file", "key", "--listen", "127.0.0.1:0", "--name", "scratch", "disk"])
        .current_dir(folder.0.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let server = Server(child);
    assert!(address.starts_with("nbd://127.0.0.1:") && address.trim().ends_with("/scratch"), "{address}");
    assert_eq!(folder.run("nbdinfo", &["--size", address.trim()]).trim(), DATA.to_string());
    server.stop();
}

#[test]
fn a_connection_without_an_io_uring_is_served() {
    let folder = Folder::new();
    folder.format();
    let mut child = Command::new(binary())
        .args(["serve", "--session", "io-uring", "--key-file", "key", "--socket", "socket", "disk"])
        .current_dir(folder.0.path())
        .stdout(Stdio::piped())
        .stderr(File::create(folder.path("log")).unwrap())
        .spawn()
        .unwrap();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    let server = Server(child);
    // Five more files may be opened. The first connection takes three of them: the socket, the ring and the ring's event
    // descriptor. No ring is left for the others.
    let pid = server.0.id();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
    let limit = Some(open + 5);
    let files = rustix::process::Rlimit { current: limit, maximum: limit };
    rustix::process::prlimit(Some(Pid::from_child(&server.0)), rustix::process::Resource::Nofile, files).unwrap();
    let mut clients: Vec<_> = (0..3).map(|_| RawClient::new(connect(&folder.path("socket")))).collect();
    for (client, block) in clients.iter_mut().zip(1..) {
        client.enter("");
        assert_eq!(client.write(0, 4096 * u64::from(block), &[block; 4096]), 0);
    }
    for client in clients.iter_mut().rev() {
        for block in 1..=3_u8 {
            assert!(client.read(4096 * u64::from(block), 4096).unwrap() == [block; 4096], "block {block}");
        }
    }
    let log = fs::read_to_string(folder.path("log")).unwrap();
    assert_eq!(log.matches("no io_uring for this connection").count(), 2, "{log}");
    drop(clients);
    server.stop();
}

#[test]
fn format_and_serve_name_what_they_cannot_do() {
    let folder = Folder::new();
    let refused = |args: &[&str], words: &[&str]| {
        let output = folder.try_run("nbdcrypt", args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", told(&output));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for word in words {
            assert!(said.contains(word), "{args:?}: `{word}` is missing: {said}");
        }
        assert!(!said.contains("ThisIs-a-SecretPassword"));
    };
    refused(&["format", "--key-file", "key", "disk"], &["disk does not exist", "--size"]);
    refused(&["format", "--key-file", "none", "--size", "16M", "disk"], &["none", "No such file"]);
    refused(&["format", "--key-file", "key", "--size", "1M", "-i", "1", "disk"], &["at least"]);
    assert!(!folder.path("disk").exists(), "a file that could not be formatted is removed again");
    refused(&["format", "--key-file", "key", "data"], &["not blank", "--wipe"]);
    assert_same(&folder, "data");

    folder.format();
    let before = fs::read(folder.path("disk")).unwrap();
    refused(&["format", "--key-file", "key", "disk"], &["not blank", "LUKS1"]);
    fs::write(folder.path("other"), "another").unwrap();
    refused(
        &["serve", "--key-file", "other", "--socket", "socket", "disk"],
        &["no keyslot opens with this passphrase"],
    );
    refused(&["serve", "--key-file", "key", "--socket", "socket", "data"], &["no LUKS header"]);
    refused(
        &["serve", "--key-file", "key", "--socket", "socket", "--type", "plain", "disk"],
        &["it has 23 bytes, but 64 were"],
    );
    refused(&["dump", "data"], &["no LUKS header"]);
    assert_eq!(fs::read(folder.path("disk")).unwrap(), before);

    // The server does not remove other files at the socket's path.
    refused(&["serve", "--key-file", "key", "--socket", "data", "disk"], &["could not listen on data", "not a socket"]);
    assert_same(&folder, "data");
    fs::copy(folder.path("disk"), folder.path("copy")).unwrap();
    let server = folder.serve(&[]);
    refused(
        &["serve", "--key-file", "key", "--socket", "other-socket", "disk"],
        &["in use", "`nbdcrypt serve` serves it (process "],
    );
    refused(
        &["serve", "--key-file", "key", "--socket", "other-socket", "--header", "./disk", "disk"],
        &["--header names disk itself", "leave it out"],
    );
    // No key is needed to see that a port is taken, so nobody is asked for one.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    refused(&["serve", "--listen", &address, "copy"], &["could not listen on", &address]);
    refused(&["format", "--key-file", "key", "key"], &["too few for a volume", "the key file?"]);
    refused(&["serve", "--key-file", "key", "--socket", "socket", "copy"], &["another server's socket"]);
    assert!(folder.path("socket").exists());
    folder.run("nbdcrypt", &["dump", "disk"]);
    server.stop();
    // Wrong usage has an exit code of its own.
    assert_eq!(folder.try_run("nbdcrypt", &["serve", "disk"]).status.code(), Some(2));
    // With this option, `format` destroys the old content.
    folder.run(
        "nbdcrypt",
        &["format", "--wipe", "--type", "luks1", "--key-file", "key", "--pbkdf-force-iterations", "1000", "disk"],
    );
}

/// A server with data in memory handles SIGBUS. A SIGBUS that another process sends must still end it.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs a tmpfs in /dev/shm: run `make test`")]
fn a_sigbus_from_another_process_ends_the_server() {
    use std::os::unix::process::ExitStatusExt;
    let folder = Folder(tempfile::tempdir_in("/dev/shm").unwrap());
    fs::write(folder.path("key"), "ThisIs-a-SecretPassword").unwrap();
    fs::set_permissions(folder.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
    folder.format();
    let mut server = folder.serve(&[]);
    kill_process(Pid::from_child(&server.0), Signal::BUS).unwrap();
    assert_eq!(server.0.wait().unwrap().signal(), Some(Signal::BUS.as_raw()));
}

#[test]
fn a_new_volume_is_kept_if_standard_output_is_full() {
    let folder = Folder::new();
    let made = Command::new(binary())
        .args([
            "format",
            "--key-file",
            "key",
            "--size",
            "16M",
            "--type",
            "luks1",
            "--pbkdf-force-iterations",
            "1000",
            "disk",
        ])
        .current_dir(folder.0.path())
        .stdout(File::options().write(true).open("/dev/full").unwrap())
        .output()
        .unwrap();
    assert_eq!(made.status.code(), Some(1), "{}", told(&made));
    folder.run("nbdcrypt", &["dump", "disk"]);
}

#[test]
fn the_help_names_every_command() {
    let folder = Folder::new();
    let help = folder.run("nbdcrypt", &["--help"]);
    for command in ["demo", "provision", "up", "down", "plan", "status", "format", "serve", "dump"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(command)), "{command} in {help}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_demo_does_the_whole_job_and_leaves_nothing() {
    let folder = Folder::new();
    let output = Command::new(binary()).arg("demo").env("TMPDIR", folder.0.path()).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    let left: Vec<_> = fs::read_dir(folder.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

//! Error messages: each names the reason and what to do.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use harness::luks::Workbench;
use harness::nbdcrypt::{binary, told};
use rustix::process::{Pid, Signal, kill_process};

const QUICK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// Makes a volume `disk` that the file `key` opens.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    fs::set_permissions(bench.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
    bench.nbdcrypt(&[&["format", "--key-file", "key", "--size", "32M", "disk"], &QUICK[..]].concat());
    bench
}

fn run(bench: &Workbench, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(arguments).current_dir(bench.path(".")).stdin(Stdio::null()).output().unwrap()
}

/// Runs nbdcrypt, which must exit with `code`, and returns its standard error.
#[track_caller]
fn said(bench: &Workbench, arguments: &[&str], code: i32) -> String {
    let output = run(bench, arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", told(&output));
    String::from_utf8(output.stderr).unwrap()
}

/// A server that has printed its addresses.
struct Server {
    child: Child,
    addresses: Vec<String>,
}

impl Server {
    fn start(bench: &Workbench, arguments: &[&str], exports: usize) -> Self {
        let mut child = Command::new(binary())
            .args(["serve", "--key-file", "key"])
            .args(arguments)
            .current_dir(bench.path("."))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let addresses: Vec<String> = lines.take(exports).map(Result::unwrap).collect();
        assert_eq!(addresses.len(), exports, "the server did not start");
        Self { child, addresses }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_error_says_why_serve_cannot_listen() {
    let bench = workbench();
    fs::write(bench.path("file"), "text").unwrap();
    fs::create_dir(bench.path("folder")).unwrap();
    std::os::unix::fs::symlink("nowhere", bench.path("link")).unwrap();
    let long = "x".repeat(120);
    for (arguments, words, code) in [
        (["--socket", "file"], &["file: it is a regular file, and not a socket", "rm file"][..], 1),
        (["--socket", "folder"], &["it is a folder"], 1),
        (["--socket", "link"], &["it is a symbolic link"], 1),
        (["--socket", "none/socket"], &["mkdir -p none"], 1),
        (["--socket", "file/socket"], &["file is not a folder"], 1),
        (["--socket", &long], &["at most 107"], 1),
        (["--socket", "/proc/socket"], &["the filesystem of /proc holds no sockets"], 1),
        (["--listen", "10809"], &["127.0.0.1:10809", " :10809"], 2),
        (["--listen", "localhost"], &["localhost:10809"], 2),
        (["--listen", "::1:10809"], &["[::1]:10809"], 2),
        (["--listen", "localhost:nbd"], &["`nbd` is not a port"], 2),
        (["--listen", "no-such-host.invalid:10809"], &["no-such-host.invalid was not resolved"], 1),
        (["--listen", "192.0.2.1:10809"], &["192.0.2.1 is not an address of this machine"], 1),
    ] {
        let said = said(&bench, &[&["serve", "--key-file", "key", "disk"], &arguments[..]].concat(), code);
        for word in words {
            assert!(said.contains(word), "{arguments:?}: {word:?} in {said}");
        }
        assert!(!said.contains("os error"), "{said}");
    }
    // The file in the way is still there.
    assert_eq!(fs::read(bench.path("file")).unwrap(), b"text");
    assert!(fs::symlink_metadata(bench.path("link")).unwrap().file_type().is_symlink());
}

#[test]
fn serve_listens_on_every_address_of_a_name() {
    let bench = workbench();
    for (wanted, shown) in
        [("localhost:0", "nbd://localhost:"), (":0", "nbd://localhost:"), ("[::1]:0", "nbd://[::1]:")]
    {
        if wanted.contains("::1") && std::net::TcpListener::bind("[::1]:0").is_err() {
            continue;
        }
        let server = Server::start(&bench, &["--listen", wanted, "disk"], 1);
        let address = &server.addresses[0];
        let port = address.strip_prefix(shown).unwrap_or_else(|| panic!("{wanted}: {address}")).trim_end_matches('/');
        let hosts: &[&str] = if wanted.contains("::1") { &["::1"] } else { &["127.0.0.1", "localhost"] };
        for host in hosts {
            let client = std::net::TcpStream::connect((*host, port.parse().unwrap()));
            assert!(client.is_ok(), "{wanted}, {host}: {client:?}");
        }
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let told = said(&bench, &["serve", "-d", "key", "disk", "--listen", &format!("localhost:{port}")], 1);
    assert!(told.contains("another program listens there") && told.contains(&format!("sport = :{port}")), "{told}");
}

/// Both files exist with their modes when the address is printed, and are gone at the end.
#[test]
fn serve_makes_its_socket_and_pid_file_as_asked() {
    let bench = workbench();
    let group = fs::metadata(bench.path("key")).unwrap().gid().to_string();
    let listen = ["--socket", "socket", "--socket-mode", "0660", "--socket-group", &group, "--pid-file", "pid", "disk"];
    let mut server = Server::start(&bench, &listen, 1);
    assert_eq!(fs::metadata(bench.path("socket")).unwrap().mode() & 0o777, 0o660);
    assert_eq!(fs::read_to_string(bench.path("pid")).unwrap(), format!("{}\n", server.child.id()));

    let second = ["serve", "-d", "key", "disk", "--socket", "second", "--pid-file"];
    let taken = said(&bench, &[&second[..], &["pid"]].concat(), 1);
    assert!(taken.contains("pid is the pid file of a server that runs"), "{taken}");
    let precious = fs::read(bench.path("key")).unwrap();
    let other = said(&bench, &[&second[..], &["key"]].concat(), 1);
    assert!(other.contains("key exists and is not a pid file: choose another path"), "{other}");
    assert_eq!(fs::read(bench.path("key")).unwrap(), precious);

    kill_process(Pid::from_child(&server.child), Signal::TERM).unwrap();
    assert!(server.child.wait().unwrap().success());
    assert!(!bench.path("pid").exists() && !bench.path("socket").exists());

    for (option, value, words) in [
        ("--socket-mode", "0888", "a mode is an octal number up to 0777"),
        ("--socket-group", "no such group", "`getent group` lists the groups"),
    ] {
        let told = said(&bench, &["serve", "-d", "key", "disk", "--socket", "socket", option, value], 2);
        assert!(told.contains(words), "{told}");
    }
    let told = said(&bench, &["serve", "-d", "key", "disk", "--listen", "127.0.0.1:0", "--socket-mode", "0660"], 2);
    assert!(told.contains("cannot be used with"), "{told}");
}

/// The NBD project's uri.md: the socket's path is percent-encoded. The path is absolute, because a client may have another
/// working directory.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs nbdinfo: run `make test`")]
fn the_printed_address_works_from_any_folder() {
    let bench = workbench();
    fs::create_dir(bench.path("a b&c=d?e#f%41")).unwrap();
    for socket in ["socket", "./a b&c=d?e#f%41/sock ä"] {
        let server = Server::start(&bench, &["--socket", socket, "--name", "my disk?", "disk"], 1);
        let address = &server.addresses[0];
        assert!(address.starts_with("nbd+unix:///my%20disk%3F?socket=/"), "{address}");
        let info = Command::new("nbdinfo").args(["--size", address]).current_dir("/").output().unwrap();
        assert!(info.status.success(), "{address}: {}", told(&info));
        assert!(fs::symlink_metadata(bench.path(socket)).unwrap().file_type().is_socket());
    }
}

/// If a key file differs from the passphrase only at its end, for example by a newline, nbdcrypt refuses it and names the
/// difference.
#[test]
fn a_key_file_that_differs_at_its_end_is_explained() {
    let bench = workbench();
    let secret = fs::read(bench.path("key")).unwrap();
    for (name, end) in [("newline", &b"\n"[..]), ("crlf", b"\r\n")] {
        fs::write(bench.path(name), [&secret[..], end].concat()).unwrap();
    }
    fs::write(bench.path("other"), "another\n").unwrap();
    bench.nbdcrypt(&[&["key", "add", "disk", "-d", "key", "--new-key-file", "other"], &QUICK[..]].concat());
    fs::write(bench.path("bare"), "another").unwrap();
    let before = fs::read(bench.path("disk")).unwrap();
    let add = [&["key", "add", "disk", "--new-key-file", "key", "-d"][..]].concat();
    let change = [&["key", "change", "disk", "--new-key-file", "key", "-d"][..]].concat();
    for command in [
        &["serve", "disk", "--socket", "socket", "-d"][..],
        &["key", "test", "disk", "-d"],
        &["key", "remove", "disk", "-d"],
        &add,
        &change,
    ] {
        for (file, words) in [
            ("newline", &["newline without the newline at its end would open keyslot 0", "head -c -1 newline"][..]),
            ("crlf", &["keyslot 0", "head -c -2 crlf"]),
            ("bare", &["bare with a newline at its end would open keyslot 1"]),
        ] {
            let said = said(&bench, &[command, &[file]].concat(), 1);
            for word in words {
                assert!(said.contains(word), "{command:?}, {file}: {word:?} in {said}");
            }
            assert!(!said.contains("ThisIs-a-SecretPassword") && !said.contains("another"), "{said}");
        }
    }
    assert!(fs::read(bench.path("disk")).unwrap() == before, "a passphrase that is not exact changes nothing");
    fs::write(bench.path("wrong"), "quite wrong\n").unwrap();
    let wrong = said(&bench, &["key", "test", "disk", "-d", "wrong"], 1);
    assert!(!wrong.contains("would open"), "{wrong}");
    let proof = said(&bench, &["key", "remove", "disk", "--key-slot", "1", "-d", "newline"], 1);
    assert!(proof.contains("would open keyslot 0"), "{proof}");
}

/// nbdcrypt does not ask for a passphrase for a disk that it cannot use. These runs have no terminal, and the errors name
/// the disk's fault and not the missing passphrase.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs mkfs.ext4: run `make test`")]
fn the_disk_is_checked_before_the_passphrase_prompt() {
    let bench = workbench();
    bench.disk("blank", 20 << 20);
    bench.disk("filesystem", 20 << 20);
    bench.run("mkfs.ext4", ["-q", "filesystem"]);
    let _server = Server::start(&bench, &["--socket", "socket", "disk"], 1);
    let serve = ["serve", "--socket", "other"];
    for (command, disk, words) in [
        (&serve[..], "none", "none does not exist"),
        (&serve, "blank", "no LUKS header"),
        (&serve, "disk", "disk is in use"),
        (&["format"], "none", "none does not exist"),
        (&["format"], "disk", "disk is in use"),
        (&["format"], "filesystem", "ext4"),
        (&["format", "--size", "1G"], "blank", "exists already"),
        (&["format", "--type", "luks1", "--label", "x"], "blank", "LUKS1 has no --label"),
        (&["key", "add"], "none", "none does not exist"),
        (&["key", "add"], "blank", "no LUKS header"),
        (&["key", "add"], "disk", "disk is in use"),
        (&["key", "change"], "blank", "no LUKS header"),
        (&["key", "remove"], "disk", "disk is in use"),
        (&["key", "test"], "none", "none does not exist"),
        (&["key", "test"], "blank", "no LUKS header"),
        (&["key", "test", "--key-slot", "5"], "disk", "no key in keyslot 5"),
    ] {
        let said = said(&bench, &[command, &[disk]].concat(), 1);
        assert!(said.contains(words) && !said.contains("terminal"), "{command:?} {disk}: {said}");
    }
    drop(_server);
    let in_the_way = said(&bench, &["serve", "--socket", "filesystem", "disk"], 1);
    assert!(
        in_the_way.contains("filesystem: it is a regular file") && !in_the_way.contains("terminal"),
        "{in_the_way}"
    );
    for (command, words) in [
        (&["key", "add", "disk", "--key-slot", "0"][..], "keyslot 0 holds a key already"),
        (&["key", "add", "disk", "--key-slot", "40"], "keyslots 0 to 31"),
        (&["key", "change", "disk", "--key-slot", "7"], "no key in keyslot 7"),
        (&["key", "remove", "disk", "--key-slot", "0"], "last key"),
    ] {
        let said = said(&bench, command, 1);
        assert!(said.contains(words) && !said.contains("terminal"), "{command:?}: {said}");
    }
}

/// Anyone may choose labels, token types, flags and paths. None of them may move the cursor, forge a line or reverse the
/// direction of the text.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn control_characters_in_names_are_escaped() {
    let evil = "evil\n0  normal\u{1b}[31m\u{202e}\u{200b}";
    let bench = workbench();
    bench.run("cryptsetup", ["config", "--label", "l\u{1b}[31m\u{202e}\n2", "--subsystem", "s\u{2066}", "disk"]);
    let token = serde_json::json!({ "type": evil, "keyslots": ["0"] });
    fs::write(bench.path("token"), token.to_string()).unwrap();
    bench.run("cryptsetup", ["token", "import", "--json-file", "token", "disk"]);
    fs::copy(bench.path("disk"), bench.path(evil)).unwrap();
    for arguments in [
        &["dump", evil][..],
        &["dump", "--json", evil],
        &["token", "list", evil],
        &["token", "list", "--json", evil],
        &["key", "list", evil],
        &["key", "test", evil, "-d", "key"],
        &["key", "test", evil, "-d", "key", "--json"],
        &["key", "test", evil, "-d", "token"],
        &["header", "backup", evil, "evil\nbackup\u{202e}"],
        &["header", "repair", evil],
        &["header", "set", evil, "--label", "x"],
        &["key", "priority", evil, "--key-slot", "0", "prefer"],
        &["key", "add", evil, "-d", "key", "--new-key-file", "token", QUICK[0], QUICK[1], QUICK[2], QUICK[3]],
        &["format", evil, "-d", "key"],
        &["serve", evil, "-d", "disk", "--socket", "socket"],
        &["dump", "no\nsuch\u{202e}"],
        &["plan", "no\nsuch\u{202e}.toml"],
        &["status", "no\nsuch\u{202e}"],
    ] {
        let output = run(&bench, arguments);
        let all = [String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap()].concat();
        assert!(!all.is_empty(), "{arguments:?}");
        for letter in ['\u{1b}', '\u{202e}', '\u{2066}', '\u{200b}', '\r'] {
            assert!(!all.contains(letter), "{arguments:?}: {letter:?} in {all:?}");
        }
        assert!(
            !all.lines().any(|line| line.starts_with("0  normal") || line.starts_with("such")),
            "{arguments:?}: {all}"
        );
    }
}

/// An error that quotes its cause does not repeat the cause at the end, and does not show the C library's number.
#[test]
fn no_error_repeats_itself() {
    let bench = workbench();
    fs::create_dir(bench.path("folder")).unwrap();
    fs::write(bench.path("text"), vec![b'x'; 1 << 20]).unwrap();
    fs::write(bench.path("bad.toml"), "[volume]\n").unwrap();
    for arguments in [
        &["dump", "none"][..],
        &["dump", "folder"],
        &["dump", "text"],
        &["key", "list", "none"],
        &["key", "list", "text"],
        &["key", "test", "disk", "-d", "none"],
        &["key", "test", "disk", "-d", "folder"],
        &["key", "test", "disk", "-d", "text"],
        &["key", "remove", "disk", "-d", "text"],
        &["key", "add", "none", "-d", "key"],
        &["token", "list", "none"],
        &["token", "export", "disk", "--token-id", "3"],
        &["token", "import", "disk", "--json-file", "none"],
        &["header", "backup", "none", "b"],
        &["header", "backup", "disk", "none/b"],
        &["header", "backup", "disk", "disk"],
        &["header", "restore", "disk", "none"],
        &["header", "repair", "none"],
        &["header", "repair", "text"],
        &["header", "set", "text", "--label", "x"],
        &["serve", "none", "-d", "key", "--socket", "s"],
        &["serve", "disk", "-d", "key", "--socket", "none/s"],
        &["serve", "disk", "-d", "key", "--header", "none", "--socket", "s"],
        &["format", "folder", "-d", "key"],
        &["format", "none/disk", "--size", "32M", "-d", "key", QUICK[0], QUICK[1], QUICK[2], QUICK[3]],
        &["format", "text", "-d", "key"],
        &["plan", "none.toml"],
        &["plan", "bad.toml"],
        &["up", "none.toml"],
        &["down", "none.toml"],
    ] {
        let said = said(&bench, arguments, 1);
        assert!(!said.contains("os error"), "{arguments:?}: {said}");
        let line =
            said.lines().rfind(|line| !line.contains("WARN")).unwrap_or_default().trim_start_matches("nbdcrypt: ");
        let mut parts: Vec<&str> = line.split(": ").collect();
        let all = parts.len();
        parts.sort_unstable();
        parts.dedup();
        assert_eq!(parts.len(), all, "{arguments:?}: {said}");
    }
}

/// A control group's memory limit does not mean that the header is damaged.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, unshare and cryptsetup: run `make test`")]
fn a_control_group_limit_below_argon2s_memory_is_named() {
    let bench = workbench();
    bench.disk("large", 20 << 20);
    let cost = ["--pbkdf", "argon2id", "--pbkdf-memory", "262144", "--pbkdf-force-iterations", "4"];
    bench.run(
        "cryptsetup",
        [&["luksFormat", "-q", "--type", "luks2", "--key-file", "key"], &cost[..], &["large"]].concat(),
    );
    let script = format!(
        "mount -t tmpfs none /sys/fs/cgroup && echo 67108864 > /sys/fs/cgroup/memory.max && exec {} key test large -d key",
        binary().display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).current_dir(bench.path(".")).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = told(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for words in ["keyslot 0 needs 256 MiB of memory", "the control group / allows 64 MiB", "/sys/fs/cgroup/memory.max"]
    {
        assert!(said.contains(words), "{words:?} in {said}");
    }
    assert!(!said.contains("trust"), "{said}");
    assert!(bench.nbdcrypt(&["key", "test", "large", "-d", "key"]).contains("opens keyslot 0"));
}

#[test]
fn sizes_have_a_unit_beside_them() {
    let bench = Workbench::new();
    let arguments = ["format", "--key-file", "key", "--size", "32M", "disk"];
    let told = bench.nbdcrypt(&[&arguments[..], &QUICK[..]].concat());
    assert!(told.contains("16777216 bytes (16 MiB) of 33554432 bytes (32 MiB) for data"), "{told}");
    let told = bench.nbdcrypt(&["header", "backup", "disk", "backup"]);
    assert!(told.contains("16777216 bytes (16 MiB)"), "{told}");
    fs::write(bench.path("huge"), vec![7; (8 << 20) + 1]).unwrap();
    let told = said(&bench, &["key", "test", "disk", "-d", "huge"], 1);
    assert!(told.contains("8388608 bytes (8 MiB)"), "{told}");
}

/// Writes a configuration of the volume `disk` with a filesystem, and a run folder, both in the bench's folder.
fn configuration(bench: &Workbench, filesystem: &str) -> Vec<String> {
    let path = |name: &str| bench.path(name).canonicalize().unwrap_or_else(|_| bench.path(name));
    let config = format!(
        "[volume]\ndevices = [{:?}]\n[key]\nsource = \"file\"\npath = {:?}\n[attach]\nmethod = \"fuse\"\n\
         [filesystem]\ntype = \"{filesystem}\"\nmountpoint = {:?}\n",
        path("disk"),
        path("key"),
        path("mnt"),
    );
    fs::write(bench.path("scratch.toml"), config).unwrap();
    let run: PathBuf = bench.path("run");
    ["--run-dir", run.to_str().unwrap(), "scratch.toml"].map(str::to_owned).to_vec()
}

fn on_config(bench: &Workbench, verb: &str, options: &[String]) -> Output {
    let mut arguments = vec![verb];
    arguments.extend(options.iter().map(String::as_str));
    run(bench, &arguments)
}

/// Returns the outlook of a step, as `plan` prints it.
fn outlook(bench: &Workbench, step: &str) -> String {
    let mut options = configuration(bench, "ext4");
    options.push("--json".to_owned());
    let output = on_config(bench, "plan", &options);
    let steps: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let step = steps.as_array().unwrap().iter().find(|found| found["step"] == step).unwrap();
    step["outlook"].as_str().unwrap().to_owned()
}

/// `plan` reports a step as done only if it is done. If the disk and the volume exist, the volume must still be opened.
#[test]
fn plan_calls_done_only_what_is_done() {
    let bench = workbench();
    for step in ["mountpoint", "disk", "secret", "volume", "device", "mount"] {
        assert_eq!(outlook(&bench, step), "to do", "{step}");
    }
    // Only the secret shows whether the volume is blank.
    assert_eq!(outlook(&bench, "filesystem"), "if needed");
    assert_eq!(outlook(&bench, "header"), "done already");
}

/// A folder that exists is ready only once nothing can be written into it. A file is not a folder.
#[test]
fn plan_checks_what_is_at_the_mountpoint() {
    let bench = workbench();
    let mountpoint = bench.path("mnt");
    fs::create_dir(&mountpoint).unwrap();
    assert_eq!(outlook(&bench, "mountpoint"), "to do");
    // This is how `up` protects a folder where the flag for immutable cannot be set.
    fs::set_permissions(&mountpoint, fs::Permissions::from_mode(0o000)).unwrap();
    let seen = outlook(&bench, "mountpoint");
    assert!(["done already", "if needed"].contains(&seen.as_str()), "only root may look: {seen}");
    fs::set_permissions(&mountpoint, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_dir(&mountpoint).unwrap();
    fs::write(&mountpoint, "text").unwrap();
    assert_eq!(outlook(&bench, "mountpoint"), "not possible");
    let said = told(&on_config(&bench, "plan", &configuration(&bench, "ext4")));
    assert!(said.contains("mnt is not a folder, so nothing can be mounted there"), "{said}");
}

/// `plan` reports problems that `up` would meet only after it has made files.
#[test]
fn plan_checks_the_key_file_and_mkfs() {
    let bench = workbench();
    fs::write(bench.path("full"), fs::read(bench.path("key")).unwrap()).unwrap();
    fs::write(bench.path("key"), "").unwrap();
    assert_eq!(outlook(&bench, "secret"), "not possible");
    fs::remove_file(bench.path("key")).unwrap();
    assert_eq!(outlook(&bench, "secret"), "not possible");
    fs::rename(bench.path("full"), bench.path("key")).unwrap();
    fs::set_permissions(bench.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(outlook(&bench, "secret"), "to do");
    // There is no such mkfs. A volume that exists needs none.
    let options = configuration(&bench, "nosuchfs");
    assert!(on_config(&bench, "plan", &options).status.success());
    fs::remove_file(bench.path("disk")).unwrap();
    fs::File::create(bench.path("disk")).unwrap().set_len(32 << 20).unwrap();
    let said = told(&on_config(&bench, "plan", &options));
    assert!(said.contains("the program mkfs.nosuchfs is not installed"), "{said}");
    assert!(said.contains("make a new LUKS2 volume on"), "{said}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and setpriv: run `make test`")]
fn a_user_without_permission_is_told_who_has_it() {
    let bench = workbench();
    let path = |name: &str| bench.path(name).canonicalize().unwrap().display().to_string();
    fs::set_permissions(bench.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    // Others may run this copy, wherever the program was built.
    fs::copy(binary(), bench.path("program")).unwrap();
    fs::copy(bench.path("disk"), bench.path("open")).unwrap();
    fs::write(bench.path("secret"), "secret").unwrap();
    fs::set_permissions(bench.path("disk"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(bench.path("open"), fs::Permissions::from_mode(0o644)).unwrap();
    for arguments in [
        &["dump", "disk"][..],
        &["key", "list", "disk"],
        &["token", "list", "disk"],
        &["header", "backup", "open", "new"],
        &["header", "repair", "open"],
        &["key", "test", "open", "-d", "key"],
        &["format", "--size", "32M", "new", "-d", "secret", QUICK[0], QUICK[1], QUICK[2], QUICK[3]],
        &["format", "open", "-d", "secret"],
    ] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", &path("program")]).args(arguments);
        let output = command.current_dir(bench.path(".")).stdin(Stdio::null()).output().unwrap();
        let said = told(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains("as root") && !said.contains("os error"), "{arguments:?}: {said}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE, mkfs.xfs and nbdcopy: run `make test`")]
fn blocks_smaller_than_sectors_are_explained() {
    let bench = Workbench::new();
    fs::set_permissions(bench.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
    // xfs needs 300 MiB.
    let format = ["format", "--key-file", "key", "--size", "400M", "--sector-size", "4096", "disk"];
    bench.nbdcrypt(&[&format[..], &QUICK[..]].concat());
    bench.disk("image", 320 << 20);
    bench.run("mkfs.xfs", ["-q", "-s", "size=512", "image"]);
    let server = Server::start(&bench, &["--socket", "socket", "disk"], 1);
    bench.run("nbdcopy", ["image", &server.addresses[0]]);
    let _ = Command::new("kill").arg(server.child.id().to_string()).status();
    drop(server);
    let options = configuration(&bench, "xfs");
    let output = on_config(&bench, "up", &options);
    let said = told(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("xfs filesystem in the volume has blocks of 512 bytes"), "{said}");
    assert!(said.contains("sector-size = 512"), "{said}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and FUSE: run `make test`")]
fn an_unknown_filesystem_type_is_not_called_a_missing_package() {
    let bench = workbench();
    let output = on_config(&bench, "up", &configuration(&bench, "ext5"));
    let said = told(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("mkfs.ext5") && said.contains("is `ext5` the right name"), "{said}");
    assert!(!said.contains("util-linux") && !said.contains("apt"), "{said}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and mkfs.ext4: run `make test`")]
fn the_holder_of_a_lazily_unmounted_filesystem_is_named() {
    let bench = workbench();
    let options = configuration(&bench, "ext4");
    let up = on_config(&bench, "up", &options);
    assert!(up.status.success(), "{}", told(&up));
    fs::write(bench.path("mnt/file"), "text").unwrap();
    let mut holder =
        Command::new("sleep").arg("600").stdin(fs::File::open(bench.path("mnt/file")).unwrap()).spawn().unwrap();
    bench.run("umount", ["-l", "mnt"]);
    let down = on_config(&bench, "down", &options);
    let said = told(&down);
    holder.kill().unwrap();
    holder.wait().unwrap();
    let after = on_config(&bench, "down", &options);
    assert_eq!(down.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("process {} (sleep)", holder.id())) && said.contains("umount -l"), "{said}");
    assert!(after.status.success(), "{}", told(&after));
}

//! `nbdcrypt serve` and the processes around it: who gives it its sockets, for whom it runs, and with whom it ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use harness::luks::Workbench;
use harness::nbd::{RawClient, connect};
use harness::nbdcrypt::{binary, interruptible, told};
use rustix::process::{Pid, Signal, kill_process};

/// The longest that a test waits for a process.
const PATIENCE: Duration = Duration::from_secs(60);
const SERVE: [&str; 4] = ["serve", "--key-file", "key", "disk"];

/// Makes a volume `disk` of 16 MiB that the file `key` opens, and a folder `tmp` for temporary files.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    fs::set_permissions(bench.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
    let format = ["format", "--key-file", "key", "--size", "32M", "disk"];
    bench.nbdcrypt(&[&format[..], &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]].concat());
    fs::create_dir(bench.path("tmp")).unwrap();
    bench
}

/// The size of the volume that [`workbench`] makes.
fn size(bench: &Workbench) -> u64 {
    (32 << 20) - offset(bench)
}

fn offset(bench: &Workbench) -> u64 {
    let dump: serde_json::Value = serde_json::from_str(&bench.nbdcrypt(&["dump", "--json", "disk"])).unwrap();
    let segment = dump.pointer("/segments/0/offset").or_else(|| dump.pointer("/metadata/segments/0/offset"));
    segment.unwrap_or_else(|| panic!("{dump}")).as_str().unwrap().parse().unwrap()
}

/// A process that is killed if the test fails.
struct Running(Child);

impl Running {
    /// Sends SIGTERM and waits.
    fn stop(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        self.0.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// The service manager's side of sd_notify(3).
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(bench: &Workbench) -> Self {
        let path = bench.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, path }
    }

    #[track_caller]
    fn expect(&self, message: &str) {
        let mut bytes = [0; 1024];
        let len = self.socket.recv(&mut bytes).expect("the server notifies its manager");
        let text = String::from_utf8_lossy(&bytes[..len]);
        assert!(text.lines().any(|line| line == message), "{text}");
    }
}

/// Returns a command that starts `nbdcrypt serve` as a service manager does, with two open files as the descriptors 3 and 4.
fn activated(bench: &Workbench, three: impl Into<OwnedFd>, four: impl Into<OwnedFd>, options: &[&str]) -> Command {
    // A shell makes 3 and 4 of 0 and 1, so that no other child of this process inherits the files.
    let script = "exec 3<&0 4<&1 </dev/null >out
        export LISTEN_PID=${LISTEN_PID:-$$} LISTEN_FDS=${LISTEN_FDS:-2} LISTEN_FDNAMES=first:second
        exec \"$0\" \"$@\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).arg(binary()).args(SERVE).args(options).current_dir(bench.path("."));
    shell.stdin(Stdio::from(three.into())).stdout(Stdio::from(four.into())).stderr(Stdio::piped());
    shell
}

/// Uses the volume over a connection.
fn is_served<S: std::io::Read + std::io::Write>(stream: S, sign: u8) -> bool {
    let mut client = RawClient::new(stream);
    client.enter("");
    client.write(0, 4096, &[sign; 512]) == 0 && client.read(4096, 512) == Ok(vec![sign; 512])
}

#[test]
fn sockets_of_a_service_manager_are_served() {
    let bench = workbench();
    let manager = Manager::new(&bench);
    for options in [&[][..], &["--print-uri"]] {
        let _ = fs::remove_file(bench.path("socket"));
        let (unix, tcp) =
            (UnixListener::bind(bench.path("socket")).unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = tcp.local_addr().unwrap();
        // A client can connect before the server runs.
        let early = connect(&bench.path("socket"));
        let mut command = activated(&bench, unix, tcp, options);
        let server = Running(command.env("NOTIFY_SOCKET", &manager.path).spawn().unwrap());
        // The last copies of the sockets in this process.
        drop(command);
        manager.expect("READY=1");
        let uris = fs::read_to_string(bench.path("out")).unwrap();
        match options {
            [] => assert_eq!(uris, ""),
            _ => {
                let at = bench.path("socket").display().to_string();
                assert_eq!(uris, format!("nbd+unix:///?socket={at}\nnbd://{address}/\n"));
            }
        }
        assert!(is_served(early, 1));
        assert!(is_served(connect(&bench.path("socket")), 2));
        assert!(is_served(TcpStream::connect(address).unwrap(), 3));
        let status = server.stop();
        assert!(status.success(), "{status}");
        manager.expect("STOPPING=1");
        assert!(bench.path("socket").exists(), "the socket belongs to the service manager");
        assert!(UnixStream::connect(bench.path("socket")).is_err(), "nobody listens any more");
    }
}

#[test]
fn an_unfit_socket_of_a_service_manager_is_named() {
    let bench = workbench();
    let listener = |name: &str| UnixListener::bind(bench.path(name)).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let cases: [(OwnedFd, String); 6] = [
        (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "a UDP socket".into()),
        (UnixDatagram::unbound().unwrap().into(), "a unix datagram socket".into()),
        (UnixStream::pair().unwrap().0.into(), "a unix stream socket that does not listen".into()),
        (connection.into(), "a TCP socket that does not listen".into()),
        (File::open(bench.path("disk")).unwrap().into(), format!("the open file {}", bench.path("disk").display())),
        (std::io::pipe().unwrap().0.into(), "pipe:[".into()),
    ];
    for (place, (four, what)) in cases.into_iter().enumerate() {
        let output = activated(&bench, listener(&place.to_string()), four, &[]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let words = format!("file descriptor 4 (\"second\") from the service manager cannot be used: it is {what}");
        assert!(said.contains(&words) && said.contains("Accept=no"), "{said}");
    }
    let with = |name: &str, variable: (&str, &str), options: &[&str]| {
        let mut command = activated(&bench, listener(name), listener(&format!("{name}-")), options);
        command.env(variable.0, variable.1).output().unwrap()
    };
    for (name, count, words) in
        [("a", "3", "file descriptor 5 from the service manager cannot be used: it is not open"), ("b", "x", "\"x\"")]
    {
        let output = with(name, ("LISTEN_FDS", count), &[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains(words), "{}", told(&output));
    }
    // The variables of another process, such as a shell that a service runs, mean nothing.
    let output = with("c", ("LISTEN_PID", "1"), &[]);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing to listen on"), "{}", told(&output));
    for option in [["--socket", "own"], ["--listen", "127.0.0.1:0"], ["--run", "true"]] {
        let output = with(&format!("d{}", option[0]), ("TMPDIR", "/tmp"), &option);
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        let words = format!("leave {} out", option[0]);
        assert!(String::from_utf8_lossy(&output.stderr).contains(&words), "{}", told(&output));
    }
    let output = with("e", ("TMPDIR", "/tmp"), &["--socket-mode", "0660"]);
    assert_eq!(output.status.code(), Some(2), "the socket unit decides: {}", told(&output));
}

/// libnbd's programs start the server with a socket. Nothing is mixed into the data that nbdcopy writes to standard output.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs nbdinfo, nbdcopy and python3-libnbd: run `make test`")]
fn libnbd_starts_the_server_with_a_socket() {
    let bench = workbench();
    let binary = binary().to_str().unwrap();
    let server = [&["[", binary], &SERVE[..], &["]"]].concat();
    let size = size(&bench);
    assert_eq!(bench.run("nbdinfo", [&["--size", "--"], &server[..]].concat()).trim(), size.to_string());
    let data: Vec<u8> = (0..size).map(|at| (at / 512 % 251) as u8).collect();
    fs::write(bench.path("data"), &data).unwrap();
    bench.run("nbdcopy", [&["--flush", "--", "data"], &server[..]].concat());
    let script = "exec 3>copy; exec nbdcopy -- \"$@\" - >&3";
    bench.run("sh", [&["-c", script, "sh"], &server[..]].concat());
    assert!(fs::read(bench.path("copy")).unwrap() == data);
    // The handle is closed with SIGTERM for the server, and waits for its end.
    let script = "import nbd, sys
h = nbd.NBD()
h.connect_systemd_socket_activation(sys.argv[1:])
h.pwrite(b'x' * 4096, 8192)
h.flush()
print(h.get_size(), bytes(h.pread(8193, 8192)).count(b'x'))
h.shutdown()";
    let said = bench.run("/usr/bin/python3", [&["-c", script, binary], &SERVE[..]].concat());
    let expected = 4096 + data[12288..8192 + 8193].iter().filter(|byte| **byte == b'x').count();
    assert_eq!(said, format!("{size} {expected}\n"));
}

/// Two sockets with names. A network namespace of its own makes sure that the port is free.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, systemd-socket-activate, ip and nbdinfo: run `make test`")]
fn systemd_socket_activate_passes_two_sockets() {
    let bench = workbench();
    let size = size(&bench);
    let script = r#"
ip link set lo up
systemd-socket-activate --listen="$PWD/socket" --listen=127.0.0.1:10809 --fdname=local:remote "$0" "$@" > out &
manager=$!
trap 'kill -KILL $manager 2> /dev/null || true' EXIT
for attempt in $(seq 600); do test ! -e socket || break; sleep 0.1; done
nbdinfo --size "nbd+unix:///?socket=socket"
nbdinfo --size nbd://127.0.0.1
kill $manager
wait $manager
test -e socket
cat out
"#;
    let arguments = ["--net", "sh", "-ec", script, binary().to_str().unwrap()];
    let said = bench.run("unshare", [&arguments[..], &SERVE[..]].concat());
    assert_eq!(said, format!("{size}\n{size}\n"));
    // A UDP port is not a place for NBD. The error has the name of the socket.
    let script = r#"
ip link set lo up
systemd-socket-activate --datagram --listen=127.0.0.1:10809 --fdname=remote "$0" "$@" &
manager=$!
trap 'kill -KILL $manager 2> /dev/null || true' EXIT
for attempt in $(seq 600); do
    if ! kill -0 $manager 2> /dev/null; then break; fi
    bash -c 'echo > /dev/udp/127.0.0.1/10809' 2> /dev/null || true
    sleep 0.1
done
if wait $manager; then exit 9; fi
"#;
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "sh", "-ec", script]).arg(binary()).args(SERVE).current_dir(bench.path("."));
    let output = unshare.output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("file descriptor 3 (\"remote\") from the service manager cannot be used: it is a UDP"),
        "{said}"
    );
}

/// Starts `nbdcrypt serve`, whose temporary files are in the folder `tmp`.
fn serve(bench: &Workbench, options: &[&str]) -> Command {
    let mut command = interruptible();
    command.args(SERVE).args(options).current_dir(bench.path(".")).env("TMPDIR", bench.path("tmp"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[track_caller]
fn nothing_is_left(bench: &Workbench) {
    let left: Vec<_> = fs::read_dir(bench.path("tmp")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!bench.path("socket").exists());
}

/// Returns the output of a command that ends by itself.
#[track_caller]
fn run(bench: &Workbench, script: &str, options: &[&str]) -> Output {
    let output = serve(bench, &[&["--run", script], options].concat()).output().unwrap();
    nothing_is_left(bench);
    output
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs nbdinfo: run `make test`")]
fn a_command_uses_the_export_and_ends_the_server() {
    let bench = workbench();
    let size = size(&bench);
    // Standard output is the command's.
    let output = run(&bench, "nbdinfo --size \"$uri\" && nbdinfo --size \"$nbd\"", &[]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{size}\n{size}\n"), "{}", told(&output));
    assert_eq!(output.status.code(), Some(0));
    let output = run(&bench, "nbdinfo --size \"$uri\"; echo $exportname", &["--print-uri", "--name", "a b"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("nbd+unix:///a%20b?socket=/") && said.ends_with(&format!("\n{size}\na b\n")), "{said}");

    let output = run(&bench, "echo \"$unixsocket,$port,$uri\"", &["--socket", "socket"]);
    let socket = bench.path("socket").display().to_string();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, format!("{socket},,nbd+unix:///?socket={socket}\n"));
    let output = run(&bench, "echo \"$unixsocket,$port\"; nbdinfo --size $uri", &["--listen", "127.0.0.1:0"]);
    let said = String::from_utf8(output.stdout).unwrap();
    let port = said.lines().next().unwrap().strip_prefix(',').unwrap();
    assert!(port.parse::<u16>().is_ok_and(|port| port > 0) && said.ends_with(&format!("\n{size}\n")), "{said}");
}

#[test]
fn the_exit_code_is_that_of_the_command() {
    let bench = workbench();
    for (script, code) in [("true", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -TERM $$", 143), ("/none/x", 127)]
    {
        let output = run(&bench, script, &[]);
        assert_eq!(output.status.code(), Some(code), "{script}: {}", told(&output));
    }
    // Without the export, the command does not run.
    fs::write(bench.path("wrong"), "wrong").unwrap();
    let mut command = Command::new(binary());
    command.args(["serve", "--key-file", "wrong", "disk", "--run", "touch ran"]).current_dir(bench.path("."));
    let output = command.env("TMPDIR", bench.path("tmp")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(!bench.path("ran").exists());
    nothing_is_left(&bench);
    // A server that is killed did not do its work.
    let output = serve(&bench, &["--run", "kill -KILL $PPID", "--socket", "socket"]).output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{}", told(&output));
}

/// A program can go back to the beginning of a file on its standard input, even after another program has read the file.
#[test]
fn the_command_cannot_read_the_key_again() {
    let bench = workbench();
    let key = || fs::File::open(bench.path("key")).unwrap();
    let serve = |key_file: &str| {
        let mut command = Command::new(binary());
        command.args(["serve", "--key-file", key_file, "disk", "--run", "cat /dev/stdin"]).current_dir(bench.path("."));
        let output = command.stdin(key()).env("TMPDIR", bench.path("tmp")).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", told(&output));
        output.stdout
    };
    assert_eq!(serve("-"), b"");
    assert_eq!(serve("key"), fs::read(bench.path("key")).unwrap(), "any other input is the command's");
}

/// The command gets the user's environment and limits. It gets no file of the server, and nothing that a service manager told
/// only the server.
#[test]
fn the_command_inherits_only_what_is_the_users() {
    let bench = workbench();
    let script = "stat -c %a \"${unixsocket%/*}\" \"$unixsocket\"; ulimit -Sn; echo $(ls /proc/self/fd); env";
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 123; export LISTEN_PID=1; exec \"$0\" \"$@\""]).arg(binary()).args(SERVE);
    let manager = Manager::new(&bench);
    let set = ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID", "WATCHDOG_PID", "WATCHDOG_USEC"];
    command.args(["--run", script]).current_dir(bench.path(".")).env("TMPDIR", bench.path("tmp")).env("MINE", "yes");
    command.envs(set.map(|name| (name, "1"))).env("NOTIFY_SOCKET", &manager.path);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    // Descriptors that these tests inherited themselves are the user's, too.
    let open = bench.run("sh", ["-c", "echo $(ls /proc/self/fd)"]);
    assert_eq!(lines[..4], ["700", "600", "123", open.trim()], "{}", told(&output));
    assert!(lines.contains(&"MINE=yes"), "{said}");
    assert!(!said.contains("LISTEN_") && !said.contains("NOTIFY_SOCKET") && !said.contains("WATCHDOG_"), "{said}");
    assert!(!said.contains(&fs::read_to_string(bench.path("key")).unwrap()));
    nothing_is_left(&bench);
}

/// SIGTERM is for the command. SIGINT is, too, but the terminal sends it to the command itself.
#[test]
fn signals_reach_the_command_and_the_server_stays() {
    let bench = workbench();
    let script =
        "trap 'echo hangup' HUP; trap 'exit 8' INT; trap 'exit 9' TERM; echo ready; while :; do sleep 0.02; done";
    let mut server = Running(serve(&bench, &["--run", script]).spawn().unwrap());
    let pid = Pid::from_child(&server.0);
    let mut lines = BufReader::new(server.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    kill_process(pid, Signal::INT).unwrap();
    kill_process(pid, Signal::HUP).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "hangup");
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(server.0.wait().unwrap().code(), Some(9));
    nothing_is_left(&bench);
}

/// A server without a command ends in order when its terminal is closed.
#[test]
fn a_hangup_ends_the_server_in_order() {
    let bench = workbench();
    let mut server = Running(serve(&bench, &["--socket", "socket"]).spawn().unwrap());
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    kill_process(Pid::from_child(&server.0), Signal::HUP).unwrap();
    assert!(server.0.wait().unwrap().success());
    nothing_is_left(&bench);
}

/// Kills a shell that started the server in the background. The server ends in order: it removes its socket.
#[test]
fn the_server_ends_with_its_parent() {
    let bench = workbench();
    let mut shell = Command::new("sh");
    shell.args(["-c", "\"$0\" \"$@\" & wait"]).arg(binary()).args(SERVE);
    shell.args(["--socket", "socket", "--pid-file", "pid", "--exit-with-parent", "--print-uri"]);
    shell.current_dir(bench.path(".")).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut shell = Running(shell.spawn().unwrap());
    let mut stdout = BufReader::new(shell.0.stdout.take().unwrap());
    let mut uri = String::new();
    stdout.read_line(&mut uri).unwrap();
    assert_eq!(uri, format!("nbd+unix:///?socket={}\n", bench.path("socket").display()));
    let pid: i32 = fs::read_to_string(bench.path("pid")).unwrap().trim().parse().unwrap();
    let mut client = RawClient::new(connect(&bench.path("socket")));
    client.enter("");
    assert_ne!(u32::try_from(pid), Ok(shell.0.id()));
    shell.0.kill().unwrap();
    shell.0.wait().unwrap();
    // Standard output ends with the last process that has it.
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(stdout.read_to_end(&mut Vec::new())));
    let ended = ended.recv_timeout(PATIENCE);
    if ended.is_err() {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    assert!(ended.is_ok(), "the server did not end with its parent");
    assert!(!bench.path("socket").exists() && !bench.path("pid").exists());
    drop(client);
}

//! The metrics of `nbdcrypt serve`, as curl fetches them and as Prometheus' own Python library reads them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use harness::moto::venv;
use harness::nbd::{RawClient, connect};
use harness::nbdcrypt::{binary, told};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A server of two exports, `a` and `b`, with metrics. Dropping it kills it.
struct Server {
    child: Child,
    folder: TempDir,
}

impl Server {
    /// Starts the server. `{}` in an option stands for the folder.
    fn start(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("key"), Vec::from_iter(0..64)).unwrap();
        fs::set_permissions(path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        for disk in ["a", "b"] {
            File::create(path(disk)).unwrap().set_len(4 << 20).unwrap();
        }
        let options = options.iter().map(|option| option.replace("{}", folder.path().to_str().unwrap()));
        let mut child = Command::new(binary())
            .args(["serve", "--type", "plain", "--key-file", "key", "--socket", "socket", "a", "b"])
            .args(options)
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        Self { child, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn client(&self, export: &str) -> RawClient<UnixStream> {
        let mut client = RawClient::new(connect(&self.path("socket")));
        client.enter(export);
        client
    }

    /// Runs curl on the unix socket. The answer's code is on the last line.
    fn curl(&self, path: &str, options: &[&str]) -> Output {
        Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "600", "--write-out", "\n%{http_code} %{content_type}"])
            .arg("--unix-socket")
            .arg(self.path("metrics"))
            .args(options)
            .arg(format!("http://localhost{path}"))
            .output()
            .unwrap()
    }

    /// Fetches the metrics, and checks that Prometheus' library reads them.
    fn metrics(&self) -> String {
        let output = self.curl("/metrics", &[]);
        assert!(output.status.success(), "{}", told(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        let (text, code) = text.rsplit_once('\n').unwrap();
        assert_eq!(code, "200 application/openmetrics-text; version=1.0.0; charset=utf-8");
        expect_valid(text);
        text.to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Checks the text with the parser of OpenMetrics in Prometheus' Python library, which is strict.
fn expect_valid(text: &str) {
    let script = "import sys; from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse; \
                  sys.exit(len(list(parse(sys.stdin.read()))) < 5)";
    let mut python = Command::new(venv().join("python"))
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{text}", told(&output));
}

#[track_caller]
fn expect_lines(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(text.lines().any(|found| found == *line), "`{line}` is missing:\n{text}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs curl and prometheus-client: run `make test`")]
fn metrics_count_what_each_export_does() {
    let server = Server::start(&["--metrics", "unix:{}/metrics"]);
    expect_lines(
        &server.metrics(),
        &["nbdcrypt_connections{volume=\"a\"} 0", "nbdcrypt_size_bytes{volume=\"b\"} 4194304"],
    );
    let mut client = server.client("a");
    assert_eq!(client.write(0, 4096, &[7; 8192]), 0);
    client.read(0, 4096).unwrap();
    assert_eq!(client.flush(), 0);
    client.read(4 << 20, 4096).unwrap_err();
    let text = server.metrics();
    expect_lines(
        &text,
        &[
            "nbdcrypt_connections{volume=\"a\"} 1",
            "nbdcrypt_connections_opened_total{volume=\"b\"} 0",
            "nbdcrypt_read_bytes_total{volume=\"a\"} 4096",
            "nbdcrypt_written_bytes_total{volume=\"a\"} 8192",
            "nbdcrypt_written_bytes_total{volume=\"b\"} 0",
            "nbdcrypt_requests_total{volume=\"a\",operation=\"flush\"} 1",
            "nbdcrypt_request_duration_seconds_count{volume=\"a\",operation=\"write\"} 1",
            "nbdcrypt_request_duration_seconds_bucket{le=\"+Inf\",volume=\"a\",operation=\"flush\"} 1",
        ],
    );
    assert!(text.contains("nbdcrypt_request_errors_total{volume=\"a\","), "{text}");
    let socket = fs::metadata(server.path("metrics")).unwrap();
    assert_eq!(socket.mode() & 0o777, 0o600);
    // The socket goes with its server.
    kill_process(Pid::from_child(&server.child), Signal::TERM).unwrap();
    drop(client);
    let mut server = server;
    assert!(server.child.wait().unwrap().success());
    assert!(!server.path("metrics").exists());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, curl and prometheus-client: run `make test`")]
fn a_group_may_read_the_metrics() {
    let server = Server::start(&["--metrics", "unix:{}/metrics", "--metrics-group", "4242"]);
    let socket = fs::metadata(server.path("metrics")).unwrap();
    assert_eq!((socket.mode() & 0o777, socket.gid()), (0o660, 4242));
    server.metrics();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs curl: run `make test`")]
fn only_the_metrics_can_be_fetched() {
    let server = Server::start(&["--metrics", "unix:{}/metrics"]);
    let code = |path: &str, options: &[&str]| {
        let output = server.curl(path, options);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().last().unwrap_or_default().split(' ').next().unwrap_or_default().to_owned()
    };
    assert_eq!(code("/", &[]), "404");
    assert_eq!(code("/metrics/../metrics", &["--path-as-is"]), "404");
    assert_eq!(code("/metrics", &["--head"]), "200");
    assert_eq!(code("/metrics", &["--data", "x"]), "405");
    assert_eq!(code("/metrics", &["--header", &format!("X-Long: {}", "x".repeat(10_000))]), "431");
    assert_eq!(code("/metrics", &[]), "200");
    // Something that is not HTTP.
    let mut stream = UnixStream::connect(server.path("metrics")).unwrap();
    stream.write_all(&[0xff; 20_000]).ok();
    server.metrics();
}

/// Clients that send nothing do not keep the volume waiting. They keep other clients of the metrics waiting for a limited
/// time.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs curl and prometheus-client: run `make test`")]
fn silent_clients_keep_the_volume_from_nothing() {
    let server = Server::start(&["--metrics", "unix:{}/metrics"]);
    let silent = |count: usize| -> Vec<UnixStream> {
        (0..count).map(|_| UnixStream::connect(server.path("metrics")).unwrap()).collect()
    };
    let mut waiting = silent(7);
    server.metrics();
    waiting.extend(silent(20));
    assert_eq!(server.client("b").write(0, 0, &[1; 4096]), 0);
    expect_lines(&server.metrics(), &["nbdcrypt_written_bytes_total{volume=\"b\"} 4096"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs curl and prometheus-client: run `make test`")]
fn metrics_can_be_fetched_from_a_loopback_address() {
    // No other process uses the address, since it is made of this process's number.
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let address = format!("127.{}.{middle}.{low}:9105", high.wrapping_add(1));
    let server = Server::start(&["--metrics", &address]);
    let output =
        Command::new("curl").args(["--silent", "--noproxy", "*", &format!("http://{address}/metrics")]).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", told(&output));
    expect_valid(&String::from_utf8(output.stdout).unwrap());
    // Two servers cannot have the same address.
    File::create(server.path("c")).unwrap().set_len(4 << 20).unwrap();
    let again = Command::new(binary())
        .args(["serve", "--type", "plain", "--key-file", "key", "--socket", "other", "--metrics", &address, "c"])
        .current_dir(server.folder.path())
        .output()
        .unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(told(&again).contains(&format!("could not listen on {address}")), "{}", told(&again));
    drop(server);
    TcpStream::connect(address.parse::<SocketAddr>().unwrap()).unwrap_err();
}

#[test]
fn an_address_that_others_can_reach_is_refused() {
    for (address, why) in [
        ("0.0.0.0:9105", "use a loopback address such as 127.0.0.1:9105"),
        ("[2001:db8::1]:9105", "other machines could reach"),
        ("unix:metrics", "no absolute path"),
    ] {
        let args = ["serve", "--socket", "socket", "--metrics", address, "disk"];
        let output = Command::new(binary()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", told(&output));
        assert!(told(&output).contains(why), "{}", told(&output));
    }
}

#[test]
fn a_group_belongs_to_a_unix_socket() {
    let said = |options: &[&str], code: i32| {
        let args = [&["serve", "--socket", "socket", "--metrics-group"][..], options, &["disk"]].concat();
        let output = Command::new(binary()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", told(&output));
        told(&output)
    };
    said(&["root"], 2);
    assert!(said(&["no such group", "--metrics", "unix:/none/metrics"], 2).contains("getent group"));
    assert!(said(&["root", "--metrics", "127.0.0.1:9105"], 1).contains("--metrics-group is for a unix socket"));
}

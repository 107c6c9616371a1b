//! `nbdcrypt serve` with TLS, with several exports, and with limits on connections. The clients are the usual programs.
//! Where no well-behaved client sends what a test needs, the test sends raw bytes.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::nbd::{RawClient, connect, option_bytes, query};
use harness::nbdcrypt::{binary, told};
use nbd_server::proto::wire::*;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const DATA: u64 = 1 << 20;
const FLAGS: u32 = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES;

/// A folder with plain volumes of one mebibyte, their key, and certificates.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        fs::write(folder.path("key"), (0..64).collect::<Vec<u8>>()).unwrap();
        fs::set_permissions(folder.path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        for disk in ["alpha.img", "beta.img"] {
            fs::File::create(folder.path(disk)).unwrap().set_len(DATA).unwrap();
        }
        folder
    }

    /// Makes the folder with certificates. `pki/` holds the certificates of a server and a client, signed by one authority.
    /// `other/` holds the same for another authority. `bare/` is a client's directory with only the first authority's
    /// certificate.
    fn with_certificates() -> Self {
        let folder = Self::new();
        for pki in ["pki", "other"] {
            folder.authority(pki);
            folder.certificate(pki, "server", "serverAuth");
            folder.certificate(pki, "client", "clientAuth");
        }
        fs::create_dir(folder.path("bare")).unwrap();
        fs::copy(folder.path("pki/ca-cert.pem"), folder.path("bare/ca-cert.pem")).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn authority(&self, pki: &str) {
        fs::create_dir(self.path(pki)).unwrap();
        let (key, certificate) = (format!("{pki}/ca-key.pem"), format!("{pki}/ca-cert.pem"));
        self.run(&format!(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={pki} \
             -addext keyUsage=critical,keyCertSign,cRLSign -keyout {key} -out {certificate}"
        ));
    }

    fn certificate(&self, pki: &str, who: &str, usage: &str) {
        let extensions = format!(
            "basicConstraints=critical,CA:FALSE\nextendedKeyUsage={usage}\nsubjectAltName=DNS:localhost,IP:127.0.0.1\n"
        );
        fs::write(self.path("extensions"), extensions).unwrap();
        self.run(&format!(
            "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost \
             -keyout {pki}/{who}-key.pem -out request.pem"
        ));
        self.run(&format!(
            "openssl x509 -req -in request.pem -CA {pki}/ca-cert.pem -CAkey {pki}/ca-key.pem -CAcreateserial -days 2 \
             -extfile extensions -out {pki}/{who}-cert.pem"
        ));
    }

    /// Revokes the client's certificate.
    fn revoke_client(&self) {
        fs::write(self.path("index"), "").unwrap();
        fs::write(
            self.path("ca.cnf"),
            "[ca]\ndefault_ca=it\n[it]\ndatabase=index\ndefault_md=sha256\ndefault_crl_days=2\ncrlnumber=crlnumber\n\
             crl_extensions=crl\n[crl]\nauthorityKeyIdentifier=keyid\n",
        )
        .unwrap();
        fs::write(self.path("crlnumber"), "01\n").unwrap();
        let by = "-config ca.cnf -cert pki/ca-cert.pem -keyfile pki/ca-key.pem";
        self.run(&format!("openssl ca {by} -revoke pki/client-cert.pem"));
        self.run(&format!("openssl ca {by} -gencrl -out pki/ca-crl.pem"));
    }

    /// Runs a command line whose words contain no spaces. The command must succeed.
    #[track_caller]
    fn run(&self, line: &str) -> String {
        let output = self.try_run(line);
        assert!(output.status.success(), "{line}: {}", told(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn try_run(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap();
        let path = if program == "nbdcrypt" { binary() } else { Path::new(program) };
        let run = Command::new(path).args(words).current_dir(self.0.path()).stdin(Stdio::null()).output();
        run.unwrap_or_else(|error| panic!("cannot run {program}: {error}; `make test` installs it"))
    }

    /// Runs a command line that must fail with an error that contains these words.
    #[track_caller]
    fn refused(&self, line: &str, words: &[&str]) {
        let output = self.try_run(line);
        assert!(!output.status.success(), "{line}: {}", told(&output));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for word in words {
            assert!(said.contains(word), "{line}: `{word}` is missing: {said}");
        }
    }

    /// Serves `alpha.img` with the further arguments in `more`.
    #[track_caller]
    fn serve(&self, more: &str) -> Server {
        let mut child = Command::new(binary())
            .args("-v serve --type plain --key-file key alpha.img".split(' '))
            .args(more.split_whitespace())
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines.next().unwrap_or_else(|| panic!("{more}: the server did not start")).unwrap();
        Server { child, address }
    }

    fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    fn client(&self) -> RawClient<UnixStream> {
        RawClient::new(connect(&self.socket()))
    }
}

struct Server {
    child: Child,
    /// The address of the first export.
    address: String,
}

impl Server {
    /// Returns the address with a client's certificates.
    fn uri(&self, certificates: &str) -> String {
        let and = if self.address.contains('?') { '&' } else { '?' };
        format!("{}{and}tls-certificates={certificates}", self.address)
    }

    fn port(&self) -> &str {
        self.address.trim_end_matches('/').rsplit(':').next().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

const TCP: &str = "--listen 127.0.0.1:0";
const UNIX: &str = "--socket socket";
const REQUIRED: &str = "--tls require --tls-certificates pki --tls-verify-peer";

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl and libnbd's programs: run `make test`")]
fn libnbd_reads_and_writes_under_tls() {
    let folder = Folder::with_certificates();
    fs::write(folder.path("data"), vec![0x5a; 1 << 20]).unwrap();
    for (place, scheme) in [(TCP, "nbds://"), (UNIX, "nbds+unix://")] {
        let server = folder.serve(&format!("{place} {REQUIRED}"));
        assert!(server.address.starts_with(scheme), "{}", server.address);
        let uri = server.uri("pki");
        let info = folder.run(&format!("nbdinfo {uri}"));
        assert!(info.contains("newstyle-fixed with TLS") && info.contains("export-size: 1048576"), "{info}");
        folder.run(&format!("nbdcopy --threads=4 --connections=4 --flush data {uri}"));
        folder.run(&format!("nbdcopy --threads=4 --connections=4 {uri} back"));
        assert_eq!(fs::read(folder.path("back")).unwrap(), vec![0x5a; 1 << 20]);
        fs::remove_file(folder.path("back")).unwrap();
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl and python3-libnbd: run `make test`")]
fn libnbd_in_python_has_many_requests_in_flight_under_tls() {
    let script = "import nbd, sys\n\
        h = nbd.NBD()\n\
        h.set_tls(nbd.TLS_REQUIRE)\n\
        h.set_tls_certificates('pki')\n\
        h.connect_tcp('127.0.0.1', sys.argv[1])\n\
        assert h.get_tls_negotiated()\n\
        done = []\n\
        for n in range(64):\n\
        \x20   b = nbd.Buffer.from_bytearray(bytearray([n + 1]) * 16384)\n\
        \x20   h.aio_pwrite(b, n * 16384, completion=lambda e, n=n: done.append((n, e.value)) or 1)\n\
        while len(done) < 64:\n\
        \x20   h.poll(-1)\n\
        assert sorted(done) == [(n, 0) for n in range(64)], done\n\
        whole = h.pread(1 << 20, 0)\n\
        assert whole == b''.join(bytes([n + 1]) * 16384 for n in range(64))\n\
        h.shutdown()\n\
        print('all well')\n";
    let folder = Folder::with_certificates();
    fs::write(folder.path("script"), script).unwrap();
    let server = folder.serve(&format!("{TCP} {REQUIRED}"));
    assert_eq!(folder.run(&format!("/usr/bin/python3 script {}", server.port())), "all well\n");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl and qemu: run `make test`")]
fn qemu_reads_and_writes_under_tls() {
    let folder = Folder::with_certificates();
    let server = folder.serve(&format!("{TCP} {REQUIRED}"));
    let tls = "--object tls-creds-x509,id=tls,dir=pki,endpoint=client,verify-peer=yes --image-opts";
    let image = format!("driver=nbd,host=127.0.0.1,port={},tls-creds=tls", server.port());
    assert!(folder.run(&format!("qemu-img info {tls} {image}")).contains("virtual size: 1 MiB"));
    let io = Command::new("qemu-io")
        .args(tls.split(' '))
        .args([&format!("{image},file.driver=nbd").replace(",file.driver=nbd", ""), "-c", "write -P 7 4k 900k"])
        .args(["-c", "flush", "-c", "read -P 7 4k 900k"])
        .current_dir(folder.0.path())
        .output()
        .expect("cannot run qemu-io; `make test` installs it");
    let said = told(&io);
    assert!(io.status.success() && !said.contains("failed") && said.matches("921600/921600").count() == 2, "{said}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl and nbdinfo: run `make test`")]
fn clients_without_a_valid_certificate_are_refused() {
    let folder = Folder::with_certificates();
    let server = folder.serve(&format!("{TCP} {REQUIRED}"));
    folder.run(&format!("nbdinfo --size {}", server.uri("pki")));
    // A client without TLS, a client that expects another server, a client without a certificate, and a client with
    // another authority's certificate.
    let plain = server.address.replace("nbds:", "nbd:");
    folder.refused(&format!("nbdinfo --size {plain}"), &["requires", "TLS"]);
    folder.refused(&format!("nbdinfo --list {plain}"), &[]);
    folder.refused(&format!("nbdinfo --size {}", server.uri("other")), &["certificate"]);
    folder.refused(&format!("nbdinfo --size {}", server.uri("bare")), &[]);
    fs::copy(folder.path("other/client-cert.pem"), folder.path("bare/client-cert.pem")).unwrap();
    fs::copy(folder.path("other/client-key.pem"), folder.path("bare/client-key.pem")).unwrap();
    folder.refused(&format!("nbdinfo --size {}", server.uri("bare")), &[]);
    // The server still works.
    folder.run(&format!("nbdinfo --size {}", server.uri("pki")));
    drop(server);

    // Without --tls-verify-peer, a client needs no certificate. With `on`, it does not even need TLS.
    fs::remove_file(folder.path("bare/client-cert.pem")).unwrap();
    fs::remove_file(folder.path("bare/client-key.pem")).unwrap();
    let server = folder.serve(&format!("{TCP} --tls require --tls-certificates pki"));
    folder.run(&format!("nbdinfo --size {}", server.uri("bare")));
    folder.refused(&format!("nbdinfo --size {}", server.address.replace("nbds:", "nbd:")), &["TLS"]);
    drop(server);
    let server = folder.serve(&format!("{TCP} --tls on --tls-certificates pki"));
    folder.run(&format!("nbdinfo --size {}", server.uri("bare")));
    folder.run(&format!("nbdinfo --size {}", server.address.replace("nbds:", "nbd:")));
    drop(server);

    folder.revoke_client();
    let server = folder.serve(&format!("{TCP} {REQUIRED}"));
    folder.refused(&format!("nbdinfo --size {}", server.uri("pki")), &[]);
    folder.certificate("pki", "client", "clientAuth");
    folder.run(&format!("nbdinfo --size {}", server.uri("pki")));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl: run `make test`")]
fn only_tls_1_2_and_1_3_are_accepted() {
    let folder = Folder::with_certificates();
    let server = folder.serve(&format!("{TCP} --tls require --tls-certificates pki"));
    for (version, served) in [("-tls1_2", true), ("-tls1_3", true), ("-tls1_1", false)] {
        // A proxy that negotiates TLS over NBD, which `openssl s_client` cannot do.
        let mut upstream = TcpStream::connect(("127.0.0.1", server.port().parse().unwrap())).unwrap();
        upstream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        begin_tls(&mut upstream);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let pump = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), upstream.try_clone().unwrap());
            let up = std::thread::spawn(move || {
                std::io::copy(&mut from, &mut to).map(|_| to.shutdown(std::net::Shutdown::Write))
            });
            let _ = std::io::copy(&mut upstream, &mut client);
            let _ = client.shutdown(std::net::Shutdown::Both);
            let _ = up.join();
        });
        let line = format!(
            "openssl s_client -connect 127.0.0.1:{port} {version} -cipher ALL:@SECLEVEL=0 -CAfile pki/ca-cert.pem"
        );
        let output = folder.try_run(&line);
        pump.join().unwrap();
        let said = told(&output);
        assert_eq!(said.contains("Server certificate"), served, "{version}: {said}");
    }
}

/// Goes through the handshake up to the acknowledgement of `NBD_OPT_STARTTLS`.
fn begin_tls(stream: &mut (impl Read + Write)) {
    let mut client = RawClient::new(stream);
    client.start_handshake(FLAGS);
    let replies = client.option(NBD_OPT_STARTTLS, &[]);
    assert_eq!(replies.last().map(|reply| reply.kind), Some(NBD_REP_ACK));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl: run `make test`")]
fn plaintext_sent_after_starttls_is_never_executed() {
    let folder = Folder::with_certificates();
    let _server = folder.serve(&format!("{UNIX} --tls on --tls-certificates pki"));
    // One packet holds STARTTLS and, in plaintext behind it, a choice of the export and a write. A server that reads
    // ahead would receive all of it. An attacker between client and server would send this before the client begins
    // TLS.
    let mut client = folder.client();
    client.greeting();
    let mut bytes = FLAGS.to_be_bytes().to_vec();
    bytes.extend(option_bytes(NBD_OPT_STARTTLS, &[]));
    bytes.extend(option_bytes(NBD_OPT_GO, &query("", &[])));
    bytes.extend(harness::nbd::request_bytes(0, NBD_CMD_WRITE, 1, 0, 4));
    bytes.extend(b"evil");
    client.send(&bytes);
    let reply = client.option_reply();
    assert_eq!((reply.option, reply.kind), (NBD_OPT_STARTTLS, NBD_REP_ACK));
    // The server expects TLS here, and this plaintext is not TLS. Only an alert (RFC 8446, section 5.1: 21) may follow,
    // and no NBD.
    let rest = client.receive_rest();
    assert!(rest.is_empty() || (rest[0] == 21 && rest.len() == 7), "{rest:?}");
    assert!(!rest.windows(4).any(|word| word == NBD_SIMPLE_REPLY_MAGIC.to_be_bytes()));
    assert!(fs::read(folder.path("alpha.img")).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl: run `make test`")]
fn without_required_tls_no_export_is_revealed() {
    let folder = Folder::with_certificates();
    let _server = folder.serve(&format!("{UNIX} {REQUIRED}"));
    let mut client = folder.client();
    client.start_handshake(FLAGS);
    for (option, data) in [
        (NBD_OPT_LIST, vec![]),
        (NBD_OPT_INFO, query("", &[])),
        (NBD_OPT_GO, query("", &[])),
        (NBD_OPT_STRUCTURED_REPLY, vec![]),
        (4711, vec![1, 2, 3]),
    ] {
        let replies = client.option(option, &data);
        assert_eq!(replies.len(), 1);
        assert_eq!((replies[0].option, replies[0].kind), (option, NBD_REP_ERR_TLS_REQD));
        assert!(!String::from_utf8_lossy(&replies[0].data).contains("alpha"));
    }
    // "as this request cannot error, it MUST terminate the session"
    client.send_option(NBD_OPT_EXPORT_NAME, b"");
    assert!(client.is_closed());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl: run `make test`")]
fn a_silent_tls_handshake_is_disconnected() {
    let folder = Folder::with_certificates();
    let _server = folder.serve(&format!("{UNIX} {REQUIRED} --handshake-timeout 1s"));
    let mut client = folder.client();
    let begun = Instant::now();
    begin_tls(&mut client.stream);
    assert!(client.is_closed());
    assert!((Duration::from_millis(800)..Duration::from_secs(60)).contains(&begun.elapsed()));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl: run `make test`")]
fn a_silent_tls_handshake_does_not_delay_the_shutdown() {
    let folder = Folder::with_certificates();
    let mut server = folder.serve(&format!("{UNIX} {REQUIRED} --handshake-timeout 10m"));
    let mut client = folder.client();
    begin_tls(&mut client.stream);
    let begun = Instant::now();
    kill_process(Pid::from_child(&server.child), Signal::TERM).unwrap();
    assert!(server.child.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
}

#[test]
fn only_idle_clients_are_disconnected() {
    let folder = Folder::new();
    let _server = folder.serve(&format!("{UNIX} --idle-timeout 3s"));
    let enter = || {
        let mut client = folder.client();
        client.enter("");
        client
    };
    let (mut busy, mut idle, mut halting) = (enter(), enter(), enter());
    // This client stops within a payload.
    halting.send(&harness::nbd::request_bytes(0, NBD_CMD_WRITE, 1, 0, 4096));
    halting.send(&[1; 100]);
    let are_gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // This client reads for as long as the others are connected.
        scope.spawn(|| {
            let begun = Instant::now();
            while !are_gone.load(Ordering::Relaxed) && begun.elapsed() < Duration::from_secs(120) {
                busy.read(0, 512).unwrap();
                std::thread::sleep(Duration::from_millis(100));
            }
            busy.read(0, 512).unwrap();
        });
        let are_closed = [&mut idle, &mut halting].map(|client| {
            client.stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            client.is_closed()
        });
        are_gone.store(true, Ordering::Relaxed);
        assert_eq!(are_closed, [true, true]);
    });
}

#[test]
fn connections_above_the_limit_wait() {
    let folder = Folder::new();
    let _server = folder.serve(&format!("{UNIX} --max-connections 2"));
    let mut first = folder.client();
    first.enter("");
    let mut second = folder.client();
    second.enter("");
    let mut third = folder.client();
    third.stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    assert!(third.stream.read(&mut [0]).is_err());
    first.send_request(0, NBD_CMD_DISC, 0, 0);
    third.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    third.enter("");
    second.read(0, 512).unwrap();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs nbdinfo and nbdcopy: run `make test`")]
fn several_devices_are_exports_by_name() {
    let folder = Folder::new();
    let list = |server: &Server| {
        let base = server.address.split("///").next().unwrap();
        let list = folder.run(&format!("nbdinfo --json --list {base}:///?socket=socket").replace("::", ":"));
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let export = |export: &serde_json::Value| {
            let text = |field: &str| export[field].as_str().unwrap_or_default().to_owned();
            (text("export-name"), text("description"), export["is_read_only"] == true)
        };
        list["exports"].as_array().unwrap().iter().map(export).collect::<Vec<_>>()
    };
    let server = folder.serve(&format!("beta.img {UNIX}"));
    let row = |name: &str, description: &str, read_only| (name.to_owned(), description.to_owned(), read_only);
    assert_eq!(list(&server), [row("alpha.img", "alpha.img", false), row("beta.img", "beta.img", false)]);
    // Each export is a disk of its own.
    fs::write(folder.path("data"), vec![9; 1 << 20]).unwrap();
    folder.run("nbdcopy --flush data nbd+unix:///beta.img?socket=socket");
    assert!(fs::read(folder.path("alpha.img")).unwrap().iter().all(|byte| *byte == 0));
    assert!(fs::read(folder.path("beta.img")).unwrap().iter().any(|byte| *byte != 0));
    folder.refused("nbdinfo nbd+unix:///gamma?socket=socket", &["gamma"]);
    drop(server);
    let server = folder.serve(&format!(
        "beta.img {UNIX} --name a --name b/c --description first --description second --read-only --key-file key"
    ));
    assert_eq!(list(&server), [row("a", "first", true), row("b/c", "second", true)]);
    folder.run("nbdcopy nbd+unix:///b/c?socket=socket back");
    assert_eq!(fs::read(folder.path("back")).unwrap(), vec![9; 1 << 20]);
}

#[test]
fn each_command_line_mistake_has_its_own_error() {
    let folder = Folder::new();
    let serve = "nbdcrypt serve --type plain --key-file key --socket socket";
    folder.refused(&format!("{serve} alpha.img beta.img --name one"), &["--name is given 1 times for 2 devices"]);
    folder.refused(&format!("{serve} alpha.img beta.img --name one --name one"), &["as `one`", "--name"]);
    folder.refused(&format!("{serve} alpha.img --key-file key --key-file key"), &["--key-file is given 3 times"]);
    folder.refused(&format!("{serve} alpha.img beta.img --key-file - --key-file -"), &["--key-file"]);
    folder.refused(&format!("{serve} alpha.img --idle-timeout 5"), &["90s, 2m or 1h"]);
    folder.refused(&format!("{serve} alpha.img --max-connections 0"), &["max-connections"]);
    folder.refused(&format!("{serve} alpha.img --tls require"), &["--tls-certificates"]);
    folder.refused(&format!("{serve} alpha.img --tls-certificates none"), &["--tls require"]);
    folder.refused(&format!("{serve} alpha.img --tls-verify-peer"), &["--tls require"]);
    folder.refused(
        &format!("{serve} alpha.img --tls require --tls-certificates none"),
        &["none/server-cert.pem", "No such file"],
    );
    assert!(!folder.socket().exists());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl: run `make test`")]
fn unusable_certificates_are_named() {
    let folder = Folder::with_certificates();
    let line = format!("nbdcrypt serve --type plain --key-file key --socket socket alpha.img {REQUIRED}");
    let chmod =
        |mode| fs::set_permissions(folder.path("pki/server-key.pem"), fs::Permissions::from_mode(mode)).unwrap();
    chmod(0o644);
    folder.refused(&line, &["pki/server-key.pem", "mode 644", "chmod 600"]);
    chmod(0o600);
    let key = fs::read(folder.path("pki/server-key.pem")).unwrap();
    fs::copy(folder.path("other/server-key.pem"), folder.path("pki/server-key.pem")).unwrap();
    folder.refused(&line, &["pki/server-cert.pem", "cannot be used together"]);
    folder.run("openssl pkcs8 -topk8 -in other/server-key.pem -passout pass:x -out pki/server-key.pem");
    folder.refused(&line, &["pki/server-key.pem", "the key is encrypted"]);
    fs::write(folder.path("pki/server-key.pem"), key).unwrap();
    fs::write(folder.path("pki/ca-crl.pem"), "").unwrap();
    folder.refused(&line, &["pki/ca-crl.pem", "no revocation list"]);
    fs::write(folder.path("pki/ca-crl.pem"), "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n").unwrap();
    folder.refused(&line, &["pki/ca-crl.pem", "cannot be parsed"]);
    fs::remove_file(folder.path("pki/ca-crl.pem")).unwrap();
    fs::remove_file(folder.path("pki/ca-cert.pem")).unwrap();
    folder.refused(&line, &["pki/ca-cert.pem", "clients' authorities"]);
    fs::write(folder.path("pki/ca-cert.pem"), "no certificate").unwrap();
    folder.refused(&line, &["pki/ca-cert.pem", "no certificate"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs openssl: run `make test`")]
fn certificates_outside_their_validity_are_reported_at_start() {
    use nbd_server::tls::{Clients, Credentials, NotValidBecause};
    use std::time::{Duration, SystemTime};
    let folder = Folder::with_certificates();
    // The chain file holds the server's certificate and then the authority's. The program checks each.
    let chain = fs::read_to_string(folder.path("pki/server-cert.pem")).unwrap()
        + &fs::read_to_string(folder.path("pki/ca-cert.pem")).unwrap();
    fs::write(folder.path("pki/server-cert.pem"), chain).unwrap();
    let credentials = Credentials::from_directory(&folder.path("pki"), Clients::Anyone).unwrap();
    let day = Duration::from_secs(86400);
    let now = SystemTime::now();
    assert_eq!(credentials.not_valid_at(now + day), []);
    let expired = credentials.not_valid_at(now + 12 * day);
    assert_eq!(expired.iter().map(|one| one.number).collect::<Vec<_>>(), [0, 1]);
    assert!(expired.iter().all(|one| matches!(one.why, NotValidBecause::Expired(ago) if ago > 9 * day)));
    let told = expired[0].to_string();
    assert!(told.contains("pki/server-cert.pem expired") && told.ends_with("days ago"), "{told}");
    let early = credentials.not_valid_at(now - 3 * day);
    assert!(early.len() == 2 && early.iter().all(|one| matches!(one.why, NotValidBecause::NotYet(_))), "{early:?}");

    // The program warns, but still serves.
    fs::write(
        folder.path("ca.cnf"),
        "[ca]\ndefault_ca=it\n[it]\ndatabase=index\nnew_certs_dir=.\nrand_serial=yes\ndefault_md=sha256\npolicy=any\n\
         [any]\ncommonName=supplied\n",
    )
    .unwrap();
    for (from, to, words) in
        [("20200101000000Z", "20210101000000Z", "expired"), ("20900101000000Z", "20910101000000Z", "is not valid yet")]
    {
        fs::write(folder.path("index"), "").unwrap();
        folder.run("openssl req -new -key pki/server-key.pem -subj /CN=localhost -out request.pem");
        folder.run(&format!(
            "openssl ca -batch -notext -config ca.cnf -cert pki/ca-cert.pem -keyfile pki/ca-key.pem -in request.pem \
             -extfile extensions -startdate {from} -enddate {to} -out pki/server-cert.pem"
        ));
        let log = log_of_serving(&folder, "--socket socket --tls require --tls-certificates pki");
        assert!(log.contains("the server's certificate pki/server-cert.pem") && log.contains(words), "{log}");
        assert!(log.contains("cannot read or write the volume"), "{log}");
    }
}

#[test]
fn the_log_says_what_clients_on_a_port_can_do() {
    let folder = Folder::new();
    let log = log_of_serving(&folder, "--listen 0.0.0.0:0");
    assert!(log.contains("anyone who reaches it may read and write the volume"), "{log}");
    let log = log_of_serving(&folder, "--listen 0.0.0.0:0 --read-only");
    assert!(log.contains("anyone who reaches it may read the volume"), "{log}");
    for near in ["127.0.0.1:0", "127.1.2.3:0"] {
        let log = log_of_serving(&folder, &format!("--listen {near}"));
        assert!(!log.contains("anyone"), "{near}: {log}");
    }
}

/// Returns what a server logs until it is ready.
fn log_of_serving(folder: &Folder, more: &str) -> String {
    let mut child = Command::new(binary())
        .args("serve --type plain --key-file key alpha.img".split(' '))
        .args(more.split_whitespace())
        .current_dir(folder.0.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(folder.path("log")).unwrap())
        .spawn()
        .unwrap();
    let address = BufReader::new(child.stdout.take().unwrap()).lines().next();
    let _ = child.kill();
    let _ = child.wait();
    let log = fs::read_to_string(folder.path("log")).unwrap();
    assert!(address.is_some(), "{more}: {log}");
    log
}

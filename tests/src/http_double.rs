//! HTTP servers on the loopback interface that give prepared answers. They stand in for services that cannot run here: the
//! instance's metadata service, and answers of AWS that moto does not give. A proxy and TLS can be put in front of them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

/// A request's method and path, its headers in lower case, and its body.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET`.
    pub method: String,
    /// `/path?query`.
    pub path: String,
    /// The headers, each as `name: value`.
    pub headers: Vec<String>,
    /// The body, in which bytes that are not UTF-8 are replaced.
    pub body: String,
}

/// A port of the loopback interface that refuses connections for as long as this value lives. The port stays taken, so that
/// no other test's server can get it meanwhile.
pub struct RefusingPort {
    socket: tokio::net::TcpSocket,
}

impl RefusingPort {
    /// Takes a free port. Nothing listens on it.
    pub fn take() -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        Self { socket }
    }

    /// Returns `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.socket.local_addr().unwrap())
    }
}

/// A server that calls a function to answer each request. It runs until the process ends, and records the requests.
pub struct HttpDouble {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

/// The rest of the status line (`200 OK`), the header lines and the body.
pub type Answer = (&'static str, Vec<String>, String);

impl HttpDouble {
    /// Listens on a free port of the loopback interface.
    pub fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let asked = Arc::clone(&requests);
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (asked, answer) = (Arc::clone(&asked), Arc::clone(&answer));
                // A client that disconnects is not a server error.
                thread::spawn(move || serve(stream?, &asked, &*answer));
            }
        });
        Self { address, requests }
    }

    /// Returns `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(stream: TcpStream, asked: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Answer) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() {
        // Ordinary web servers answer a TLS handshake in this way.
        return writer.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    }
    let mut words = line.split_whitespace().map(ToOwned::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim() {
            "" => break,
            header => headers.push(header.to_ascii_lowercase()),
        }
    }
    let len = headers.iter().find_map(|header| header.strip_prefix("content-length: ")?.parse().ok());
    let mut body = Vec::new();
    reader.take(len.unwrap_or(0)).read_to_end(&mut body)?;
    let request = Request { method, path, headers, body: String::from_utf8_lossy(&body).into_owned() };
    let (status, headers, body) = answer(&request);
    asked.lock().unwrap().push(request);
    write!(writer, "HTTP/1.1 {status}\r\nConnection: close\r\n")?;
    // A length that the test gives may be wrong on purpose.
    if !headers.iter().any(|header| header.starts_with("Transfer-Encoding") || header.starts_with("Content-Length")) {
        write!(writer, "Content-Length: {}\r\n", body.len())?;
    }
    for header in headers {
        write!(writer, "{header}\r\n")?;
    }
    write!(writer, "\r\n{body}")
}

impl Request {
    /// Returns the access key and the region that the request is signed with.
    pub fn signed_by(&self) -> Option<(&str, &str)> {
        let scope = self.headers.iter().find_map(|header| header.split_once("credential=")?.1.split(',').next())?;
        let mut parts = scope.split('/');
        let key = parts.next()?;
        Some((key, parts.nth(1)?))
    }
}

/// An HTTP proxy that connects every tunnel and every request to one address, whatever the client asks for. It records what
/// clients ask for.
pub struct ProxyDouble {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl ProxyDouble {
    /// Listens on a free port of the loopback interface and connects to `behind`.
    pub fn start(behind: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (kept, behind) = (Arc::clone(&asked), behind.to_owned());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (kept, behind) = (Arc::clone(&kept), behind.clone());
                thread::spawn(move || tunnel(stream?, &kept, &behind));
            }
        });
        Self { address, asked }
    }

    /// Returns `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the request lines so far, without the protocol: `CONNECT host:443`.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn tunnel(client: TcpStream, asked: &Mutex<Vec<String>>, behind: &str) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    // Reads one byte at a time: what follows the head is for the server behind the proxy.
    while !head.ends_with(b"\r\n\r\n") {
        (&client).read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
    asked.lock().unwrap().push(line.trim_end_matches(" HTTP/1.1").to_owned());
    let server = TcpStream::connect(behind)?;
    match line.starts_with("CONNECT ") {
        true => (&client).write_all(b"HTTP/1.1 200 OK\r\n\r\n")?,
        false => (&server).write_all(&head)?,
    }
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        to_server.shutdown(Shutdown::Write)
    });
    std::io::copy(&mut &server, &mut &client)?;
    client.shutdown(Shutdown::Both)
}

/// A TLS server in front of an address. Its certificate is signed by a new test authority. Dropping this value stops the
/// server.
pub struct TlsFront {
    server: Child,
    address: String,
}

impl TlsFront {
    /// Makes the authority's certificate `ca.pem` in `dir`, and listens under the names `hosts`.
    ///
    /// # Panics
    /// If openssl or the virtual environment's Python is missing.
    pub fn start(dir: &Path, hosts: &[&str], behind: &str) -> Self {
        let names: Vec<String> = hosts.iter().map(|host| format!("DNS:{host}")).collect();
        let script = format!(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 30 \
                 -subj /CN=test-authority -addext keyUsage=keyCertSign\n\
             openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout tls.key -out tls.csr -subj /CN=test\n\
             printf 'subjectAltName={}\\nbasicConstraints=CA:FALSE\\n' > extensions\n\
             openssl x509 -req -in tls.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile extensions \
                 -out tls.pem\n",
            names.join(",")
        );
        let made = Command::new("sh").args(["-euc", &script]).current_dir(dir).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/venv/bin/python");
        let mut server = Command::new(python)
            .args(["-c", TLS_FRONT, behind])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("127.0.0.1:"), "{address:?}");
        Self { server, address: address.trim().to_owned() }
    }

    /// Returns `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The TLS server, in Python. It exits when its standard input closes, which happens when the test ends.
const TLS_FRONT: &str = r#"
import os, socket, ssl, sys, threading
host, port = sys.argv[1].split(":")
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("tls.pem", "tls.key")
listener = socket.create_server(("127.0.0.1", 0))
def pump(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
def serve(plain):
    try:
        client = context.wrap_socket(plain, server_side=True)
    except OSError:
        return
    server = socket.create_connection((host, int(port)))
    threading.Thread(target=pump, args=(client, server), daemon=True).start()
    pump(server, client)
def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
threading.Thread(target=accept, daemon=True).start()
print("127.0.0.1:%d" % listener.getsockname()[1], flush=True)
sys.stdin.read()
os._exit(0)
"#;

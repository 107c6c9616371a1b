//! A few prepared answers over HTTP on the loopback, for services that nobody can run here: the instance's metadata, and
//! answers of AWS that moto does not give.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// A request's method and path, with its headers in lower case.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET`.
    pub method: String,
    /// `/path?query`.
    pub path: String,
    /// `name: value`, each.
    pub headers: Vec<String>,
}

/// Answers every request by a function until the process ends, and keeps what was asked.
pub struct HttpDouble {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

/// A status line's end (`200 OK`), header lines and a body.
pub type Answer = (&'static str, Vec<String>, String);

impl HttpDouble {
    /// Listens on a free port of the loopback.
    pub fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let asked = Arc::clone(&requests);
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (asked, answer) = (Arc::clone(&asked), Arc::clone(&answer));
                // A client that goes away is its own affair.
                thread::spawn(move || serve(stream?, &asked, &*answer));
            }
        });
        Self { address, requests }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(stream: TcpStream, asked: &Mutex<Vec<Request>>, answer: &dyn Fn(&Request) -> Answer) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() {
        // As a web server answers to TLS.
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
    reader.take(len.unwrap_or(0)).read_to_end(&mut Vec::new())?;
    let request = Request { method, path, headers };
    let (status, headers, body) = answer(&request);
    asked.lock().unwrap().push(request);
    write!(writer, "HTTP/1.1 {status}\r\nConnection: close\r\n")?;
    if !headers.iter().any(|header| header.starts_with("Transfer-Encoding")) {
        write!(writer, "Content-Length: {}\r\n", body.len())?;
    }
    for header in headers {
        write!(writer, "{header}\r\n")?;
    }
    write!(writer, "\r\n{body}")
}

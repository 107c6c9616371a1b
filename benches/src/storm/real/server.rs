//! An HTTP server on the loopback interface that stands in for S3 and KMS: it answers `GetObject` always, and `Decrypt` as far
//! as a token bucket allows.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::storm::bucket::TokenBucket;

/// The ARN of the only key.
pub(super) const KEY: &str = "arn:aws:kms:eu-central-1:123456789012:key/00000000-0000-4000-8000-000000000000";
/// The plaintext of every ciphertext: the bytes 0 to 63, in Base64. It protects nothing.
const PLAINTEXT: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+Pw==";
/// The largest request that is read.
const MAX_REQUEST: u64 = 64 << 10;

/// A request to KMS.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// When it arrived, counted from the start of the server.
    pub(super) at: Duration,
    /// Whether it was granted.
    pub(super) is_granted: bool,
}

/// A running server. It runs until the process ends.
pub(super) struct Server {
    address: SocketAddr,
    kms: Arc<Kms>,
}

/// KMS for a number of clients.
struct Kms {
    started: Instant,
    clients: usize,
    quota: NonZeroU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Closed until every client has asked once.
    bucket: Option<TokenBucket>,
    /// The requests of each client, which is known by the name of its credentials.
    asked: HashMap<String, Vec<Asked>>,
}

impl Server {
    /// Listens on a free port. All requests to KMS are throttled until each of `clients` has asked once. So the storm is as
    /// sudden as it can be, however long it takes to start the clients.
    ///
    /// # Errors
    /// Fails if there is no free port or no thread.
    pub(super) fn start(clients: usize, quota: NonZeroU32) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on 127.0.0.1")?;
        let address = listener.local_addr().context("cannot learn the port that was given to this server")?;
        let kms = Arc::new(Kms { started: Instant::now(), clients, quota, state: Mutex::default() });
        let answering = Arc::clone(&kms);
        thread::Builder::new()
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    let kms = Arc::clone(&answering);
                    // A client that disconnects, or for which there is no thread, asks again.
                    let _ = thread::Builder::new().spawn(move || serve(&stream, &kms));
                }
            })
            .context("cannot start a thread")?;
        Ok(Self { address, kms })
    }

    /// Returns `http://127.0.0.1:PORT`.
    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the requests to KMS of each client.
    pub(super) fn asked(&self) -> Vec<Vec<Asked>> {
        self.kms.state.lock().unwrap_or_else(PoisonError::into_inner).asked.values().cloned().collect()
    }
}

impl Kms {
    /// Decides about a request of this client that arrives now.
    fn is_granted(&self, client: String) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.started.elapsed();
        let is_new = !state.asked.contains_key(&client);
        if is_new && state.asked.len() + 1 == self.clients {
            state.bucket = Some(TokenBucket::full(self.quota, at));
        }
        let is_granted = state.bucket.as_mut().is_some_and(|bucket| bucket.take(at));
        state.asked.entry(client).or_default().push(Asked { at, is_granted });
        is_granted
    }
}

/// Answers one request.
fn serve(stream: &TcpStream, kms: &Kms) -> io::Result<()> {
    let mut reader = BufReader::new(stream.take(MAX_REQUEST));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let is_s3 = line.starts_with("GET ");
    let (mut client, mut len) = (String::new(), 0);
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.trim().split_once(':') else { continue };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => client = access_key(value).unwrap_or_default().to_owned(),
            "content-length" => len = value.trim().parse().unwrap_or(0),
            _ => {}
        }
    }
    // A socket that is closed with unread bytes resets the connection, and the client would lose the answer.
    io::copy(&mut reader.take(len), &mut io::sink())?;
    let (status, kind, body) = match is_s3 {
        true => ("200 OK", "application/octet-stream", "a ciphertext".to_owned()),
        false if kms.is_granted(client) => (
            "200 OK",
            "application/x-amz-json-1.1",
            format!(r#"{{"KeyId":"{KEY}","Plaintext":"{PLAINTEXT}","EncryptionAlgorithm":"SYMMETRIC_DEFAULT"}}"#),
        ),
        false => (
            "400 Bad Request",
            "application/x-amz-json-1.1",
            r#"{"__type":"ThrottlingException","message":"You have exceeded the rate at which you may call KMS."}"#
                .to_owned(),
        ),
    };
    let mut writer = stream;
    write!(
        writer,
        "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Returns the access key in the header of a signed request: `AWS4-HMAC-SHA256 Credential=KEY/20261130/eu-central-1/kms/...`.
fn access_key(authorization: &str) -> Option<&str> {
    authorization.split_once("Credential=")?.1.split('/').next()
}

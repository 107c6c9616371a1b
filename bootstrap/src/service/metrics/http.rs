//! The HTTP server of the metrics. It runs in a separate thread, and no other thread waits for it, not even at the end.
//!
//! # Bounds
//! The server serves at most eight connections at once, and gives one answer on each. A client has five seconds to send a
//! request, whose header has at most 8 KiB, and ten seconds in all. Further clients wait in the kernel's queue.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nbd_server::threads;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, oneshot};

use crate::config::MetricsAddress;
use crate::machine::socket_file::{self, Permissions, SocketError, SocketFile};

/// The most connections that are served at the same time.
const CONNECTIONS: usize = 8;
/// How long a client may take to send a request.
const HEADER: Duration = Duration::from_secs(5);
/// How long a connection may last.
const ALL: Duration = Duration::from_secs(10);
/// The longest header of a request in bytes. hyper allows no smaller limit.
const LONGEST_HEADER: usize = 8192;
/// The pause after a connection could not be accepted, for lack of open files or memory.
const PAUSE: Duration = Duration::from_millis(100);
/// The type of the metrics: OpenMetrics.
const OPEN_METRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
/// The type of the other answers.
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Why the metrics cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The unix socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The port cannot be used.
    #[error("could not listen on {address}: {source}")]
    Port {
        /// The address.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The system refused a thread or memory.
    #[error("the thread that serves the metrics could not be started: {0}")]
    Resource(#[from] io::Error),
}

/// Where the metrics come from.
struct Source {
    /// Returns the metrics at the moment of the call.
    metrics: Box<dyn Fn() -> Result<String, anyhow::Error> + Send + Sync>,
    /// Whether a failure was logged. Clients could fill the log if every failure were logged.
    has_warned: AtomicBool,
}

/// Serves metrics until it is dropped. Dropping it removes the unix socket. It does not wait for an answer that is being made,
/// because that may take as long as the kernel takes to list the mounts.
pub struct MetricsServer {
    /// Dropped when the thread is to end.
    _stop: oneshot::Sender<()>,
    _socket: Option<SocketFile>,
}

impl fmt::Debug for MetricsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetricsServer").finish_non_exhaustive()
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl MetricsServer {
    /// Listens at `address`, and answers each request with what `metrics` returns. If `address` is a unix socket, it gets
    /// `permissions`.
    ///
    /// # Errors
    /// [`MetricsError`], if the address cannot be used, or the thread cannot be started.
    pub fn start(
        address: &MetricsAddress,
        permissions: Permissions,
        metrics: impl Fn() -> Result<String, anyhow::Error> + Send + Sync + 'static,
    ) -> Result<Self, MetricsError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let inside = runtime.enter();
        let (listener, socket) = match address {
            MetricsAddress::Unix(path) => {
                let (listener, file) = socket_file::bind(path, permissions)?;
                listener.set_nonblocking(true)?;
                (Listener::Unix(UnixListener::from_std(listener)?), Some(file))
            }
            MetricsAddress::Tcp(address) => {
                let listen = || {
                    let listener = StdTcpListener::bind(address)?;
                    listener.set_nonblocking(true)?;
                    TcpListener::from_std(listener)
                };
                let listener = listen().map_err(|source| MetricsError::Port { address: *address, source })?;
                (Listener::Tcp(listener), None)
            }
        };
        drop(inside);
        let source = Arc::new(Source { metrics: Box::new(metrics), has_warned: AtomicBool::new(false) });
        let (stop, stopped) = oneshot::channel();
        threads::start("metrics", move || {
            runtime.block_on(async {
                tokio::select! {
                    () = run(listener, source) => {}
                    _ = stopped => {}
                }
            });
            // Connections that are still open are dropped with the runtime.
        })?;
        Ok(Self { _stop: stop, _socket: socket })
    }
}

async fn run(listener: Listener, source: Arc<Source>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let source = Arc::clone(&source);
        let accepted = match &listener {
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(async move {
                    serve(stream, source).await;
                    drop(slot);
                });
            }),
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(async move {
                    serve(stream, source).await;
                    drop(slot);
                });
            }),
        };
        if let Err(error) = accepted {
            tracing::debug!("a client of the metrics could not be accepted: {error}");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, source: Arc<Source>) {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer(&request, &source);
        async { Ok::<_, Infallible>(answer) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER).max_buf_size(LONGEST_HEADER).keep_alive(false);
    match tokio::time::timeout(ALL, http.serve_connection(TokioIo::new(stream), service)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("a client of the metrics left early: {error}"),
        Err(_) => tracing::debug!("a client of the metrics took too long"),
    }
}

fn answer(request: &Request<Incoming>, source: &Source) -> Response<Full<Bytes>> {
    let plain = |status, text: &str| {
        let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, PLAIN);
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "the metrics are at /metrics\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "the metrics can only be read\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match (source.metrics)() {
        Ok(text) => {
            let mut response = plain(StatusCode::OK, &text);
            response.headers_mut().insert(CONTENT_TYPE, OPEN_METRICS);
            response
        }
        Err(error) => {
            if !source.has_warned.swap(true, Ordering::Relaxed) {
                tracing::warn!("the metrics could not be made, which is logged only once: {error:#}");
            }
            plain(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be made: see the server's log\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::mpsc::channel;

    use super::*;

    fn start(
        path: &Path,
        metrics: impl Fn() -> Result<String, anyhow::Error> + Send + Sync + 'static,
    ) -> MetricsServer {
        MetricsServer::start(&MetricsAddress::Unix(path.to_owned()), Permissions::ONLY_THIS_USER, metrics).unwrap()
    }

    fn ask(path: &Path) -> UnixStream {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        stream
    }

    /// The client's request is in the server's code, which waits for this test. Dropping the server returns all the same.
    #[test]
    fn the_end_does_not_wait_for_an_answer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (asked, was_asked) = channel();
        let (go_on, may_go_on) = channel::<()>();
        let may_go_on = std::sync::Mutex::new(may_go_on);
        let server = start(&path, move || {
            asked.send(())?;
            // An error, because this test drops the sender.
            let _ = may_go_on.lock().unwrap().recv();
            Ok(String::new())
        });
        let _client = ask(&path);
        was_asked.recv().unwrap();
        drop(server);
        assert!(!path.exists());
        drop(go_on);
    }

    #[test]
    fn a_failure_of_the_source_is_an_answer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _server = start(&path, || anyhow::bail!("/proc is missing"));
        let mut text = String::new();
        ask(&path).read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 500 ") && text.contains("see the server's log"), "{text}");
        assert!(!text.contains("/proc"), "the reason is for the log only: {text}");
    }
}

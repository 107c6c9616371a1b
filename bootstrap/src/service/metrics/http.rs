//! The HTTP server of the metrics. It runs in a thread of its own, and nothing waits for it.
//!
//! # Bounds
//! It serves at most eight connections at once, and one answer on each. A client has five seconds to send a request, whose
//! header has at most 8 KiB, and ten seconds in all. Further clients wait, in the kernel.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
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
/// The type of the answer: OpenMetrics.
const TEXT: HeaderValue = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

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

/// Returns the metrics at the moment of the call.
type Source = dyn Fn() -> Result<String, anyhow::Error> + Send + Sync;

/// Serves metrics until it is dropped.
pub struct MetricsServer {
    /// Dropped when the thread is to end.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
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
    /// Listens at `address`, and answers each request with what `source` returns. A unix socket has these permissions.
    ///
    /// # Errors
    /// [`MetricsError`], if the address cannot be used, or the thread cannot be started.
    pub fn start(
        address: &MetricsAddress,
        permissions: Permissions,
        source: impl Fn() -> Result<String, anyhow::Error> + Send + Sync + 'static,
    ) -> Result<Self, MetricsError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _inside = runtime.enter();
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
        drop(_inside);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = run(listener, Arc::new(source)) => {}
                    _ = stopped => {}
                }
            });
            // Connections that are still there are dropped with the runtime.
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread), _socket: socket })
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been reported on standard error.
            let _ = thread.join();
        }
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
        let answer = answer(&request, &*source);
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
    match source() {
        Ok(text) => {
            let mut response = plain(StatusCode::OK, &text);
            response.headers_mut().insert(CONTENT_TYPE, TEXT);
            response
        }
        Err(error) => {
            tracing::warn!("the metrics could not be made: {error:#}");
            plain(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be made: see the server's log\n")
        }
    }
}

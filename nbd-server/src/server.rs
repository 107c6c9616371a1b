//! The server: its exports, and the connections on which it serves them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::server::TlsStream;

use crate::export::{Export, Exports};
use crate::proto::Negotiated;
use crate::session::link::Link;
use crate::session::tokio::HandshakeEnd;
use crate::session::workers::Workers;
use crate::session::{SessionError, Work, tokio as session, uring};
use crate::shutdown::Shutdown;
use crate::tls::Tls;

/// The send buffer of a unix socket in bytes: kernel memory for what was sent and is not received yet. Linux doubles the
/// value (socket(7)). With the usual 104 KiB, sender and receiver take turns; with half a megabyte they run side by side. A
/// larger buffer is hardly faster with one connection. With several connections it is slower, because the data leaves the
/// CPU's cache before it is received ("Send buffers" in benches/README.md).
const UNIX_SOCKET_BUFFER: usize = 512 << 10;
/// How long to wait after a failed accept. Accepting fails for lack of file descriptors or memory, and other
/// connections or programs must release some first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Checks whether this process may use io_uring, as [`SessionKind::Auto`] does.
///
/// # Errors
/// `Unsupported` or `ENOSYS` if the kernel is too old, `EPERM` if io_uring is forbidden.
pub fn io_uring() -> io::Result<()> {
    uring::is_available()
}

/// Which session serves plain sockets. tokio's session always serves TLS and other streams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SessionKind {
    /// io_uring if the kernel allows it, otherwise tokio. The log says once if it is tokio.
    #[default]
    Auto,
    /// io_uring. [`Server::new`] fails if the kernel does not allow it.
    IoUring,
    /// tokio, which polls sockets, and threads that block for the disk.
    Tokio,
}

/// A socket that system calls can serve directly, without a layer such as TLS.
pub trait PlainSocket: AsyncRead + AsyncWrite + Unpin + Send {
    /// Takes the socket from tokio.
    ///
    /// # Errors
    /// The system's error if tokio cannot deregister the socket.
    fn into_owned_fd(self) -> io::Result<OwnedFd>;
}

impl PlainSocket for UnixStream {
    fn into_owned_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

impl PlainSocket for TcpStream {
    fn into_owned_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

/// The settings of a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The maximum number of connections served at once. Further connections wait in the listener's queue.
    pub max_connections: usize,
    /// How long a client may take until transmission begins, including TLS.
    pub handshake_timeout: Duration,
    /// How long a client in transmission may be idle. A client is idle while it neither sends nor takes a byte and none
    /// of its requests is being carried out. An idle client is disconnected after this time or up to an eighth later,
    /// even in the middle of a message. `None` means never. A filesystem needs `None`, since it may have no requests
    /// for hours.
    pub idle_timeout: Option<Duration>,
    /// Whether connections are encrypted. This does not affect connections without a handshake.
    pub tls: Tls,
    /// The number of threads that read and write the disks. It limits how many requests these threads carry out at
    /// once, over all connections.
    pub workers: usize,
    /// Which session serves plain sockets.
    pub session: SessionKind,
    /// Whether io_uring keeps the buffers of direct I/O registered (looked up and pinned), as far as `RLIMIT_MEMLOCK`
    /// allows. Without this, I/O takes more CPU time. The setting exists to measure how much.
    pub registered_buffers: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_connections: 256,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: None,
            tls: Tls::Off,
            workers: 16,
            session: SessionKind::Auto,
            registered_buffers: true,
        }
    }
}

/// A server's exports and worker threads. Clones are the same server.
///
/// # Memory
/// A connection holds at most [`MAX_BYTES_IN_FLIGHT`](crate::session::MAX_BYTES_IN_FLIGHT) bytes in buffers, including
/// buffers that are kept for reuse, and about one megabyte of other memory. A worker takes two megabytes more for a request
/// that does not cover whole blocks. In addition, the kernel holds the data that is in the socket. On a unix socket, this
/// is at most 1 MiB that the server has sent, and as much from the client as the client's own send buffer allows.
#[derive(Clone)]
pub struct Server {
    exports: Exports,
    workers: Arc<Workers<Work>>,
    settings: Settings,
    /// Set if io_uring serves plain sockets.
    by_uring: bool,
}

/// A socket on which clients connect.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP port on one address.
    Tcp(TcpListener),
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl Listener {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        match self {
            Self::Unix(listener) => listener.poll_accept(context).map_ok(|(stream, _)| Accepted::Unix(stream)),
            Self::Tcp(listener) => listener.poll_accept(context).map_ok(|(stream, peer)| Accepted::Tcp(stream, peer)),
        }
    }
}

/// Where connections come from: one or more sockets, which may be of different kinds.
#[derive(Debug)]
pub struct Listeners {
    all: Vec<Listener>,
    /// The listener that is asked first. It changes with each connection, so that no listener keeps the others waiting.
    first: usize,
}

impl<L: Into<Listener>> From<L> for Listeners {
    fn from(listener: L) -> Self {
        Self::from(vec![listener.into()])
    }
}

impl From<Vec<Listener>> for Listeners {
    fn from(all: Vec<Listener>) -> Self {
        Self { all, first: 0 }
    }
}

impl Listeners {
    /// Accepts the next connection of any of the listeners.
    async fn accept(&mut self) -> io::Result<Accepted> {
        let accepted = std::future::poll_fn(|context| {
            let (before, after) = self.all.split_at(self.first);
            for (place, listener) in (self.first..).zip(after).chain((0..).zip(before)) {
                if let Poll::Ready(accepted) = listener.poll_accept(context) {
                    self.first = (place + 1) % self.all.len();
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await?;
        match &accepted {
            Accepted::Unix(stream) => enlarge_send_buffer(stream),
            Accepted::Tcp(stream, peer) => {
                tracing::debug!(%peer, "a client connected");
                stream.set_nodelay(true)?;
                keep_alive(stream);
            }
        }
        Ok(accepted)
    }
}

enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream, SocketAddr),
}

/// A client that has chosen an export, and the stream for its requests: the socket itself, or TLS in it.
enum Ready<S> {
    Plain(S, Export, Negotiated),
    Tls(Box<TlsStream<S>>, Export, Negotiated),
}

impl Server {
    /// Starts the worker threads. Serves nothing yet.
    ///
    /// # Errors
    /// The system's error if a thread cannot be started, or if [`SessionKind::IoUring`] was asked for and is not
    /// available.
    pub fn new(exports: Exports, settings: Settings) -> io::Result<Self> {
        let by_uring = match (settings.session, uring::is_available()) {
            (SessionKind::Tokio, _) => false,
            (_, Ok(())) => true,
            (SessionKind::IoUring, Err(error)) => return Err(error),
            (SessionKind::Auto, Err(error)) => {
                tracing::warn!("io_uring is not available: serving without it, which takes more CPU time: {error}");
                false
            }
        };
        let workers = Arc::new(Workers::start(settings.workers.max(1))?);
        Ok(Self { exports, workers, settings, by_uring })
    }

    /// Returns the exports.
    pub fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Serves the listeners' connections until the shutdown. After that, it accepts no connections, carries out and
    /// answers the requests in flight, answers later requests with `NBD_ESHUTDOWN`, and flushes every volume.
    ///
    /// # Errors
    /// The error of a volume whose last flush failed.
    pub async fn run(&self, listeners: impl Into<Listeners>, mut shutdown: Shutdown) -> io::Result<()> {
        let mut listeners = listeners.into();
        let slots = Arc::new(Semaphore::new(self.settings.max_connections));
        let mut connections = JoinSet::new();
        let mut failing = false;
        loop {
            // The semaphore is never closed.
            let slot = tokio::select! {
                slot = Arc::clone(&slots).acquire_owned() => slot.ok(),
                () = shutdown.requested() => break,
            };
            let accepted = tokio::select! {
                accepted = listeners.accept() => accepted,
                () = shutdown.requested() => break,
            };
            match accepted {
                Ok(accepted) => {
                    failing = false;
                    connections.spawn(self.clone().serve_logged(accepted, shutdown.clone(), slot));
                }
                Err(error) => {
                    // Warns only once, however long this lasts.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!("cannot accept connections; trying again until it works: {error}");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
            while connections.try_join_next().is_some() {}
        }
        drop(listeners);
        // Each connection now ends within seconds, unless a disk delays it.
        while connections.join_next().await.is_some() {}
        self.flush().await
    }

    /// Takes a client through the handshake, and through TLS if both agree on it. Returns `None` if the client left or
    /// the server is shutting down.
    async fn handshake<S>(&self, stream: S, shutdown: &mut Shutdown) -> Result<Option<Ready<S>>, SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stop = shutdown.clone();
        tokio::select! {
            biased;
            ended = self.handshake_in_time(stream, shutdown) => ended,
            // The client did not finish in time after the shutdown: its message, the reply to it or the TLS handshake is
            // incomplete.
            () = session::too_late(stop) => Err(SessionError::Shutdown),
        }
    }

    async fn handshake_in_time<S>(
        &self,
        mut stream: S,
        shutdown: &mut Shutdown,
    ) -> Result<Option<Ready<S>>, SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { exports, settings, .. } = self;
        // One deadline for the whole handshake, so that a client cannot prolong any part of it.
        let deadline = Instant::now() + settings.handshake_timeout;
        let late = |_| SessionError::HandshakeTimeout;
        let greeted = session::greet(&mut stream, settings.tls.policy(), exports, shutdown);
        let expect = match timeout_at(deadline, greeted).await.map_err(late)?? {
            HandshakeEnd::Chosen(export, negotiated) => {
                tracing::debug!(export = export.info().name, "a client entered transmission");
                return Ok(Some(Ready::Plain(stream, export, negotiated)));
            }
            HandshakeEnd::Left => return Ok(None),
            HandshakeEnd::StartTls(expect) => expect,
        };
        let stream = timeout_at(deadline, settings.tls.accept(stream)).await.map_err(late)?;
        let mut stream = Box::new(stream.map_err(SessionError::Tls)?);
        let ended = session::negotiate(&mut stream, expect.established(), exports, shutdown);
        match timeout_at(deadline, ended).await.map_err(late)?? {
            HandshakeEnd::Chosen(export, negotiated) => {
                tracing::debug!(export = export.info().name, "a client entered transmission under TLS");
                Ok(Some(Ready::Tls(stream, export, negotiated)))
            }
            // The handshake does not let TLS begin a second time.
            HandshakeEnd::Left | HandshakeEnd::StartTls(_) => {
                // The client may be gone already, or it may not read this.
                let _ = timeout_at(deadline, stream.shutdown()).await;
                Ok(None)
            }
        }
    }

    /// Serves one client on a plain socket, beginning with the greeting. io_uring serves the socket if possible, unless
    /// the client starts TLS.
    ///
    /// # Errors
    /// [`SessionError`] if the connection ended for any reason other than a disconnect by the client or the shutdown.
    pub async fn serve_socket(&self, socket: impl PlainSocket, mut shutdown: Shutdown) -> Result<(), SessionError> {
        match self.handshake(socket, &mut shutdown).await? {
            None => Ok(()),
            Some(Ready::Plain(socket, export, negotiated)) => {
                self.serve_socket_negotiated(socket, &export, negotiated, shutdown).await
            }
            Some(Ready::Tls(stream, export, negotiated)) => {
                self.serve_negotiated(stream, &export, negotiated, shutdown).await
            }
        }
    }

    /// Serves one client on a plain socket without a handshake. This is for the kernel, which has the other end of a
    /// socketpair and learns the export's parameters in another way.
    ///
    /// # Errors
    /// [`SessionError`] if the connection ended for any reason other than a disconnect by the client or the shutdown.
    pub async fn serve_socket_transmission(
        &self,
        socket: impl PlainSocket,
        export: &Export,
        shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        self.serve_socket_negotiated(socket, export, Negotiated::default(), shutdown).await
    }

    /// Serves one of the kernel's NBD connections. The kernel has several, and they may replace one another: see
    /// [`crate::session::link`].
    ///
    /// # Errors
    /// [`SessionError`] if the connection ended for any reason other than a disconnect by the kernel or the shutdown.
    /// All requests that were received are carried out in any case.
    pub async fn serve_link(
        &self,
        mut socket: UnixStream,
        export: &Export,
        link: &Arc<Link>,
        mut shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        tokio::select! {
            () = async {
                link.pass().await;
                link.replay(&mut socket).await;
            } => {}
            () = shutdown.requested() => {}
        }
        let link = Arc::clone(link);
        let served =
            self.serve_connection(socket, export, Negotiated::default(), Some(Arc::clone(&link)), shutdown).await;
        link.drain().await;
        served
    }

    async fn serve_socket_negotiated(
        &self,
        socket: impl PlainSocket,
        export: &Export,
        negotiated: Negotiated,
        shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        self.serve_connection(socket, export, negotiated, None, shutdown).await
    }

    async fn serve_connection(
        &self,
        socket: impl PlainSocket,
        export: &Export,
        negotiated: Negotiated,
        link: Option<Arc<Link>>,
        shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        let idle = self.settings.idle_timeout;
        if !self.by_uring {
            return session::transmission(socket, export, negotiated, &self.workers, idle, link, shutdown).await;
        }
        match uring::Session::begin(link.as_ref()).await {
            Ok(session) => {
                let registered_buffers = self.settings.registered_buffers;
                let options = uring::Options { idle, registered_buffers, link };
                session
                    .transmission(socket.into_owned_fd()?, export, negotiated, &self.workers, options, shutdown)
                    .await
            }
            Err(error) => {
                tracing::warn!(
                    "no io_uring for this connection: serving it without io_uring, which takes more CPU time: {error}"
                );
                session::transmission(socket, export, negotiated, &self.workers, idle, link, shutdown).await
            }
        }
    }

    async fn serve_negotiated<S>(
        &self,
        stream: S,
        export: &Export,
        negotiated: Negotiated,
        shutdown: Shutdown,
    ) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite,
    {
        let idle = self.settings.idle_timeout;
        session::transmission(stream, export, negotiated, &self.workers, idle, None, shutdown).await
    }

    async fn serve_logged<P: Send>(self, accepted: Accepted, shutdown: Shutdown, slot: P) {
        let served = match accepted {
            Accepted::Unix(socket) => self.serve_socket(socket, shutdown).await,
            Accepted::Tcp(socket, _) => self.serve_socket(socket, shutdown).await,
        };
        match served {
            Ok(()) => tracing::debug!("a client left"),
            Err(error) => tracing::info!("a connection ended: {error}"),
        }
        drop(slot);
    }

    async fn flush(&self) -> io::Result<()> {
        for export in self.exports.all() {
            let (told, flushed) = oneshot::channel();
            self.workers.submit([Work::Flush(Arc::clone(export.volume()), told)]);
            let flushed = flushed
                .await
                .map_err(|_| io::Error::other("cannot flush a volume: the thread that flushed it panicked"))?;
            flushed.map_err(|error| match error {
                engine::volume::VolumeError::Store(error) => error,
                other => io::Error::other(other),
            })?;
        }
        Ok(())
    }
}

/// Makes the kernel detect within two minutes that a peer has vanished, for example after a power cut (tcp(7)).
/// Otherwise the peer would keep its connection slot forever.
fn keep_alive(socket: &TcpStream) {
    let set = || -> rustix::io::Result<()> {
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, Duration::from_secs(60))?;
        sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10))?;
        sockopt::set_tcp_keepcnt(socket, 6)
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "cannot turn on TCP keepalive for a connection");
    }
}

/// Enlarges the send buffer of a unix socket, so that the server can send while the client receives. The system may
/// allow less than that. (unix(7) has no receive buffer: what the client sends counts against the client's own send
/// buffer.)
pub fn enlarge_send_buffer(socket: &impl std::os::fd::AsFd) {
    // Only privileged processes may exceed net.core.wmem_max.
    if sockopt::set_socket_send_buffer_size_force(socket, UNIX_SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, UNIX_SOCKET_BUFFER);
    }
}

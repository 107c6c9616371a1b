//! The server: exports, and the connections that are served with them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::server::TlsStream;

use crate::export::{Export, Exports};
use crate::proto::Negotiated;
use crate::session::tokio::Haggled;
use crate::session::workers::Workers;
use crate::session::{SessionError, Work, tokio as session, uring};
use crate::shutdown::Shutdown;
use crate::tls::Tls;

/// Kernel memory for what was sent on a unix socket and is not received yet, in bytes; Linux allows twice as much (socket(7)). The
/// usual 104 KiB make sender and receiver take turns; with half a megabyte they run side by side. More is hardly faster with
/// one connection and slower with several: what was sent leaves the CPU's cache before it is received ("Send buffers" in benches/README.md).
const UNIX_SOCKET_BUFFER: usize = 512 << 10;
/// How long to wait after a failed accept: it fails for want of file descriptors or memory, which others must give back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Which session serves plain sockets. (TLS and other streams are always tokio's.)
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SessionKind {
    /// io_uring where the kernel allows it, else tokio; the log says which, once.
    #[default]
    Auto,
    /// io_uring, or [`Server::new`] fails.
    IoUring,
    /// tokio, with its poll, and threads that block for the disk.
    Tokio,
}

/// A socket that the kernel's own calls can serve, without a layer such as TLS between.
pub trait PlainSocket: AsyncRead + AsyncWrite + Unpin + Send {
    /// The socket itself, taken from tokio.
    ///
    /// # Errors
    /// What the system said.
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

/// What can be chosen about a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Connections served at once; further ones wait in the listener's queue.
    pub max_connections: usize,
    /// How long a client may take to come to transmission, TLS included.
    pub handshake_timeout: Duration,
    /// A client in transmission that neither sends nor takes a byte for so long, while nothing is carried out for it, is
    /// cut off: one without requests as well as one that stopped in the middle of a message. Up to an eighth longer may
    /// pass. `None`: never, as a filesystem wants it, which may have nothing to ask for hours.
    pub idle_timeout: Option<Duration>,
    /// Whether conversations are encrypted. Connections that have no handshake are not concerned.
    pub tls: Tls,
    /// Threads that read and write the disks: how many requests they have at once, over all connections.
    pub workers: usize,
    /// Which session serves plain sockets.
    pub session: SessionKind,
    /// Whether io_uring keeps the memory of direct I/O looked up and pinned, as far as `RLIMIT_MEMLOCK` goes. Without it, more CPU
    /// time: this is here to measure how much.
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

/// Exports and the threads that serve them. Clones are the same server.
///
/// # Memory
/// A connection holds at most [`MAX_BYTES_IN_FLIGHT`](crate::session::MAX_BYTES_IN_FLIGHT) bytes in buffers, those that are
/// kept to be used again among them, and a megabyte beside; a worker takes two more for a request that is not whole blocks.
/// (The kernel holds what is in the socket beside: of what is sent on a unix socket 1 MiB at most, and what the client's own
/// buffer lets it send.)
#[derive(Clone)]
pub struct Server {
    exports: Exports,
    workers: Arc<Workers<Work>>,
    settings: Settings,
    /// Plain sockets are served by io_uring.
    by_uring: bool,
}

/// Where connections come from.
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP port.
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
    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                enlarge_send_buffer(&stream);
                Ok(Accepted::Unix(stream))
            }
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                tracing::debug!(%peer, "a client connected");
                stream.set_nodelay(true)?;
                keep_alive(&stream);
                Ok(Accepted::Tcp(stream))
            }
        }
    }
}

enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A client that chose an export, and the stream on which it sends its requests: the socket itself, or TLS in it.
enum Settled<S> {
    Plain(S, Export, Negotiated),
    Tls(Box<TlsStream<S>>, Export, Negotiated),
}

impl Server {
    /// Starts the threads; nothing is served yet.
    ///
    /// # Errors
    /// What the system said to a new thread, or to a ring that was asked for by name.
    pub fn new(exports: Exports, settings: Settings) -> io::Result<Self> {
        let by_uring = match (settings.session, uring::is_available()) {
            (SessionKind::Tokio, _) => false,
            (_, Ok(())) => true,
            (SessionKind::IoUring, Err(error)) => return Err(error),
            (SessionKind::Auto, Err(error)) => {
                tracing::warn!(%error, "no io_uring here: serving without it, which takes more CPU time");
                false
            }
        };
        let workers = Arc::new(Workers::start(settings.workers.max(1))?);
        Ok(Self { exports, workers, settings, by_uring })
    }

    /// What is served.
    pub fn exports(&self) -> &Exports {
        &self.exports
    }

    /// Serves the listener's connections until the shutdown: then no more are accepted, requests under way are carried
    /// out and answered, later ones get `NBD_ESHUTDOWN`, and every volume is flushed.
    ///
    /// # Errors
    /// What a volume said to the last flush.
    pub async fn run(&self, listener: impl Into<Listener>, mut shutdown: Shutdown) -> io::Result<()> {
        let listener = listener.into();
        let places = Arc::new(Semaphore::new(self.settings.max_connections));
        let mut connections = JoinSet::new();
        let mut failing = false;
        loop {
            // The semaphore is never closed.
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place.ok(),
                () = shutdown.requested() => break,
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.requested() => break,
            };
            match accepted {
                Ok(accepted) => {
                    failing = false;
                    connections.spawn(self.clone().serve_logged(accepted, shutdown.clone(), place));
                }
                Err(error) => {
                    // Once, however long it lasts.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "no connection could be accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
            while connections.try_join_next().is_some() {}
        }
        drop(listener);
        // Each ends by itself within seconds, unless a disk keeps it.
        while connections.join_next().await.is_some() {}
        self.flush().await
    }

    /// Serves one client, from the first word on. Returns when it is done and everything it asked for is carried out.
    ///
    /// # Errors
    /// [`SessionError`] when it ended otherwise than by the client's leave or the shutdown.
    pub async fn serve_stream<S>(&self, stream: S, mut shutdown: Shutdown) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let settled = self.settle(stream, &mut shutdown).await?;
        self.transmit(settled, shutdown).await
    }

    /// Takes a client through the handshake, and through TLS where the two agree on it. `None` when it took its leave, or
    /// the shutdown came.
    async fn settle<S>(&self, stream: S, shutdown: &mut Shutdown) -> Result<Option<Settled<S>>, SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stop = shutdown.clone();
        tokio::select! {
            biased;
            settled = self.haggle(stream, shutdown) => settled,
            // It neither says what it began to say nor takes what it is told, nor does TLS come about.
            () = session::too_late(stop) => Err(SessionError::Shutdown),
        }
    }

    async fn haggle<S>(&self, mut stream: S, shutdown: &mut Shutdown) -> Result<Option<Settled<S>>, SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { exports, settings, .. } = self;
        // One for all of it, so that no stage of it can be drawn out.
        let deadline = Instant::now() + settings.handshake_timeout;
        let late = |_| SessionError::HandshakeTimeout;
        let greeted = session::greet(&mut stream, settings.tls.policy(), exports, shutdown);
        let handshake = match timeout_at(deadline, greeted).await.map_err(late)?? {
            Haggled::Chosen(export, negotiated) => {
                tracing::debug!(export = export.info().name, "a client entered transmission");
                return Ok(Some(Settled::Plain(stream, export, negotiated)));
            }
            Haggled::Left => return Ok(None),
            Haggled::StartTls(handshake) => handshake,
        };
        let stream = timeout_at(deadline, settings.tls.accept(stream)).await.map_err(late)?;
        let mut stream = Box::new(stream.map_err(SessionError::Tls)?);
        let haggled = session::haggle(&mut stream, handshake, exports, shutdown);
        match timeout_at(deadline, haggled).await.map_err(late)?? {
            Haggled::Chosen(export, negotiated) => {
                tracing::debug!(export = export.info().name, "a client entered transmission under TLS");
                Ok(Some(Settled::Tls(stream, export, negotiated)))
            }
            // TLS does not begin twice: the handshake sees to it.
            Haggled::Left | Haggled::StartTls(_) => {
                // The client may be gone already, or not take it.
                let _ = timeout_at(deadline, stream.shutdown()).await;
                Ok(None)
            }
        }
    }

    /// Serves one client on a plain socket, from the first word on: by io_uring where that is possible, unless the client
    /// goes on under TLS.
    ///
    /// # Errors
    /// [`SessionError`] when it ended otherwise than by the client's leave or the shutdown.
    pub async fn serve_socket(&self, socket: impl PlainSocket, mut shutdown: Shutdown) -> Result<(), SessionError> {
        match self.settle(socket, &mut shutdown).await? {
            None => Ok(()),
            Some(Settled::Plain(socket, export, negotiated)) => {
                self.serve_socket_negotiated(socket, &export, negotiated, shutdown).await
            }
            Some(Settled::Tls(stream, export, negotiated)) => {
                self.serve_negotiated(stream, &export, negotiated, shutdown).await
            }
        }
    }

    /// Serves one client on a plain socket that needs no handshake: the kernel, which was given the other end of a
    /// socketpair and told of the export by other means.
    ///
    /// # Errors
    /// [`SessionError`] when it ended otherwise than by the client's leave or the shutdown.
    pub async fn serve_socket_transmission(
        &self,
        socket: impl PlainSocket,
        export: &Export,
        shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        self.serve_socket_negotiated(socket, export, Negotiated::default(), shutdown).await
    }

    async fn serve_socket_negotiated(
        &self,
        socket: impl PlainSocket,
        export: &Export,
        negotiated: Negotiated,
        shutdown: Shutdown,
    ) -> Result<(), SessionError> {
        if !self.by_uring {
            return self.serve_negotiated(socket, export, negotiated, shutdown).await;
        }
        match uring::Session::begin().await {
            Ok(session) => {
                let options = uring::Options {
                    idle: self.settings.idle_timeout,
                    registered_buffers: self.settings.registered_buffers,
                };
                session
                    .transmission(socket.into_owned_fd()?, export, negotiated, &self.workers, options, shutdown)
                    .await
            }
            Err(error) => {
                tracing::warn!(%error, "no io_uring for this connection: serving it without, which takes more CPU time");
                self.serve_negotiated(socket, export, negotiated, shutdown).await
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
        session::transmission(stream, export, negotiated, &self.workers, idle, shutdown).await
    }

    async fn serve_logged<P: Send>(self, accepted: Accepted, shutdown: Shutdown, place: P) {
        let served = match accepted {
            Accepted::Unix(socket) => self.serve_socket(socket, shutdown).await,
            Accepted::Tcp(socket) => self.serve_socket(socket, shutdown).await,
        };
        match served {
            Ok(()) => tracing::debug!("a client left"),
            Err(error) => tracing::info!(%error, "a connection ended"),
        }
        drop(place);
    }

    async fn transmit<S>(&self, settled: Option<Settled<S>>, shutdown: Shutdown) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match settled {
            Some(Settled::Plain(stream, export, negotiated)) => {
                self.serve_negotiated(stream, &export, negotiated, shutdown).await
            }
            Some(Settled::Tls(stream, export, negotiated)) => {
                self.serve_negotiated(stream, &export, negotiated, shutdown).await
            }
            None => Ok(()),
        }
    }

    async fn flush(&self) -> io::Result<()> {
        for export in self.exports.all() {
            let volume = Arc::clone(export.volume());
            let flushed = tokio::task::spawn_blocking(move || volume.flush()).await.map_err(io::Error::from)?;
            flushed.map_err(|error| match error {
                engine::volume::VolumeError::Store(error) => error,
                other => io::Error::other(other),
            })?;
        }
        Ok(())
    }
}

/// Has the kernel find out when a peer is gone without a word, as after a power cut, within two minutes: its place would be
/// taken for good. (tcp(7))
fn keep_alive(socket: &TcpStream) {
    let set = || -> rustix::io::Result<()> {
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, Duration::from_secs(60))?;
        sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10))?;
        sockopt::set_tcp_keepcnt(socket, 6)
    };
    if let Err(error) = set() {
        tracing::debug!(%error, "no keepalive");
    }
}

/// Gives a unix socket room to send while its other end receives. Where the system allows less, it is given less. (What the
/// other end sends is on its own account: unix(7) has no buffer for receiving.)
pub fn enlarge_send_buffer(socket: &impl std::os::fd::AsFd) {
    // Only the privileged may exceed net.core.wmem_max.
    if sockopt::set_socket_send_buffer_size_force(socket, UNIX_SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, UNIX_SOCKET_BUFFER);
    }
}

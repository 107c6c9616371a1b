//! The server: exports, and the connections that are served with them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::export::{Export, Exports};
use crate::proto::Negotiated;
use crate::session::tokio::Task;
use crate::session::workers::Workers;
use crate::session::{SessionError, tokio as session};
use crate::shutdown::Shutdown;

/// Kernel memory for each direction of a unix socket, in bytes. The usual 208 KiB make sender and receiver take turns;
/// with a few megabytes they run side by side, at twice the throughput.
const UNIX_SOCKET_BUFFER: usize = 4 << 20;
/// How long to wait after a failed accept: it fails for want of file descriptors or memory, which others must give back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What can be chosen about a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Connections served at once; further ones wait in the listener's queue.
    pub max_connections: usize,
    /// How long a client may take to come to transmission.
    pub handshake_timeout: Duration,
    /// Threads that read and write the disks: how many requests they have at once, over all connections.
    pub workers: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { max_connections: 256, handshake_timeout: Duration::from_secs(10), workers: 16 }
    }
}

/// Exports and the threads that serve them. Clones are the same server.
///
/// # Memory
/// A connection holds at most [`MAX_BYTES_IN_FLIGHT`](crate::session::MAX_BYTES_IN_FLIGHT) bytes of payload, as much
/// again in buffers to be used again, and some hundred kilobytes beside.
#[derive(Clone)]
pub struct Server {
    exports: Exports,
    workers: Arc<Workers<Task>>,
    settings: Settings,
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
                enlarge_buffers(&stream);
                Ok(Accepted::Unix(stream))
            }
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                tracing::debug!(%peer, "a client connected");
                stream.set_nodelay(true)?;
                Ok(Accepted::Tcp(stream))
            }
        }
    }
}

enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Server {
    /// Starts the threads; nothing is served yet.
    ///
    /// # Errors
    /// What the system said to a new thread.
    pub fn new(exports: Exports, settings: Settings) -> io::Result<Self> {
        let workers = Arc::new(Workers::start(settings.workers.max(1))?);
        Ok(Self { exports, workers, settings })
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
                Ok(Accepted::Unix(stream)) => {
                    connections.spawn(self.clone().serve_logged(stream, shutdown.clone(), place));
                }
                Ok(Accepted::Tcp(stream)) => {
                    connections.spawn(self.clone().serve_logged(stream, shutdown.clone(), place));
                }
                Err(error) => {
                    tracing::warn!(%error, "no connection could be accepted");
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
    pub async fn serve_stream<S>(&self, mut stream: S, mut shutdown: Shutdown) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let limit = self.settings.handshake_timeout;
        let settled = session::handshake(&mut stream, &self.exports, limit, &mut shutdown).await?;
        let Some((export, negotiated)) = settled else { return Ok(()) };
        tracing::debug!(export = export.info().name, "a client entered transmission");
        session::transmission(stream, &export, negotiated, &self.workers, shutdown).await
    }

    /// Serves one client that needs no handshake: the kernel, which was given the other end of a socketpair and told of
    /// the export by other means.
    ///
    /// # Errors
    /// [`SessionError`] when it ended otherwise than by the client's leave or the shutdown.
    pub async fn serve_transmission<S>(
        &self,
        stream: S,
        export: &Export,
        shutdown: Shutdown,
    ) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite,
    {
        session::transmission(stream, export, Negotiated::default(), &self.workers, shutdown).await
    }

    async fn serve_logged<S, P>(self, stream: S, shutdown: Shutdown, place: P)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
        P: Send,
    {
        match self.serve_stream(stream, shutdown).await {
            Ok(()) => tracing::debug!("a client left"),
            Err(error) => tracing::info!(%error, "a connection ended"),
        }
        drop(place);
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

/// Gives a unix socket room for a few large requests in each direction. Where the system allows less, it is given less.
pub fn enlarge_buffers(socket: &impl std::os::fd::AsFd) {
    // Only the privileged may exceed net.core.wmem_max.
    if sockopt::set_socket_send_buffer_size_force(socket, UNIX_SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, UNIX_SOCKET_BUFFER);
    }
    if sockopt::set_socket_recv_buffer_size_force(socket, UNIX_SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, UNIX_SOCKET_BUFFER);
    }
}

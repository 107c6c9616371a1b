//! The sockets that `nbdcrypt serve` listens on, and the addresses of its exports on them.

use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::error::ErrorKind;
use nbd_server::{Listener, Listeners};
use tokio::net::{TcpListener, UnixListener};

use super::listen::{self, Listening, why_no_socket};
use super::{Args, TlsChoice, warn_of_strangers};
use crate::cli::wrong_usage;
use crate::machine::activation;
use crate::machine::private_folder::PrivateFolder;
use crate::machine::socket_file::{self, Permissions, SocketError, SocketFile};
use crate::text;

/// Where the server is going to listen. Clients cannot connect to a unix socket yet. On TCP ports and on sockets of the service
/// manager, they can already wait to be accepted.
pub(super) enum Place {
    /// On sockets that the service manager made.
    Activated(Vec<activation::Socket>),
    /// On a unix socket at this path.
    Unix(PathBuf, Permissions),
    /// On a TCP port.
    Tcp(Listening),
    /// On a unix socket in a temporary folder, for `--run` only.
    Private,
}

impl Place {
    /// Chooses the place by the options and by the sockets of the service manager, and takes the TCP port. This comes before
    /// anybody types a passphrase, so it finds as many obstacles as it can.
    ///
    /// # Errors
    /// Fails if there is no place or more than one, and if the server cannot listen there.
    pub(super) async fn choose(args: &Args, activated: Vec<activation::Socket>) -> Result<Self> {
        if !activated.is_empty() {
            for (is_given, option) in [
                (args.socket.is_some(), "--socket"),
                (args.listen.is_some(), "--listen"),
                (args.run.is_some(), "--run"),
            ] {
                if is_given {
                    bail!(
                        "the service manager passed sockets to listen on (LISTEN_FDS={}): leave {option} out, or start \
                         nbdcrypt without a socket unit",
                        activated.len()
                    );
                }
            }
            return Ok(Self::Activated(activated));
        }
        match (&args.socket, &args.listen) {
            (Some(path), _) => {
                listen::refuse_obstacle(path)?;
                Ok(Self::Unix(path.clone(), Permissions { mode: args.socket_mode, group: args.socket_group }))
            }
            (None, Some(address)) => Ok(Self::Tcp(address.listen().await?)),
            (None, None) if args.run.is_some() => Ok(Self::Private),
            (None, None) => Err(wrong_usage(
                "serve",
                ErrorKind::MissingRequiredArgument,
                "nothing to listen on: give '--socket <PATH>', '--listen <ADDR>' or '--run <COMMAND>'. Without them, the \
                 service manager must pass sockets (LISTEN_FDS)",
            )),
        }
    }

    /// Makes the sockets that do not exist yet. From then on, clients can connect.
    ///
    /// # Errors
    /// Fails if a unix socket cannot be made.
    pub(super) fn open(self, args: &Args) -> Result<Open> {
        match self {
            Self::Activated(sockets) => {
                let opened = sockets.into_iter().map(activated).collect::<std::io::Result<Vec<_>>>();
                let (listeners, endpoints): (Vec<_>, Vec<_>) =
                    opened.context("the sockets of the service manager cannot be used")?.into_iter().unzip();
                warn_of(args, listeners.iter().filter_map(address));
                Ok(Open { listeners: listeners.into(), endpoints, files: Files::default() })
            }
            Self::Unix(path, permissions) => {
                let (listener, file) = unix_socket(&path, permissions)?;
                Ok(Open {
                    listeners: listener.into(),
                    // A client may have another working directory.
                    endpoints: vec![Endpoint::Unix(std::path::absolute(path)?)],
                    files: Files { _socket: Some(file), _folder: None },
                })
            }
            Self::Tcp(Listening { listeners, authority, port }) => {
                let listeners: Vec<Listener> = listeners.into_iter().map(Listener::from).collect();
                warn_of(args, listeners.iter().filter_map(address));
                let endpoints = vec![Endpoint::Tcp { authority, port }];
                Ok(Open { listeners: listeners.into(), endpoints, files: Files::default() })
            }
            Self::Private => {
                let folder = PrivateFolder::new();
                let folder = folder.with_context(|| {
                    let at = text::path(std::env::temp_dir());
                    format!("could not make a folder in {at} for the socket of --run (TMPDIR chooses another place)")
                })?;
                let path = folder.path().join("nbd.sock");
                let socket = unix_socket(&path, Permissions::ONLY_THIS_USER);
                let (listener, file) = socket.context("no socket for --run (TMPDIR chooses its folder)")?;
                Ok(Open {
                    listeners: listener.into(),
                    endpoints: vec![Endpoint::Unix(path)],
                    files: Files { _socket: Some(file), _folder: Some(folder) },
                })
            }
        }
    }
}

/// Sockets on which clients can connect.
pub(super) struct Open {
    pub(super) listeners: Listeners,
    /// The addresses of the sockets that have one in a URI.
    pub(super) endpoints: Vec<Endpoint>,
    /// What is removed from the filesystem at the end.
    pub(super) files: Files,
}

/// Files that are removed when this value is dropped.
#[derive(Default)]
pub(super) struct Files {
    // The socket is removed before its folder.
    _socket: Option<SocketFile>,
    _folder: Option<PrivateFolder>,
}

/// The address of a socket, for clients.
pub(super) enum Endpoint {
    /// The absolute path of a unix socket.
    Unix(PathBuf),
    /// A TCP port. `authority` is host and port as in a URI.
    Tcp { authority: String, port: u16 },
    /// A unix socket without a path. NBD URIs cannot name it.
    Nameless,
}

impl Endpoint {
    /// Returns the address of an export as an NBD URI (the NBD project's uri.md).
    pub(super) fn uri(&self, tls: TlsChoice, export: &str) -> Option<String> {
        let scheme = if tls == TlsChoice::Off { "nbd" } else { "nbds" };
        let export = text::in_uri(export);
        match self {
            Self::Unix(path) => {
                let path = text::in_uri(path.as_os_str().as_bytes());
                Some(format!("{scheme}+unix:///{export}?socket={path}"))
            }
            Self::Tcp { authority, .. } => Some(format!("{scheme}://{authority}/{export}")),
            Self::Nameless => None,
        }
    }
}

fn unix_socket(path: &Path, permissions: Permissions) -> Result<(UnixListener, SocketFile)> {
    let (listener, file) = socket_file::bind(path, permissions).map_err(|error| {
        let source = match error {
            SocketError::NoSocket(_) => std::io::ErrorKind::AddrInUse.into(),
            SocketError::Io { source, .. } => source,
            other => return other.into(),
        };
        anyhow!("could not listen on {}: {}", path.display(), why_no_socket(path, &source))
    })?;
    listener.set_nonblocking(true)?;
    Ok((UnixListener::from_std(listener)?, file))
}

/// Hands a socket of the service manager to tokio.
fn activated(socket: activation::Socket) -> std::io::Result<(Listener, Endpoint)> {
    Ok(match socket {
        activation::Socket::Unix(listener) => {
            let address = listener.local_addr()?;
            let endpoint = address.as_pathname().map_or(Endpoint::Nameless, |path| Endpoint::Unix(path.to_owned()));
            (UnixListener::from_std(listener)?.into(), endpoint)
        }
        activation::Socket::Tcp(listener) => {
            let address = listener.local_addr()?;
            let host = Some(address.ip()).filter(|ip| !ip.is_unspecified()).map(|ip| ip.to_string());
            let authority = listen::authority(host.as_deref(), address.port());
            (TcpListener::from_std(listener)?.into(), Endpoint::Tcp { authority, port: address.port() })
        }
    })
}

fn address(listener: &Listener) -> Option<SocketAddr> {
    match listener {
        Listener::Tcp(listener) => listener.local_addr().ok(),
        Listener::Unix(_) => None,
    }
}

/// Warns of each address that other machines can reach.
fn warn_of(args: &Args, addresses: impl Iterator<Item = SocketAddr>) {
    addresses.filter(|address| !address.ip().to_canonical().is_loopback()).for_each(|address| {
        warn_of_strangers(args, address);
    });
}

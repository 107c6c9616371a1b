//! Sockets that a service manager made and passed to this process when it started it (sd_listen_fds(3)).

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use listenfd::ListenFd;
use rustix::net::{AddressFamily, SocketType, sockopt};

/// The number of the first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: u32 = 3;

/// A socket that listens already.
#[derive(Debug)]
pub enum Socket {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP port on one address.
    Tcp(TcpListener),
}

/// Why the sockets of the service manager cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// `LISTEN_FDS` is not the number of sockets.
    #[error(
        "the variable LISTEN_FDS is {0:?}, but it must be the number of sockets that the service manager passes; unset it if \
         there are none"
    )]
    Count(String),
    /// A descriptor cannot be used to listen for clients.
    #[error(
        "{descriptor} from the service manager cannot be used: it is {found}, but nbdcrypt needs a stream socket that \
         listens. In a systemd socket unit, use only ListenStream= with paths, ports or IP addresses, and Accept=no"
    )]
    Unfit {
        /// The descriptor.
        descriptor: Descriptor,
        /// What the descriptor is.
        found: String,
    },
}

/// A descriptor, as an error names it.
#[derive(Debug)]
pub struct Descriptor {
    number: u32,
    /// The socket's name in `LISTEN_FDNAMES`, which is `FileDescriptorName=` in a socket unit.
    name: Option<String>,
}

impl fmt::Display for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file descriptor {}", self.number)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, " ({name:?})"))
    }
}

/// Takes the sockets that a service manager passed to this process, in their order. Returns none if nothing was passed, or
/// if it was meant for another process. Programs that this process starts inherit neither the sockets nor `LISTEN_PID` and
/// `LISTEN_FDS`.
///
/// Call this once, before any thread is started, because it changes the environment, and before the program opens a file.
///
/// # Errors
/// [`ActivationError`], if one of the descriptors is not a listening unix or TCP socket.
pub fn take() -> Result<Vec<Socket>, ActivationError> {
    let variable = |name| std::env::var(name).ok();
    // `listenfd` would also take descriptors if `LISTEN_PID` is missing, and then the variables could be a parent's.
    let (Some(pid), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else { return Ok(Vec::new()) };
    if pid.parse() != Ok(std::process::id()) {
        return Ok(Vec::new());
    }
    let Some(count) = count.parse::<u16>().ok().map(u32::from) else { return Err(ActivationError::Count(count)) };
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(|name| Some(name.to_owned()).filter(|name| !name.is_empty()));
    let mut passed = ListenFd::from_env();
    let descriptors = (FIRST..FIRST + count).map(|number| Descriptor { number, name: names.next().flatten() });
    descriptors.map(|descriptor| socket(&mut passed, descriptor)).collect()
}

fn socket(passed: &mut ListenFd, descriptor: Descriptor) -> Result<Socket, ActivationError> {
    // A number of 16 bits and three more.
    let place = (descriptor.number - FIRST) as usize;
    let taken = match passed.take_unix_listener(place) {
        Ok(Some(listener)) => Ok((sockopt::socket_acceptconn(&listener), Socket::Unix(listener))),
        _ => match passed.take_tcp_listener(place) {
            Ok(Some(listener)) => Ok((sockopt::socket_acceptconn(&listener), Socket::Tcp(listener))),
            _ => Err(other(passed, &descriptor, place)),
        },
    };
    let found = match taken {
        Ok((Ok(true), socket)) => match socket.set_nonblocking() {
            Ok(()) => return Ok(socket),
            Err(error) => format!("a socket that cannot be prepared ({error})"),
        },
        Ok((_, Socket::Unix(_))) => "a unix stream socket that does not listen".to_owned(),
        Ok((_, Socket::Tcp(_))) => "a TCP socket that does not listen".to_owned(),
        Err(found) => found,
    };
    Err(ActivationError::Unfit { descriptor, found })
}

impl Socket {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }
}

/// Returns what a descriptor is that is neither a unix nor a TCP stream socket.
fn other(passed: &mut ListenFd, descriptor: &Descriptor, place: usize) -> String {
    for (family, kind, what) in [
        (AddressFamily::UNIX, SocketType::DGRAM, "a unix datagram socket"),
        (AddressFamily::UNIX, SocketType::SEQPACKET, "a unix sequential-packet socket"),
        (AddressFamily::INET, SocketType::DGRAM, "a UDP socket"),
    ] {
        let raw_kind = kind.as_raw().cast_signed();
        if let Ok(Some(_)) = passed.take_custom::<OwnedFd>(place, family.as_raw().into(), raw_kind, what) {
            return what.to_owned();
        }
    }
    match std::fs::read_link(format!("/proc/self/fd/{}", descriptor.number)) {
        Ok(target) if target.to_string_lossy().starts_with("socket:") => "a socket of another kind".to_owned(),
        Ok(target) if target.is_absolute() => format!("the open file {}", target.display()),
        Ok(target) => target.display().to_string(),
        Err(_) => "not open".to_owned(),
    }
}

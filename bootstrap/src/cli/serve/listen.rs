//! Where `nbdcrypt serve` listens: a TCP address as the user types it, or the path of a unix socket.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;

use crate::text;

/// The maximum length in bytes of a unix socket's path (unix(7), `sun_path`, without the NUL at its end).
const MAX_SOCKET_PATH: usize = 107;

/// A TCP address: `HOST:PORT`, or `:PORT` for every address of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListenAddress {
    /// A name or an IP address. `None` stands for every address.
    host: Option<String>,
    port: u16,
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(match text.parse::<u16>() {
                Ok(port) => format!(
                    "it is a port without an address: write 127.0.0.1:{port} for this machine only, or :{port} for every \
                     address of this machine"
                ),
                Err(_) => format!("it names no port: write {text}:10809"),
            });
        };
        let number =
            port.parse::<u16>().map_err(|_| format!("`{port}` is not a port, which is a number up to 65535"))?;
        let host = match host {
            "" => None,
            _ => match (host.strip_prefix('[').and_then(|host| host.strip_suffix(']')), host.contains(':')) {
                (Some(inner), _) => Some(inner.to_owned()),
                (None, false) => Some(host.to_owned()),
                (None, true) => {
                    return Err(format!("an IPv6 address is written in brackets, before the port: [{host}]:{number}"));
                }
            },
        };
        Ok(Self { host, port: number })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            None => write!(f, ":{}", self.port),
            Some(host) if host.contains(':') => write!(f, "[{host}]:{}", self.port),
            Some(host) => write!(f, "{host}:{}", self.port),
        }
    }
}

/// Listening sockets and their addresses.
pub(super) struct Listening {
    /// One socket for each address.
    pub(super) listeners: Vec<TcpListener>,
    /// Host and port for a URI. The host is the name that the user typed, if it was a name.
    pub(super) authority: String,
    /// The port of all sockets.
    pub(super) port: u16,
}

impl ListenAddress {
    /// Listens on every address of the name, always with the same port. Addresses of a kind that this machine lacks (IPv6
    /// may be off) are left out, unless the name has no others.
    ///
    /// # Errors
    /// Fails if the name has no address, or if one of its addresses cannot be listened on.
    pub(super) async fn listen(&self) -> Result<Listening> {
        let wanted: Vec<SocketAddr> = match &self.host {
            None => vec![(Ipv6Addr::UNSPECIFIED, self.port).into(), (Ipv4Addr::UNSPECIFIED, self.port).into()],
            Some(host) => {
                let found = tokio::net::lookup_host((host.as_str(), self.port)).await;
                let found =
                    found.with_context(|| format!("could not listen on {self}: the name {host} was not resolved"))?;
                found.collect()
            }
        };
        let (mut listeners, mut addresses, mut refusal) = (Vec::new(), Vec::<SocketAddr>::new(), None);
        for mut address in wanted {
            if let Some(first) = addresses.first() {
                // If the kernel chooses the port, all addresses get the same one.
                address.set_port(first.port());
            }
            if addresses.contains(&address) {
                continue;
            }
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    addresses.push(listener.local_addr()?);
                    listeners.push(listener);
                }
                Err(error) if is_absent(&error) => refusal = refusal.or(Some((address, error))),
                // `[::]` includes the IPv4 addresses, unless net.ipv6.bindv6only is set.
                Err(error) if self.host.is_none() && !listeners.is_empty() && in_use(&error) => {}
                Err(error) => bail!("could not listen on {address}: {}", why(&error, address)),
            }
        }
        match (addresses.first(), refusal) {
            (None, Some((address, error))) => bail!("could not listen on {address}: {}", why(&error, address)),
            (None, None) => bail!("could not listen on {self}: the name has no address"),
            (Some(first), _) => {
                let authority = authority(self.host.as_deref(), first.port());
                Ok(Listening { listeners, authority, port: first.port() })
            }
        }
    }
}

/// Returns host and port as a URI has them (RFC 3986). An IPv6 address is in brackets, and its zone follows `%25` (RFC 6874).
pub(super) fn authority(host: Option<&str>, port: u16) -> String {
    match host {
        None => format!("localhost:{port}"),
        Some(host) if host.contains(':') => format!("[{}]:{port}", host.replace('%', "%25")),
        Some(host) => format!("{}:{port}", text::in_uri(host)),
    }
}

fn in_use(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrInUse
}

/// Returns whether this machine lacks the address or its family.
fn is_absent(error: &io::Error) -> bool {
    let unsupported = Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error());
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == unsupported
}

fn why(error: &io::Error, address: SocketAddr) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another program listens there (`ss -ltnp 'sport = :{}'` shows it); end it, or choose another port",
            address.port()
        ),
        io::ErrorKind::AddrNotAvailable => {
            format!("{} is not an address of this machine (`ip address` lists them)", address.ip())
        }
        io::ErrorKind::PermissionDenied => {
            format!("only root may take the port {}; choose one from 1024 on", address.port())
        }
        _ => error.to_string(),
    }
}

/// Returns why no unix socket could be made at `path`, and what to do.
pub(super) fn why_no_socket(path: &Path, error: &io::Error) -> String {
    if let Some(obstacle) = obstacle(path) {
        return obstacle;
    }
    let at = text::path(folder_of(path));
    match error.kind() {
        _ if path.exists() => error.to_string(),
        _ if holds_no_sockets(error) => {
            format!("the filesystem of {at} holds no sockets; choose another folder, such as /run")
        }
        _ if error.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => format!(
            "no file can be made in {at}: it is immutable (`lsattr -d {at}` shows this), or its filesystem holds no \
             sockets; choose another folder, such as /run"
        ),
        io::ErrorKind::PermissionDenied => {
            format!("this user may not make files in the folder {at}; choose one of this user's own folders")
        }
        io::ErrorKind::ReadOnlyFilesystem => format!("the filesystem of {at} is read-only; choose another folder"),
        _ => error.to_string(),
    }
}

/// Checks that a unix socket can be made at `path`. Makes nothing.
///
/// # Errors
/// Fails with the same text as an attempt to make the socket.
pub(super) fn refuse_obstacle(path: &Path) -> Result<()> {
    match obstacle(path) {
        None => Ok(()),
        Some(why) => bail!("could not listen on {}: {why}", path.display()),
    }
}

/// Returns why no unix socket can be made at `path`, and what to do, as far as this can be seen without an attempt.
fn obstacle(path: &Path) -> Option<String> {
    let name = text::path(path);
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        let kind = metadata.file_type();
        let what = match () {
            () if kind.is_socket() => return None,
            () if kind.is_file() => "a regular file",
            () if kind.is_dir() => "a folder",
            () if kind.is_symlink() => "a symbolic link",
            () if kind.is_fifo() => "a named pipe",
            () => "a device",
        };
        return Some(match kind.is_dir() {
            true => format!("it is {what}; choose a path in it, such as {}", text::path(path.join("nbd.sock"))),
            false => format!("it is {what}, and not a socket; choose another path, or remove it: rm {name}"),
        });
    }
    let len = path.as_os_str().as_bytes().len();
    if len > MAX_SOCKET_PATH {
        return Some(format!(
            "its path has {len} bytes, and a socket's at most {MAX_SOCKET_PATH}; choose a shorter path"
        ));
    }
    let folder = folder_of(path);
    let at = text::path(folder);
    match std::fs::metadata(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some(format!("the folder {at} does not exist; make it: mkdir -p {at}"))
        }
        Ok(metadata) if !metadata.is_dir() => Some(format!("{at} is not a folder; choose a path in a folder")),
        _ => None,
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Returns whether this is the error of a filesystem that has no sockets, such as /proc, /sys or vfat. The folder exists.
fn holds_no_sockets(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::NOENT | Errno::OPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<(Option<String>, u16), String> {
        text.parse().map(|address: ListenAddress| (address.host, address.port))
    }

    #[test]
    fn addresses_are_understood_as_they_are_typed() {
        for (text, host, port) in [
            ("127.0.0.1:10809", Some("127.0.0.1"), 10809),
            ("localhost:10809", Some("localhost"), 10809),
            ("server.example:1", Some("server.example"), 1),
            (":10809", None, 10809),
            ("[::1]:10809", Some("::1"), 10809),
            ("[::]:0", Some("::"), 0),
        ] {
            assert_eq!(parsed(text), Ok((host.map(str::to_owned), port)), "{text}");
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        for (text, words) in [
            ("10809", "127.0.0.1:10809 for this machine only, or :10809"),
            ("localhost", "localhost:10809"),
            ("::1:10809", "[::1]:10809"),
            ("localhost:http", "`http` is not a port"),
            ("localhost:65536", "up to 65535"),
            ("localhost:", "not a port"),
        ] {
            let said = parsed(text).unwrap_err();
            assert!(said.contains(words), "{text}: {said}");
        }
    }

    fn listen(text: &str) -> Result<Listening> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(text.parse::<ListenAddress>().unwrap().listen())
    }

    fn addresses(found: &Listening) -> Vec<SocketAddr> {
        found.listeners.iter().map(|listener| listener.local_addr().unwrap()).collect()
    }

    #[test]
    fn all_addresses_of_a_name_get_the_same_port() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let found = listen("localhost:0").unwrap();
        let (port, all) = (found.port, addresses(&found));
        assert!(all.iter().all(|address| address.port() == port && address.ip().is_loopback()));
        assert!(all.iter().any(SocketAddr::is_ipv4), "{all:?}");
        assert_eq!(found.authority, format!("localhost:{port}"));
        let taken = listen(&format!("127.0.0.1:{port}")).err().unwrap().to_string();
        assert!(taken.contains("another program listens there"), "{taken}");
        assert!(addresses(&listen(":0").unwrap()).iter().any(|address| address.ip().is_unspecified()));
        let foreign = listen("192.0.2.1:10809").err().unwrap().to_string();
        assert!(foreign.contains("not an address of this machine"), "{foreign}");
    }

    #[test]
    fn an_address_in_a_uri_is_escaped() {
        for (host, uri) in [
            (None, "localhost:1"),
            (Some("server.example"), "server.example:1"),
            (Some("127.0.0.1"), "127.0.0.1:1"),
            (Some("::1"), "[::1]:1"),
            (Some("fe80::1%eth0"), "[fe80::1%25eth0]:1"),
        ] {
            assert_eq!(authority(host, 1), uri);
        }
    }

    #[test]
    fn the_error_names_what_blocks_a_socket() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "text").unwrap();
        let long = folder.path().join("x".repeat(120));
        for (path, words) in [
            (file.clone(), "it is a regular file"),
            (folder.path().to_owned(), "it is a folder"),
            (folder.path().join("none/socket"), "mkdir -p"),
            (file.join("socket"), "is not a folder"),
            (long, "at most 107"),
            ("/dev/null".into(), "it is a device"),
            ("/proc/socket".into(), "the filesystem of /proc holds no sockets"),
        ] {
            let error = std::os::unix::net::UnixListener::bind(&path).unwrap_err();
            let said = why_no_socket(&path, &error);
            assert!(said.contains(words), "{}: {said}", path.display());
        }
    }
}

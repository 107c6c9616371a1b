//! `nbdcrypt serve`: volumes for NBD clients.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use engine::key::Passphrase;
use engine::luks::{self, Disks};
use engine::store::{Access, BlockStore, BusErrorsCaught, Caching};
use engine::volume::Volume;
use nbd_server::tls::{Clients, Credentials};
use nbd_server::{Export, Exports, ExportsError, Listener, Server, SessionKind, Settings, Tls, shutdown};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use super::header_args::{HeaderArgs, LimitArgs};
use super::passphrase;
use super::plain_args::PlainArgs;
use crate::config::parse_duration;
use crate::{disk, process};

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true))]
pub(super) struct Args {
    /// The disks or files that hold the ciphertext: each is an export of its own.
    #[arg(required = true, value_name = "DEVICE")]
    devices: Vec<PathBuf>,
    /// The passphrase (with `--type plain`, the volume key): the file's bytes, all of them; `-` is standard input. Given
    /// once it opens every DEVICE; or once a DEVICE, in their order. Without it, the passphrase that opens every DEVICE is
    /// asked for.
    #[arg(long = "key-file", value_name = "FILE")]
    key_files: Vec<PathBuf>,
    /// Try the passphrase on this keyslot alone, even one that is ignored otherwise.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
    #[command(flatten)]
    header: HeaderArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Listen on a unix socket, which only this user may connect to.
    #[arg(long, value_name = "PATH", group = "where")]
    socket: Option<PathBuf>,
    /// Listen on a TCP port, such as 127.0.0.1:10809. Whoever reaches it reads and writes the plaintext, unless
    /// `--tls require --tls-verify-peer` keeps them out.
    #[arg(long, value_name = "ADDR", group = "where")]
    listen: Option<SocketAddr>,
    /// What the disk holds.
    #[arg(long = "type", value_enum, default_value_t = Type::Luks)]
    kind: Type,
    #[command(flatten)]
    plain: PlainArgs,
    /// The name that clients ask for; once a DEVICE, in their order. Without it one DEVICE is the default export, with the
    /// empty name, and several have their files' names.
    #[arg(long = "name", visible_alias = "export-name", value_name = "NAME")]
    names: Vec<String>,
    /// A line for people, shown by `nbdinfo --list`; once a DEVICE, in their order. Without it, the DEVICE's path.
    #[arg(long = "description", value_name = "TEXT")]
    descriptions: Vec<String>,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Connections served at once; further ones wait.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    max_connections: u16,
    /// How long a client may take from connecting to having chosen an export, TLS included, such as 10s or 2m: one that
    /// takes longer is cut off.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    handshake_timeout: Duration,
    /// Cut off a client that neither sends nor takes a byte for so long, such as 90s, 2m or 1h, while nothing is carried out
    /// for it; without this, none is. Not for a client with a filesystem on the export.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    idle_timeout: Option<Duration>,
    /// Whether clients speak TLS.
    #[arg(long, value_enum, default_value_t = TlsChoice::Off, requires_ifs = [("on", "tls_certificates"), ("require", "tls_certificates")])]
    tls: TlsChoice,
    /// The directory with server-cert.pem and server-key.pem and, with `--tls-verify-peer`, ca-cert.pem and perhaps
    /// ca-crl.pem: as for nbdkit and qemu.
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Serve only those who have a certificate by an authority in ca-cert.pem.
    #[arg(long)]
    tls_verify_peer: bool,
    /// Give no space back to the disk: TRIM is refused, and zeros are written. Holes show whoever reads the disk which
    /// parts of it are in use.
    #[arg(long)]
    no_discard: bool,
    /// Let the kernel cache the ciphertext. Without it, `O_DIRECT` where the filesystem allows.
    #[arg(long)]
    page_cache: bool,
    /// What serves the connections: `auto` is io_uring where the kernel allows it.
    #[arg(long, value_enum, default_value_t = Session::Auto)]
    session: Session,
    /// Have the kernel look up and pin the memory of each request anew.
    #[arg(long, hide = true)]
    no_registered_buffers: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Type {
    /// A LUKS header says it.
    Luks,
    /// No header: all of the disk is data, and the key file is the volume key.
    Plain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TlsChoice {
    /// No TLS.
    Off,
    /// Clients may use it, or not.
    On,
    /// Clients must.
    Require,
}

/// Which session serves.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Session {
    /// io_uring where the kernel allows it, else tokio.
    #[default]
    Auto,
    /// io_uring, or fail.
    IoUring,
    /// Threads that block.
    Tokio,
}

impl From<Session> for SessionKind {
    fn from(session: Session) -> Self {
        match session {
            Session::Auto => Self::Auto,
            Session::IoUring => Self::IoUring,
            Session::Tokio => Self::Tokio,
        }
    }
}

pub(super) fn run(args: Args) -> Result<()> {
    process::protect_secrets();
    let names = names(&args)?;
    process::allow_open_files(args.max_connections.into());
    let settings = Settings {
        max_connections: args.max_connections.into(),
        handshake_timeout: args.handshake_timeout,
        idle_timeout: args.idle_timeout,
        registered_buffers: !args.no_registered_buffers,
        tls: tls(&args)?,
        session: args.session.into(),
        ..Settings::default()
    };
    let exports = exports(&args, &names)?;
    let server = Server::new(exports, settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(listen_and_serve(&args, &names, &server))
}

/// What clients ask for, a name a device.
fn names(args: &Args) -> Result<Vec<String>> {
    let several = args.devices.len() > 1;
    if several && args.header.header.is_some() {
        bail!("a header is one volume's: with --header, give one DEVICE");
    }
    once_a_device(args, "--name", args.names.len())?;
    once_a_device(args, "--description", args.descriptions.len())?;
    if args.key_files.len() > 1 {
        once_a_device(args, "--key-file", args.key_files.len())?;
        if args.key_files.iter().filter(|file| file.as_os_str() == "-").count() > 1 {
            bail!("standard input holds one key: give `--key-file -` once");
        }
    }
    if !args.names.is_empty() {
        return Ok(args.names.clone());
    }
    let file_name = |device: &PathBuf| match device.file_name().and_then(|name| name.to_str()) {
        _ if !several => Ok(String::new()),
        Some(name) => Ok(name.to_owned()),
        None => bail!("{} has no name that clients could ask for: give each DEVICE a --name", device.display()),
    };
    args.devices.iter().map(file_name).collect()
}

/// An option that is given for each device is given for all of them, or not at all.
fn once_a_device(args: &Args, option: &str, given: usize) -> Result<()> {
    let devices = args.devices.len();
    if given != 0 && given != devices {
        bail!(
            "{option} is given {given} times for {devices} devices: give it once for each, in their order, or not at all"
        );
    }
    Ok(())
}

fn tls(args: &Args) -> Result<Tls> {
    let directory = match (args.tls, &args.tls_certificates) {
        (TlsChoice::Off, None) if args.tls_verify_peer => {
            bail!("--tls-verify-peer needs `--tls require` or `--tls on`")
        }
        (TlsChoice::Off, None) => return Ok(Tls::Off),
        // Whoever names certificates does not want plaintext.
        (TlsChoice::Off, Some(_)) => bail!("--tls-certificates needs `--tls require` or `--tls on`"),
        (_, None) => bail!("--tls needs --tls-certificates DIR"),
        (_, Some(directory)) => directory,
    };
    if args.tls == TlsChoice::On && args.tls_verify_peer {
        bail!(
            "with `--tls on` a client without a certificate could simply do without TLS: --tls-verify-peer needs `--tls require`"
        );
    }
    let clients = if args.tls_verify_peer { Clients::WithCertificate } else { Clients::Anyone };
    let credentials = Credentials::from_directory(directory, clients).context("TLS")?;
    Ok(match args.tls {
        TlsChoice::Require => Tls::Required(credentials),
        _ => Tls::Offered(credentials),
    })
}

fn exports(args: &Args, names: &[String]) -> Result<Exports> {
    // One key for all is read once: it may be on standard input.
    let only = match args.key_files.as_slice() {
        [] => Some(passphrase::existing(None, &args.devices[0])?),
        [file] => Some(passphrase::existing(Some(file), &args.devices[0])?),
        _ => None,
    };
    let mut exports = Vec::new();
    for (place, (device, name)) in args.devices.iter().zip(names).enumerate() {
        let own = match (&only, args.key_files.get(place)) {
            (None, Some(file)) => Some(passphrase::existing(Some(file), device)?),
            _ => None,
        };
        let Some(passphrase) = own.as_ref().or(only.as_ref()) else { bail!("no --key-file for {}", device.display()) };
        let key_file = args.key_files.get(place).or(args.key_files.first()).map(PathBuf::as_path);
        let volume = Arc::new(open(args, device, key_file, passphrase)?);
        let description = args.descriptions.get(place).cloned().unwrap_or_else(|| device.display().to_string());
        let mut export = Export::new(name.clone(), volume).described(description);
        if args.read_only {
            export = export.read_only();
        }
        if args.no_discard {
            export = export.without_discard();
        }
        exports.push(export);
    }
    Exports::new(exports).map_err(|error| match error {
        ExportsError::SameName(name) => anyhow!("two devices would be exported as `{name}`: give each a --name"),
        other => other.into(),
    })
}

fn open(args: &Args, path: &Path, key_file: Option<&Path>, passphrase: &Passphrase) -> Result<Volume> {
    let name = || path.display().to_string();
    let access = if args.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let caching = if args.page_cache { Caching::PageCache } else { Caching::Direct };
    let store: Arc<dyn BlockStore> = Arc::new(disk::open(path, access, caching)?.mapped(BusErrorsCaught::new()?));
    let plain = args.plain.volume();
    let (key, segment) = match args.kind {
        Type::Luks => {
            args.plain.refuse()?;
            let header = match &args.header.header {
                Some(path) => Some(disk::open(path, Access::ReadOnly, Caching::PageCache)?),
                None => None,
            };
            let disks = match &header {
                Some(header) => Disks::detached(header, store.as_ref()),
                None => store.as_ref().into(),
            };
            let name = || args.header.header.as_deref().unwrap_or(path).display().to_string();
            let limits = args.limits.limits();
            let locked = luks::read(disks, &limits).with_context(name)?;
            let unlocked = locked.unlock_keyslot(disks.header(), args.key_slot, passphrase, &limits);
            let unlocked = unlocked.with_context(name)?;
            (unlocked.key, unlocked.segment)
        }
        Type::Plain => {
            if args.header.header.is_some() {
                bail!("a plain volume has no header: leave --header out");
            }
            if args.key_slot.is_some() {
                bail!("a plain volume has no keyslots: leave --key-slot out");
            }
            let key = plain.key(passphrase).with_context(|| {
                let key = key_file.unwrap_or(Path::new("what was typed")).display();
                format!("{key} holds no volume key of {} bits", 8 * plain.key_len)
            })?;
            (key, plain.segment(store.len()).with_context(name)?)
        }
    };
    Volume::with_cipher(store, segment, plain.cipher(&key)?).with_context(name)
}

async fn listen_and_serve(args: &Args, names: &[String], server: &Server) -> Result<()> {
    // Before the address is told: whoever reads it may end this process at once.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (listener, addresses, _socket) = bind(args, names).await?;
    let mut stdout = std::io::stdout();
    // With one call: whoever needs the first alone may close the pipe behind it.
    let lines: String = addresses.iter().map(|address| format!("{address}\n")).collect();
    stdout.write_all(lines.as_bytes())?;
    stdout.flush()?;
    if stdout.is_terminal() {
        let devices: Vec<String> = args.devices.iter().map(|device| device.display().to_string()).collect();
        eprintln!("serving {} until Ctrl-C", devices.join(", "));
    }
    let (trigger, stop) = shutdown();
    tokio::pin! { let serving = server.run(listener, stop); }
    tokio::select! {
        result = &mut serving => return Ok(result?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    trigger.stop();
    Ok(serving.await?)
}

/// The listener, and each export's address as an NBD URI (the NBD project's uri.md).
async fn bind(args: &Args, names: &[String]) -> Result<(Listener, Vec<String>, Option<SocketFile>)> {
    let scheme = if args.tls == TlsChoice::Off { "nbd" } else { "nbds" };
    let names = names.iter().map(|name| in_uri(name));
    if let Some(path) = &args.socket {
        let (listener, file) = bind_unix(path)?;
        let addresses = names.map(|name| format!("{scheme}+unix:///{name}?socket={}", path.display())).collect();
        return Ok((listener.into(), addresses, Some(file)));
    }
    let Some(address) = args.listen else { bail!("neither --socket nor --listen") };
    let listener = TcpListener::bind(address).await.with_context(|| format!("could not listen on {address}"))?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        warn_of_strangers(args, address);
    }
    Ok((listener.into(), names.map(|name| format!("{scheme}://{address}/{name}")).collect(), None))
}

fn warn_of_strangers(args: &Args, address: SocketAddr) {
    match (args.tls, args.tls_verify_peer) {
        (TlsChoice::Require, true) => {}
        (TlsChoice::Require, false) => tracing::warn!(
            "{address} can be reached from other machines, and whoever reaches it reads the plaintext, under TLS: \
             --tls-verify-peer serves only those who have a certificate"
        ),
        _ => tracing::warn!(
            "{address} can be reached from other machines, and whoever reaches it reads the plaintext: \
             --tls require --tls-verify-peer serves only those who have a certificate"
        ),
    }
}

/// A name as it stands in a URI: all but RFC 3986's unreserved characters and the slash in percent-encoding.
fn in_uri(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// A socket in the filesystem that this process made, removed at the end unless it is another's by then.
struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
        std::fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if Self::identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let name = || format!("could not listen on {}", path.display());
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        match std::os::unix::net::UnixStream::connect(path) {
            // Left by a server that died.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).with_context(name)?;
            }
            _ => bail!("{} is another server's socket: choose another path", path.display()),
        }
    }
    // No one else may connect, from the first moment on.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener.with_context(name)?;
    let identity = SocketFile::identity(path).with_context(name)?;
    Ok((listener, SocketFile { path: path.to_owned(), identity }))
}

fn duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Some(time) if !time.is_zero() => Ok(time),
        _ => Err("a time is a number of seconds, minutes or hours: 90s, 2m, 1h".to_owned()),
    }
}

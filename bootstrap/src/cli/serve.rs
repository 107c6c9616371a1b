//! `nbdcrypt serve`: a volume for NBD clients.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use engine::luks::{self, Disks};
use engine::store::{Access, BlockStore, Caching};
use engine::volume::Volume;
use nbd_server::{Export, Exports, Listener, Server, SessionKind, Settings, shutdown};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use super::format::key_file;
use super::header_args::{HeaderArgs, LimitArgs};
use super::plain_args::PlainArgs;
use crate::keys::{FileKey, KeySource};
use crate::{disk, process};

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where").required(true))]
pub(super) struct Args {
    /// The disk or file that holds the ciphertext.
    device: PathBuf,
    /// The passphrase (with `--type plain`, the volume key): the file's bytes, all of them; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    key_file: PathBuf,
    #[command(flatten)]
    header: HeaderArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Listen on a unix socket, which only this user may connect to.
    #[arg(long, value_name = "PATH", group = "where")]
    socket: Option<PathBuf>,
    /// Listen on a TCP port, such as 127.0.0.1:10809. Whoever reaches it reads and writes the plaintext.
    #[arg(long, value_name = "ADDR", group = "where")]
    listen: Option<SocketAddr>,
    /// What the disk holds.
    #[arg(long = "type", value_enum, default_value_t = Type::Luks)]
    kind: Type,
    #[command(flatten)]
    plain: PlainArgs,
    /// The name that clients ask for.
    #[arg(long, default_value = "")]
    name: String,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Let the kernel cache the ciphertext. Without it, `O_DIRECT` where the filesystem allows.
    #[arg(long)]
    page_cache: bool,
    /// What serves the connections: `auto` is io_uring where the kernel allows it.
    #[arg(long, value_enum, default_value_t = Session::Auto)]
    session: Session,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Type {
    /// A LUKS header says it.
    Luks,
    /// No header: all of the disk is data, and the key file is the volume key.
    Plain,
}

pub(super) fn run(args: Args) -> Result<()> {
    process::protect_secrets();
    let volume = Arc::new(open(&args)?);
    let mut export = Export::new(args.name.clone(), volume).described(args.device.display().to_string());
    if args.read_only {
        export = export.read_only();
    }
    let server =
        Server::new(Exports::new([export])?, Settings { session: args.session.into(), ..Settings::default() })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(listen_and_serve(&args, &server))
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

fn open(args: &Args) -> Result<Volume> {
    let path = &args.device;
    let name = || path.display().to_string();
    let access = if args.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let caching = if args.page_cache { Caching::PageCache } else { Caching::Direct };
    let passphrase = FileKey::new(key_file(&args.key_file)).passphrase()?;
    let store: Arc<dyn BlockStore> = Arc::new(disk::open(path, access, caching)?);
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
            let name = || args.header.header.as_ref().unwrap_or(path).display().to_string();
            let locked = luks::read(disks, &args.limits.limits()).with_context(name)?;
            let unlocked = locked.unlock(disks.header(), &passphrase).with_context(name)?;
            (unlocked.key, unlocked.segment)
        }
        Type::Plain => {
            if args.header.header.is_some() {
                bail!("a plain volume has no header: leave --header out");
            }
            let key = args.plain.key(&passphrase).with_context(|| {
                format!("{} holds no volume key of {} bits", args.key_file.display(), args.plain.key_bits())
            })?;
            (key, args.plain.segment(store.len()).with_context(name)?)
        }
    };
    Volume::with_cipher(store, segment, args.plain.cipher(&key)?).with_context(name)
}

async fn listen_and_serve(args: &Args, server: &Server) -> Result<()> {
    // Before the address is told: whoever reads it may end this process at once.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (listener, address, _socket) = bind(args).await?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{address}")?;
    stdout.flush()?;
    if stdout.is_terminal() {
        eprintln!("serving {} until Ctrl-C", args.device.display());
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

/// The listener, and its address as an NBD URI (the NBD project's uri.md).
async fn bind(args: &Args) -> Result<(Listener, String, Option<SocketFile>)> {
    if let Some(path) = &args.socket {
        let (listener, file) = bind_unix(path)?;
        let address = format!("nbd+unix:///{}?socket={}", args.name, path.display());
        return Ok((listener.into(), address, Some(file)));
    }
    let Some(address) = args.listen else { bail!("neither --socket nor --listen") };
    let listener = TcpListener::bind(address).await.with_context(|| format!("could not listen on {address}"))?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() {
        tracing::warn!("{address} can be reached from other machines, and whoever reaches it reads the plaintext");
    }
    Ok((listener.into(), format!("nbd://{address}/{}", args.name), None))
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

//! `nbdcrypt serve`: serves volumes to NBD clients.

mod captive;
mod listen;
mod place;

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use clap::ArgAction;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use engine::key::Passphrase;
use engine::layout::Segment;
use engine::luks::{self, Disks, LockedVolume};
use engine::store::{Access, BlockStore, BusErrorsCaught, Caching, FileStore};
use engine::volume::Volume;
use nbd_server::tls::{Clients, Credentials};
use nbd_server::{Export, Exports, ExportsError, Server, SessionKind, Settings, Tls, shutdown};
use rustix::fs::Gid;
use rustix::process::Rlimit;
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::captive::Captive;
use self::listen::ListenAddress;
use self::place::{Endpoint, Open, Place};
use super::header_args::{HeaderArgs, LimitArgs};
use super::passphrase;
use super::plain_args::PlainArgs;
use crate::config::{MetricsAddress, parse_duration};
use crate::keys::opening::{self, Then};
use crate::machine::pid_file::PidFile;
use crate::machine::socket_file::Permissions;
use crate::machine::{activation, cpu, disk, group, process};
use crate::service::metrics::{self, MetricsServer, Observed};
use crate::service::status::Requests;
use crate::text;
use crate::volume::array;
use crate::volume::data_disks::DataDisks;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("where"))]
pub(super) struct Args {
    /// The disks or files that hold the ciphertext. Each becomes an export.
    #[arg(required = true, value_name = "DEVICE")]
    devices: Vec<PathBuf>,
    /// A file that contains the passphrase or, with `--type plain`, the volume key. All bytes of the file count, even a
    /// newline at the end; `-` is standard input. Give this option once for all DEVICEs, or once for each, in their order.
    /// Without this option, nbdcrypt asks for one passphrase that opens every DEVICE.
    #[arg(short = 'd', long = "key-file", value_name = "FILE")]
    key_files: Vec<PathBuf>,
    /// Try the passphrase only on this keyslot, even if the keyslot is set to be ignored.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
    #[command(flatten)]
    header: HeaderArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Listen on a unix socket. Only this user may connect to it, unless `--socket-mode` allows more.
    #[arg(long, value_name = "PATH", group = "where")]
    socket: Option<PathBuf>,
    /// The mode of the unix socket, in octal, as for chmod(1). Users who may write to the socket may connect to it, and
    /// read and write the volume.
    #[arg(long, value_name = "MODE", default_value = "0600", conflicts_with = "listen", requires = "socket", value_parser = mode)]
    socket_mode: u32,
    /// The group of the unix socket: a name or a number. Its members may connect with `--socket-mode 0660`.
    #[arg(long, value_name = "GROUP", conflicts_with = "listen", requires = "socket", value_parser = group::find)]
    socket_group: Option<Gid>,
    /// Listen on a TCP port, such as 127.0.0.1:10809 or localhost:10809; `:10809` is every address of this machine. Anyone
    /// who can reach the port may read and write the volume, unless `--tls require --tls-verify-peer` is given.
    #[arg(long, value_name = "ADDR", group = "where")]
    listen: Option<ListenAddress>,
    /// Run a shell command that uses the export, end the server when the command ends, and exit with its exit code. The
    /// command finds the export's NBD URI in `$uri` and `$nbd`, and the path of the socket in `$unixsocket`. Without `--socket`
    /// and `--listen`, only the command's own user can connect, to a socket in a temporary folder.
    #[arg(long, value_name = "COMMAND")]
    run: Option<OsString>,
    /// Print the NBD URI of each export on standard output, one a line, as soon as clients can connect. This is the default
    /// with `--socket` and `--listen`; with `--run` and with sockets from a service manager, nothing is printed without it.
    #[arg(long)]
    print_uri: bool,
    /// End as on SIGTERM when the process that started this one ends, even if it is killed.
    #[arg(long)]
    exit_with_parent: bool,
    /// Write the process ID to this file as soon as clients can connect, and remove the file at the end.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Serve metrics for Prometheus over HTTP at /metrics, on a unix socket such as unix:/run/disk.metrics, or on a port of a
    /// loopback address such as 127.0.0.1:9105, which every user of this machine can read.
    #[arg(long, value_name = "ADDR", value_parser = clap::builder::ValueParser::new(str::parse::<MetricsAddress>))]
    metrics: Option<MetricsAddress>,
    /// The group of the unix socket for metrics: a name or a number. Without this option, only this user may connect.
    #[arg(long, value_name = "GROUP", requires = "metrics", value_parser = group::find)]
    metrics_group: Option<Gid>,
    /// The kind of volume on the disk.
    #[arg(long = "type", ignore_case = true, value_name = "TYPE", value_parser = header_or_none(), default_value = "luks", action = ArgAction::Set)]
    has_header: bool,
    #[command(flatten)]
    plain: PlainArgs,
    /// The export name that clients ask for. Give it once for each DEVICE, in their order. Without this option, a single
    /// DEVICE is the default export, with the empty name, and several are named after their files.
    #[arg(long = "name", visible_alias = "export-name", value_name = "NAME")]
    names: Vec<String>,
    /// A description of the export, which `nbdinfo --list` shows. Give it once for each DEVICE, in their order. [default:
    /// the DEVICE's path]
    #[arg(long = "description", value_name = "TEXT")]
    descriptions: Vec<String>,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// The maximum number of connections that are served at the same time. More clients wait until a connection ends.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    max_connections: u16,
    /// How long a client may take to connect, set up TLS and choose an export, such as 10s or 2m. A client that takes longer
    /// is disconnected.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    handshake_timeout: Duration,
    /// Disconnect a client that sends and receives nothing for this time, such as 90s, 2m or 1h. While a request of the
    /// client is in progress, it is not disconnected. Do not use this for a client that has a filesystem on the export.
    /// [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    idle_timeout: Option<Duration>,
    /// Whether clients use TLS.
    #[arg(help_heading = "TLS", long, value_enum, ignore_case = true, default_value_t = TlsChoice::Off, requires_ifs = [("on", "tls_certificates"), ("require", "tls_certificates")])]
    tls: TlsChoice,
    /// The directory with server-cert.pem and server-key.pem, and with `--tls-verify-peer` also ca-cert.pem and optionally
    /// ca-crl.pem. The names are those of nbdkit and qemu.
    #[arg(help_heading = "TLS", long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Serve only clients that have a certificate from an authority in ca-cert.pem.
    #[arg(help_heading = "TLS", long)]
    tls_verify_peer: bool,
    /// Never discard blocks of the disk: refuse TRIM, and write zeros instead of making holes. Holes show anyone who reads
    /// the disk which parts of it are in use.
    #[arg(long)]
    no_discard: bool,
    /// Let the kernel cache the ciphertext. Without this option, `O_DIRECT` is used if the filesystem allows it.
    #[arg(long)]
    page_cache: bool,
    /// How connections are served: `auto` uses io_uring if the kernel allows it.
    #[arg(long, value_enum, ignore_case = true, default_value_t = Session::Auto)]
    session: Session,
    /// Use io_uring without registered buffers.
    #[arg(long, hide = true)]
    no_registered_buffers: bool,
}

/// Returns the parser of `--type`, which yields whether the volume has a header.
fn header_or_none() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new([
        PossibleValue::new("luks").help("LUKS1 or LUKS2, as the header says"),
        PossibleValue::new("plain")
            .help("A volume without a header. The whole disk is data, and the key file is the volume key"),
    ])
    .map(|name| name.eq_ignore_ascii_case("luks"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TlsChoice {
    /// No TLS.
    Off,
    /// Clients may use TLS, or not.
    On,
    /// Clients must use TLS.
    Require,
}

/// The kind of session.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Session {
    /// io_uring if the kernel allows it, otherwise tokio.
    #[default]
    Auto,
    /// io_uring. The server does not start without it.
    IoUring,
    /// tokio: sockets are polled, and threads wait for the disk.
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

pub(super) fn run(args: Args) -> Result<ExitCode> {
    if args.exit_with_parent {
        process::end_with_parent().context("--exit-with-parent")?;
    }
    // This comes before any thread is started, since it changes the environment.
    let activated = activation::take()?;
    process::protect_secrets();
    let names = names(&args)?;
    let open_files = process::allow_open_files(args.max_connections.into());
    let settings = Settings {
        max_connections: args.max_connections.into(),
        handshake_timeout: args.handshake_timeout,
        idle_timeout: args.idle_timeout,
        registered_buffers: !args.no_registered_buffers,
        tls: tls(&args)?,
        session: args.session.into(),
        ..Settings::default()
    };
    // These are checked before anybody types a passphrase.
    if args.metrics_group.is_some() && args.metrics.as_ref().is_some_and(|address| address.socket().is_none()) {
        bail!("--metrics-group is for a unix socket: every user of this machine can connect to a port");
    }
    if let Some(path) = &args.pid_file {
        PidFile::refuse_obstacle(path)?;
    }
    let runtime = process::runtime().context("the server's threads could not be started")?;
    let place = runtime.block_on(Place::choose(&args, activated))?;
    let exports = exports(&args, &names)?;
    let server = Server::new(exports, settings).context(match args.session {
        Session::IoUring => "the server could not be started with `--session io-uring`",
        _ => "the server could not be started",
    })?;
    let _metrics = serve_metrics(&args, &server)?;
    runtime.block_on(listen_and_serve(&args, &names, place, &server, open_files))
}

/// Serves the metrics of all exports, if the user asks for it. An export without a name has the name of its device there.
fn serve_metrics(args: &Args, server: &Server) -> Result<Option<MetricsServer>> {
    let Some(address) = &args.metrics else { return Ok(None) };
    let devices: Vec<String> = args.devices.iter().map(text::path).collect();
    let exports = server.exports().clone();
    let source = move || {
        let named = exports.all().iter().zip(&devices).map(|(export, device)| Observed {
            name: if export.info().name.is_empty() { device.clone() } else { export.info().name.clone() },
            size: Some(export.info().size),
            status: None,
            statistics: Some(Arc::clone(export.statistics())),
        });
        Ok(metrics::encode(named.collect())?)
    };
    let permissions = args.metrics_group.map_or(Permissions::ONLY_THIS_USER, Permissions::with_group);
    Ok(Some(MetricsServer::start(address, permissions, source).context("--metrics")?))
}

/// Returns the export name of each device.
fn names(args: &Args) -> Result<Vec<String>> {
    let several = args.devices.len() > 1;
    if several && args.header.header.is_some() {
        bail!("--header belongs to one volume: give only one DEVICE with it");
    }
    once_a_device(args, "--name", args.names.len())?;
    once_a_device(args, "--description", args.descriptions.len())?;
    if args.key_files.len() > 1 {
        once_a_device(args, "--key-file", args.key_files.len())?;
        if args.key_files.iter().filter(|file| file.as_os_str() == "-").count() > 1 {
            bail!("standard input holds only one key: give `--key-file -` only once");
        }
    }
    if !args.names.is_empty() {
        return Ok(args.names.clone());
    }
    let file_name = |device: &PathBuf| match device.file_name().and_then(|name| name.to_str()) {
        _ if !several => Ok(String::new()),
        Some(name) => Ok(name.to_owned()),
        None => bail!("{} has no file name that can be an export name: give each DEVICE a --name", device.display()),
    };
    args.devices.iter().map(file_name).collect()
}

/// Fails unless an option is given once for each device, or not at all.
fn once_a_device(args: &Args, option: &str, given: usize) -> Result<()> {
    let devices = args.devices.len();
    if given != 0 && given != devices {
        bail!(
            "{option} is given {given} times for {devices} devices: give it once for each device, in their order, or \
             not at all"
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
        // A user who names certificates does not want plaintext.
        (TlsChoice::Off, Some(_)) => bail!("--tls-certificates needs `--tls require` or `--tls on`"),
        (_, None) => bail!("--tls needs --tls-certificates DIR"),
        (_, Some(directory)) => directory,
    };
    if args.tls == TlsChoice::On && args.tls_verify_peer {
        bail!(
            "with `--tls on`, a client without a certificate could connect without TLS: --tls-verify-peer needs \
             `--tls require`"
        );
    }
    let clients = if args.tls_verify_peer { Clients::WithCertificate } else { Clients::Anyone };
    let credentials = Credentials::from_directory(directory, clients).context("TLS")?;
    warn_of_certificates(&credentials);
    Ok(match args.tls {
        TlsChoice::Require => Tls::Required(credentials),
        _ => Tls::Offered(credentials),
    })
}

fn exports(args: &Args, names: &[String]) -> Result<Exports> {
    // All disks are checked before anybody types a passphrase for one of them.
    let found = args.devices.iter().map(|device| look(args, device)).collect::<Result<Vec<_>>>()?;
    // A key that is for all disks is read once, because it may come from standard input.
    let only = match args.key_files.as_slice() {
        [] => Some(passphrase::existing(None, &args.devices[0])?),
        [file] => Some(passphrase::existing(Some(file), &args.devices[0])?),
        _ => None,
    };
    let mut exports = Vec::new();
    for (place, (found, name)) in found.into_iter().zip(names).enumerate() {
        let device = found.path;
        let own = match (&only, args.key_files.get(place)) {
            (None, Some(file)) => Some(passphrase::existing(Some(file), device)?),
            _ => None,
        };
        let Some(passphrase) = own.as_ref().or(only.as_ref()) else { bail!("no --key-file for {}", device.display()) };
        let key_file = args.key_files.get(place).or(args.key_files.first()).map(PathBuf::as_path);
        let volume = Arc::new(open(args, found, key_file, passphrase)?);
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

/// A volume that was found and is not unlocked yet.
struct Found<'a> {
    path: &'a Path,
    store: Arc<dyn BlockStore>,
    kind: FoundKind<'a>,
}

enum FoundKind<'a> {
    Luks {
        /// The disk with the detached header, if there is one.
        header: Option<Box<FileStore>>,
        /// The path of the disk that holds the header, detached or not.
        header_path: &'a Path,
        locked: LockedVolume,
    },
    Plain(Segment),
}

/// Opens the disk of a volume and reads its header.
fn look<'a>(args: &'a Args, path: &'a Path) -> Result<Found<'a>> {
    let access = if args.read_only { Access::ReadOnly } else { Access::ReadWrite };
    args.header.refuse_same(path)?;
    let caching = if args.page_cache { Caching::PageCache } else { Caching::Direct };
    let mut store = match access {
        Access::ReadOnly => disk::open(path, access, caching)?,
        Access::ReadWrite => disk::open_as_allowed(path, caching)?,
    };
    if !args.has_header || args.header.header.is_some() {
        array::refuse_member(path, &store)?;
    }
    let (kind, segment) = match args.has_header {
        true => {
            args.plain.refuse()?;
            let header = match &args.header.header {
                Some(path) => Some(disk::open(path, Access::ReadOnly, Caching::PageCache)?),
                None => None,
            };
            let disks = match &header {
                Some(header) => Disks::detached(header, &store),
                None => Disks::from(&store),
            };
            let header_path = args.header.header.as_deref().unwrap_or(path);
            let locked = luks::read(disks, &args.limits.limits()).with_context(|| text::path(header_path))?;
            opening::warn_of_copies(&DataDisks::one(header_path), disks.header(), Then::Stays);
            let segment = locked.segment();
            (FoundKind::Luks { header: header.map(Box::new), header_path, locked }, segment)
        }
        false => {
            if args.header.header.is_some() {
                bail!("a plain volume has no header: leave --header out");
            }
            if args.key_slot.is_some() {
                bail!("a plain volume has no keyslots: leave --key-slot out");
            }
            let segment = args.plain.volume().segment(store.len()).with_context(|| text::path(path))?;
            (FoundKind::Plain(segment), segment)
        }
    };
    // Direct I/O needs whole blocks, and the data of some volumes does not begin or end at a block boundary.
    if !(segment.offset | segment.len).is_multiple_of(store.alignment() as u64) {
        store = store.into_buffered().with_context(|| text::path(path))?;
    }
    let store = Arc::new(store.mapped(BusErrorsCaught::new()?));
    Ok(Found { path, store, kind })
}

fn open(args: &Args, found: Found<'_>, key_file: Option<&Path>, passphrase: &Passphrase) -> Result<Volume> {
    let Found { path, store, kind } = found;
    let plain = args.plain.volume();
    let (key, segment) = match kind {
        FoundKind::Luks { header, header_path, locked } => {
            let disk = header.as_deref().map_or(store.as_ref(), |header| header as &dyn BlockStore);
            let opens = |passphrase: &Passphrase| locked.unlock_keyslot(disk, args.key_slot, passphrase);
            let unlocked = opens(passphrase).map_err(|error| {
                let keyslot = |other: &Passphrase| opens(other).map(|unlocked| unlocked.keyslot);
                opening::explained(error, key_file.map(passphrase::key_file).as_ref(), passphrase, keyslot)
            });
            let unlocked = unlocked.with_context(|| text::path(header_path))?;
            (unlocked.key, unlocked.segment)
        }
        FoundKind::Plain(segment) => {
            let is_key_file = key_file.is_some_and(|file| file != Path::new("-"));
            if plain.ignores_hash(is_key_file) {
                tracing::warn!(
                    "--hash is ignored, as cryptsetup does with a key file: the bytes of {} are the key. To hash them, add \
                     --hash-key-file; otherwise leave --hash out",
                    text::path(key_file.unwrap_or(path))
                );
            }
            let key = plain.key(passphrase, is_key_file).map_err(|why| {
                let key = match key_file {
                    Some(file) if is_key_file => text::path(file),
                    Some(_) => "standard input".to_owned(),
                    None => "what was typed".to_owned(),
                };
                let (bits, bytes) = (8 * plain.key_len, plain.key_len);
                anyhow!(
                    "{key} is not the key of the plain volume on {}: {why}. `--key-size {bits}` takes exactly {bytes} bytes. \
                     `--keyfile-size {bytes}` takes the first {bytes} bytes of a longer file; for a passphrase, name its hash \
                     with `--hash`, and add `--hash-key-file` if it is in a file",
                    text::path(path)
                )
            })?;
            (key, segment)
        }
    };
    Volume::with_cipher(store, segment, plain.cipher(&key, cpu::path()?)?).with_context(|| text::path(path))
}

/// The signals that end the server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` if the user wants the server to outlive the terminal, as under nohup(1).
    hangup: Option<Signal>,
}

/// A signal that ends the server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Terminate,
    Interrupt,
    Hangup,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let hangup = if process::is_hangup_ignored() { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())?, hangup })
    }

    async fn next(&mut self) -> Ending {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => Ending::Terminate,
            _ = self.interrupt.recv() => Ending::Interrupt,
            _ = hangup => Ending::Hangup,
        }
    }
}

async fn listen_and_serve(
    args: &Args,
    names: &[String],
    place: Place,
    server: &Server,
    open_files: Rlimit,
) -> Result<ExitCode> {
    // The signal handlers are installed before the address is printed. A script that waits for the address may send SIGTERM
    // at once.
    let mut signals = Signals::new()?;
    // Whoever made the socket knows the address, and the standard output may belong to the data of a client such as nbdcopy.
    let tells_addresses = args.print_uri || (args.run.is_none() && !matches!(place, Place::Activated(_)));
    let Open { listeners, endpoints, files: _files } = place.open(args)?;
    let _pid_file = args.pid_file.as_deref().map(PidFile::write).transpose()?;
    if tells_addresses {
        tell_addresses(args, names, &endpoints)?;
    }
    notify("READY=1\nSTATUS=serving");
    let (trigger, stop) = shutdown();
    tokio::pin! { let serving = server.run(listeners, stop); }
    let mut captive = match &args.run {
        Some(script) => Some(captive(args, names, script, &endpoints, open_files)?),
        None => None,
    };
    let ended = loop {
        tokio::select! {
            result = &mut serving => {
                captive.iter().for_each(|captive| captive.pass_on(rustix::process::Signal::TERM));
                result?;
                bail!("the server ended, although nobody ended it");
            }
            ended = async {
                match &mut captive {
                    Some(captive) => captive.ended().await,
                    None => std::future::pending().await,
                }
            } => break ended,
            ending = signals.next() => match (&captive, ending) {
                (None, _) => break Ok(ExitCode::SUCCESS),
                // The terminal sends SIGINT to the command, too, and the command may go on.
                (Some(_), Ending::Interrupt) => {}
                (Some(captive), Ending::Terminate) => captive.pass_on(rustix::process::Signal::TERM),
                (Some(captive), Ending::Hangup) => captive.pass_on(rustix::process::Signal::HUP),
            },
        }
    };
    notify("STOPPING=1");
    trigger.stop();
    serving.await?;
    for export in server.exports().all() {
        let (name, clients) = (&export.info().name, export.statistics().snapshot().connections_total);
        let requests = Requests::from(&**export.statistics());
        tracing::info!("export {name:?}: {clients} clients; requests: {requests}");
    }
    ended
}

/// Starts the command of `--run`. It learns the address of the first export.
fn captive(
    args: &Args,
    names: &[String],
    script: &OsStr,
    endpoints: &[Endpoint],
    open_files: Rlimit,
) -> Result<Captive> {
    let first = endpoints.first().zip(names.first());
    let with_uri = first.and_then(|(endpoint, name)| Some((endpoint, name, endpoint.uri(args.tls, name)?)));
    let (endpoint, name, uri) = with_uri.context("the export has no address for the command of --run")?;
    let input = match args.key_files.iter().any(|file| file.as_os_str() == "-") {
        // The command could read the key again: a file on standard input has a beginning to go back to.
        true => Stdio::null(),
        false => Stdio::inherit(),
    };
    Captive::start(script, input, &uri, endpoint, name, open_files)
}

/// Prints the address of each export on each socket as an NBD URI.
fn tell_addresses(args: &Args, names: &[String], endpoints: &[Endpoint]) -> Result<()> {
    let mut stdout = std::io::stdout();
    let uris = endpoints.iter().flat_map(|endpoint| names.iter().filter_map(|name| endpoint.uri(args.tls, name)));
    // All lines are written with one call, because a reader may close the pipe after the first line.
    let lines: String = uris.map(|uri| format!("{uri}\n")).collect();
    stdout.write_all(lines.as_bytes())?;
    stdout.flush()?;
    if stdout.is_terminal() && args.run.is_none() {
        let devices: Vec<String> = args.devices.iter().map(text::path).collect();
        eprintln!("serving {} until Ctrl-C", devices.join(", "));
    }
    Ok(())
}

fn notify(message: &str) {
    if let Err(error) = process::notify_service_manager(message) {
        tracing::debug!("the service manager could not be notified: {error}");
    }
}

/// Warns if other machines can reach the port, and says what they may do with the volume.
fn warn_of_strangers(args: &Args, address: SocketAddr) {
    let may = if args.read_only { "may read the volume" } else { "may read and write the volume" };
    let overhear = if args.read_only { "read" } else { "read and change" };
    match (args.tls, args.tls_verify_peer) {
        (TlsChoice::Require, true) => {}
        (TlsChoice::Require, false) => tracing::warn!(
            "other machines can reach {address}: anyone who reaches it {may}, with TLS. To serve only clients with a \
             certificate, add --tls-verify-peer"
        ),
        (TlsChoice::On, _) => tracing::warn!(
            "other machines can reach {address}: anyone who reaches it {may}, with and without TLS, and anyone on the \
             network path can {overhear} what is transferred without TLS. To serve only clients with a certificate, \
             use \
             `--tls require --tls-verify-peer`"
        ),
        (TlsChoice::Off, _) => tracing::warn!(
            "other machines can reach {address}: anyone who reaches it {may}, and anyone on the network path can \
             {overhear} what is transferred. To serve only clients with a certificate, with TLS, use \
             `--tls require --tls-verify-peer --tls-certificates DIR`"
        ),
    }
}

/// Warns of each of the server's certificates that is not valid now.
fn warn_of_certificates(credentials: &Credentials) {
    for certificate in credentials.not_valid_at(SystemTime::now()) {
        tracing::warn!(
            "{certificate}. Clients that check it do not connect, so they cannot read or write the volume. Clients \
             that do not check it cannot tell this server from another one. Make a new certificate, and start the \
             server again"
        );
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Some(time) if !time.is_zero() => Ok(time),
        _ => Err("a time is a number of seconds, minutes or hours, such as 90s, 2m or 1h".to_owned()),
    }
}

/// Parses the mode of a socket.
fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && text.starts_with(|first: char| first.is_ascii_digit()) => Ok(mode),
        _ => Err("a mode is an octal number up to 0777, such as 0660".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal() {
        assert_eq!([mode("0660"), mode("600"), mode("0")], [Ok(0o660), Ok(0o600), Ok(0)]);
        for wrong in ["", "rw", "0888", "01777", "+600", "-1", "0o660"] {
            assert!(mode(wrong).is_err(), "{wrong}");
        }
    }

    #[derive(clap::Parser)]
    struct Typed {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn one_disk_of_an_array_is_not_served_without_its_own_header() {
        use clap::Parser;
        use engine::raid::{self, NewArray};
        use engine::store::MemoryStore;
        use uuid::Uuid;

        let file = tempfile::NamedTempFile::new().unwrap();
        let members = vec![(8 << 20, Uuid::nil()); 2];
        let new = NewArray { uuid: Uuid::nil(), name: "scratch".into(), now: 1, chunk: 64 << 10, members };
        let disk = MemoryStore::zeroed(8 << 20);
        raid::write_member(&disk, &new.superblocks().unwrap()[0]).unwrap();
        std::fs::write(file.path(), disk.snapshot()).unwrap();
        let path = file.path().to_str().unwrap();
        for options in [["--type", "plain"], ["--header", "/nonexistent"]] {
            let typed = ["serve", "--page-cache", path].into_iter().chain(options);
            let args = Typed::try_parse_from(typed).unwrap().args;
            let error = format!("{:#}", look(&args, file.path()).err().unwrap());
            assert!(
                error.contains("does not hold a volume by itself: it is one of the 2 disks of the array"),
                "{error}"
            );
        }
    }
}

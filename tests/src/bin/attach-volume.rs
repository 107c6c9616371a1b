//! Attaches a LUKS volume until it is told to stop, and does nothing else. With `--stale`, it removes what a killed run
//! left:
//!
//! ```sh
//! attach-volume DISK KEY-FILE [METHOD [DEVICE [CONNECTIONS [REQUEST-TIMEOUT]]]]
//! attach-volume --stale DEVICE METHOD [IDENTIFIER]
//! ```
//! METHOD is `auto`, `nbd` or `fuse`. DEVICE is `any` or a path. The program prints the device's path once the device is
//! there. It detaches the device on SIGTERM and SIGINT. If something holds the device, the program detaches it by force and
//! exits with code 1.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bootstrap::attach::{self, Method, Options, Remains};
use engine::key::Passphrase;
use engine::luks::{self, Limits};
use engine::store::{Access, BlockStore, Caching, FileStore};
use engine::volume::Volume;
use tokio::signal::unix::{SignalKind, signal};

const IDENTIFIER: &str = "attach-volume";
const MOUNT_DIR: &str = "/run/attach-volume";

/// An error whose `Debug` output is its `Display` text, because `main` prints errors with `Debug`.
struct Failure(String);

fn main() -> Result<(), Failure> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |place: usize| args.get(place).map(String::as_str);
    let (Some(disk), Some(key_file)) = (arg(0), arg(1)) else {
        return Err("usage: attach-volume DISK KEY-FILE [METHOD [DEVICE [CONNECTIONS]]]".into());
    };
    let method = match arg(2) {
        None | Some("auto") => Method::Auto,
        Some("nbd") => Method::Nbd,
        Some("fuse") => Method::Fuse,
        Some(other) => return Err(format!("there is no method {other}").into()),
    };
    if disk == "--stale" {
        let (device, identifier) = (PathBuf::from(key_file), arg(3).unwrap_or(IDENTIFIER).to_owned());
        let mount_dir = (method != Method::Nbd).then(|| PathBuf::from(MOUNT_DIR));
        return Ok(attach::detach_stale(&Remains { method, device, identifier, mount_dir })?);
    }
    let options = Options {
        method,
        device: arg(3).filter(|device| *device != "any").map(PathBuf::from),
        connections: arg(4).unwrap_or("4").parse()?,
        request_timeout: arg(5).map(str::parse).transpose()?.map(Duration::from_secs),
        read_only: false,
        identifier: IDENTIFIER.to_owned(),
        mount_dir: PathBuf::from(MOUNT_DIR),
    };
    let volume = open(Path::new(disk), Path::new(key_file))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let attachment = attach::attach(volume, &options)?;
    println!("{}", attachment.device().display());
    let ended = attachment.ended();
    runtime.block_on(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            ended = ended.wait() => eprintln!("{ended}"),
        }
    });
    Ok(attachment.detach()?)
}

impl<E: std::fmt::Display> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl std::fmt::Debug for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn open(disk: &Path, key_file: &Path) -> Result<Arc<Volume>, Failure> {
    let store: Arc<dyn BlockStore> = Arc::new(FileStore::open(disk, Access::ReadWrite, Caching::Direct)?);
    let passphrase = Passphrase::new(std::fs::read(key_file)?);
    let volume = luks::read(store.as_ref(), &Limits::default())?.unlock(store.as_ref(), &passphrase)?;
    Ok(Arc::new(Volume::encrypted(store, volume.segment, &volume.key)?))
}

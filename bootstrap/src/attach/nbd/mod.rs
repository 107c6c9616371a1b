//! The kernel's NBD client, over socketpairs: no port, no helper program, no handshake with oneself.
//!
//! ```text
//!   /dev/nbdN ─► nbd driver, a hardware queue a connection ⇄ socketpair ⇄ session ─► worker threads ─► Volume
//! ```

mod netlink;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::volume::Volume;
use nbd_server::server::enlarge_send_buffer;
use nbd_server::{Export, Exports, Server, SessionError, Settings, Trigger};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::claim::claim;
use super::command::load_module;
use super::error::{AttachError, DetachError};
use super::holders::{holders_of, kernel_name, sys_block};
use super::signal::{Ended, EndedSender, EndedSignal, ended_signal};
use super::{Method, Options, Remains};
use netlink::{Connect, Netlink};

/// The longest to wait for a device to come up, and for one that nobody holds to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks at `/sys`: there may be no udev to tell.
const PAUSE: Duration = Duration::from_millis(2);

/// The most connections: more than the processors of any machine have use for.
const MAX_CONNECTIONS: usize = 64;

/// A volume that the kernel's NBD client shows as a block device. Dropping it disconnects the device, whoever uses it.
#[derive(Debug)]
pub(super) struct NbdAttachment {
    index: u32,
    path: PathBuf,
    identifier: String,
    connected: bool,
    sender: EndedSender,
    signal: EndedSignal,
    sessions: Sessions,
}

/// The serving side: the threads, and whether the last connection has ended.
#[derive(Debug)]
struct Sessions {
    runtime: Option<Runtime>,
    trigger: Trigger,
    over: Arc<AtomicBool>,
}

pub(super) fn attach(volume: Arc<Volume>, options: &Options) -> Result<NbdAttachment, AttachError> {
    let wished = options.device.as_deref().map(|device| {
        index_of(device).ok_or_else(|| AttachError::WrongDevice {
            device: device.to_owned(),
            method: Method::Nbd,
            expected: "an NBD device such as /dev/nbd0",
        })
    });
    let wished = wished.transpose()?;
    let netlink = open()?;
    let busy = |index| user_of(index).map(|by| AttachError::DeviceBusy { device: path_of(index), by });
    if let Some(error) = wished.and_then(busy) {
        return Err(error);
    }

    let mut export = Export::new("", volume);
    if options.read_only {
        export = export.read_only();
    }
    let connections = options.connections.clamp(1, MAX_CONNECTIONS);
    let pairs = (0..connections).map(|_| UnixStream::pair()).collect::<io::Result<Vec<_>>>();
    let pairs = pairs.map_err(|source| AttachError::Resource { what: "a socketpair", source })?;
    let (ours, kernels): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    kernels.iter().for_each(enlarge_send_buffer);
    let (sender, signal) = ended_signal();
    let sessions = Sessions::start(ours, &export, &sender)?;

    let connect = Connect {
        index: wished,
        size: export.volume().len(),
        block_size: export.volume().sector_size().bytes_u64(),
        server_flags: export.info().transmission_flags(),
        identifier: &options.identifier,
    };
    let sockets: Vec<_> = kernels.iter().map(AsFd::as_fd).collect();
    let index = netlink.connect(&connect, &sockets).map_err(|source| {
        let taken = wished.filter(|_| source.kind() == io::ErrorKind::ResourceBusy).and_then(busy);
        let device = wished.map_or_else(|| PathBuf::from("/dev/nbd*"), path_of);
        taken.unwrap_or(AttachError::NbdRefused { device, source })
    })?;
    // From here on the value disconnects when it is dropped. The kernel has sockets of its own: ours would keep the
    // sessions from noticing their end.
    drop(kernels);
    let identifier = options.identifier.clone();
    let attachment =
        NbdAttachment { index, path: path_of(index), identifier, connected: true, sender, signal, sessions };
    attachment.wait_until_ready(connect.size)?;
    attachment.watch(true);
    Ok(attachment)
}

/// Whether the kernel has the driver, or comes to have it by loading the module.
pub(super) fn ready() -> Result<(), AttachError> {
    open().map(drop)
}

impl NbdAttachment {
    pub(super) fn device(&self) -> &Path {
        &self.path
    }

    pub(super) fn ended(&self) -> EndedSignal {
        self.signal.clone()
    }

    pub(super) fn remains(&self) -> Remains {
        Remains { method: Method::Nbd, device: self.path.clone(), identifier: self.identifier.clone(), mount_dir: None }
    }

    pub(super) fn detach(&mut self) -> Result<(), DetachError> {
        self.watch(false);
        let detached = self.disconnect();
        if detached.is_err() {
            self.watch(true);
        }
        detached
    }

    fn disconnect(&mut self) -> Result<(), DetachError> {
        if self.sessions.are_over() {
            // Nobody is there to write to, as the signal told. Its last user may still be closing it.
            if is_ours(self.index, &self.identifier) {
                disconnect(self.index)?;
            }
        } else if let Some(claim) = claim(&self.path, || is_ours(self.index, &self.identifier))? {
            // While the claim lasts nobody else can mount it. What there was to write is written.
            disconnect(self.index)?;
            drop(claim);
        }
        wait_until_gone(self.index, &self.identifier)?;
        self.connected = false;
        // The kernel has let go of its sockets, so the sessions come to their end.
        if !wait(|| self.sessions.are_over()) {
            let reason = "its connections have not ended".to_owned();
            return Err(DetachError::Lingers { device: self.path.clone(), seconds: PATIENCE.as_secs(), reason });
        }
        Ok(())
    }

    /// Whether the end is to be told of when it comes.
    fn watch(&self, armed: bool) {
        self.sender.set_armed(armed);
        if self.sessions.are_over() {
            self.sender.send(Ended::Disconnected);
        }
    }

    fn wait_until_ready(&self, size: u64) -> Result<(), AttachError> {
        let not_ready =
            |missing| AttachError::NotReady { device: self.path.clone(), missing, seconds: PATIENCE.as_secs() };
        let told = sys_block(&self.path).join("size");
        // `/sys` counts in 512 bytes, whatever the block size.
        let has_size = || read(&told).is_some_and(|told| told.parse::<u64>().is_ok_and(|told| told == size / 512));
        if !wait(has_size) {
            return Err(not_ready("it did not get its size"));
        }
        if !wait(|| self.path.exists()) {
            return Err(not_ready("nobody made its node in /dev"));
        }
        Ok(())
    }
}

impl Drop for NbdAttachment {
    fn drop(&mut self) {
        self.sender.set_armed(false);
        if self.connected && is_ours(self.index, &self.identifier) {
            // Nobody is left to hear of a failure.
            let _ = disconnect(self.index);
        }
    }
}

impl Sessions {
    /// Serves each socket, from now on until the kernel takes its leave.
    fn start(sockets: Vec<UnixStream>, export: &Export, sender: &EndedSender) -> Result<Self, AttachError> {
        let resource = |what| move |source| AttachError::Resource { what, source };
        let exports = Exports::new([export.clone()])
            .map_err(|error| AttachError::Resource { what: "the export", source: io::Error::other(error) })?;
        let server = Server::new(exports, Settings::default()).map_err(resource("the server's threads"))?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(sockets.len().min(processors))
            .thread_name("nbd-session")
            .enable_all()
            .build()
            .map_err(resource("the sessions' threads"))?;
        let (trigger, shutdown) = nbd_server::shutdown();
        let mut sessions = JoinSet::new();
        {
            let _entered = runtime.enter();
            for socket in sockets {
                enlarge_send_buffer(&socket);
                let socket = socket.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(socket));
                let socket = socket.map_err(resource("a connection"))?;
                let (server, export, shutdown) = (server.clone(), export.clone(), shutdown.clone());
                sessions.spawn(async move { server.serve_socket_transmission(socket, &export, shutdown).await });
            }
        }
        let over = Arc::<AtomicBool>::default();
        runtime.spawn(supervise(sessions, sender.clone(), Arc::clone(&over)));
        Ok(Self { runtime: Some(runtime), trigger, over })
    }

    fn are_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.trigger.stop();
        // Waiting is not allowed where the caller has a runtime of its own.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A connection that breaks is told at once, since the kernel may go on without it; a leave when it is the last.
async fn supervise(mut sessions: JoinSet<Result<(), SessionError>>, sender: EndedSender, over: Arc<AtomicBool>) {
    while let Some(session) = sessions.join_next().await {
        match session {
            Ok(Ok(())) => {}
            Ok(Err(error)) => sender.send(Ended::ServerFailed(error.to_string())),
            Err(error) => sender.send(Ended::ServerFailed(error.to_string())),
        }
    }
    // Before it is told of, or who is told could find it not so.
    over.store(true, Ordering::SeqCst);
    sender.send(Ended::Disconnected);
}

/// Disconnects what a dead server left, unless it is somebody else's by now.
pub(super) fn detach_stale(remains: &Remains) -> Result<(), DetachError> {
    let Some(index) = index_of(&remains.device) else { return Ok(()) };
    if !is_ours(index, &remains.identifier) {
        return Ok(());
    }
    disconnect(index)?;
    wait_until_gone(index, &remains.identifier)
}

fn open() -> Result<Netlink, AttachError> {
    let find = || Netlink::open().map_err(AttachError::Netlink);
    if let Some(netlink) = find()? {
        return Ok(netlink);
    }
    let loaded = load_module("nbd", Path::new("/sys/module/nbd"));
    find()?.ok_or_else(|| AttachError::NoNbdDriver {
        modprobe: loaded.err().unwrap_or_else(|| {
            "it is loaded, but answers in the machine's own network namespace only, which this is not".to_owned()
        }),
    })
}

fn disconnect(index: u32) -> Result<(), DetachError> {
    let failed = |error: io::Error| DetachError::Failed { device: path_of(index), reason: error.to_string() };
    match Netlink::open().map_err(failed)? {
        Some(netlink) => netlink.disconnect(index).map_err(failed),
        // No driver, no device.
        None => Ok(()),
    }
}

fn wait_until_gone(index: u32, identifier: &str) -> Result<(), DetachError> {
    if wait(|| !is_ours(index, identifier)) {
        return Ok(());
    }
    let device = path_of(index);
    Err(DetachError::Held { holders: holders_of(&device), device })
}

/// Whether the device is connected, and by this identifier. Where the kernel tells none (before 5.14, or when it was
/// connected by ioctl, as qemu-nbd does), it is ours if a thread of this process connected it, or one that is gone.
fn is_ours(index: u32, identifier: &str) -> bool {
    let sys = sys_block(&path_of(index));
    let Some(pid) = read(&sys.join("pid")) else { return false };
    match read(&sys.join("backend")) {
        Some(told) => told == identifier,
        None => Path::new("/proc/self/task").join(&pid).exists() || !Path::new("/proc").join(&pid).exists(),
    }
}

/// Clears away what a killed server left, where it could not write down which device that is.
pub(super) fn detach_all_stale(identifier: &str) -> Result<(), DetachError> {
    let Ok(devices) = std::fs::read_dir("/sys/block") else { return Ok(()) };
    for device in devices.flatten() {
        let path = Path::new("/dev").join(device.file_name());
        // Only what says its name: another's device is not to be guessed at.
        if let Some(index) = index_of(&path)
            && read(&device.path().join("backend")).is_some_and(|told| told == identifier)
        {
            disconnect(index)?;
            wait_until_gone(index, identifier)?;
        }
    }
    Ok(())
}

/// What the kernel says about who connected the device; `None` when nobody did.
fn user_of(index: u32) -> Option<String> {
    let sys = sys_block(&path_of(index));
    let pid = read(&sys.join("pid"))?;
    let name = read(&Path::new("/proc").join(&pid).join("comm"));
    let who = name.unwrap_or_else(|| "gone by now".to_owned());
    let called = read(&sys.join("backend")).filter(|told| !told.is_empty());
    let called = called.map(|told| format!(" as {told:?}")).unwrap_or_default();
    Some(format!("connected{called} by process {pid} ({who})"))
}

fn path_of(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

fn index_of(device: &Path) -> Option<u32> {
    let name = kernel_name(device);
    let number = name.strip_prefix("nbd").filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()))?;
    number.parse().ok()
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim_end_matches('\n').to_owned())
}

/// Waits for it to be so; `false` when it was not in time.
fn wait(mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_nbd_devices_have_an_index() {
        let indexes = ["/dev/nbd0", "/dev/nbd12", "/dev/nbd0p1", "/dev/nbd", "/dev/loop0"].map(Path::new).map(index_of);
        assert_eq!(indexes, [Some(0), Some(12), None, None, None]);
    }
}

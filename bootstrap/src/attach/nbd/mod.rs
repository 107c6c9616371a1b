//! Attaches a volume with the kernel's NBD client, over socketpairs. This needs no port, no helper program and no
//! handshake.
//!
//! ```text
//!   /dev/nbdN ─► nbd driver, one hardware queue per connection ⇄ socketpair ⇄ session ─► worker threads ─► Volume
//! ```

mod netlink;
mod sessions;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::volume::Volume;
use nbd_server::Export;
use nbd_server::statistics::Statistics;

use super::claim::claim;
use super::error::{AttachError, DetachError};
use super::node::fault_of_node;
use super::signal::{Ended, EndedSender, EndedSignal, ended_signal};
use super::{Method, Options, Remains};
use crate::machine::holders::{holders_of, kernel_name, sys_block};
use crate::machine::modules::load_module;
use netlink::{Connect, LONGEST_REQUEST_TIMEOUT, Netlink};
use sessions::Sessions;

/// The longest time to wait for a device to become ready, or for an unused device to disappear.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause between two checks of `/sys`. There may be no udev that reports changes.
const PAUSE: Duration = Duration::from_millis(2);

/// The maximum number of connections. More connections are of no use on any machine.
const MAX_CONNECTIONS: usize = 64;

/// If the kernel has no connection left, a request waits this long for a fresh socket, and then fails. A live server
/// provides a fresh socket within milliseconds, unless the server is stopped (SIGSTOP). After a server was killed, `down`
/// and `up` do not wait for this time, because they disconnect the device first.
const DEAD_CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// A volume that is attached by the kernel's NBD client. Dropping it disconnects the device, even if it is in use.
#[derive(Debug)]
pub(super) struct NbdAttachment {
    index: u32,
    path: PathBuf,
    identifier: String,
    statistics: Arc<Statistics>,
    connected: bool,
    sender: EndedSender,
    signal: EndedSignal,
    sessions: Sessions,
}

pub(super) fn attach(volume: Arc<Volume>, options: &Options) -> Result<NbdAttachment, AttachError> {
    let requested = options.device.as_deref().map(|device| {
        index_of(device).ok_or_else(|| AttachError::WrongDevice {
            device: device.to_owned(),
            method: Method::Nbd,
            expected: "an NBD device such as /dev/nbd0",
        })
    });
    let requested = requested.transpose()?;
    let netlink = open()?;
    let busy = |index| user_of(index).map(|by| AttachError::DeviceBusy { device: path_of(index), by });
    if let Some(error) = requested.and_then(busy) {
        return Err(error);
    }

    // The name appears only in the log. The kernel does not see it.
    let mut export = Export::new(&*options.identifier, volume);
    if options.read_only {
        export = export.read_only();
    }
    let connections = options.connections.clamp(1, MAX_CONNECTIONS);
    let (sender, signal) = ended_signal();
    let (sessions, kernels) = Sessions::start(connections, &export, options.request_timeout, &sender)?;

    let connect = Connect {
        index: requested,
        size: export.volume().len(),
        block_size: export.volume().sector_size().bytes_u64(),
        server_flags: export.info().transmission_flags(),
        identifier: &options.identifier,
        request_timeout: options
            .request_timeout
            .map_or(LONGEST_REQUEST_TIMEOUT, |timeout| timeout.as_secs().clamp(1, LONGEST_REQUEST_TIMEOUT)),
        dead_connection_timeout: DEAD_CONNECTION_TIMEOUT.as_secs(),
    };
    let sockets: Vec<_> = kernels.iter().map(AsFd::as_fd).collect();
    let index = netlink.connect(&connect, &sockets).map_err(|source| {
        let taken = requested.filter(|_| source.kind() == io::ErrorKind::ResourceBusy).and_then(busy);
        let device = requested.map_or_else(|| PathBuf::from("/dev/nbd*"), path_of);
        taken.unwrap_or(AttachError::NbdRefused { device, source })
    })?;
    // From here on, dropping the value disconnects the device. The kernel has its own copies of these sockets. If this process's
    // copies stayed open, the sessions would not notice that the kernel closes its copies.
    drop(kernels);
    sessions.connected(index, &options.identifier);
    let attachment = NbdAttachment {
        index,
        path: path_of(index),
        identifier: options.identifier.clone(),
        statistics: Arc::clone(export.statistics()),
        connected: true,
        sender,
        signal,
        sessions,
    };
    attachment.wait_until_ready(connect.size)?;
    attachment.watch(true);
    Ok(attachment)
}

/// Checks that the kernel has the driver, and tries to load the module.
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

    pub(super) fn statistics(&self) -> Arc<Statistics> {
        Arc::clone(&self.statistics)
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
            // The sessions have ended, so nothing can be written. The device's last user may still be closing it.
            if is_ours(self.index, &self.identifier) {
                disconnect(self.index)?;
            }
        } else if let Some(claim) = claim(&self.path, || is_ours(self.index, &self.identifier))? {
            // While the claim is held, nobody else can mount the device. All data has been written.
            disconnect(self.index)?;
            drop(claim);
        }
        wait_until_gone(self.index, &self.identifier)?;
        self.connected = false;
        // The kernel has closed its sockets, so the sessions will end.
        if !wait(|| self.sessions.are_over()) {
            let reason = "its connections have not ended".to_owned();
            return Err(DetachError::Lingers { device: self.path.clone(), seconds: PATIENCE.as_secs(), reason });
        }
        Ok(())
    }

    /// Arms or disarms the signal for an unexpected end.
    fn watch(&self, armed: bool) {
        self.sender.set_armed(armed);
        if self.sessions.are_over() {
            self.sender.send(Ended::Disconnected);
        }
    }

    fn wait_until_ready(&self, size: u64) -> Result<(), AttachError> {
        let not_ready =
            |missing| AttachError::NotReady { device: self.path.clone(), missing, seconds: PATIENCE.as_secs() };
        let file = sys_block(&self.path).join("size");
        // The file counts units of 512 bytes, whatever the block size is.
        let has_size = || read(&file).is_some_and(|text| text.parse::<u64>().is_ok_and(|units| units == size / 512));
        if !wait(has_size) {
            return Err(not_ready("it did not get its size"));
        }
        // udev may be about to make the node, or to correct its owner.
        wait(|| self.path.exists());
        match fault_of_node(&self.path) {
            Some(reason) => Err(AttachError::Node { device: self.path.clone(), reason }),
            None => Ok(()),
        }
    }
}

impl Drop for NbdAttachment {
    fn drop(&mut self) {
        self.sender.set_armed(false);
        if self.connected && is_ours(self.index, &self.identifier) {
            // A failure cannot be reported to anyone.
            let _ = disconnect(self.index);
        }
    }
}

/// Returns whether the device in `remains` is connected, and still with the identifier in `remains`.
pub(super) fn is_attached(remains: &Remains) -> bool {
    index_of(&remains.device).is_some_and(|index| is_ours(index, &remains.identifier))
}

/// Disconnects what a dead server left behind, unless it belongs to someone else by now.
pub(super) fn detach_stale(remains: &Remains) -> Result<(), DetachError> {
    let indexes = disconnect_stale(remains)?;
    indexes.into_iter().try_for_each(|index| wait_until_gone(index, &remains.identifier))
}

/// Does what [`detach_stale`] does, but does not wait until the device is gone: its last user may keep it open. Returns the
/// device's index.
pub(super) fn disconnect_stale(remains: &Remains) -> Result<Option<u32>, DetachError> {
    let index = index_of(&remains.device).filter(|index| is_ours(*index, &remains.identifier));
    index.map(|index| disconnect(index).map(|()| index)).transpose()
}

fn open() -> Result<Netlink, AttachError> {
    let find = || Netlink::open().map_err(AttachError::Netlink);
    if let Some(netlink) = find()? {
        return Ok(netlink);
    }
    let loaded = load_module("nbd", Path::new("/sys/module/nbd"));
    find()?.ok_or_else(|| AttachError::NoNbdDriver {
        modprobe: loaded.err().unwrap_or_else(|| {
            "it is loaded, but answers only in the machine's own network namespace, and this process is in another one".to_owned()
        }),
    })
}

fn disconnect(index: u32) -> Result<(), DetachError> {
    let failed = |error: io::Error| DetachError::Failed { device: path_of(index), reason: error.to_string() };
    match Netlink::open().map_err(failed)? {
        Some(netlink) => netlink.disconnect(index).map_err(failed),
        // Without a driver there is no device.
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

/// Returns whether the device is connected with this identifier. Kernels before 5.14 show no identifier, and neither does a
/// device that was connected by ioctl (qemu-nbd does that). Such a device counts as ours if the thread that connected it
/// belongs to this process, or if that thread no longer exists.
fn is_ours(index: u32, identifier: &str) -> bool {
    let sys = sys_block(&path_of(index));
    let Some(pid) = read(&sys.join("pid")) else { return false };
    match read(&sys.join("backend")) {
        Some(backend) => backend == identifier,
        None => Path::new("/proc/self/task").join(&pid).exists() || !Path::new("/proc").join(&pid).exists(),
    }
}

/// Disconnects what a killed server left behind. This is for a server that could not store which device it attached.
pub(super) fn detach_all_stale(identifier: &str) -> Result<(), DetachError> {
    let indexes = disconnect_all_stale(identifier)?;
    indexes.into_iter().try_for_each(|index| wait_until_gone(index, identifier))
}

/// Does what [`detach_all_stale`] does, but does not wait until the devices are gone. Returns their indexes.
pub(super) fn disconnect_all_stale(identifier: &str) -> Result<Vec<u32>, DetachError> {
    let Ok(devices) = std::fs::read_dir("/sys/block") else { return Ok(Vec::new()) };
    let mut indexes = Vec::new();
    for device in devices.flatten() {
        let path = Path::new("/dev").join(device.file_name());
        // A device without an identifier is left alone, because its owner is not known.
        if let Some(index) = index_of(&path)
            && read(&device.path().join("backend")).is_some_and(|backend| backend == identifier)
        {
            disconnect(index)?;
            indexes.push(index);
        }
    }
    Ok(indexes)
}

/// Returns what the kernel shows about the program that connected the device, or `None` if it is not connected.
fn user_of(index: u32) -> Option<String> {
    let sys = sys_block(&path_of(index));
    let pid = read(&sys.join("pid"))?;
    let name = read(&Path::new("/proc").join(&pid).join("comm"));
    let who = name.unwrap_or_else(|| "gone by now".to_owned());
    let called = read(&sys.join("backend")).filter(|backend| !backend.is_empty());
    let called = called.map(|backend| format!(" as {backend:?}")).unwrap_or_default();
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

/// Waits until `is_so` returns `true`. Returns `false` if `is_so` has not returned `true` within [`PATIENCE`].
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

//! The serving side of an NBD device: a session for each of the kernel's sockets, and a fresh socket for each socket that is
//! lost.
//!
//! A slot is a position in the kernel's list of sockets for the device. The kernel gives a socket up if a request was not
//! answered in time, or if the kernel could not send. The socket is then lost. It is also lost if the session here fails. The
//! kernel then gets a fresh socket for the slot, and the volume stays up. [`nbd_server::session::link`] explains how requests
//! that are sent again are not executed twice in the wrong order.
//!
//! The kernel puts a fresh socket into the first slot whose connection is dead, does not say which slot that was, and closes
//! the old socket. So the old socket of that slot is missing in `/proc/net/unix` afterwards.
//!
//! The kernel reads the replies of a slot in a separate work item (`recv_work`), which looks up the slot's socket for each reply.
//! If a fresh socket arrives while the work item for the lost socket is still running, two work items read from the fresh socket,
//! and one item gets data that belongs to the other. So a fresh socket is handed over only some time after the lost socket was
//! shut down and read to its end.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use nbd_server::failures::FailureLog;
use nbd_server::server::enlarge_send_buffer;
use nbd_server::session::link::{KeptReply, is_hung_up, is_read};
use nbd_server::{Export, Exports, Fence, Link, Server, SessionError, Settings, Shutdown, Trigger};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::{self, JoinError, JoinSet};

use super::netlink::Netlink;
use super::path_of;
use crate::attach::error::AttachError;
use crate::attach::signal::{Ended, EndedSender};
use crate::attach::{Method, Remains, swap_warning};

/// The first and the longest pause between two attempts to hand over a socket. The first attempts may come too early,
/// because the kernel notices a lost connection shortly after this side has noticed it.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// How long the kernel gets to notice that a socket was shut down, and to end the socket's reader, before this side hands over
/// a fresh socket.
const GRACE: Duration = Duration::from_millis(100);
/// Replaces [`GRACE`] if the kernel has not read everything that was sent. A reader that rejected a reply never reads the rest.
const LONG_GRACE: Duration = Duration::from_secs(1);

/// How often to check whether the kernel has given up a socket whose session is too busy to notice, and whether the system
/// swaps to the device. The first interval applies with a request timeout, the second without one.
const LOOK: Duration = Duration::from_secs(1);
const RARE_LOOK: Duration = Duration::from_secs(10);

/// Up to this request timeout, requests on a lost connection are left to the kernel, which sends them again. With longer
/// timeouts, their replies are sent on the next connection. The kernel rejects replies to requests that it has already
/// sent again.
const SHORT_TIMEOUT: Duration = Duration::from_secs(60);

/// The threads that serve a device. They end when this value is dropped.
#[derive(Debug)]
pub(super) struct Sessions {
    runtime: Option<Runtime>,
    trigger: Trigger,
    over: Arc<AtomicBool>,
    device: Arc<OnceLock<Device>>,
}

/// The device that is being served.
#[derive(Debug)]
struct Device {
    index: u32,
    identifier: String,
}

impl Sessions {
    /// Makes `connections` connections and serves them. Returns the kernel's ends of their sockets, in the order in which
    /// the kernel must get them.
    pub(super) fn start(
        connections: usize,
        export: &Export,
        request_timeout: Option<Duration>,
        sender: &EndedSender,
    ) -> Result<(Self, Vec<UnixStream>), AttachError> {
        let resource = |what| move |source| AttachError::Resource { what, source };
        let exports = Exports::new([export.clone()])
            .map_err(|error| AttachError::Resource { what: "the export", source: io::Error::other(error) })?;
        let server = Server::new(exports, Settings::default()).map_err(resource("the server's threads"))?;
        let fence = Fence::new().map_err(resource("an epoll descriptor"))?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        // tokio panics if the system refuses a thread.
        nbd_server::threads::can_start(connections.min(processors)).map_err(resource("the sessions' threads"))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(connections.min(processors))
            .thread_name("nbd-session")
            .enable_all()
            .build()
            .map_err(resource("the sessions' threads"))?;
        let (trigger, shutdown) = nbd_server::shutdown();
        let (over, device) = (Arc::<AtomicBool>::default(), Arc::<OnceLock<Device>>::default());
        let mut supervisor = Supervisor {
            server,
            helper: Helper::start("nbd-netlink").map_err(resource("the thread that hands over sockets"))?,
            export: export.clone(),
            fence,
            shutdown,
            device: Arc::clone(&device),
            slots: Vec::new(),
            running: JoinSet::new(),
            slot_of: HashMap::new(),
            losses: FailureLog::default(),
            request_timeout,
        };
        let mut kernels = Vec::new();
        {
            let _entered = runtime.enter();
            for slot in 0..connections {
                let (fresh, kernels_end) = pair().map_err(resource("a socketpair"))?;
                supervisor.slots.push(Slot::default());
                supervisor.fill(slot, fresh);
                supervisor.serve_fresh();
                kernels.push(kernels_end);
            }
        }
        let end = End { sender: sender.clone(), over: Arc::clone(&over) };
        runtime.spawn(async move {
            // Dropped last, also when the supervisor panics.
            let _end = end;
            supervisor.run().await;
        });
        Ok((Self { runtime: Some(runtime), trigger, over, device }, kernels))
    }

    /// Sets which device the sockets belong to. Before this, lost connections are not replaced.
    pub(super) fn connected(&self, index: u32, identifier: &str) {
        let _ = self.device.set(Device { index, identifier: identifier.to_owned() });
    }

    /// Returns whether every connection has ended and the kernel accepts no other.
    pub(super) fn are_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.trigger.stop();
        // Blocking is not allowed, because the caller may be in a runtime of its own.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Reports the end of the sessions when it is dropped, so that nobody waits for them after a panic.
struct End {
    sender: EndedSender,
    over: Arc<AtomicBool>,
}

impl Drop for End {
    fn drop(&mut self) {
        // The flag is set before the signal is sent, so that everyone who gets the signal also sees that the sessions are
        // over.
        self.over.store(true, Ordering::SeqCst);
        self.sender.send(match std::thread::panicking() {
            true => Ended::ServerFailed("a thread that serves it panicked".to_owned()),
            false => Ended::Disconnected,
        });
    }
}

/// A thread for calls that may block. It is started in advance, because the system may refuse a thread later. It ends when
/// this value is dropped and the last call is over.
struct Helper(mpsc::Sender<Box<dyn FnOnce() + Send>>);

impl Helper {
    fn start(name: &str) -> io::Result<Self> {
        let (calls, received) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        nbd_server::threads::start(name, move || received.into_iter().for_each(|call| call()))?;
        Ok(Self(calls))
    }

    async fn call<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let (done, is_done) = oneshot::channel();
        // If the thread has ended, `is_done` says so.
        let _ = self.0.send(Box::new(move || drop(done.send(work()))));
        is_done.await.unwrap_or_else(|_| Err(io::Error::other("the thread that hands over sockets panicked")))
    }
}

/// Serves the slots, and gives the kernel fresh sockets, until the device is gone.
struct Supervisor {
    server: Server,
    helper: Helper,
    export: Export,
    fence: Arc<Fence>,
    shutdown: Shutdown,
    device: Arc<OnceLock<Device>>,
    slots: Vec<Slot>,
    running: JoinSet<Result<(), SessionError>>,
    slot_of: HashMap<task::Id, usize>,
    losses: FailureLog,
    request_timeout: Option<Duration>,
}

/// A position in the kernel's list of sockets.
#[derive(Default)]
struct Slot {
    /// This side's end of the socket in this slot, as a separate descriptor.
    socket: Option<OwnedFd>,
    /// The inode of the kernel's end, which identifies it in `/proc/net/unix`.
    inode: u64,
    /// When this process first saw that the socket was shut down.
    hung_up_since: Option<Instant>,
    /// The link of the session that serves the slot, if there is one. The session may still be busy with a lost socket.
    link: Option<Arc<Link>>,
    /// Sockets that the kernel has for this slot. They wait until the previous session has ended, or until the system has
    /// the resources for a session. The kernel may have sent requests on them, so none may be dropped.
    fresh: VecDeque<UnixStream>,
    /// Replies of previous sessions.
    kept: Vec<KeptReply>,
    /// The kernel announced that it disconnects the device.
    has_left: bool,
}

impl Slot {
    /// Returns whether the kernel's socket is lost.
    fn is_lost(&mut self, now: Instant) -> bool {
        let is_lost = !self.has_left && self.socket.as_ref().is_none_or(|socket| is_hung_up(socket.as_fd()));
        if is_lost {
            self.hung_up_since.get_or_insert(now);
        }
        is_lost
    }

    /// Returns whether there is a socket for which no session could be started.
    fn waits_to_be_served(&self) -> bool {
        self.link.is_none() && self.fresh.iter().any(|ours| !is_hung_up(ours.as_fd()))
    }

    /// Returns whether the kernel's reader of a lost socket has probably ended.
    fn is_let_go(&self, now: Instant) -> bool {
        let Some(since) = self.hung_up_since else { return true };
        let is_read = self.socket.as_ref().is_none_or(|socket| is_read(socket.as_fd()));
        now.saturating_duration_since(since) >= if is_read { GRACE } else { LONG_GRACE }
    }
}

/// A socket for the kernel, with everything that is needed to record it: nothing may fail once the kernel has it.
struct Fresh {
    ours: UnixStream,
    /// The same socket, as a separate descriptor.
    socket: OwnedFd,
    /// The inode of the kernel's end.
    inode: u64,
}

/// The result of handing over a fresh socket.
enum Handed {
    /// The socket is now in this slot.
    Taken { slot: usize, fresh: Fresh },
    /// The kernel has not noticed yet that a connection is lost.
    NotYet,
    /// The device is no longer connected.
    Gone,
}

impl Supervisor {
    async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        let mut is_gone = false;
        let mut is_swap_reported = false;
        loop {
            self.serve_fresh();
            let now = Instant::now();
            let are_lost = self.slots.iter_mut().map(|slot| slot.is_lost(now)).collect::<Vec<_>>().contains(&true);
            let is_waiting = self.slots.iter().any(Slot::waits_to_be_served);
            let wait = match are_lost && !is_gone {
                true => pause,
                false if is_waiting => LONGEST_PAUSE,
                false if self.running.is_empty() => break,
                false if self.request_timeout.is_some() => LOOK,
                false => RARE_LOOK,
            };
            tokio::select! {
                biased;
                Some(ended) = self.running.join_next_with_id() => {
                    self.ended(ended);
                    pause = FIRST_PAUSE;
                    continue;
                }
                () = tokio::time::sleep(wait) => {}
            }
            if !is_swap_reported && let Some(warning) = self.swap_warning() {
                is_swap_reported = true;
                tracing::warn!("{warning}");
            }
            if !are_lost || is_gone {
                continue;
            }
            let now = Instant::now();
            // The kernel replaces the first socket that it considers lost, which may be any of them.
            if !self.slots.iter_mut().all(|slot| !slot.is_lost(now) || slot.is_let_go(now)) {
                continue;
            }
            pause = LONGEST_PAUSE.min(2 * pause);
            match self.hand_over().await {
                Ok(Handed::Taken { slot, fresh }) => {
                    pause = FIRST_PAUSE;
                    self.fill(slot, fresh);
                }
                Ok(Handed::NotYet) => {}
                Ok(Handed::Gone) => is_gone = true,
                Err(error) => self.log("the kernel got no fresh socket", &error),
            }
        }
    }

    fn swap_warning(&self) -> Option<String> {
        let Device { index, identifier } = self.device.get()?;
        let (method, device, identifier) = (Method::Nbd, path_of(*index), identifier.clone());
        swap_warning(&Remains { method, device, identifier, mount_dir: None })
    }

    /// Records that a session has ended.
    fn ended(&mut self, ended: Result<(task::Id, Result<(), SessionError>), JoinError>) {
        let (id, outcome) = match ended {
            Ok((id, outcome)) => (id, outcome.map_err(io::Error::other)),
            Err(error) => (error.id(), Err(io::Error::other(error))),
        };
        let Some(number) = self.slot_of.remove(&id) else { return };
        let slot = &mut self.slots[number];
        let Some(link) = slot.link.take() else { return };
        if !link.is_drained() {
            // The task panicked. Its jobs that still run could write late, so the slot waits for them.
            let draining = Arc::clone(&link);
            slot.link = Some(link);
            let error = outcome.err().unwrap_or_else(|| io::Error::other("it was not drained"));
            let drained = async move {
                draining.drain().await;
                Err(SessionError::Io(error))
            };
            let id = self.running.spawn(drained).id();
            self.slot_of.insert(id, number);
            return;
        }
        let kept = link.take_kept();
        if self.request_timeout.is_none_or(|timeout| timeout > SHORT_TIMEOUT) {
            slot.kept.extend(kept);
        }
        slot.has_left = link.has_left();
        if !slot.has_left && self.device.get().is_some() {
            let error = outcome.err().unwrap_or_else(|| io::Error::other("it was closed"));
            self.log("a connection to the kernel was lost", &error);
        }
    }

    /// Records the socket that the kernel now has in a slot.
    fn fill(&mut self, slot: usize, Fresh { ours, socket, inode }: Fresh) {
        let slot = &mut self.slots[slot];
        (slot.socket, slot.inode, slot.hung_up_since) = (Some(socket), inode, None);
        slot.fresh.push_back(ours);
    }

    /// Serves the fresh sockets of slots whose previous session has ended.
    fn serve_fresh(&mut self) {
        for number in 0..self.slots.len() {
            let slot = &mut self.slots[number];
            if self.request_timeout.is_some() {
                // With a timeout, the kernel sends the requests in a lost socket again. Without a timeout, it does not.
                slot.fresh.retain(|ours| !is_hung_up(ours.as_fd()));
            }
            if slot.link.is_some() {
                continue;
            }
            let Some(ours) = slot.fresh.pop_front() else { continue };
            if let Err(error) = self.serve(number, &ours) {
                self.log("a fresh socket cannot be served yet", &error);
                self.slots[number].fresh.push_front(ours);
            }
        }
    }

    /// Starts a session. If that fails, the socket and the kept replies stay as they were.
    fn serve(&mut self, slot: usize, socket: &UnixStream) -> io::Result<()> {
        enlarge_send_buffer(socket);
        socket.set_nonblocking(true)?;
        let ours = tokio::net::UnixStream::from_std(socket.try_clone()?)?;
        // This is the last step that can fail: a link that is dropped shuts its socket down.
        let link = Link::new(&self.fence, socket)?;
        let slot_served = &mut self.slots[slot];
        link.inherit(std::mem::take(&mut slot_served.kept));
        slot_served.link = Some(Arc::clone(&link));
        let (server, export, shutdown) = (self.server.clone(), self.export.clone(), self.shutdown.clone());
        let session = async move { server.serve_link(ours, &export, &link, shutdown).await };
        let id = self.running.spawn(session).id();
        self.slot_of.insert(id, slot);
        Ok(())
    }

    /// Gives the kernel a fresh socket for the first slot that it considers lost.
    async fn hand_over(&self) -> io::Result<Handed> {
        let Some(Device { index, identifier }) = self.device.get() else { return Ok(Handed::NotYet) };
        let (index, identifier) = (*index, identifier.clone());
        let (fresh, kernels_end) = pair()?;
        // This call runs on a separate thread: the kernel may be disconnecting the device, and would then wait for a session
        // that this thread serves.
        let handed = self.helper.call(move || {
            let Some(netlink) = Netlink::open()? else { return Err(io::ErrorKind::InvalidInput.into()) };
            netlink.replace_socket(index, &identifier, kernels_end.as_fd())
        });
        match handed.await {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
                return Ok(Handed::Gone);
            }
            Err(error) => return Err(error),
        }
        let open = open_sockets()?;
        if !open.contains(&fresh.inode) {
            return Ok(Handed::NotYet);
        }
        let slot = self.slots.iter().position(|slot| !open.contains(&slot.inode));
        let slot = slot.ok_or_else(|| io::Error::other("the kernel took it, but closed no other"))?;
        Ok(Handed::Taken { slot, fresh })
    }

    fn log(&self, what: &'static str, error: &io::Error) {
        let device = self.device.get().map(|device| path_of(device.index).display().to_string());
        let now = Instant::now();
        let device = device.unwrap_or_default();
        match self.losses.note(what, error, now) {
            Some(_) => tracing::warn!("{device}: {what} ({error}); the volume stays up"),
            None => tracing::debug!("{device}: {what} ({error})"),
        }
    }
}

/// Returns this side's end and the kernel's end.
fn pair() -> io::Result<(Fresh, UnixStream)> {
    let (ours, kernels_end) = UnixStream::pair()?;
    enlarge_send_buffer(&kernels_end);
    let inode = rustix::fs::fstat(&kernels_end)?.st_ino;
    let socket = ours.as_fd().try_clone_to_owned()?;
    Ok((Fresh { ours, socket, inode }, kernels_end))
}

/// Returns the inodes of all open unix sockets in this network namespace.
fn open_sockets() -> io::Result<HashSet<u64>> {
    Ok(inodes(&fs::read_to_string("/proc/self/net/unix")?))
}

/// Parses the column `Inode` of `/proc/net/unix`.
fn inodes(table: &str) -> HashSet<u64> {
    table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(6)?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use engine::sector::SectorSize;
    use engine::store::MemoryStore;
    use engine::volume::Volume;

    use super::*;
    use crate::attach::signal::ended_signal;

    #[test]
    fn an_open_socket_is_listed_by_its_inode() {
        let (fresh, kernels_end) = pair().unwrap();
        assert!(open_sockets().unwrap().contains(&fresh.inode));
        drop(kernels_end);
        assert!(!open_sockets().unwrap().contains(&fresh.inode));
    }

    #[test]
    fn a_panic_while_serving_is_reported() {
        let (sender, signal) = ended_signal();
        sender.set_armed(true);
        let over = Arc::<AtomicBool>::default();
        let end = End { sender, over: Arc::clone(&over) };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let panicked = runtime.spawn(async move {
            let _end = end;
            panic!("on purpose");
        });
        runtime.block_on(panicked).unwrap_err();
        assert!(over.load(Ordering::SeqCst));
        assert!(matches!(signal.get(), Some(Ended::ServerFailed(_))), "{signal:?}");
    }

    #[test]
    fn all_sockets_are_handed_over_on_one_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let helper = Helper::start("nbd-netlink").unwrap();
        let name = || Ok((std::thread::current().id(), std::thread::current().name().map(str::to_owned)));
        let calls = [runtime.block_on(helper.call(name)).unwrap(), runtime.block_on(helper.call(name)).unwrap()];
        assert_eq!(calls[0], calls[1]);
        assert_eq!(calls[0].1.as_deref(), Some("nbd-netlink"));
        // A call that panics returns an error, and so do the calls after it.
        for _ in 0..2 {
            runtime.block_on(helper.call(|| -> io::Result<()> { panic!("on purpose") })).unwrap_err();
        }
    }

    #[test]
    fn a_socket_without_a_session_waits_and_is_not_dropped() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let _entered = runtime.enter();
        let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(4096)), SectorSize::B512).unwrap();
        let export = Export::new("", Arc::new(volume));
        let (_trigger, shutdown) = nbd_server::shutdown();
        let mut supervisor = Supervisor {
            server: Server::new(Exports::new([export.clone()]).unwrap(), Settings::default()).unwrap(),
            helper: Helper::start("nbd-netlink").unwrap(),
            export,
            fence: Fence::new().unwrap(),
            shutdown,
            device: Arc::default(),
            slots: vec![Slot::default()],
            running: JoinSet::new(),
            slot_of: HashMap::new(),
            losses: FailureLog::default(),
            request_timeout: None,
        };
        // epoll refuses a regular file, as it refuses a socket when the system is short of memory.
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let socket = file.try_clone().unwrap();
        supervisor.fill(0, Fresh { ours: file.into(), socket, inode: 1 });
        supervisor.serve_fresh();
        let slot = &supervisor.slots[0];
        assert!(slot.waits_to_be_served() && slot.socket.is_some() && supervisor.running.is_empty());

        let (fresh, kernels_end) = pair().unwrap();
        supervisor.slots[0].fresh.clear();
        supervisor.fill(0, fresh);
        supervisor.serve_fresh();
        assert!(!supervisor.slots[0].waits_to_be_served() && supervisor.slots[0].link.is_some());
        drop(kernels_end);
        runtime.block_on(supervisor.running.join_next()).unwrap().unwrap().unwrap();
    }

    #[test]
    fn the_seventh_column_has_the_inodes() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     ffff8880: 00000003 00000000 00000000 0001 03 21342 /run/x\n\
                     ffff8881: 00000002 00000000 00010000 0001 01     7\n";
        assert_eq!(inodes(table), HashSet::from([21342, 7]));
    }
}

//! Connections of the kernel's NBD client, which may send a request again on another connection.
//!
//! The kernel spreads a device's requests over several sockets. The kernel gives a socket up when a request on that
//! socket is not answered in time, when sending fails, or when the other end is gone. The kernel then shuts the socket
//! down, and sooner or later sends every unanswered request again on another socket (`nbd_xmit_timeout` and
//! `nbd_handle_cmd` in drivers/block/nbd.c). The first copy of such a request may still be in the old socket, or in
//! flight on the disk. If an old copy of a write were carried out late, it would replace newer data. A [`Fence`]
//! prevents that.
//!
//! # The fence
//! All connections of one device share a fence. A connection is *hung up* when either side has shut its socket down. A
//! connection is *drained* when all requests that were received on it are carried out and its session has ended.
//!
//! 1. A session begins a request only if every other connection that is hung up is drained (`Link::may_begin`). The
//!    session checks this after it has received the request.
//! 2. A session whose own connection is hung up carries out what it has received, but sends no replies. It shuts its
//!    socket down in both directions and keeps the replies.
//! 3. Kept replies are sent on the socket that replaces the lost socket, and only when every connection that is hung up
//!    is drained.
//!
//! These rules are enough. To see why, let the kernel send copies R0, R1 … Rm of one request, and accept the reply to
//! Rm. (Each copy has its own cookie, and the kernel accepts only a reply to the last copy.) The kernel sends R(k+1)
//! only after it has shut down the socket of Rk. If Rm was begun by rule 1, the session checked the fence after it had
//! received Rm. The connections of all earlier copies were hung up by then, and rule 1 requires that they were drained.
//! If Rm was begun by rule 2, its reply was kept. Rule 3 sends this reply only after the connections of all earlier
//! copies are drained. In both cases, no earlier copy is carried out after the kernel has read the reply. The kernel
//! sends no dependent request before it has read the reply. Stopping the server (SIGSTOP) for any time does not change
//! this, because the session sees the shutdown of a socket before it can see the next copy.
//!
//! # Kept replies
//! The kernel sends a request again when the request timeout has passed, and not when the connection is lost. A timeout
//! may last days. A fresh socket takes the index of the lost socket, and the kernel accepts the outstanding replies on
//! the fresh socket. So the link sends these replies first, one by one (`Link::replay`). If the kernel has sent a
//! request again in the meantime, the kernel refuses the kept reply and gives the fresh socket up. The link then drops
//! this reply, and sends the other replies on the next socket.
//!
//! # A session that fails
//! A session's thread may panic, and its ring may fail permanently. The kernel then still waits for replies until the
//! request timeout, which may be days. Losing a socket does not make the kernel send the requests again earlier. So a
//! link keeps a [`Ledger`] of requests that were received and not answered. The ledger does not depend on the session.
//! When the session has ended for any reason, the link reads the requests that are left in the socket. The link then
//! answers all requests in the ledger with an I/O error, as kept replies. The kernel receives these replies on the next
//! socket within about a second. A filesystem treats such an error as an error of the disk.
//!
//! The link does not carry out these requests a second time, because the progress of each request is unknown. The data of
//! writes is lost with the session, or is in memory that a failed ring may still use. If a request is answered with an
//! error, the kernel assumes nothing about the request's blocks. They may contain old or new data. The fence still holds,
//! because a link is drained only when its session and all workers of the connection have ended ([`Link::drain`]). By then,
//! a request that was answered with an error is no longer in flight.
//!
//! There is one exception. Nobody can wait for writes that a failed ring has submitted but can no longer report. If
//! there are such writes, every later flush of the store fails. So if such a late write replaces newer data, that data
//! was never reported as durable.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, Shutdown};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::proto::{ErrorCode, Ledger};
use crate::session::uring::unread;

/// How long a session that may not begin waits before it checks again.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A reply is dropped when sending it has lost this many sockets.
const MOST_ATTEMPTS: u8 = 3;

/// The connections of one device. The fence knows which of them are hung up and not drained.
#[derive(Debug)]
pub struct Fence {
    /// Contains the sockets of all links. Waiting on it returns the sockets that are hung up.
    epoll: OwnedFd,
    next: AtomicU64,
}

impl Fence {
    /// Makes a fence for one device.
    ///
    /// # Errors
    /// The system's error, for example if there are too many open files.
    pub fn new() -> io::Result<Arc<Self>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Arc::new(Self { epoll, next: AtomicU64::new(0) }))
    }

    /// Returns whether any connection is hung up and not drained.
    fn is_closed(&self) -> bool {
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 1];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            match epoll::wait(&self.epoll, &mut events[..], Some(&at_once)) {
                Ok(count) => return count > 0,
                Err(rustix::io::Errno::INTR) => {}
                // The state is unknown, and waiting is safe.
                Err(_) => return true,
            }
        }
    }
}

/// One connection of a device, from before its session begins until it is drained.
#[derive(Debug)]
pub struct Link {
    fence: Arc<Fence>,
    /// A duplicate of the session's socket.
    socket: OwnedFd,
    ledger: Mutex<Ledger>,
    kept: Mutex<Vec<KeptReply>>,
    /// The number of [`Working`] values.
    at_work: AtomicUsize,
    has_left: AtomicBool,
    drained: AtomicBool,
    #[cfg(test)]
    pub(crate) faults: tests::Faults,
}

/// Marks that a session or a worker is at work for a connection, as long as the value lives.
#[derive(Debug)]
pub(crate) struct Working(Arc<Link>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.at_work.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A reply that could not be sent.
#[derive(Debug)]
pub struct KeptReply {
    bytes: Vec<u8>,
    /// How many sockets were lost while this reply was the first to be sent.
    attempts: u8,
}

impl Link {
    /// Adds a connection to the device.
    ///
    /// # Errors
    /// The system's error, for example if there are too many open files.
    pub fn new(fence: &Arc<Fence>, socket: &impl AsFd) -> io::Result<Arc<Self>> {
        let socket = rustix::io::fcntl_dupfd_cloexec(socket, 0)?;
        let number = EventData::new_u64(fence.next.fetch_add(1, Ordering::Relaxed));
        // With RDHUP, epoll reports a socket that is hung up. It reports HUP and ERR in any case.
        epoll::add(&fence.epoll, &socket, number, EventFlags::RDHUP)?;
        Ok(Arc::new(Self {
            fence: Arc::clone(fence),
            socket,
            ledger: Mutex::default(),
            kept: Mutex::default(),
            at_work: AtomicUsize::new(0),
            has_left: AtomicBool::new(false),
            drained: AtomicBool::new(false),
            #[cfg(test)]
            faults: tests::Faults::default(),
        }))
    }

    /// Returns whether the session may begin requests that it has already received. It must ask again for later
    /// requests.
    pub(crate) fn may_begin(&self) -> bool {
        if !self.fence.is_closed() {
            return true;
        }
        if !self.is_hung_up() {
            return false;
        }
        // Rule 2. A client that hung up in only one direction gets no reply either.
        self.hang_up();
        true
    }

    /// Waits until the session may begin what it has received.
    pub(crate) async fn pass(&self) {
        while !self.may_begin() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Marks that a session or a worker is at work for this connection, as long as the returned value lives.
    pub(crate) fn work(self: &Arc<Self>) -> Working {
        self.at_work.fetch_add(1, Ordering::AcqRel);
        Working(Arc::clone(self))
    }

    /// Records bytes that were received on the socket. The session calls this before it does anything else with them.
    pub(crate) fn received(&self, bytes: &[u8]) {
        self.ledger().received(bytes);
        #[cfg(test)]
        assert!(!self.faults.panics.swap(false, Ordering::SeqCst), "on purpose");
    }

    /// Records received bytes that are known to belong to a payload.
    pub(crate) fn received_payload(&self, count: usize) {
        self.ledger().received_payload(count);
    }

    /// Records that the replies to these requests were sent.
    pub(crate) fn answered(&self, cookies: impl IntoIterator<Item = u64>) {
        let mut ledger = self.ledger();
        cookies.into_iter().for_each(|cookie| ledger.answered(cookie));
    }

    /// Keeps replies that can no longer be sent.
    pub(crate) fn keep(&self, replies: impl IntoIterator<Item = Vec<u8>>) {
        let (mut ledger, mut kept) = (self.ledger(), self.kept());
        kept.extend(replies.into_iter().map(|bytes| {
            ledger.answered_by(&bytes);
            KeptReply { bytes, attempts: 0 }
        }));
    }

    /// Notes that the kernel has sent `NBD_CMD_DISC`, which disconnects the device.
    pub(crate) fn leave(&self) {
        self.has_left.store(true, Ordering::Release);
    }

    /// Returns whether the kernel has sent `NBD_CMD_DISC`. If it has not, a connection that ended was lost.
    pub fn has_left(&self) -> bool {
        self.has_left.load(Ordering::Acquire)
    }

    /// Hands over the kept replies of the connection that this connection replaces. Called before this connection's
    /// session begins.
    pub fn inherit(&self, kept: Vec<KeptReply>) {
        self.kept().extend(kept);
    }

    /// Takes the replies that could not be sent, for the connection that replaces this connection.
    pub fn take_kept(&self) -> Vec<KeptReply> {
        std::mem::take(&mut *self.kept())
    }

    /// Shuts the socket down. The session sends and receives nothing any more.
    pub(crate) fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Waits until no session and no worker is at work for this connection, then calls [`Link::drained`].
    pub async fn drain(&self) {
        while self.at_work.load(Ordering::Acquire) > 0 {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        self.drained();
    }

    /// Returns whether [`Link::drained`] was called.
    pub fn is_drained(&self) -> bool {
        self.drained.load(Ordering::Acquire)
    }

    /// Notes that nothing of this connection is in flight any more, and shuts its socket down. Requests that the
    /// session has left without an answer get an I/O error as a kept reply.
    pub fn drained(&self) {
        if self.drained.swap(true, Ordering::AcqRel) {
            return;
        }
        self.hang_up();
        self.answer_owed();
        let _ = epoll::delete(&self.fence.epoll, &self.socket);
    }

    /// Answers the requests that are left in the ledger. Only bytes that are already in the socket can still be
    /// received.
    fn answer_owed(&self) {
        let mut ledger = self.ledger();
        let mut bytes = vec![0; 64 << 10];
        loop {
            match rustix::net::recv(&self.socket, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((count @ 1.., _)) => ledger.received(&bytes[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => break,
            }
        }
        let replies = ledger.fail_owed(ErrorCode::Io);
        drop(ledger);
        if !replies.is_empty() {
            let count = replies.len();
            tracing::error!(
                "a connection to the kernel has failed, and left {count} of its requests without an answer. The next connection \
                 answers them with an I/O error, unless the kernel sends them again first"
            );
            self.kept().extend(replies.into_iter().map(|bytes| KeptReply { bytes, attempts: 0 }));
        }
    }

    /// Sends the kept replies one by one. If the connection is lost, the replies that the kernel has not taken stay
    /// kept.
    pub(crate) async fn replay(&self, socket: &mut UnixStream) {
        let replies = self.take_kept();
        let mut replies = replies.into_iter();
        let mut is_first = true;
        for mut reply in replies.by_ref() {
            match send_and_await_reading(socket, &reply.bytes).await {
                Sent::Read => {}
                // The kernel has refused this reply or the one before it. If this reply was the first on the socket, it
                // is certain that this reply was refused.
                Sent::Partly if is_first && reply.attempts + 1 >= MOST_ATTEMPTS => break,
                Sent::Partly => {
                    reply.attempts += u8::from(is_first);
                    self.kept().push(reply);
                    break;
                }
                Sent::Nothing => {
                    self.kept().push(reply);
                    break;
                }
            }
            is_first = false;
        }
        self.kept().extend(replies);
    }

    fn is_hung_up(&self) -> bool {
        is_hung_up(self.socket.as_fd())
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, Vec<KeptReply>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.drained();
    }
}

/// How much of a reply the other end has read.
enum Sent {
    /// The other end has read the whole reply.
    Read,
    /// The connection was lost, and the other end may have read a part of the reply.
    Partly,
    /// The connection was lost before any byte of the reply was sent.
    Nothing,
}

/// Returns whether the other end of a unix socket has read everything that was sent.
pub fn is_read(socket: BorrowedFd<'_>) -> bool {
    unread(socket).is_ok_and(|bytes| bytes == 0)
}

async fn send_and_await_reading(socket: &mut UnixStream, mut bytes: &[u8]) -> Sent {
    let whole = bytes.len();
    while !bytes.is_empty() {
        match socket.write(bytes).await {
            Ok(count) if count > 0 => bytes = &bytes[count..],
            Ok(_) | Err(_) if bytes.len() == whole => return Sent::Nothing,
            Ok(_) | Err(_) => return Sent::Partly,
        }
    }
    loop {
        // The order matters: the other end may read everything just before it hangs up.
        let is_hung_up = is_hung_up(socket.as_fd());
        if is_read(socket.as_fd()) {
            return Sent::Read;
        }
        if is_hung_up {
            return Sent::Partly;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Returns `true` if the other end has shut the socket down, or if this end has shut it down for receiving.
pub fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    // If poll fails, the state is unknown. The session then waits and checks again.
    rustix::event::poll(&mut fds, Some(&at_once)).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as StdStream;
    use std::sync::Condvar;

    use engine::sector::SectorSize;
    use engine::store::{FaultyStore, MemoryStore, Operation};
    use engine::volume::Volume;
    use tokio::runtime::Runtime;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::export::{Export, Exports};
    use crate::server::{Server, SessionKind, Settings};
    use crate::session::SessionError;

    /// Ways to make a session fail, for tests.
    #[derive(Debug, Default)]
    pub(crate) struct Faults {
        /// If this is set, the session panics once when it has received something.
        pub(crate) panics: AtomicBool,
        /// The errno with which every call of the session's ring fails, or 0.
        pub(crate) ring: Arc<std::sync::atomic::AtomicI32>,
    }

    /// A disk that can be stuck. While it is, its first block can be neither read nor written. Records all operations
    /// that were begun on the disk.
    #[derive(Default)]
    struct Disk {
        state: Mutex<(bool, Vec<Operation>)>,
        changed: Condvar,
    }

    impl Disk {
        fn begin(&self, operation: Operation) {
            let mut state = self.state.lock().unwrap();
            state.1.push(operation);
            self.changed.notify_all();
            while state.0 && matches!(operation, Operation::Read(0, _) | Operation::Write(0, _)) {
                state = self.changed.wait(state).unwrap();
            }
        }

        fn set_stuck(&self, stuck: bool) {
            self.state.lock().unwrap().0 = stuck;
            self.changed.notify_all();
        }

        fn wait_for(&self, operation: Operation) {
            let mut state = self.state.lock().unwrap();
            while !state.1.contains(&operation) {
                state = self.changed.wait(state).unwrap();
            }
        }

        fn has_begun(&self, operation: Operation) -> bool {
            self.begun(operation) > 0
        }

        /// Returns how often the operation was begun.
        fn begun(&self, operation: Operation) -> usize {
            self.state.lock().unwrap().1.iter().filter(|begun| **begun == operation).count()
        }
    }

    struct Bench {
        disk: Arc<Disk>,
        runtime: Runtime,
        server: Server,
        export: Export,
        fence: Arc<Fence>,
    }

    type Session = JoinHandle<Result<(), SessionError>>;

    impl Bench {
        fn new(session: SessionKind) -> Self {
            let disk = Arc::new(Disk::default());
            let seen = Arc::clone(&disk);
            let store = FaultyStore::new(MemoryStore::zeroed(1 << 20), move |operation| {
                seen.begin(operation);
                None
            });
            let export = Export::new("", Arc::new(Volume::plaintext(Arc::new(store), SectorSize::B512).unwrap()));
            let settings = Settings { session, ..Settings::default() };
            let server = Server::new(Exports::new([export.clone()]).unwrap(), settings).unwrap();
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            Self { disk, runtime, server, export, fence: Fence::new().unwrap() }
        }

        /// Makes a connection. Returns the kernel's end.
        fn connect(&self, kept: Vec<KeptReply>) -> (StdStream, Arc<Link>, Session) {
            let (ours, kernels) = StdStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            kernels.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let _entered = self.runtime.enter();
            let link = Link::new(&self.fence, &ours).unwrap();
            link.inherit(kept);
            let ours = UnixStream::from_std(ours).unwrap();
            let (server, export, held) = (self.server.clone(), self.export.clone(), Arc::clone(&link));
            let session = self.runtime.spawn(async move {
                // The trigger is kept until the session has ended.
                let (_trigger, shutdown) = crate::shutdown();
                server.serve_link(ours, &export, &held, shutdown).await
            });
            (kernels, link, session)
        }

        fn end(&self, session: Session) {
            let _ = self.runtime.block_on(session).unwrap();
        }
    }

    fn request(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = crate::proto::wire::NBD_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    fn write(cookie: u64, offset: u64, fill: u8) -> Vec<u8> {
        [request(1, cookie, offset, 4096), vec![fill; 4096]].concat()
    }

    /// Reads a simple reply without payload. Returns its cookie.
    fn reply(kernels: &mut StdStream) -> u64 {
        let mut bytes = [0; 16];
        kernels.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[4..8], [0; 4], "an error");
        u64::from_be_bytes(bytes[8..].try_into().unwrap())
    }

    const SESSIONS: [SessionKind; 2] = [SessionKind::IoUring, SessionKind::Tokio];

    #[test]
    fn nothing_begins_while_a_lost_connection_still_writes() {
        for session in SESSIONS {
            let bench = Bench::new(session);
            bench.disk.set_stuck(true);
            let (mut first, first_link, first_session) = bench.connect(Vec::new());
            let (mut second, _second_link, second_session) = bench.connect(Vec::new());
            first.write_all(&write(1, 0, 1)).unwrap();
            bench.disk.wait_for(Operation::Write(0, 4096));
            // The second connection begins requests until the kernel gives the first connection up. After that, it
            // begins nothing while the first connection still writes.
            second.write_all(&write(2, 8192, 2)).unwrap();
            assert_eq!(reply(&mut second), 2);
            first.shutdown(std::net::Shutdown::Both).unwrap();
            second.write_all(&write(3, 4096, 3)).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            assert!(!bench.disk.has_begun(Operation::Write(4096, 4096)), "{session:?}");
            bench.disk.set_stuck(false);
            assert_eq!(reply(&mut second), 3);
            bench.end(first_session);
            assert_eq!(first_link.take_kept().len(), 1);
            drop(second);
            bench.end(second_session);
        }
    }

    /// Everything that the kernel sent before the connection was lost is carried out, and answered on the next
    /// connection.
    #[test]
    fn the_next_connection_gets_the_replies_of_the_one_before() {
        for session_kind in SESSIONS {
            let bench = Bench::new(session_kind);
            bench.disk.set_stuck(true);
            let (mut kernels, link, session) = bench.connect(Vec::new());
            kernels.write_all(&write(1, 0, 1)).unwrap();
            bench.disk.wait_for(Operation::Write(0, 4096));
            // These include the first block, so that none of them is answered before the connection is lost.
            kernels.write_all(&[write(2, 0, 2), request(0, 3, 0, 512)].concat()).unwrap();
            // Half a request does not count as a request.
            kernels.write_all(&write(4, 8192, 4)[..100]).unwrap();
            kernels.shutdown(std::net::Shutdown::Both).unwrap();
            bench.disk.set_stuck(false);
            bench.end(session);
            assert!(!link.has_left() && !bench.disk.has_begun(Operation::Write(8192, 4096)));

            let kept = link.take_kept();
            assert_eq!(kept.len(), 3, "{session_kind:?}");
            let (mut kernels, link, session) = bench.connect(kept);
            kernels.write_all(&write(5, 12288, 5)).unwrap();
            let mut bytes = vec![0; 4 * 16 + 512];
            kernels.read_exact(&mut bytes).unwrap();
            let mut cookies = std::collections::BTreeSet::new();
            let mut at = 0;
            while at < bytes.len() {
                let cookie = u64::from_be_bytes(bytes[at + 8..at + 16].try_into().unwrap());
                cookies.insert(cookie);
                at += if cookie == 3 { 16 + 512 } else { 16 };
            }
            assert_eq!(cookies.into_iter().collect::<Vec<_>>(), [1, 2, 3, 5]);
            // This is NBD_CMD_DISC.
            kernels.write_all(&request(2, 0, 0, 0)).unwrap();
            bench.end(session);
            assert!(link.has_left() && link.take_kept().is_empty());
        }
    }

    #[test]
    fn a_refused_reply_does_not_lose_the_others() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let fence = Fence::new().unwrap();
        let mut kept: Vec<_> = (0..4).map(|number| KeptReply { bytes: vec![number; 16], attempts: 0 }).collect();
        let mut accepted = Vec::new();
        let mut sockets = 0;
        while !kept.is_empty() {
            sockets += 1;
            assert!(sockets < 20);
            let (ours, mut kernels) = StdStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            // The kernel accepts each reply except number 1. When the kernel gets that reply, it gives the socket up.
            let kernel = std::thread::spawn(move || {
                let (mut bytes, mut taken) = ([0; 16], Vec::new());
                while kernels.read_exact(&mut bytes).is_ok() && bytes[0] != 1 {
                    taken.push(bytes[0]);
                }
                let _ = kernels.shutdown(std::net::Shutdown::Both);
                taken
            });
            let link = Link::new(&fence, &ours).unwrap();
            link.inherit(kept);
            runtime.block_on(async {
                let mut ours = UnixStream::from_std(ours).unwrap();
                link.replay(&mut ours).await;
            });
            kept = link.take_kept();
            drop(link);
            accepted.extend(kernel.join().unwrap());
        }
        assert_eq!(accepted, [0, 2, 3]);
    }

    /// Returns the cookies of kept replies to writes and reads: first of the replies without an error, then of the
    /// replies with an error.
    fn sorted(kept: &[KeptReply]) -> (Vec<u64>, Vec<u64>) {
        let (mut done, mut failed) = (Vec::new(), Vec::new());
        for reply in kept {
            let cookie = u64::from_be_bytes(reply.bytes[8..16].try_into().unwrap());
            match u32::from_be_bytes(reply.bytes[4..8].try_into().unwrap()) {
                0 => done.push(cookie),
                error => {
                    assert_eq!((error, reply.bytes.len()), (ErrorCode::Io.code(), 16));
                    failed.push(cookie);
                }
            }
        }
        done.sort_unstable();
        failed.sort_unstable();
        (done, failed)
    }

    /// If a session panics, every request on its connection is answered: the requests that workers carry out, the
    /// requests that the session has received, and the requests in the socket.
    #[test]
    fn a_session_that_panics_leaves_no_request_without_an_answer() {
        for session_kind in SESSIONS {
            let bench = Bench::new(session_kind);
            bench.disk.set_stuck(true);
            let (mut kernels, link, session) = bench.connect(Vec::new());
            let (mut other, _other_link, other_session) = bench.connect(Vec::new());
            kernels.write_all(&write(1, 8192, 1)).unwrap();
            assert_eq!(reply(&mut kernels), 1);
            kernels.write_all(&request(0, 2, 8192, 512)).unwrap();
            let mut read = [0; 16 + 512];
            kernels.read_exact(&mut read).unwrap();
            kernels.write_all(&write(3, 0, 3)).unwrap();
            bench.disk.wait_for(Operation::Write(0, 4096));
            link.faults.panics.store(true, Ordering::SeqCst);
            // Half a request does not count as a request.
            kernels
                .write_all(&[request(0, 4, 8192, 512), write(5, 4096, 5), write(6, 4096, 6)[..100].to_vec()].concat())
                .unwrap();
            // The connection is not drained while a worker writes, so the other connection begins nothing.
            while !link.is_hung_up() {
                std::thread::sleep(Duration::from_millis(1));
            }
            other.write_all(&write(7, 0, 7)).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            assert!(!session.is_finished() && !link.is_drained(), "{session_kind:?}");
            assert_eq!(bench.disk.begun(Operation::Write(0, 4096)), 1);
            bench.disk.set_stuck(false);
            let error = bench.runtime.block_on(session).unwrap().unwrap_err();
            assert!(error.to_string().contains("panicked"), "{error}");
            assert_eq!(reply(&mut other), 7);

            assert!(!bench.disk.has_begun(Operation::Write(4096, 4096)));
            let kept = link.take_kept();
            assert_eq!(sorted(&kept), (vec![3], vec![4, 5]), "{session_kind:?}");
            let (mut kernels, link, session) = bench.connect(kept);
            kernels.read_exact(&mut [0; 3 * 16]).unwrap();
            kernels.write_all(&write(8, 0, 8)).unwrap();
            assert_eq!(reply(&mut kernels), 8);
            drop((kernels, other));
            bench.end(session);
            bench.end(other_session);
            assert!(link.take_kept().is_empty());
        }
    }

    /// The ring fails briefly or permanently. At that time, workers are carrying out requests, and more requests are in
    /// the ring and in the socket.
    #[test]
    fn a_ring_that_fails_leaves_no_request_without_an_answer() {
        const REQUESTS: u64 = 100;
        for is_lasting in [false, true] {
            let bench = Bench::new(SessionKind::IoUring);
            bench.disk.set_stuck(true);
            let (mut kernels, link, session) = bench.connect(Vec::new());
            crate::server::enlarge_send_buffer(&kernels);
            // When the ring fails, a worker is carrying out the first request.
            kernels.write_all(&write(0, 0, 1)).unwrap();
            bench.disk.wait_for(Operation::Write(0, 4096));
            // One call cannot receive all of these requests. Holding the ring here leaves time to send them, because
            // the session closes the socket as soon as the ring fails.
            link.faults.ring.store(crate::session::uring::HELD, Ordering::SeqCst);
            let requests: Vec<u8> = (1..REQUESTS).flat_map(|cookie| write(cookie, 4096 * (cookie % 8), 1)).collect();
            kernels.write_all(&requests).unwrap();
            let begun = std::time::Instant::now();
            link.faults.ring.store(libc::EBADF, Ordering::SeqCst);
            while !link.is_hung_up() {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !is_lasting {
                link.faults.ring.store(0, Ordering::SeqCst);
            }
            bench.disk.set_stuck(false);
            bench.runtime.block_on(session).unwrap().unwrap_err();
            assert!(begun.elapsed() < Duration::from_secs(20));
            let (done, failed) = sorted(&link.take_kept());
            // The requests that the workers had get their real answers.
            assert!(!done.is_empty() && !failed.is_empty(), "{done:?} {failed:?}");
            let mut all = [done, failed].concat();
            all.sort_unstable();
            assert_eq!(all, (0..REQUESTS).collect::<Vec<_>>(), "{is_lasting}");
        }
    }
}

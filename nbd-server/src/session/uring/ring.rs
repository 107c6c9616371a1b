//! An io_uring whose operations own the memory they use. This is the one room of the server with `unsafe` in it.
//!
//! The kernel reads and fills memory by address, at any time between an operation's submission and its completion. So
//! an operation takes its memory with it and gives it back with its completion; in between nobody else has it, and a
//! ring that is dropped first has every operation cancelled and waits for it.
#![allow(unsafe_code, reason = "the kernel is handed addresses; each block says why they stay good")]

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::batch::Batch;
use super::registered::{PLACES, Table};
use crate::session::buffers::Buffer;

/// Entries of the submission queue. Operations beyond are submitted first and wait for nothing.
const SUBMISSIONS: u32 = 128;
/// Entries of the completion queue: more than a connection has under way, so that none has to be held back.
const COMPLETIONS: u32 = 1024;
/// The completion of a cancellation, of which there is nothing to tell.
const CANCELLATION: u64 = u64::MAX;
/// The offset that means "where the file stands": for what has no offsets.
const NO_OFFSET: u64 = u64::MAX;

/// What an operation owns while it is under way.
enum Held {
    Nothing,
    Buffer(Buffer),
    Message(Box<Message>),
    /// Kept for the kernel's sake alone.
    Word {
        _word: Box<[u8; 8]>,
    },
}

/// A batch on its way, with the addresses of its slices as sendmsg(2) wants them.
struct Message {
    batch: Batch,
    slices: Vec<libc::iovec>,
    header: libc::msghdr,
}

/// The memory that a completed operation gives back.
pub(super) enum Memory {
    /// It needed none that matters.
    Nothing,
    /// What was read, written or received into.
    Buffer(Buffer),
    /// What was sent.
    Batch(Batch),
}

/// An operation that is over.
pub(super) struct Completion<T> {
    /// What the operation was given.
    pub(super) tag: T,
    /// How many bytes it moved.
    pub(super) result: io::Result<usize>,
    /// Its memory.
    pub(super) memory: Memory,
}

struct Operation<T> {
    tag: T,
    held: Held,
}

/// A ring, and the operations that are under way on it. `'fd` is how long the files and sockets stay open.
pub(super) struct Ring<'fd, T> {
    ring: IoUring,
    operations: ManuallyDrop<Vec<Option<Operation<T>>>>,
    free: Vec<usize>,
    /// A message's memory, to be used again.
    spare: Option<Box<Message>>,
    /// The socket that the kernel has looked up once for all, as the first of its fixed files.
    registered: Option<RawFd>,
    /// The buffers that are registered, where there is direct I/O to gain by it.
    table: Option<Table>,
    files: std::marker::PhantomData<BorrowedFd<'fd>>,
}

impl<'fd, T> Ring<'fd, T> {
    /// A ring for the thread that makes it.
    ///
    /// # Errors
    /// What the kernel said: `ENOSYS` where it has none, `EPERM` where it is forbidden (the sysctl
    /// `kernel.io_uring_disabled`, seccomp).
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_cqsize(COMPLETIONS)
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .dontfork()
            .build(SUBMISSIONS)
            // Before Linux 6.1 the hints are unknown.
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => IoUring::builder().setup_cqsize(COMPLETIONS).dontfork().build(SUBMISSIONS),
                _ => Err(error),
            })?;
        // Without it completions could be lost, and with them memory (Linux before 5.5).
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_ext_arg() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            operations: ManuallyDrop::new(Vec::new()),
            free: Vec::new(),
            spare: None,
            registered: None,
            table: None,
            files: std::marker::PhantomData,
        })
    }

    /// Has the kernel look up a socket once, and not with each operation. Where it will not, nothing is lost but that.
    pub(super) fn register(&mut self, socket: BorrowedFd<'fd>) {
        if self.registered.is_none() && self.ring.submitter().register_files(&[socket.as_raw_fd()]).is_ok() {
            self.registered = Some(socket.as_raw_fd());
        }
    }

    /// Has the kernel look up and pin once the memory of buffers that are read and written again and again. That is up to half
    /// of the CPU time of a direct read of 128 KiB (fio with and without `--fixedbufs`). Where the kernel will not (before Linux
    /// 5.19), nothing is lost but that.
    pub(super) fn register_buffers(&mut self) {
        if self.table.is_none() && self.ring.submitter().register_buffers_sparse(PLACES.into()).is_ok() {
            self.table = Some(Table::new());
        }
    }

    /// The place of the whole of a buffer's memory in the table, put there now if it is worth it.
    fn place_of(&mut self, buffer: &mut Buffer) -> Option<u16> {
        let table = self.table.as_mut()?;
        let memory = buffer.memory();
        if let Some(registration) = &buffer.registration {
            return table.holds(registration.place(), &memory).then_some(registration.place());
        }
        // What is used once only would cost more to register than it saves.
        if !buffer.is_reused {
            return None;
        }
        let slice = libc::iovec { iov_base: buffer.bytes.as_mut_ptr().cast(), iov_len: memory.len() };
        // SAFETY: the memory is the buffer's own, all of it. The kernel holds the pages themselves from here on, so that they
        // stay even if the buffer ends before its registration does, and touches them for operations alone that name the
        // place: `read` and `write` do, with an address inside the buffer that they own.
        let fill = |place: u16| unsafe { self.ring.submitter().register_buffers_update(place.into(), &[slice], None) };
        buffer.registration = table.add(memory, fill);
        buffer.registration.as_ref().map(|registration| registration.place())
    }

    /// Gives up the places of buffers that are no more.
    fn tidy(&mut self) {
        let Some(table) = &mut self.table else { return };
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: there is no memory in it.
        table.tidy(|place| unsafe { self.ring.submitter().register_buffers_update(place.into(), &[nothing], None) });
    }

    /// How many operations are under way.
    pub(super) fn under_way(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    /// Receives into `range` of the buffer, as much as there is.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'fd>, mut buffer: Buffer, range: Range<usize>, tag: T) {
        debug_assert!(!range.is_empty(), "a receive of nothing would look like the end of the stream");
        let (address, len) = span(&mut buffer.bytes[range]);
        let entry = match self.registered == Some(socket.as_raw_fd()) {
            true => opcode::Recv::new(Fixed(0), address, len).build(),
            false => opcode::Recv::new(Fd(socket.as_raw_fd()), address, len).build(),
        };
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Sends what is left of the batch, or as much of it as the socket takes.
    pub(super) fn send(&mut self, socket: BorrowedFd<'fd>, batch: Batch, tag: T) {
        let mut message = match self.spare.take() {
            Some(mut message) => {
                message.batch = batch;
                message
            }
            None => {
                // SAFETY: a msghdr of zeros is one without address, slices and control data.
                let header = unsafe { std::mem::zeroed() };
                Box::new(Message { batch, slices: Vec::new(), header })
            }
        };
        message.slices.clear();
        // The kernel only reads through these, whatever sendmsg(2) calls the pointer.
        let slices = message
            .batch
            .left()
            .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() });
        message.slices.extend(slices);
        message.header.msg_iov = message.slices.as_mut_ptr();
        message.header.msg_iovlen = message.slices.len();
        let flags = libc::MSG_NOSIGNAL.cast_unsigned();
        let header = &raw const message.header;
        let entry = match self.registered == Some(socket.as_raw_fd()) {
            true => opcode::SendMsg::new(Fixed(0), header).flags(flags).build(),
            false => opcode::SendMsg::new(Fd(socket.as_raw_fd()), header).flags(flags).build(),
        };
        self.push(entry, tag, Held::Message(message));
    }

    /// Reads `range` of the buffer from the file's `offset`.
    pub(super) fn read(&mut self, file: BorrowedFd<'fd>, mut buffer: Buffer, range: Range<usize>, offset: u64, tag: T) {
        let place = self.place_of(&mut buffer);
        let (address, len) = span(&mut buffer.bytes[range]);
        let file = Fd(file.as_raw_fd());
        let entry = match place {
            Some(place) => opcode::ReadFixed::new(file, address, len, place).offset(offset).build(),
            None => opcode::Read::new(file, address, len).offset(offset).build(),
        };
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Writes `range` of the buffer to the file's `offset`; where `durable` is set, completes when it is on stable
    /// storage.
    pub(super) fn write(
        &mut self,
        file: BorrowedFd<'fd>,
        mut buffer: Buffer,
        range: Range<usize>,
        offset: u64,
        durable: bool,
        tag: T,
    ) {
        let place = self.place_of(&mut buffer);
        let (address, len) = span(&mut buffer.bytes[range]);
        let (file, flags) = (Fd(file.as_raw_fd()), if durable { libc::RWF_DSYNC } else { 0 });
        let entry = match place {
            Some(place) => opcode::WriteFixed::new(file, address, len, place).offset(offset).rw_flags(flags).build(),
            None => opcode::Write::new(file, address, len).offset(offset).rw_flags(flags).build(),
        };
        self.push(entry, tag, Held::Buffer(buffer));
    }

    /// Completes when what was written before is on stable storage.
    pub(super) fn sync(&mut self, file: BorrowedFd<'fd>, tag: T) {
        let entry = opcode::Fsync::new(Fd(file.as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
        self.push(entry, tag, Held::Nothing);
    }

    /// Completes when the eventfd was written to, and resets it.
    pub(super) fn listen(&mut self, eventfd: BorrowedFd<'fd>, tag: T) {
        let mut word = Box::new([0; 8]);
        let (address, len) = span(&mut word[..]);
        let entry = opcode::Read::new(Fd(eventfd.as_raw_fd()), address, len).offset(NO_OFFSET).build();
        self.push(entry, tag, Held::Word { _word: word });
    }

    /// Submits what was begun and waits until something is complete, or the time is over.
    ///
    /// # Errors
    /// What the kernel said.
    pub(super) fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.wait_for(1, limit)
    }

    /// Submits what was begun and waits until so many operations are complete, or the time is over.
    ///
    /// # Errors
    /// What the kernel said.
    pub(super) fn wait_for(&mut self, operations: usize, limit: Option<Duration>) -> io::Result<()> {
        self.tidy();
        let result = match limit {
            None => self.ring.submit_and_wait(operations),
            Some(limit) => {
                let limit = Timespec::from(limit);
                self.ring.submitter().submit_with_args(operations, &SubmitArgs::new().timespec(&limit))
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // The time is over; a signal; completions are to be taken first.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next operation that is over.
    pub(super) fn next(&mut self) -> Option<Completion<T>> {
        loop {
            let entry = self.ring.completion().next()?;
            if entry.user_data() == CANCELLATION {
                continue;
            }
            // The number is one of ours: see push.
            let place = usize::try_from(entry.user_data()).ok()?;
            let operation = self.operations.get_mut(place)?.take()?;
            self.free.push(place);
            let result = match usize::try_from(entry.result()) {
                Ok(count) => Ok(count),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            let memory = match operation.held {
                Held::Nothing | Held::Word { .. } => Memory::Nothing,
                Held::Buffer(buffer) => Memory::Buffer(buffer),
                Held::Message(mut message) => {
                    let batch = std::mem::take(&mut message.batch);
                    self.spare = Some(message);
                    Memory::Batch(batch)
                }
            };
            return Some(Completion { tag: operation.tag, result, memory });
        }
    }

    fn push(&mut self, entry: squeue::Entry, tag: T, held: Held) {
        let operation = Some(Operation { tag, held });
        let place = match self.free.pop() {
            Some(place) => {
                self.operations[place] = operation;
                place
            }
            None => {
                self.operations.push(operation);
                self.operations.len() - 1
            }
        };
        self.submit(&entry.user_data(place as u64));
    }

    fn submit(&mut self, entry: &squeue::Entry) {
        // SAFETY: the addresses in the entry are those of heap memory which `operations` owns from before the submission
        // until the completion was taken (`next`) or every operation was seen to be over (`drop`): nothing else reads,
        // writes or frees it meanwhile, and moving the owner moves no heap memory. The files outlive the ring (`'fd`).
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // The queue is full. What the kernel cannot take now, for want of memory, it takes later.
            if self.ring.submit().is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Bytes that were sent on a unix socket and that its other end has not read yet, with what the kernel keeps them in.
pub(super) fn unread(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut count: libc::c_int = 0;
    // SAFETY: the kernel writes one int there, while this waits.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(count).unwrap_or(0))
}

impl<T> Drop for Ring<'_, T> {
    fn drop(&mut self) {
        for place in 0..self.operations.len() {
            if self.operations[place].is_some() {
                let cancel = opcode::AsyncCancel::new(place as u64).build().user_data(CANCELLATION);
                self.submit(&cancel);
            }
        }
        while self.under_way() > 0 {
            if self.wait(None).is_err() {
                // The kernel may still write there: the memory is given up, not freed.
                return;
            }
            while self.next().is_some() {}
        }
        // A ring goes away some time after it is closed, and would keep the socket open and the memory locked until then.
        if self.registered.is_some() {
            let _ = self.ring.submitter().unregister_files();
        }
        if self.table.is_some() {
            let _ = self.ring.submitter().unregister_buffers();
        }
        // SAFETY: this is the only place that drops it, and the last that touches it.
        unsafe { ManuallyDrop::drop(&mut self.operations) };
    }
}

/// Address and length of memory, as an operation takes them. (Nothing here is longer than 32 MiB.)
fn span(memory: &mut [u8]) -> (*mut u8, u32) {
    (memory.as_mut_ptr(), u32::try_from(memory.len()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::session::buffers::Buffers;

    #[test]
    fn what_is_received_is_what_was_sent() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        ring.receive(ours.as_fd(), buffers.take(100), 10..100, "receive");
        theirs.write_all(&[7; 90]).unwrap();
        ring.wait(None).unwrap();
        let Completion { tag, result, memory: Memory::Buffer(buffer) } = ring.next().unwrap() else { panic!() };
        assert_eq!((tag, result.unwrap()), ("receive", 90));
        assert!(buffer.bytes[..10].iter().all(|byte| *byte == 0) && buffer.bytes[10..].iter().all(|byte| *byte == 7));

        let mut batch = Batch::default();
        batch.append(b"abc");
        batch.attach(buffer, 90..100);
        ring.send(ours.as_fd(), batch, "send");
        ring.wait(None).unwrap();
        assert_eq!(ring.next().unwrap().result.unwrap(), 13);
        let mut received = [0; 13];
        theirs.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"abc\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07");
    }

    #[test]
    fn a_registered_socket_receives_and_sends_and_is_closed_with_its_ring() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ring = Ring::new().unwrap();
        ring.register(ours.as_fd());
        assert!(ring.registered.is_some());
        ring.receive(ours.as_fd(), Buffers::new(1 << 20).take(3), 0..3, ());
        theirs.write_all(b"abc").unwrap();
        ring.wait(None).unwrap();
        let Completion { memory: Memory::Buffer(buffer), .. } = ring.next().unwrap() else { panic!() };
        let mut batch = Batch::default();
        batch.attach(buffer, 0..3);
        ring.send(ours.as_fd(), batch, ());
        ring.wait(None).unwrap();
        assert_eq!(ring.next().unwrap().result.unwrap(), 3);
        drop(ring);
        drop(ours);
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"abc");
    }

    /// Reads and writes by registered buffers what is there by plain ones, whatever part of a buffer, and whatever became of
    /// the memory of the buffers before.
    #[test]
    fn registered_buffers_are_read_and_written_and_their_places_used_again() {
        let file = tempfile::tempfile().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        ring.register_buffers();
        let take = |buffers: &mut Buffers, len| {
            let buffer = buffers.take(len);
            buffers.give_back(buffer);
            buffers.take(len)
        };
        for round in 0..3 * u32::from(PLACES) {
            let (len, fill) = ([5000, 64 << 10, 100 << 10][round as usize % 3], round.to_le_bytes()[0] | 1);
            let mut buffer = take(&mut buffers, len);
            buffer.bytes.fill(fill);
            ring.write(file.as_fd(), buffer, 100..len, 0, false, ());
            ring.wait(None).unwrap();
            let Completion { result, memory: Memory::Buffer(buffer), .. } = ring.next().unwrap() else { panic!() };
            assert_eq!(result.unwrap(), len - 100);
            assert!(buffer.registration.is_some(), "round {round}: is this kernel older than 5.19?");
            // Its memory is the system's again, and the next buffer may well lie at the same address.
            drop(buffer);
            buffers = Buffers::new(1 << 20);
            let mut buffer = take(&mut buffers, len);
            buffer.bytes.fill(0);
            ring.read(file.as_fd(), buffer, 0..len - 100, 0, ());
            ring.wait(None).unwrap();
            let Completion { result, memory: Memory::Buffer(buffer), .. } = ring.next().unwrap() else { panic!() };
            assert_eq!(result.unwrap(), len - 100);
            assert!(buffer.registration.is_some());
            assert!(buffer.bytes[..len - 100].iter().all(|byte| *byte == fill), "round {round}");
            assert!(buffer.bytes[len - 100..].iter().all(|byte| *byte == 0), "round {round}");
        }
    }

    #[test]
    fn a_ring_that_is_dropped_ends_what_is_under_way() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        for _ in 0..300 {
            ring.receive(ours.as_fd(), buffers.take(4096), 0..4096, ());
        }
        ring.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(ring.under_way(), 300);
        drop(ring);
        drop(theirs);
    }

    #[test]
    fn waiting_ends_with_its_time() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        ring.receive(ours.as_fd(), buffers.take(1), 0..1, ());
        let begun = std::time::Instant::now();
        ring.wait(Some(Duration::from_millis(20))).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(20) && ring.next().is_none());
    }

    #[test]
    fn several_operations_are_waited_for_until_the_time_is_over() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (full, mut sender) = UnixStream::pair().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        sender.write_all(b"ab").unwrap();
        ring.receive(ours.as_fd(), buffers.take(1), 0..1, 'o');
        ring.receive(full.as_fd(), buffers.take(1), 0..1, 'f');
        let limit = Duration::from_millis(20);
        let begun = std::time::Instant::now();
        ring.wait_for(2, Some(limit)).unwrap();
        assert!(begun.elapsed() >= limit, "one is not two");
        assert_eq!(ring.next().unwrap().tag, 'f');
        ring.receive(full.as_fd(), buffers.take(1), 0..1, 'f');
        let begun = std::time::Instant::now();
        ring.wait_for(1, Some(Duration::from_secs(60))).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30) && ring.next().is_some());
    }

    #[test]
    fn what_the_other_end_has_not_read_is_known() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(unread(ours.as_fd()).unwrap(), 0);
        ours.write_all(b"abc").unwrap();
        assert!(unread(ours.as_fd()).unwrap() > 0);
        theirs.read_exact(&mut [0; 2]).unwrap();
        assert!(unread(ours.as_fd()).unwrap() > 0, "one byte is left");
        theirs.read_exact(&mut [0; 1]).unwrap();
        assert_eq!(unread(ours.as_fd()).unwrap(), 0);
    }

    #[test]
    fn a_file_is_written_and_read_and_made_durable() {
        let file = tempfile::tempfile().unwrap();
        let mut buffers = Buffers::new(1 << 20);
        let mut ring = Ring::new().unwrap();
        let mut buffer = buffers.take(8192);
        buffer.bytes.fill(9);
        ring.write(file.as_fd(), buffer, 4096..8192, 512, true, ());
        ring.wait(None).unwrap();
        assert_eq!(ring.next().unwrap().result.unwrap(), 4096);
        ring.sync(file.as_fd(), ());
        ring.wait(None).unwrap();
        ring.next().unwrap().result.unwrap();
        ring.read(file.as_fd(), buffers.take(8192), 0..8192, 0, ());
        ring.wait(None).unwrap();
        let Completion { result, memory: Memory::Buffer(buffer), .. } = ring.next().unwrap() else { panic!() };
        assert_eq!(result.unwrap(), 512 + 4096);
        assert!(buffer.bytes[..512].iter().all(|byte| *byte == 0));
        assert!(buffer.bytes[512..512 + 4096].iter().all(|byte| *byte == 9));
    }
}

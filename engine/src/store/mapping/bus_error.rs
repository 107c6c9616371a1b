//! Turns SIGBUS into an error of the mapping in which it occurred.
//!
//! A mapped file can lose pages while it is read: it is cut short, or the filesystem has no room for a page. The kernel
//! then sends SIGBUS, which ends the process and with it every other export. For addresses of a [`Watch`], the handler
//! therefore puts a page of zeros where the page is missing, and marks the watch. Code that has used the memory then checks
//! the mark. If the watch is marked, the code discards what it read. Any other bus error goes to the previous handler,
//! which ends the process. A SIGBUS that a process sends acts as it does without a handler.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

/// The maximum number of mappings that can be watched at once.
const MOST: usize = 64;

/// Proof that bus errors are caught.
#[derive(Clone, Copy, Debug)]
pub struct BusErrorsCaught(());

impl BusErrorsCaught {
    /// Catches bus errors from now on, in the whole process.
    ///
    /// # Errors
    /// The error of sigaction(2).
    pub fn new() -> io::Result<Self> {
        static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
        let installed =
            INSTALLED.get_or_init(|| install().map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL)));
        installed.map(|()| Self(())).map_err(io::Error::from_raw_os_error)
    }
}

/// A watched range in the form that the handler reads. All fields that the handler touches are atomic.
struct Slot {
    taken: AtomicBool,
    /// The range is empty while `start` is not below `end`.
    start: AtomicUsize,
    end: AtomicUsize,
    faulted: AtomicBool,
}

static SLOTS: [Slot; MOST] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(usize::MAX),
        end: AtomicUsize::new(0),
        faulted: AtomicBool::new(false),
    }
}; MOST];

/// The previous handler of SIGBUS: Rust's own check for stack overflows, or the system's default.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// Bytes in a page, for the handler.
static PAGE: AtomicUsize = AtomicUsize::new(4096);

/// A range of addresses whose bus errors are caught and marked.
pub(super) struct Watch(&'static Slot);

impl Watch {
    /// Starts to watch the range. Returns `None` if too many ranges are watched.
    pub(super) fn new(_caught: BusErrorsCaught, addresses: Range<usize>) -> Option<Self> {
        let slot = SLOTS.iter().find(|slot| !slot.taken.swap(true, Ordering::AcqRel))?;
        slot.faulted.store(false, Ordering::Relaxed);
        slot.end.store(addresses.end, Ordering::Relaxed);
        slot.start.store(addresses.start, Ordering::Release);
        Some(Self(slot))
    }

    /// Returns whether a page in the range was missing since the watch began.
    pub(super) fn has_faulted(&self) -> bool {
        self.0.faulted.load(Ordering::Acquire)
    }

    /// Stops watching.
    pub(super) fn end(&self) {
        self.0.start.store(usize::MAX, Ordering::Release);
        self.0.end.store(0, Ordering::Release);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
        self.0.taken.store(false, Ordering::Release);
    }
}

fn install() -> io::Result<()> {
    PAGE.store(rustix::param::page_size(), Ordering::Relaxed);
    // SAFETY: a zeroed sigaction is valid: it has an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: as above. The sigaction is written before it is read.
    let before = Box::leak(Box::new(unsafe { std::mem::zeroed() }));
    // The previous handler is stored before our handler can run: the first call reads it, the second call replaces it.
    // SAFETY: both pointers are valid for the call.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    BEFORE.store(before, Ordering::Release);
    // SAFETY: the handler calls only what a signal handler may call: atomics, mmap(2), sigaction(2), raise(3).
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t, which for SIGBUS contains an address (sigaction(2)).
    let (address, code) = unsafe { ((*info).si_addr().addr(), (*info).si_code) };
    // BUS_ADRERR means that a page of a file is missing. Signals sent by a process and broken hardware have other codes.
    if code == libc::BUS_ADRERR && mend(address) {
        return;
    }
    // The hardware has found a broken memory page that no code is reading now. A later read of the page will get its
    // own signal.
    if code == libc::BUS_MCEERR_AO {
        return;
    }
    let before = BEFORE.load(Ordering::Acquire);
    // SAFETY: `install` stored a pointer to a leaked sigaction before this function could be called.
    let action = unsafe { &*before };
    if code <= 0 {
        // A process sent the signal (kill(2)), so nothing is wrong in this process. Rust's handler would restore the
        // default action permanently, and so remove this handler. So this function lets the signal do what it does to a
        // process without a handler.
        if action.sa_sigaction == libc::SIG_IGN {
            return;
        }
        // SAFETY: a zeroed sigaction is the default action; the pointer is valid for the call; both functions may be called in
        // a handler (signal-safety(7)). The signal is blocked until this function returns.
        unsafe {
            libc::sigaction(signal, &std::mem::zeroed(), std::ptr::null_mut());
            libc::raise(signal);
        }
        return;
    }
    if action.sa_flags & libc::SA_SIGINFO != 0 && action.sa_sigaction > libc::SIG_IGN {
        // SAFETY: with SA_SIGINFO, the field is the address of a function of this type (sigaction(2)).
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(action.sa_sigaction) };
        return handler(signal, info, context);
    }
    // The instruction runs again, and its bus error then has the effect that it would have had without this handler.
    // SAFETY: the pointer is valid for the call.
    unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
}

/// Puts a page of zeros at the address if the address is watched. Returns whether it did.
fn mend(address: usize) -> bool {
    let covers =
        |slot: &&Slot| slot.start.load(Ordering::Acquire) <= address && address < slot.end.load(Ordering::Acquire);
    let Some(slot) = SLOTS.iter().find(covers) else { return false };
    slot.faulted.store(true, Ordering::Release);
    let page = PAGE.load(Ordering::Relaxed);
    let start = std::ptr::with_exposed_provenance_mut(address - address % page);
    // SAFETY: the page belongs to a mapping that the owner of its watch keeps. That memory is accessed only by address, and its
    // contents are already gone. (mmap(2) is a plain system call here, without the C library.)
    unsafe {
        rustix::mm::mmap_anonymous(start, page, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED)
    }
    .is_ok()
}

//! SIGBUS, made an error of the one mapping that it happened in.
//!
//! A mapped file can lose pages under its readers: somebody cuts it short, or the filesystem has no room for one. The
//! kernel then sends SIGBUS, which ends a process, and with it every other export. So for addresses of a [`Watch`] the
//! handler puts a page of zeros where there is none and marks the watch; whoever used the memory looks at the mark
//! afterwards, and throws away what was read. A bus error anywhere else is left to who handled it before, which ends the
//! process; and so does a signal that somebody sends.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

/// Mappings that are watched at once, at most.
const MOST: usize = 64;

/// Proof that bus errors are caught.
#[derive(Clone, Copy, Debug)]
pub struct BusErrorsCaught(());

impl BusErrorsCaught {
    /// Has them caught from now on, in the whole process.
    ///
    /// # Errors
    /// What the system said.
    pub fn new() -> io::Result<Self> {
        static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
        let installed =
            INSTALLED.get_or_init(|| install().map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL)));
        installed.map(|()| Self(())).map_err(io::Error::from_raw_os_error)
    }
}

/// One of the handler's places. All that it touches is atomic.
struct Slot {
    taken: AtomicBool,
    /// Empty while `start` is not below `end`.
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

/// What handled SIGBUS before: Rust's own check of stack overflows, or the system's default.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// Bytes in a page, for the handler.
static PAGE: AtomicUsize = AtomicUsize::new(4096);

/// A range of addresses whose bus errors are marked here.
pub(super) struct Watch(&'static Slot);

impl Watch {
    /// `None` when too many are watched.
    pub(super) fn new(_caught: BusErrorsCaught, addresses: Range<usize>) -> Option<Self> {
        let slot = SLOTS.iter().find(|slot| !slot.taken.swap(true, Ordering::AcqRel))?;
        slot.faulted.store(false, Ordering::Relaxed);
        slot.end.store(addresses.end, Ordering::Relaxed);
        slot.start.store(addresses.start, Ordering::Release);
        Some(Self(slot))
    }

    /// Whether a page in the range was missing since the watch began.
    pub(super) fn has_faulted(&self) -> bool {
        self.0.faulted.load(Ordering::Acquire)
    }

    /// Watches no longer.
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
    // SAFETY: a sigaction of zeros is one with an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: as above; it is written before anybody reads it.
    let before = Box::leak(Box::new(unsafe { std::mem::zeroed() }));
    // What was there is known before the handler can be called: a first call reads it, a second one replaces it.
    // SAFETY: both pointers are good for the call.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    BEFORE.store(before, Ordering::Release);
    // SAFETY: the handler calls nothing that a signal handler may not: atomics, mmap(2), sigaction(2), raise(3).
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands over a siginfo_t, and for SIGBUS an address in it (sigaction(2)).
    let (address, code) = unsafe { ((*info).si_addr().addr(), (*info).si_code) };
    // A file's page that is not there (BUS_ADRERR); what a process sends and broken hardware are other things.
    if code == libc::BUS_ADRERR && mend(address) {
        return;
    }
    // A page broke that nobody reads now; who does will be told.
    if code == libc::BUS_MCEERR_AO {
        return;
    }
    let before = BEFORE.load(Ordering::Acquire);
    // SAFETY: `install` left a sigaction there for good before this function could be called.
    let action = unsafe { &*before };
    if code <= 0 {
        // Somebody sent it (kill(2)): nothing went wrong that a handler could look into, and Rust's would give way to the
        // default for good, and with it this one. It does what it does to a process that does not handle it.
        if action.sa_sigaction == libc::SIG_IGN {
            return;
        }
        // SAFETY: a sigaction of zeros is the default action; the pointer is good for the call; both may be called here
        // (signal-safety(7)). The signal is blocked until this function returns.
        unsafe {
            libc::sigaction(signal, &std::mem::zeroed(), std::ptr::null_mut());
            libc::raise(signal);
        }
        return;
    }
    if action.sa_flags & libc::SA_SIGINFO != 0 && action.sa_sigaction > libc::SIG_IGN {
        // SAFETY: with SA_SIGINFO the field is the address of a function of this type (sigaction(2)).
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(action.sa_sigaction) };
        return handler(signal, info, context);
    }
    // The instruction is tried again, and its bus error then does what it would have done.
    // SAFETY: the pointer is good for the call.
    unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
}

/// Puts a page of zeros at the address, if it is a watched one.
fn mend(address: usize) -> bool {
    let covers =
        |slot: &&Slot| slot.start.load(Ordering::Acquire) <= address && address < slot.end.load(Ordering::Acquire);
    let Some(slot) = SLOTS.iter().find(covers) else { return false };
    slot.faulted.store(true, Ordering::Release);
    let page = PAGE.load(Ordering::Relaxed);
    let start = std::ptr::with_exposed_provenance_mut(address - address % page);
    // SAFETY: the page belongs to a mapping that its watch's owner keeps, and whose memory is accessed by addresses alone;
    // what it held is not there any more. (mmap(2) is a plain system call here, without the C library.)
    unsafe {
        rustix::mm::mmap_anonymous(start, page, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED)
    }
    .is_ok()
}

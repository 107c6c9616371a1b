//! A library that is loaded into user-mode Linux (LD_PRELOAD), so that it runs on CPUs with AMX.
//!
//! User-mode Linux 6.1 keeps 2696 bytes of a process's extended CPU state (XSAVE), and gives these to
//! `ptrace(PTRACE_SETREGSET, NT_X86_XSTATE)`. The host's kernel accepts only the whole state (`xstateregs_set` in
//! arch/x86/kernel/fpu/regset.c), which takes 11 KiB where the CPU has AMX. So the guest's first process dies.
//!
//! This library replaces `ptrace`. It adds what the guest does not keep: the rest of the process's present state.

use std::cell::UnsafeCell;
use std::ffi::{c_char, c_int, c_long, c_void};
use std::mem::transmute;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

const PTRACE_GETREGSET: c_int = 0x4204;
const PTRACE_SETREGSET: c_int = 0x4205;
/// `NT_X86_XSTATE`.
const XSTATE: usize = 0x202;
/// `RTLD_NEXT`.
const NEXT: *mut c_void = -1isize as *mut c_void;

/// `struct iovec`.
#[repr(C)]
struct Iovec {
    base: *mut u8,
    len: usize,
}

type Ptrace = unsafe extern "C" fn(c_int, c_int, *mut c_void, *mut c_void) -> c_long;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
}

/// Room for the whole state.
#[repr(C, align(64))]
struct Whole(UnsafeCell<[u8; 65536]>);

// SAFETY: user-mode Linux has one CPU and calls `ptrace` from one thread at a time.
unsafe impl Sync for Whole {}

static WHOLE: Whole = Whole(UnsafeCell::new([0; 65536]));
/// The C library's function.
static REAL: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
/// The length of the whole state, once it is known.
static LEN: AtomicUsize = AtomicUsize::new(usize::MAX);

fn real() -> Ptrace {
    let mut found = REAL.load(Ordering::Relaxed);
    if found.is_null() {
        // SAFETY: the symbol is a C string.
        found = unsafe { dlsym(NEXT, c"ptrace".as_ptr()) };
        REAL.store(found, Ordering::Relaxed);
    }
    assert!(!found.is_null(), "the C library has no ptrace");
    // SAFETY: this is the C library's ptrace, whose arguments are passed as this type says on x86-64.
    unsafe { transmute::<*mut c_void, Ptrace>(found) }
}

/// # Safety
/// As ptrace(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptrace(request: c_int, pid: c_int, address: *mut c_void, data: *mut c_void) -> c_long {
    let real = real();
    if request != PTRACE_SETREGSET || address as usize != XSTATE {
        // SAFETY: the caller's own call.
        return unsafe { real(request, pid, address, data) };
    }
    // SAFETY: for this request, `data` is an iovec.
    let Iovec { base, len: given } = unsafe { data.cast::<Iovec>().read() };
    let room = WHOLE.0.get().cast::<u8>();
    if given < LEN.load(Ordering::Relaxed) {
        let mut whole = Iovec { base: room, len: 65536 };
        // SAFETY: the iovec describes `WHOLE`, which only this call uses.
        if unsafe { real(PTRACE_GETREGSET, pid, address, (&raw mut whole).cast()) } == 0 {
            LEN.store(whole.len, Ordering::Relaxed);
            if given < whole.len {
                // SAFETY: `given` bytes are at `base`, and `WHOLE` is longer.
                unsafe { base.copy_to_nonoverlapping(room, given) };
                // SAFETY: as above.
                return unsafe { real(request, pid, address, (&raw mut whole).cast()) };
            }
        }
    }
    // SAFETY: the caller's own call.
    unsafe { real(request, pid, address, data) }
}

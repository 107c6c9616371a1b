//! Turns SIGXFSZ into an error of the write that caused it.
//!
//! A write beyond the limit on file sizes (`RLIMIT_FSIZE`, `ulimit -f`) fails with `EFBIG`. Before it fails, the kernel
//! also sends SIGXFSZ, which by default ends the process and with it every other export. With a handler that does nothing,
//! only the write fails. A handler is better than ignoring the signal: the programs that this process starts would inherit
//! an ignored signal, but they do not inherit a handler.

use std::io;

/// Makes writes beyond the limit on file sizes fail without ending the process. If the program already has a handler for
/// SIGXFSZ or ignores this signal, nothing is changed.
///
/// A program that serves a file calls this once, when it starts.
///
/// # Errors
/// The error of sigaction(2). A write beyond the limit then ends the process.
pub fn survive_file_size_limit() -> io::Result<()> {
    // SAFETY: a zeroed sigaction is valid: it has an empty mask and no flags.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call, and the call changes no handler.
    if unsafe { libc::sigaction(libc::SIGXFSZ, std::ptr::null(), &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if before.sa_sigaction != libc::SIG_DFL {
        return Ok(());
    }
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int) = on_file_size_limit;
    action.sa_sigaction = handler as libc::sighandler_t;
    // The handler runs on the alternative stack, like all handlers of this process. Other system calls get no EINTR.
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: the pointer is valid for the call, and the handler does nothing.
    if unsafe { libc::sigaction(libc::SIGXFSZ, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_file_size_limit(_signal: libc::c_int) {}

//! Starting threads that the system may refuse.
//!
//! If the system refuses a thread, the standard library returns an error. But if the thread gets its stack and then a small
//! allocation fails, the standard library aborts the process. tokio panics if the system refuses a thread. So these
//! functions check first.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use engine::buffer::has_room;

/// Bytes of address space that a thread takes: its stack, and what the C library adds.
pub const SPACE: usize = 3 << 20;

/// Starts a thread called `name`.
///
/// # Errors
/// `WouldBlock` or `OutOfMemory` if the system refuses the thread or its memory. The error names the limits to look at.
pub fn start<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
    has_room(SPACE)?;
    Builder::new().name(name.to_owned()).spawn(work).map_err(|error| {
        let text = format!(
            "the system refuses another thread to this process ({error}): check `ulimit -u`, the control group's pids.max and \
             kernel.threads-max"
        );
        io::Error::new(error.kind(), text)
    })
}

/// Checks that `count` more threads can run at once, by starting them and ending them again. This is for code that
/// starts threads in a way that panics on failure, such as tokio's runtime.
///
/// # Errors
/// The same as for [`start`].
pub fn can_start(count: usize) -> io::Result<()> {
    let gate = Arc::new(Mutex::new(()));
    let shut = gate.lock().unwrap_or_else(PoisonError::into_inner);
    let started: Vec<_> = (0..count)
        .map(|_| {
            let gate = Arc::clone(&gate);
            start("probe", move || drop(gate.lock()))
        })
        .collect();
    drop(shut);
    let mut outcome = Ok(());
    for thread in started {
        match thread {
            Ok(thread) => drop(thread.join()),
            Err(error) => outcome = Err(error),
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_name_and_many_end_again() {
        let name = start("a-name", || std::thread::current().name().map(str::to_owned)).unwrap().join().unwrap();
        assert_eq!(name.as_deref(), Some("a-name"));
        can_start(8).unwrap();
    }
}

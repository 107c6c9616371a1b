//! One heap for all threads, for a process whose address space is limited.
//!
//! glibc gives each thread a heap of its own and reserves 64 MiB of addresses for it. While it reserves them, it needs 128
//! MiB for a moment. Under a limit on address space (`RLIMIT_AS`, `ulimit -v`), the reservation of one thread can make a
//! small allocation of another thread fail. A failed allocation ends the process. With one heap, no addresses are reserved,
//! so the room that [`crate::buffer::has_room`] found stays available.

/// Makes all threads allocate from one heap. A thread that already has a heap keeps it. Returns `false` if the C library
/// does not offer this. musl does not need it: it has one heap.
///
/// Threads then wait for each other when they allocate, so call this only where address space is limited.
pub fn share_one_heap() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes two integers and no pointers. It locks the heap, so other threads may run.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) == 1 }
    }
    #[cfg(not(target_env = "gnu"))]
    false
}

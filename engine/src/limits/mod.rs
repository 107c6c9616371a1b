//! Turns resource limits of the process (setrlimit(2)) into errors of single requests.
//!
//! Both functions change the whole process. A program calls them once, when it starts; a library never does.
//!
//! This folder has `unsafe` in it: the functions make calls of the C library (sigaction, mallopt) that no safe crate offers.
#![allow(unsafe_code, reason = "calls of the C library; each block says why it is sound")]

mod file_size;
mod heap;

pub use file_size::survive_file_size_limit;
pub use heap::share_one_heap;

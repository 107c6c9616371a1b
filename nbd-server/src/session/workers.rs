//! Threads that may block. They do the work for which a session would have to block.
//!
//! All of these threads start with the server. A server under a filesystem must not need a new thread to serve a
//! request.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::threads;

/// Work for a thread that may block.
pub(crate) trait Job: Send + 'static {
    /// Returns whether the job may take minutes. Such jobs must not occupy all threads.
    fn is_long(&self) -> bool;

    /// Does the job. A panic ends only the job.
    fn run(self);
}

/// A fixed number of threads, and the jobs that wait for them. The queue has no limit of its own: each submitter has
/// only a limited number of unanswered requests.
pub(crate) struct Workers<J: Job> {
    shared: Arc<Shared<J>>,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    work: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// Long jobs. They are begun only if no other job waits, and by at most a quarter of the threads.
    long: VecDeque<J>,
    /// How many threads may still take a long job.
    free_for_long: usize,
    idle: usize,
    /// Set from the moment at which a thread is woken until it runs. That thread wakes the next one if there is more to do.
    /// Often the jobs are done before a second thread would arrive.
    waking: bool,
    stopping: bool,
}

impl<J: Job> Workers<J> {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// `OutOfMemory` or `WouldBlock` if the system refuses a thread.
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let state = State {
            jobs: VecDeque::with_capacity(1024),
            long: VecDeque::new(),
            free_for_long: (count / 4).max(1),
            idle: 0,
            waking: false,
            stopping: false,
        };
        let workers = Self { shared: Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() }) };
        for number in 0..count {
            let shared = Arc::clone(&workers.shared);
            threads::start(&format!("nbd-io-{number}"), move || shared.work())?;
        }
        Ok(workers)
    }

    /// Submits jobs. Long jobs start in the order of their submission, and so do all other jobs.
    pub(crate) fn submit(&self, jobs: impl IntoIterator<Item = J>) {
        let mut state = self.shared.lock();
        for job in jobs {
            if job.is_long() { state.long.push_back(job) } else { state.jobs.push_back(job) }
        }
        self.shared.wake_one(state);
    }
}

impl<J: Job> Drop for Workers<J> {
    /// Lets the threads end after they have done all submitted jobs.
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
    }
}

impl<J> State<J> {
    fn next_long(&mut self) -> Option<J> {
        if self.free_for_long == 0 { None } else { self.long.pop_front() }
    }

    /// Returns whether there is a job that a thread may begin.
    fn has_work(&self) -> bool {
        !self.jobs.is_empty() || (self.free_for_long > 0 && !self.long.is_empty())
    }
}

/// Runs a job. The thread survives a panic of the job, since no new thread would replace it.
fn run(job: impl Job) {
    // The panic was reported on standard error. Dropping what the job owned informs the session that waits for the job.
    let _ = catch_unwind(AssertUnwindSafe(|| job.run()));
}

impl<J: Job> Shared<J> {
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                self.wake_one(state);
                run(job);
                state = self.lock();
            } else if let Some(job) = state.next_long() {
                state.free_for_long -= 1;
                self.wake_one(state);
                run(job);
                state = self.lock();
                state.free_for_long += 1;
            } else if state.stopping {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                state.waking = false;
            }
        }
    }

    /// Wakes a thread if there is a job for it and no other woken thread has yet to run.
    fn wake_one(&self, mut state: MutexGuard<'_, State<J>>) {
        let wake = state.has_work() && state.idle > 0 && !state.waking;
        state.waking |= wake;
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Call {
        is_long: bool,
        function: Box<dyn FnOnce() + Send>,
    }

    fn call(function: impl FnOnce() + Send + 'static) -> Call {
        Call { is_long: false, function: Box::new(function) }
    }

    impl Job for Call {
        fn is_long(&self) -> bool {
            self.is_long
        }

        fn run(self) {
            (self.function)();
        }
    }

    #[test]
    fn long_jobs_take_at_most_a_quarter_of_the_threads() {
        let workers = Workers::start(4).unwrap();
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let done = Arc::new(AtomicUsize::new(0));
        workers.submit((0..20).map(|_| {
            let (gate, done) = (Arc::clone(&gate), Arc::clone(&done));
            let function = move || {
                gate.lock().unwrap().recv().unwrap();
                done.fetch_add(1, Ordering::SeqCst);
            };
            Call { is_long: true, function: Box::new(function) }
        }));
        // Three threads are left, and these jobs need all of them at the same time.
        let all = Arc::new(Barrier::new(4));
        workers.submit((0..3).map(|_| {
            let all = Arc::clone(&all);
            call(move || {
                all.wait();
            })
        }));
        all.wait();
        assert_eq!(done.load(Ordering::SeqCst), 0);
        (0..20).for_each(|_| open.send(()).unwrap());
        drop(workers);
        while done.load(Ordering::SeqCst) < 20 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn queued_jobs_finish_when_the_workers_are_dropped() {
        let done = Arc::new(AtomicUsize::new(0));
        let workers = Workers::start(3).unwrap();
        let job = || {
            let done = Arc::clone(&done);
            call(move || {
                done.fetch_add(1, Ordering::SeqCst);
            })
        };
        for _ in 0..100 {
            workers.submit((0..10).map(|_| job()));
        }
        drop(workers);
        while done.load(Ordering::SeqCst) < 1000 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_panicking_job_does_not_end_its_thread() {
        let workers = Workers::start(4).unwrap();
        for is_long in [false, true] {
            let panics = || Call { is_long, function: Box::new(|| panic!("on purpose")) };
            (0..8).for_each(|_| workers.submit([panics()]));
        }
        let (done, is_done) = std::sync::mpsc::channel();
        let long = Call { is_long: true, function: Box::new(move || done.send(()).unwrap()) };
        workers.submit([long]);
        is_done.recv_timeout(std::time::Duration::from_secs(30)).unwrap();
        // Each waits for all the others.
        let all = Arc::new(Barrier::new(5));
        workers.submit((0..4).map(|_| {
            let all = Arc::clone(&all);
            call(move || {
                all.wait();
            })
        }));
        all.wait();
    }

    #[test]
    fn blocking_jobs_leave_threads_for_others() {
        let workers = Workers::start(4).unwrap();
        let all = Arc::new(Barrier::new(5));
        // Each job waits for all the others, so a single thread would never reach the second.
        workers.submit((0..4).map(|_| {
            let all = Arc::clone(&all);
            call(move || {
                all.wait();
            })
        }));
        all.wait();
    }
}

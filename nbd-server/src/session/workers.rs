//! Threads that block, so that sessions need not.
//!
//! They are started once: a server under a filesystem must not need a new thread to serve a request.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Something to be done on a thread that may block.
pub(crate) trait Job: Send + 'static {
    /// Whether it may take minutes, and so must not keep every thread from the others.
    fn is_long(&self) -> bool;

    /// Does it.
    fn run(self);
}

/// A fixed number of threads and the jobs that wait for them. The queue's bound is the submitters': each holds only so
/// many unanswered requests.
pub(crate) struct Workers<J: Job> {
    shared: Arc<Shared<J>>,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    work: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// Those that take long: done where nothing else waits, and by a quarter of the threads at most.
    long: VecDeque<J>,
    /// Threads that may still take one of these.
    free_for_long: usize,
    idle: usize,
    /// A thread was woken and has not come yet. The next one is woken by it, if there is more to do: jobs are often
    /// done before a second thread could have come.
    waking: bool,
    stopping: bool,
}

impl<J: Job> Workers<J> {
    /// Starts the threads.
    ///
    /// # Errors
    /// What the system said.
    pub(crate) fn start(threads: usize) -> io::Result<Self> {
        let state = State {
            jobs: VecDeque::with_capacity(1024),
            long: VecDeque::new(),
            free_for_long: (threads / 4).max(1),
            idle: 0,
            waking: false,
            stopping: false,
        };
        let workers = Self { shared: Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() }) };
        for number in 0..threads {
            let shared = Arc::clone(&workers.shared);
            std::thread::Builder::new().name(format!("nbd-io-{number}")).spawn(move || shared.work())?;
        }
        Ok(workers)
    }

    /// Hands over jobs. Those that take long are begun in their order, and so are the others.
    pub(crate) fn submit(&self, jobs: impl IntoIterator<Item = J>) {
        let mut state = self.shared.lock();
        for job in jobs {
            if job.is_long() { state.long.push_back(job) } else { state.jobs.push_back(job) }
        }
        self.shared.wake_one(state);
    }
}

impl<J: Job> Drop for Workers<J> {
    /// The threads finish what was submitted and end.
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
    }
}

impl<J> State<J> {
    fn next_long(&mut self) -> Option<J> {
        if self.free_for_long == 0 { None } else { self.long.pop_front() }
    }

    /// Whether there is something that a thread may begin.
    fn has_work(&self) -> bool {
        !self.jobs.is_empty() || (self.free_for_long > 0 && !self.long.is_empty())
    }
}

impl<J: Job> Shared<J> {
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                self.wake_one(state);
                job.run();
                state = self.lock();
            } else if let Some(job) = state.next_long() {
                state.free_for_long -= 1;
                self.wake_one(state);
                job.run();
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

    /// Wakes a thread if there is work for it and none is on its way.
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
    fn what_takes_long_keeps_no_more_than_a_quarter_of_the_threads_and_all_of_it_is_done() {
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
        // Three threads are left, which these need at the same time.
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
    fn every_job_is_done_even_those_left_when_the_workers_are_dropped() {
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
    fn jobs_that_block_do_not_keep_others_from_their_threads() {
        let workers = Workers::start(4).unwrap();
        let all = Arc::new(Barrier::new(5));
        // Each waits for all the others: one thread alone would never get to the second.
        workers.submit((0..4).map(|_| {
            let all = Arc::clone(&all);
            call(move || {
                all.wait();
            })
        }));
        all.wait();
    }
}

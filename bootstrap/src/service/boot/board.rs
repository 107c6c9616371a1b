//! What the server is doing, for clients that ask while its main thread is busy.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use engine::volume::Volume;
use nbd_server::statistics::Statistics;

use super::pace::{Pace, Sample};
use super::stall::{Change, Stall};
use crate::attach::{self, Method, Remains};
use crate::service::control::Answer;
use crate::service::metrics::Observed;
use crate::service::status::{Condition, KeyFacts, Status, VolumeFacts, age};
use crate::steps::Made;

/// For this long after the disk has failed a request, the volume counts as degraded.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// What the main thread writes and the control thread reads.
#[derive(Clone, Debug)]
pub(super) struct Board(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    /// The status of the volume if everything that was made still exists.
    status: Status,
    /// Where the secret comes from.
    key_source: &'static str,
    started: Instant,
    /// When the volume was unlocked, if it is.
    unlocked: Option<Instant>,
    built: Built,
    pace: Pace,
    stall: Stall,
}

/// What the steps have made so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Built {
    /// The open volume. The board must not keep its key in memory.
    pub(super) volume: Weak<Volume>,
    /// How the volume is encrypted, if it is open.
    pub(super) facts: Option<VolumeFacts>,
    /// What was not there before.
    pub(super) made: Option<Made>,
    /// The device that was attached.
    pub(super) attachment: Option<Remains>,
    /// The counters of the requests that the device sends.
    pub(super) statistics: Option<Arc<Statistics>>,
}

impl Board {
    /// Makes a board with this status. Nothing is attached yet.
    pub(super) fn new(status: Status, key_source: &'static str) -> Self {
        Self(Arc::new(Mutex::new(Written {
            status,
            key_source,
            started: Instant::now(),
            unlocked: None,
            built: Built::default(),
            pace: Pace::default(),
            stall: Stall::default(),
        })))
    }

    /// Sets what the server is doing from now on, and why it takes so long.
    pub(super) fn set(&self, condition: Condition, doing: Option<String>) {
        let mut written = self.lock();
        (written.status.condition, written.status.doing) = (condition, doing);
    }

    /// Sets the disk of the ciphertext, once it is found.
    pub(super) fn set_disk(&self, disk: std::path::PathBuf) {
        self.lock().status.disk = disk;
    }

    /// Sets what the steps have made.
    pub(super) fn build(&self, built: Built) {
        let mut written = self.lock();
        written.unlocked = built.facts.is_some().then(|| written.unlocked.unwrap_or_else(Instant::now));
        let counts_anew = built.statistics.is_some() != written.built.statistics.is_some();
        written.built = built;
        if counts_anew {
            (written.pace, written.stall) = (Pace::default(), Stall::default());
            written.add_to_pace();
        }
    }

    /// Takes a sample of the counters, and logs if requests are no longer answered. Call this every [`super::pace::EVERY`].
    pub(super) fn sample(&self) {
        let device = self.lock().built.attachment.as_ref().map(|remains| remains.device.clone());
        // The lock is not held while /sys is read and while something is logged.
        let waiting = device.as_deref().map_or(0, attach::unanswered);
        let (change, name) = {
            let mut written = self.lock();
            written.add_to_pace();
            (written.add_to_stall(Instant::now(), waiting), written.status.name.clone())
        };
        match change {
            None => {}
            Some(Change::Begun) => tracing::warn!(
                "{name} has answered no request for a minute, although the kernel waits for {waiting}: the disk hangs, or the \
                 server does"
            ),
            Some(Change::Over(lasted)) => {
                tracing::warn!("{name} answers requests again, after {}", age(lasted.as_secs()));
            }
        }
    }

    /// Returns the volume's status as it is now.
    ///
    /// # Errors
    /// Fails if /proc cannot be read.
    pub(super) fn status(&self) -> std::io::Result<Status> {
        let (status, attachment) = {
            let written = self.lock();
            (written.now(Instant::now()), written.built.attachment.clone())
        };
        // By now the lock is released: the main thread must not wait while this thread reads /proc and /sys.
        status.seen(attachment.as_ref())
    }

    /// Returns what the metrics are made of.
    ///
    /// # Errors
    /// Fails if /proc cannot be read.
    pub(super) fn observed(&self) -> std::io::Result<Observed> {
        let status = self.status()?;
        let (name, size) = (status.name.clone(), status.volume.as_ref().map(|volume| volume.size));
        let statistics = self.lock().built.statistics.clone();
        Ok(Observed { name, size, status: Some(status), statistics })
    }

    /// Returns the status as an answer.
    pub(super) fn answer(&self) -> Answer {
        match self.status() {
            Ok(status) => Answer::Status(Box::new(status)),
            Err(error) => Answer::Failed(format!("the server cannot see what is mounted: {error}")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        // Each change is complete when the lock is released, even by a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Written {
    fn add_to_stall(&mut self, at: Instant, waiting: u64) -> Option<Change> {
        let answered = self.built.statistics.as_ref()?.snapshot().requests;
        self.stall.add(at, waiting, answered)
    }

    fn add_to_pace(&mut self) {
        if let Some(sample) = self.counted(Instant::now()) {
            self.pace.add(sample);
        }
    }

    fn counted(&self, at: Instant) -> Option<Sample> {
        let counters = self.built.statistics.as_ref()?.snapshot();
        Some(Sample { at, read: counters.bytes_read, written: counters.bytes_written })
    }

    /// Returns the status at the time `now`, except for what the kernel knows.
    fn now(&self, now: Instant) -> Status {
        let Built { facts, made, attachment, statistics, .. } = &self.built;
        let since = |then: Instant| now.saturating_duration_since(then).as_secs();
        let by_nbd = attachment.as_ref().is_some_and(|remains| remains.method == Method::Nbd);
        Status {
            volume: facts.clone(),
            key: self.unlocked.map(|then| KeyFacts { source: self.key_source.to_owned(), age: since(then) }),
            made: *made,
            connections: statistics.as_ref().filter(|_| by_nbd).map(|counters| counters.snapshot().connections),
            requests: statistics.as_deref().map(Into::into),
            throughput: self.counted(now).and_then(|sample| self.pace.until(sample)),
            uptime: Some(since(self.started)),
            problems: self.problems(now),
            ..self.status.clone()
        }
    }

    /// Returns what is wrong although the volume is served.
    fn problems(&self, now: Instant) -> Vec<String> {
        let mut problems = Vec::new();
        let (name, config) = (&self.status.name, crate::text::path(&self.status.config));
        if let Some(volume) = self.built.volume.upgrade()
            && let Some(failure) = volume.store().flush_failure()
        {
            problems.push(format!(
                "a flush failed ({failure}), so data may be lost, and every later flush fails, too: check the disk, then run \
                 `nbdcrypt down {name}` and `nbdcrypt up {config}`"
            ));
        }
        let failed = self.built.statistics.as_ref().and_then(|counters| counters.last_failure_of_disk());
        let passed = failed.map(|then| now.saturating_duration_since(then)).filter(|passed| *passed < REMEMBERED);
        if let Some(passed) = passed {
            let passed = age(passed.as_secs());
            problems.push(format!("the disk failed a request {passed} ago: see `errors` below, and the server's log"));
        }
        if let Some(passed) = self.stall.long(now) {
            problems.push(format!(
                "no request was answered for {}, although the kernel waits for some: the disk hangs (see `dmesg`), or the server \
                 does",
                age(passed.as_secs())
            ));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use engine::sector::SectorSize;
    use engine::store::{Access, Caching, FileStore, Medium};
    use nbd_server::statistics::{Blame, Operation};

    use super::*;
    use crate::service::run_dir::State;
    use crate::service::status::Health;

    fn board() -> Board {
        Board::new(State::default().status("scratch", Condition::Up), "file")
    }

    #[test]
    fn requests_are_reported_while_a_device_counts_them() {
        let board = board();
        let reported = || board.status().unwrap().requests.map(|requests| requests.answered);
        assert_eq!(reported(), None);
        board.build(Built { statistics: Some(Arc::default()), ..Built::default() });
        assert_eq!(reported(), Some(0));
        board.build(Built::default());
        assert_eq!(reported(), None);
    }

    #[test]
    fn a_failure_of_the_disk_is_a_problem_for_an_hour() {
        let board = board();
        let counters = Arc::<Statistics>::default();
        board.build(Built { statistics: Some(Arc::clone(&counters)), ..Built::default() });
        let then = Instant::now();
        let health = |minutes: u64| board.lock().now(then + Duration::from_secs(60 * minutes)).health();
        counters.has_failed(Operation::Write, "EPERM", Blame::Client, then);
        assert_eq!(health(0), Health::Healthy, "the client is to blame");
        counters.has_failed(Operation::Write, "EIO", Blame::Disk, then);
        assert_eq!([health(0), health(59), health(60)], [Health::Degraded, Health::Degraded, Health::Healthy]);
    }

    #[test]
    fn a_failed_flush_stays_a_problem() {
        let board = board();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let store = Arc::new(FileStore::open(file.path(), Access::ReadWrite, Caching::PageCache).unwrap());
        let volume = Arc::new(Volume::plaintext(Arc::clone(&store) as _, SectorSize::B512).unwrap());
        board.build(Built { volume: Arc::downgrade(&volume), ..Built::default() });
        let problems = |days: u64| board.lock().now(Instant::now() + Duration::from_secs(86_400 * days)).problems;
        assert_eq!(problems(0), [""; 0]);
        let Medium::File { latch, .. } = engine::store::BlockStore::medium(&*store) else { panic!("no file") };
        latch.record(Err(io::Error::from_raw_os_error(5))).unwrap_err();
        assert!(problems(9)[0].contains("a flush failed") && problems(9)[0].contains("nbdcrypt down scratch"));
        drop(volume);
        assert_eq!(problems(0), [""; 0]);
    }

    #[test]
    fn requests_without_a_reply_are_a_problem_for_as_long_as_they_wait() {
        let board = board();
        let counters = Arc::<Statistics>::default();
        board.build(Built { statistics: Some(Arc::clone(&counters)), ..Built::default() });
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let problems = |seconds| board.lock().now(after(seconds)).problems;
        let sample = |seconds, waiting| board.lock().add_to_stall(after(seconds), waiting);
        assert_eq!((sample(0, 1), sample(50, 1), problems(59)), (None, None, vec![]));
        assert_eq!(sample(60, 1), Some(Change::Begun));
        assert!(problems(125)[0].starts_with("no request was answered for 2 min, "), "{:?}", problems(125));
        counters.succeeded(Operation::Read, 4096);
        assert_eq!(sample(130, 1), Some(Change::Over(Duration::from_secs(130))));
        assert_eq!(problems(131), [""; 0]);
        // Another device has its own requests.
        sample(140, 1);
        board.build(Built::default());
        assert_eq!((sample(250, 1), problems(250)), (None, vec![]));
    }

    #[test]
    fn the_age_of_the_key_is_that_of_the_open_volume() {
        let board = board();
        let key = || board.lock().now(Instant::now() + Duration::from_secs(100)).key;
        assert_eq!(key(), None);
        let facts = VolumeFacts {
            kind: crate::volume::VolumeType::Luks2,
            cipher: String::new(),
            key_bits: 512,
            algorithm: String::new(),
            cpu_path: None,
            keyslot: None,
            header: None,
            sector_size: 4096,
            offset: 0,
            size: 0,
            read_only: false,
        };
        let open = || Built { facts: Some(facts.clone()), ..Built::default() };
        board.build(open());
        let unlocked = board.lock().unlocked;
        board.build(open());
        assert_eq!(board.lock().unlocked, unlocked, "a later step does not unlock it again");
        let KeyFacts { source, age } = key().unwrap();
        assert_eq!((source.as_str(), (99..=101).contains(&age)), ("file", true));
        board.build(Built::default());
        assert_eq!(key(), None);
    }
}

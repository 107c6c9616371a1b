//! Retries errors that may pass, up to a configured time. If there are several ways to the same result, such as the replicas of
//! a KMS key, they take turns.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;

use super::backoff::{Backoff, Cause};
use super::error::AwsError;

/// How long to retry a refusal that may be due to a new role or policy. IAM is eventually consistent: changes take seconds
/// to take effect everywhere (IAM User Guide, "Changes that I make are not always immediately visible"). A refusal that
/// lasts longer is final.
const BRIEFLY: Duration = Duration::from_secs(15);

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// The error is temporary: repeat the request for the configured time.
    Again,
    /// Renew the credentials, and repeat the request for the configured time.
    Renew,
    /// The error passes within seconds or not at all: repeat the request for [`BRIEFLY`].
    Briefly,
    /// The answer will always be the same: do not repeat the request.
    Final,
}

/// When to stop retrying. All requests of one call share the time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    started: Instant,
    retry_for: Duration,
    /// [`BRIEFLY`], except in tests.
    briefly: Duration,
}

impl Patience {
    /// Allows retries for `retry_for`, counted from now.
    pub(super) fn from_now(retry_for: Duration) -> Self {
        Self { started: Instant::now(), retry_for, briefly: BRIEFLY }
    }
}

/// Repeats `attempt` until it succeeds, fails permanently, or the time is over. An attempt that takes longer than `limit` fails
/// with `overdue`. The first attempt is always made. No attempt starts after the time is over.
pub(super) async fn retried<T>(
    patience: Patience,
    limit: Duration,
    overdue: impl Fn() -> AwsError,
    mut attempt: impl AsyncFnMut() -> Result<T, AwsError>,
) -> Result<T, AwsError> {
    in_turn(patience, limit, &[String::new()], |_| overdue(), async |_| attempt().await).await
}

/// Makes attempts in several ways, until one of them succeeds, all fail permanently, or the time is over. `ways` has their
/// names, for errors. `attempt` gets the index of the way.
///
/// The ways take turns, in their order. There is a pause only after each round, so that a way which fails does not use up
/// the time of the next one. A way that fails permanently has no more turns. An attempt that takes longer than `limit` fails
/// with `overdue`. Each way is tried at least once. Apart from that, no attempt starts after the time is over.
pub(super) async fn in_turn<T>(
    patience: Patience,
    limit: Duration,
    ways: &[String],
    overdue: impl Fn(usize) -> AwsError,
    mut attempt: impl AsyncFnMut(usize) -> Result<T, AwsError>,
) -> Result<T, AwsError> {
    let mut turns = Turns::new(patience, ways.len());
    loop {
        // Without a random number, the pause has its full length.
        let way = match turns.next(patience.started.elapsed(), getrandom::u32().unwrap_or(u32::MAX)) {
            Turn::Try(way) => way,
            Turn::Pause(pause) => {
                if let Some(error) = turns.last_error() {
                    let why = match error.course() {
                        Course::Briefly => ", since a new role, policy or key takes seconds to take effect",
                        _ => "",
                    };
                    tracing::warn!("{error}; trying again in {:.1} s{why}", pause.as_secs_f64());
                }
                sleep(pause).await;
                continue;
            }
            Turn::GiveUp => return Err(turns.into_error(ways, patience.started.elapsed())),
        };
        if let (Some(error), Some(name)) = (turns.last_error_in_round(), ways.get(way)) {
            tracing::warn!("{error}; trying {name}");
        }
        // The SDK's own log is suppressed: it quotes answers, which contain secrets.
        let made = attempt(way).with_subscriber(NoSubscriber::default());
        match timeout(limit, made).await.unwrap_or_else(|_| Err(overdue(way))) {
            Ok(found) => return Ok(found),
            Err(error) => turns.failed(way, error, patience.started.elapsed()),
        }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Turn {
    /// Make an attempt in this way.
    Try(usize),
    /// Wait.
    Pause(Duration),
    /// No attempt may succeed any more.
    GiveUp,
}

/// Decides whose turn it is. All times are counted from the start of the first attempt.
struct Turns {
    patience: Patience,
    backoff: Backoff,
    ways: Vec<Way>,
    /// The way whose turn is next in this round. At the end of a round, the number of ways.
    at: usize,
    /// Whether an attempt was made in this round.
    is_begun: bool,
    attempts: u32,
    /// The way of the last attempt.
    last: Option<usize>,
}

/// One way, and what is known about it.
#[derive(Default)]
struct Way {
    /// The error of the last attempt.
    error: Option<AwsError>,
    /// When a refusal that may pass within seconds is final.
    brief_until: Option<Duration>,
    /// Whether the last error is final.
    is_over: bool,
}

impl Way {
    /// Returns when the last attempt in this way may start, if there may be one.
    fn until(&self, patience: Patience) -> Option<Duration> {
        match (&self.error, self.brief_until) {
            _ if self.is_over => None,
            (Some(error), Some(brief)) if error.course() == Course::Briefly => Some(patience.retry_for.min(brief)),
            _ => Some(patience.retry_for),
        }
    }
}

impl Turns {
    fn new(patience: Patience, ways: usize) -> Self {
        let ways = (0..ways).map(|_| Way::default()).collect();
        Self { patience, backoff: Backoff::new(), ways, at: 0, is_begun: false, attempts: 0, last: None }
    }

    /// Returns what to do after `elapsed`. `random` chooses the length of a pause.
    fn next(&mut self, elapsed: Duration, random: u32) -> Turn {
        while let Some(way) = self.ways.get(self.at) {
            let is_in_time = !self.is_begun || way.until(self.patience).is_some_and(|until| elapsed <= until);
            if !way.is_over && (way.error.is_none() || is_in_time) {
                return Turn::Try(self.at);
            }
            self.at += 1;
        }
        // A new round: which ways still have time? It starts before the time of any of them is over.
        let mut until: Option<Duration> = None;
        for way in &mut self.ways {
            match way.until(self.patience) {
                Some(end) if end > elapsed => until = Some(until.map_or(end, |other| other.min(end))),
                _ => way.is_over = true,
            }
        }
        (self.at, self.is_begun) = (0, false);
        let open = self.ways.iter().filter(|way| !way.is_over).filter_map(|way| way.error.as_ref());
        let cause = if open.map(cause).any(|cause| cause == Cause::Busy) { Cause::Busy } else { Cause::Other };
        match until.and_then(|until| self.backoff.next(elapsed, until, cause, random)) {
            Some(pause) => Turn::Pause(pause),
            None => Turn::GiveUp,
        }
    }

    /// Notes that the attempt in this way failed after `elapsed`.
    fn failed(&mut self, at: usize, error: AwsError, elapsed: Duration) {
        self.attempts = self.attempts.saturating_add(1);
        (self.at, self.is_begun, self.last) = (at + 1, true, Some(at));
        let is_final = error.course() == Course::Final;
        if error.is_of_this_machine() {
            // No other way can succeed now, either.
            self.at = self.ways.len();
            self.ways.iter_mut().for_each(|way| way.is_over |= is_final);
        }
        let patience = self.patience;
        if let Some(way) = self.ways.get_mut(at) {
            if error.course() == Course::Briefly {
                way.brief_until.get_or_insert(elapsed.saturating_add(patience.briefly));
            }
            way.is_over |= is_final;
            way.error = Some(error);
        }
    }

    /// Returns the error of the last attempt.
    fn last_error(&self) -> Option<&AwsError> {
        self.ways.get(self.last?)?.error.as_ref()
    }

    /// Returns the error of the last attempt, if it was made in the present round.
    fn last_error_in_round(&self) -> Option<&AwsError> {
        self.last_error().filter(|_| self.is_begun)
    }

    /// Returns the error of all attempts together.
    fn into_error(mut self, names: &[String], after: Duration) -> AwsError {
        // An error of this machine says everything.
        if self.last_error().is_some_and(AwsError::is_of_this_machine)
            && let Some(last) = self.last
        {
            self.ways.swap(0, last);
            self.ways.truncate(1);
        }
        let mut tried: Vec<(String, AwsError)> =
            self.ways.into_iter().zip(names).filter_map(|(way, name)| Some((name.clone(), way.error?))).collect();
        let is_final = tried.iter().all(|(_, error)| error.course() == Course::Final);
        let last = match tried.len() {
            1 => tried.remove(0).1,
            _ => AwsError::Each { tried },
        };
        match is_final {
            true => last,
            false => AwsError::GaveUp { last: Box::new(last), attempts: self.attempts, after },
        }
    }
}

fn cause(error: &AwsError) -> Cause {
    match error {
        AwsError::Busy { .. } => Cause::Busy,
        _ => Cause::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::aws::error::{At, Service};

    const LIMIT: Duration = Duration::from_secs(10);

    fn unreachable() -> AwsError {
        let endpoint = "https://kms.example".to_owned();
        AwsError::unreachable(Service::Kms, endpoint, "no route".to_owned())
    }

    fn refused() -> AwsError {
        AwsError::NoRegion { transient: false }
    }

    /// Makes attempts with a limit of `patience_ms`. Attempt number `succeed_at` succeeds. Returns the number of attempts
    /// and the result.
    fn run(patience_ms: u64, succeed_at: u32, error: fn() -> AwsError) -> (u32, Result<(), AwsError>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut made = 0;
        let result = runtime.block_on(async {
            let patience = Patience::from_now(Duration::from_millis(patience_ms));
            retried(patience, LIMIT, unreachable, async || {
                made += 1;
                if made < succeed_at { Err(error()) } else { Ok(()) }
            })
            .await
        });
        (made, result)
    }

    #[test]
    fn attempts_continue_until_one_succeeds() {
        let (made, result) = run(60_000, 3, unreachable);
        assert!(result.is_ok());
        assert_eq!(made, 3);
    }

    #[test]
    fn the_error_counts_the_attempts() {
        let (made, result) = run(300, u32::MAX, unreachable);
        // At least one attempt and one retry. On a busy machine there may be no time for more.
        assert!(made >= 2, "{made}");
        let text = result.unwrap_err().to_string();
        assert!(text.contains("https://kms.example") && text.contains("no route"), "{text}");
        assert!(text.contains(&format!("tried {made} times in ")), "{text}");
    }

    /// A service that throttles is left alone for at least half a second. So there is only the attempt at the very end of the
    /// time.
    #[test]
    fn a_busy_service_is_not_asked_again_at_once() {
        let busy = || AwsError::Busy {
            at: At { service: Service::Kms, region: "eu-central-1".to_owned() },
            code: "ThrottlingException".to_owned(),
            message: "Rate exceeded".to_owned(),
        };
        let (made, result) = run(400, u32::MAX, busy);
        assert!(made <= 2, "{made}");
        assert!(result.unwrap_err().to_string().contains("ThrottlingException"));
    }

    #[test]
    fn a_final_error_is_not_retried() {
        let (made, result) = run(60_000, u32::MAX, refused);
        assert!(matches!(result, Err(AwsError::NoRegion { .. })));
        assert_eq!(made, 1);
    }

    #[test]
    fn without_time_to_retry_there_is_one_attempt() {
        let (made, result) = run(0, u32::MAX, unreachable);
        assert!(matches!(result, Err(AwsError::GaveUp { attempts: 1, .. })));
        assert_eq!(made, 1);
    }

    #[test]
    fn an_attempt_that_hangs_ends_at_its_limit() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let result = runtime.block_on(async {
            let limit = Duration::from_millis(20);
            retried(Patience::from_now(Duration::from_millis(1)), limit, unreachable, async || {
                std::future::pending::<Result<(), AwsError>>().await
            })
            .await
        });
        assert!(matches!(result, Err(AwsError::GaveUp { attempts: 1, .. })));
    }

    #[test]
    fn a_brief_error_is_not_retried_for_the_whole_time() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let denied = || AwsError::Credentials {
            from: "the role".to_owned(),
            detail: "denied".to_owned(),
            course: Course::Briefly,
        };
        let mut made = 0;
        let result: Result<(), AwsError> = runtime.block_on(async {
            // One hour in all, some of which passed while the network was down.
            let patience =
                Patience { briefly: Duration::from_millis(300), ..Patience::from_now(Duration::from_secs(3600)) };
            retried(patience, LIMIT, unreachable, async || {
                made += 1;
                Err(if made < 3 { unreachable() } else { denied() })
            })
            .await
        });
        let text = result.unwrap_err().to_string();
        assert!(text.contains("denied") && text.contains(&format!("tried {made} times")), "{text}");
        assert!((4..10).contains(&made), "{made}");
    }

    fn denied() -> AwsError {
        AwsError::Credentials { from: "r".to_owned(), detail: "denied".to_owned(), course: Course::Briefly }
    }

    fn disabled() -> AwsError {
        AwsError::KeyDisabled { key: "k".to_owned(), message: "m".to_owned() }
    }

    fn kms_denied() -> AwsError {
        AwsError::KmsDenied {
            action: "kms:Decrypt",
            key: "k".to_owned(),
            region: "r".to_owned(),
            message: "no".to_owned(),
            course: Course::Briefly,
        }
    }

    /// Plays the attempts in several ways without waiting: each attempt takes `attempt` and fails with the error of its way.
    /// Returns the way and the start of each attempt, and the error of all attempts together.
    fn played(retry_for: u64, attempt: u64, errors: &[fn() -> AwsError]) -> (Vec<(usize, u64)>, AwsError) {
        let patience = Patience::from_now(Duration::from_secs(retry_for));
        let mut turns = Turns::new(patience, errors.len());
        let (mut now, mut made) = (Duration::ZERO, Vec::new());
        loop {
            match turns.next(now, u32::MAX) {
                Turn::Try(way) => {
                    made.push((way, now.as_secs()));
                    now += Duration::from_secs(attempt);
                    turns.failed(way, errors[way](), now);
                }
                Turn::Pause(pause) => now += pause,
                Turn::GiveUp => break,
            }
        }
        let names: Vec<String> = (0..errors.len()).map(|way| format!("key {way}")).collect();
        (made, turns.into_error(&names, now))
    }

    /// The first way does not use up the time of the others: a way that hangs costs one attempt a round.
    #[test]
    fn ways_take_turns_within_one_deadline() {
        let (made, error) = played(60, 10, &[unreachable, unreachable]);
        assert_eq!(made[..4].iter().map(|(way, _)| *way).collect::<Vec<_>>(), [0, 1, 0, 1]);
        // The second way starts as soon as the first attempt is over.
        assert_eq!(made[1], (1, 10));
        assert!(made.iter().all(|(_, start)| *start <= 60), "{made:?}");
        let text = error.to_string();
        assert!(text.contains("(1) key 0: KMS at") && text.contains("(2) key 1: KMS at"), "{text}");
        assert!(text.contains(&format!("tried {} times in ", made.len())), "{text}");
    }

    #[test]
    fn each_way_is_tried_once_even_without_time() {
        for retry_for in [0, 15] {
            let (made, _) = played(retry_for, 10, &[unreachable, unreachable, unreachable]);
            assert_eq!(made[..3], [(0, 0), (1, 10), (2, 20)], "{retry_for}");
            assert_eq!(made.len(), 3, "{made:?}");
        }
    }

    #[test]
    fn a_way_that_failed_for_good_has_no_more_turns() {
        let (made, error) = played(30, 1, &[disabled, unreachable]);
        assert_eq!(made.iter().filter(|(way, _)| *way == 0).count(), 1, "{made:?}");
        assert!(made.len() > 4, "{made:?}");
        assert!(matches!(error, AwsError::GaveUp { .. }));
        // All of them failed for good: nothing is repeated.
        let (made, error) = played(30, 1, &[disabled, refused_key]);
        assert_eq!(made, [(0, 0), (1, 1)]);
        let text = error.to_string();
        assert!(text.contains("2 ways") && text.contains("is disabled") && text.contains("another key"), "{text}");
        assert!(!text.contains("times"), "{text}");
    }

    fn refused_key() -> AwsError {
        AwsError::OtherKey { object: crate::config::SecretLocation::Token, key: "k".to_owned() }
    }

    /// A refusal passes within seconds or not at all, while another way is tried until the end.
    #[test]
    fn a_refusal_ends_the_turns_of_its_way_only() {
        let (made, _) = played(100, 1, &[kms_denied, unreachable]);
        let last = |way| made.iter().filter(|(at, _)| *at == way).map(|(_, start)| *start).max().unwrap();
        assert!(last(0) <= BRIEFLY.as_secs() + 1, "{made:?}");
        assert!(last(1) >= 90, "{made:?}");
    }

    /// Without credentials, no other key helps.
    #[test]
    fn an_error_of_this_machine_is_no_reason_to_try_another_way() {
        let (made, error) = played(10, 1, &[denied, unreachable]);
        assert!(made.iter().all(|(way, _)| *way == 0), "{made:?}");
        assert!(!error.to_string().contains("ways"), "{error}");
        let (made, error) = played(10, 1, &[refused, unreachable]);
        assert_eq!(made, [(0, 0)]);
        assert!(matches!(error, AwsError::NoRegion { .. }));
    }
}

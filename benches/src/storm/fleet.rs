//! Simulates a fleet that boots: a discrete-event simulation, without a clock, sockets or randomness of its own. The same
//! scenario always gives the same outcome.
//!
//! ```text
//!   instance ── request ──► token bucket ── granted ───► the boot's next request, or mounted
//!      ▲                         └───────── throttled ─► the policy's pause, or the time is over: failed
//!      └──────────────────────────────────────────────────────┘
//! ```

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::bucket::TokenBucket;
use super::policy::{Pauses, Policy};
use super::random::Random;

/// A service with a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// Key Management Service.
    Kms,
    /// Simple Storage Service.
    S3,
}

/// What an instance asks AWS for when it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Boot {
    /// A secret in S3: GetObject, then Decrypt.
    Object,
    /// A token in the header of an existing volume: Decrypt.
    Token,
    /// A token in the header of a new volume: Encrypt, then Decrypt.
    NewToken,
}

impl Boot {
    /// Returns the requests in their order.
    pub(super) fn requests(self) -> &'static [Service] {
        match self {
            Self::Object => &[Service::S3, Service::Kms],
            Self::Token => &[Service::Kms],
            Self::NewToken => &[Service::Kms, Service::Kms],
        }
    }

    /// Returns how many requests one boot sends to KMS, if none is throttled.
    pub(super) fn kms_requests(self) -> usize {
        self.requests().iter().filter(|service| **service == Service::Kms).count()
    }
}

/// What is simulated.
#[derive(Clone, Debug)]
pub(super) struct Scenario<'s> {
    /// When each instance sends its first request.
    pub(super) arrivals: &'s [Duration],
    /// What each of them asks for.
    pub(super) boot: Boot,
    /// KMS's quota.
    pub(super) kms: TokenBucket,
    /// S3's quota.
    pub(super) s3: TokenBucket,
    /// The time from a request to its answer.
    pub(super) latency: Duration,
    /// How long each instance retries.
    pub(super) retry_for: Duration,
    /// How each instance waits between two attempts.
    pub(super) policy: Policy,
    /// Chooses the lengths of the pauses.
    pub(super) seed: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Instances whose last request was granted.
    pub(super) mounted: usize,
    /// Instances whose time was over.
    pub(super) failed: usize,
    /// Requests that were granted.
    pub(super) granted: usize,
    /// Requests that were throttled.
    pub(super) throttled: usize,
    /// When the last instance had its last answer, counted from the start of the simulation.
    pub(super) last: Duration,
}

impl Outcome {
    /// Returns the number of all requests.
    pub(super) fn requests(&self) -> usize {
        self.granted + self.throttled
    }
}

/// An instance that is not up yet.
struct Booting {
    /// When its first request was sent.
    started: Duration,
    /// Its requests that were granted.
    done: usize,
    /// The pauses of its present request.
    pauses: Pauses,
}

/// Simulates until every instance has mounted or given up. `each` sees each request in the order of time: when it arrived, at
/// which service, and whether it was granted.
pub(super) fn simulate(scenario: &Scenario<'_>, mut each: impl FnMut(Duration, Service, bool)) -> Outcome {
    let Scenario { arrivals, boot, latency, retry_for, policy, .. } = *scenario;
    let (mut kms, mut s3) = (scenario.kms.clone(), scenario.s3.clone());
    let mut random = Random::new(scenario.seed);
    let mut instances: Vec<_> =
        arrivals.iter().map(|started| Booting { started: *started, done: 0, pauses: policy.pauses() }).collect();
    // The next request of each instance. Requests at the same time are decided in the order of the instances.
    let mut next: BinaryHeap<_> = arrivals.iter().enumerate().map(|(number, at)| Reverse((*at, number))).collect();
    let mut outcome = Outcome::default();
    while let Some(Reverse((now, number))) = next.pop() {
        let instance = &mut instances[number];
        let service = boot.requests()[instance.done];
        let is_granted = match service {
            Service::Kms => kms.take(now),
            Service::S3 => s3.take(now),
        };
        each(now, service, is_granted);
        let answered = now + latency;
        if is_granted {
            outcome.granted += 1;
            instance.done += 1;
            if instance.done == boot.requests().len() {
                outcome.mounted += 1;
                outcome.last = outcome.last.max(answered);
            } else {
                instance.pauses = policy.pauses();
                next.push(Reverse((answered, number)));
            }
        } else {
            outcome.throttled += 1;
            match instance.pauses.next(answered - instance.started, retry_for, random.number()) {
                Some(pause) => next.push(Reverse((answered + pause, number))),
                None => outcome.failed += 1,
            }
        }
    }
    outcome
}

/// Returns when each of `instances` sends its first request: at any time within `within`, in the order of time.
pub(super) fn arrivals(instances: u32, within: Duration, seed: u64) -> Vec<Duration> {
    let mut random = Random::new(seed);
    let mut arrivals: Vec<_> = (0..instances).map(|_| random.up_to(within)).collect();
    arrivals.sort_unstable();
    arrivals
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: Duration = Duration::from_millis(20);
    const HOUR: Duration = Duration::from_secs(3600);

    fn bucket(quota: u32) -> TokenBucket {
        TokenBucket::full(quota.try_into().unwrap(), Duration::ZERO)
    }

    fn at_once(arrivals: &[Duration], quota: u32, policy: Policy) -> Scenario<'_> {
        let (kms, s3) = (bucket(quota), bucket(5_500));
        let (boot, latency, retry_for, seed) = (Boot::Token, LATENCY, HOUR, 1);
        Scenario { arrivals, boot, kms, s3, latency, retry_for, policy, seed }
    }

    fn outcome(scenario: &Scenario<'_>) -> Outcome {
        simulate(scenario, |_, _, _| ())
    }

    /// Calls `check` with scenarios of every kind.
    fn each_scenario(mut check: impl FnMut(&Scenario<'_>)) {
        for (number, policy) in (0..24).zip(Policy::ALL.into_iter().cycle()) {
            let seed = u64::from(number);
            let arrivals = arrivals(300 + 40 * number, Duration::from_secs(seed % 3 * 10), seed);
            let boot = [Boot::Object, Boot::Token, Boot::NewToken][number as usize % 3];
            let retry_for = [HOUR, Duration::from_secs(10), Duration::ZERO][number as usize % 5 % 3];
            let (kms, s3) = (bucket(20 + 13 * number), bucket(50 + 7 * number));
            check(&Scenario { arrivals: &arrivals, boot, kms, s3, latency: LATENCY, retry_for, policy, seed });
        }
    }

    #[test]
    fn no_request_and_no_instance_is_lost() {
        each_scenario(|scenario| {
            let mut decisions = (0, 0);
            let outcome = simulate(scenario, |_, _, is_granted| match is_granted {
                true => decisions.0 += 1,
                false => decisions.1 += 1,
            });
            assert_eq!((outcome.granted, outcome.throttled), decisions);
            assert_eq!(outcome.mounted + outcome.failed, scenario.arrivals.len());
            // Each instance that mounted had each of its requests granted once. An instance that failed had fewer.
            let (each, of_mounted) = (scenario.boot.requests().len(), outcome.mounted * scenario.boot.requests().len());
            assert!(outcome.granted >= of_mounted);
            assert!(outcome.granted <= of_mounted + outcome.failed * (each - 1));
            // Only an instance that was throttled can fail.
            assert!(outcome.throttled >= outcome.failed);
            assert!(scenario.retry_for < HOUR || outcome.failed == 0, "{outcome:?}");
        });
    }

    /// In any interval, a service grants at most a full bucket and what the interval brings.
    #[test]
    fn no_quota_is_ever_exceeded() {
        each_scenario(|scenario| {
            let mut granted = [Vec::new(), Vec::new()];
            simulate(scenario, |at, service, is_granted| {
                if is_granted {
                    granted[usize::from(service == Service::S3)].push(at);
                }
            });
            let quotas = [&scenario.kms, &scenario.s3].map(|bucket| {
                let mut bucket = bucket.clone();
                (0..).take_while(|_| bucket.take(Duration::ZERO)).count()
            });
            for (times, quota) in granted.iter().zip(quotas) {
                // The request after the next `quota` ones is never in the same instant, and so on for longer intervals.
                for more in [1, 10, 100] {
                    for (first, last) in times.iter().zip(times.iter().skip(quota + more - 1)) {
                        let brought = (*last - *first).as_nanos() * quota as u128;
                        assert!(brought >= (more as u128 - 1) * 1_000_000_000, "{first:?} {last:?}");
                    }
                }
            }
        });
    }

    /// No policy can be faster than the quota: the last of `n` requests waits until `n` tokens have come.
    #[test]
    fn the_last_mount_is_never_before_the_closed_form() {
        let arrivals = arrivals(3_000, Duration::ZERO, 1);
        for policy in Policy::ALL {
            for (boot, quota) in [(Boot::Token, 100), (Boot::Token, 1_000), (Boot::NewToken, 300), (Boot::Object, 150)]
            {
                let outcome = outcome(&Scenario { boot, ..at_once(&arrivals, quota, policy) });
                let tokens = arrivals.len() * boot.kms_requests() - quota as usize;
                let bound = Duration::from_secs_f64(tokens as f64 / f64::from(quota));
                assert!(outcome.last >= bound + LATENCY, "{policy:?}, {boot:?}: {outcome:?}");
            }
        }
    }

    /// Nobody waits much longer than the closed form says: an instance that asks after the crowd asks within one pause.
    #[test]
    fn the_last_mount_is_one_pause_after_the_closed_form() {
        let arrivals = arrivals(3_000, Duration::ZERO, 1);
        for quota in [50, 100, 300, 1_000] {
            let outcome = outcome(&at_once(&arrivals, quota, Policy::Nbdcrypt));
            let bound = Duration::from_secs_f64(3_000.0 / f64::from(quota));
            assert!(outcome.last <= bound + Duration::from_secs(5), "{quota}: {outcome:?}");
        }
    }

    #[test]
    fn a_larger_quota_never_makes_the_fleet_slower() {
        let arrivals = arrivals(4_000, Duration::ZERO, 1);
        for policy in Policy::ALL {
            let outcomes =
                [50, 100, 200, 400, 800, 1_600, 4_000].map(|quota| outcome(&at_once(&arrivals, quota, policy)));
            for pair in outcomes.windows(2) {
                assert!(pair[1].last <= pair[0].last, "{policy:?}: {outcomes:#?}");
                assert!(pair[1].requests() <= pair[0].requests(), "{policy:?}: {outcomes:#?}");
            }
        }
    }

    #[test]
    fn a_quota_for_the_whole_fleet_throttles_nobody() {
        let arrivals = arrivals(4_000, Duration::ZERO, 1);
        for (boot, answers) in [(Boot::Token, 1), (Boot::Object, 2)] {
            let outcome = outcome(&Scenario { boot, ..at_once(&arrivals, 4_000, Policy::Nbdcrypt) });
            assert_eq!((outcome.mounted, outcome.throttled), (4_000, 0));
            assert_eq!(outcome.last, LATENCY * answers);
        }
    }

    #[test]
    fn without_time_to_retry_one_bucket_mounts() {
        let arrivals = arrivals(1_000, Duration::ZERO, 1);
        let scenario = Scenario { retry_for: Duration::ZERO, ..at_once(&arrivals, 300, Policy::Nbdcrypt) };
        let outcome = outcome(&scenario);
        assert_eq!((outcome.mounted, outcome.failed, outcome.requests()), (300, 700, 1_000));
    }

    #[test]
    fn equal_seeds_give_equal_outcomes() {
        let arrivals = arrivals(1_000, Duration::from_secs(5), 7);
        let scenario = at_once(&arrivals, 100, Policy::Nbdcrypt);
        assert_eq!(outcome(&scenario), outcome(&scenario));
        assert_ne!(outcome(&scenario), outcome(&Scenario { seed: 2, ..scenario.clone() }));
    }

    /// Why nbdcrypt waits as it does: before, it sent more requests and was not faster. Full jitter without a cap is far slower.
    /// Where the quota decides about the last mount, all ways to wait are equally fast, except for less than a hundredth.
    #[test]
    fn the_program_waits_better_than_before() {
        let arrivals = arrivals(10_000, Duration::ZERO, 1);
        for quota in [100, 1_000, 5_500] {
            let [before, _, uncapped, now] = Policy::ALL.map(|policy| outcome(&at_once(&arrivals, quota, policy)));
            assert!(now.last.mul_f64(0.99) <= before.last, "{quota}: {now:?} {before:?}");
            assert!(now.requests() * 10 <= before.requests() * 9, "{quota}: {now:?} {before:?}");
            assert!(now.last.mul_f64(0.99) <= uncapped.last, "{quota}: {now:?} {uncapped:?}");
        }
    }
}

//! The ways to wait between two requests that the simulation compares.

use std::time::Duration;

use bootstrap::keys::backoff::{Backoff, Cause};
use serde::Serialize;

use super::random::share;

/// The first pause of full jitter, which is also nbdcrypt's first pause for a busy service.
const FIRST: Duration = Duration::from_secs(1);
/// The longest pause of full jitter with a cap, which is also nbdcrypt's longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// A way to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Policy {
    /// nbdcrypt's own pauses for a service that is busy.
    Nbdcrypt,
    /// What nbdcrypt did before: for a busy service, the pauses for a network that is not up yet.
    Before,
    /// Full jitter, as in the AWS Architecture Blog's "Exponential Backoff And Jitter": each pause is between nothing and the
    /// whole, which doubles up to 5 s.
    FullJitter,
    /// The same, but the whole doubles up to `retry-for`.
    FullJitterUncapped,
}

impl Policy {
    /// Every way, in the order of the tables.
    pub(super) const ALL: [Self; 4] = [Self::Before, Self::FullJitter, Self::FullJitterUncapped, Self::Nbdcrypt];

    /// Returns the heading of the policy's column.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nbdcrypt => "nbdcrypt",
            Self::Before => "nbdcrypt before",
            Self::FullJitter => "full jitter up to 5 s",
            Self::FullJitterUncapped => "full jitter up to retry-for",
        }
    }

    /// Returns the pauses for one request.
    pub(super) fn pauses(self) -> Pauses {
        match self {
            Self::Nbdcrypt => Pauses::Own(Backoff::new(), Cause::Busy),
            Self::Before => Pauses::Own(Backoff::new(), Cause::Other),
            Self::FullJitter => Pauses::Full { whole: FIRST, longest: LONGEST },
            Self::FullJitterUncapped => Pauses::Full { whole: FIRST, longest: Duration::MAX },
        }
    }
}

/// The pauses between the attempts of one request.
#[derive(Clone, Debug)]
pub(super) enum Pauses {
    /// The program's own calculation.
    Own(Backoff, Cause),
    /// Full jitter.
    Full {
        /// The longest value of the next pause.
        whole: Duration,
        /// The limit of `whole`.
        longest: Duration,
    },
}

impl Pauses {
    /// Returns the pause before the next attempt, or `None` if `elapsed` has reached `until`. The last attempt is at `until`.
    pub(super) fn next(&mut self, elapsed: Duration, until: Duration, random: u32) -> Option<Duration> {
        match self {
            Self::Own(backoff, cause) => backoff.next(elapsed, until, *cause, random),
            Self::Full { whole, longest } => {
                let left = until.checked_sub(elapsed).filter(|left| !left.is_zero())?;
                let pause = share(*whole, random).min(left);
                *whole = whole.saturating_mul(2).min(*longest).min(until);
                Some(pause)
            }
        }
    }
}

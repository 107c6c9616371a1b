//! Whether a volume is as it should be, for programs that watch it.

use serde::{Deserialize, Serialize};

use super::{Condition, Status};

/// Whether a volume is as it should be. The order is from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// The volume is up, and nothing is wrong.
    Healthy,
    /// The volume is not up: nobody asked for it, or it is on its way up or down.
    NotUp,
    /// Something is there, and somebody should look at it.
    Degraded,
}

impl Health {
    /// Returns the exit code of `nbdcrypt status`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Healthy => 0,
            Self::NotUp => 3,
            Self::Degraded => 4,
        }
    }
}

impl Status {
    /// Returns whether the volume is as it should be.
    pub fn health(&self) -> Health {
        match self.condition {
            Condition::Attached | Condition::Silent | Condition::Dead => Health::Degraded,
            // A start or an end is no fault, even if an error has brought it about: then the next condition shows that.
            Condition::ComingUp | Condition::GoingDown => Health::NotUp,
            Condition::Up if self.problems.is_empty() => Health::Healthy,
            Condition::Up => Health::Degraded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_volume_that_is_up_without_problems_is_healthy() {
        let of = |condition| Status::new("scratch", condition).health();
        assert_eq!(of(Condition::Up), Health::Healthy);
        for condition in [Condition::ComingUp, Condition::GoingDown] {
            assert_eq!(of(condition), Health::NotUp);
        }
        for condition in [Condition::Attached, Condition::Silent, Condition::Dead] {
            assert_eq!(of(condition), Health::Degraded);
        }
        let mut up = Status::new("scratch", Condition::Up);
        up.warning = Some("swap".to_owned());
        assert_eq!(up.health(), Health::Healthy, "a warning about the system is no fault of the volume");
        up.problems.push("the disk failed".to_owned());
        assert_eq!(up.health(), Health::Degraded);
        assert_eq!([Health::Healthy, Health::NotUp, Health::Degraded].map(Health::exit_code), [0, 3, 4]);
    }
}

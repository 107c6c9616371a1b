//! How long a session lets requests gather before it receives them.
//!
//! If a session waits for its client, the client's next request must wake the session. This costs the client time:
//! waking a thread on another core takes about as long as sending the request. While the client has replies left to
//! read, an early answer does not make the client faster. So the session pauses before it receives again. It then finds
//! several requests at once. The pause is short enough that the client still has replies left when it is answered.
//! Network cards treat their interrupts in the same way (interrupt coalescing).
//!
//! The right pause depends on the client's depth and pace, which the server does not know. So the session finds it by
//! trying: the pause grows while the client hardly ever waits for an answer, and shrinks while the client often waits.
//! If several threads share a connection, a thread that waits for one reply may wait longer, by one pause, while
//! another thread has many replies left. A pause is at most 40 µs.

use std::time::Duration;

/// The first pause. It is not known yet whether it is too long.
const FIRST: Duration = Duration::from_micros(20);
/// The shortest pause. A shorter pause costs more than it saves, because each pause takes a timer and one more call.
const SHORTEST: Duration = Duration::from_micros(10);
/// The longest pause. A longer pause saves nothing more.
const LONGEST: Duration = Duration::from_micros(40);
/// The number of answers after which the length of the pause is reconsidered.
const WINDOW: u32 = 64;
/// If more than this many answers of a window were late, the pause shrinks. Waking the client costs as much as several
/// pauses save.
const MANY: u32 = WINDOW / 16;
/// If at most this many answers of a window were late, the pause grows.
const FEW: u32 = WINDOW / 64;
/// If even the shortest pause is too long, the session does without pauses for this many answers before it tries again.
/// The number doubles with each failure, up to `MOST_WITHOUT`.
const FEWEST_WITHOUT: u32 = 1 << 8;
const MOST_WITHOUT: u32 = 1 << 15;

/// A pause that takes this much longer than planned has overslept: the timer is too coarse, or the machine is too busy.
const OVERSLEPT: Duration = Duration::from_micros(200);
/// After this many overslept pauses in a row, the session does without pauses for long. (On older kernels, each pause
/// may last until the scheduler's next tick.)
const TOO_OFTEN: u32 = 16;
/// The first time, this many answers then come without a pause. The number doubles each time, up to `MOST_DISTRUST`.
const FIRST_DISTRUST: u32 = 1 << 15;
const MOST_DISTRUST: u32 = 1 << 30;

/// What the session knows about the client's pace.
pub(super) struct Coalescing {
    pause: Duration,
    /// Answers in this window, and how many of them were late: the client waited for them.
    answers: u32,
    late: u32,
    /// How many of the next answers come without a pause.
    without: u32,
    /// How many answers will come without a pause the next time.
    next_without: u32,
    /// Overslept pauses in a row.
    overslept: u32,
    /// Answers that will come without a pause if too many pauses oversleep.
    distrust: u32,
    /// The decision at the last answer, if the client has sent nothing since.
    found: Option<Option<Duration>>,
}

impl Coalescing {
    pub(super) fn new() -> Self {
        Self {
            pause: FIRST,
            answers: 0,
            late: 0,
            without: 0,
            next_without: FEWEST_WITHOUT,
            overslept: 0,
            distrust: FIRST_DISTRUST,
            found: None,
        }
    }

    /// Notes that the client sent something.
    pub(super) fn received(&mut self) {
        self.found = None;
    }

    /// Returns how long to let new requests gather after the current ones are answered, or `None` for no pause. Called when
    /// replies are about to be sent. `is_busy` returns whether the client has earlier replies left to read. If an answer is
    /// sent in several parts, the first part decides.
    pub(super) fn answering(&mut self, is_busy: impl FnOnce() -> bool) -> Option<Duration> {
        if let Some(found) = self.found {
            return found;
        }
        let found = self.find_out(is_busy);
        self.found = Some(found);
        found
    }

    fn find_out(&mut self, is_busy: impl FnOnce() -> bool) -> Option<Duration> {
        if self.without > 0 {
            self.without -= 1;
            return None;
        }
        let is_busy = is_busy();
        self.answers += 1;
        self.late += u32::from(!is_busy);
        if self.late > MANY {
            self.shorten();
            (self.answers, self.late) = (0, 0);
        } else if self.answers == WINDOW {
            self.next_without = FEWEST_WITHOUT;
            if self.late <= FEW {
                self.pause = LONGEST.min(self.pause + self.pause / 4);
            }
            (self.answers, self.late) = (0, 0);
        }
        is_busy.then_some(self.pause)
    }

    /// Notes that a pause is over and how long it took.
    pub(super) fn paused(&mut self, took: Duration) {
        if took <= self.pause + OVERSLEPT {
            self.overslept = 0;
            return;
        }
        self.overslept += 1;
        if self.overslept == TOO_OFTEN {
            self.overslept = 0;
            self.without = self.distrust;
            self.distrust = MOST_DISTRUST.min(2 * self.distrust);
        }
    }

    fn shorten(&mut self) {
        self.pause = self.pause * 3 / 4;
        if self.pause < SHORTEST {
            self.pause = FIRST;
            self.without = self.next_without;
            self.next_without = MOST_WITHOUT.min(2 * self.next_without);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates `answers` answers to a client that has `depth` requests and takes `pace` µs for each; the server takes
    /// `work` µs for each. Returns the pauses in µs (0 for none) and how many answers were late.
    fn serve(coalescing: &mut Coalescing, depth: u64, pace: u64, work: u64, answers: usize) -> (Vec<u64>, usize) {
        let (mut pauses, mut late, mut pause) = (Vec::new(), 0, 0);
        for _ in 0..answers {
            // While requests gather and are carried out, the client reads the replies to all other requests.
            let gathered = (pause / pace).clamp(1, depth);
            let is_busy = pause + gathered * work < (depth - 1) * pace;
            late += usize::from(pause > 0 && !is_busy);
            coalescing.received();
            let length = coalescing.answering(|| is_busy);
            pause = length.map_or(0, |length| u64::try_from(length.as_micros()).unwrap());
            pauses.push(pause);
        }
        (pauses, late)
    }

    #[test]
    fn pauses_grow_to_the_longest_while_no_answer_is_late() {
        let (pauses, late) = serve(&mut Coalescing::new(), 32, 4, 2, 1000);
        assert_eq!((pauses[0], pauses[999]), (20, 40));
        assert!(pauses.is_sorted() && late == 0);
    }

    #[test]
    fn a_pause_shrinks_until_the_client_hardly_ever_waits() {
        // With 12 requests of 3 µs, the client has 33 µs until it waits.
        let (pauses, late) = serve(&mut Coalescing::new(), 12, 3, 2, 10_000);
        assert!(pauses.iter().all(|pause| *pause == 0 || (10..=26).contains(pause)));
        assert!(pauses.iter().filter(|pause| **pause > 0).count() > 9000);
        assert!((1..700).contains(&late), "{late}");
    }

    #[test]
    fn attempts_become_rare_if_no_pause_is_short_enough() {
        let mut coalescing = Coalescing::new();
        let (_, late) = serve(&mut coalescing, 4, 2, 1, 200_000);
        assert!((1..200).contains(&late), "{late}");
        // The client changes, and the session notices it within the longest time without pauses.
        let (pauses, _) = serve(&mut coalescing, 64, 4, 2, MOST_WITHOUT as usize + 1000);
        assert_eq!(pauses.last(), Some(&40));
    }

    #[test]
    fn a_client_that_waits_for_each_answer_gets_no_pauses() {
        let (mut coalescing, mut asked) = (Coalescing::new(), 0);
        for _ in 0..100_000 {
            coalescing.received();
            let pause = coalescing.answering(|| {
                asked += 1;
                false
            });
            assert_eq!(pause, None);
        }
        assert!((1..300).contains(&asked), "{asked}");
    }

    #[test]
    fn pauses_become_rare_if_timers_are_coarse() {
        let (mut coalescing, mut pauses) = (Coalescing::new(), 0);
        for _ in 0..1_000_000 {
            coalescing.received();
            if coalescing.answering(|| true).is_some() {
                pauses += 1;
                coalescing.paused(Duration::from_millis(4));
            }
        }
        // After the first 16 pauses, 2^15 answers come without a pause, and twice as many each further time. So there
        // are five rounds of 16 pauses.
        assert_eq!(pauses, 5 * TOO_OFTEN);
    }

    #[test]
    fn occasional_pauses_in_time_keep_the_timer_trusted() {
        let mut coalescing = Coalescing::new();
        for round in 0..1000 {
            coalescing.received();
            assert!(coalescing.answering(|| true).is_some());
            coalescing.paused(if round % 10 == 0 { Duration::from_micros(45) } else { Duration::from_millis(4) });
        }
    }

    #[test]
    fn the_first_part_of_an_answer_decides_for_all() {
        let mut coalescing = Coalescing::new();
        assert_eq!(coalescing.answering(|| false), None);
        assert_eq!(coalescing.answering(|| unreachable!("the first part has decided")), None);
        coalescing.received();
        assert!(coalescing.answering(|| true).is_some());
        assert!(coalescing.answering(|| unreachable!("the first part has decided")).is_some());
    }
}

//! How long requests are left to gather before they are received.
//!
//! A session that waits for its client is woken by the client's next request, and it is the client that pays for it: waking a
//! thread on another core takes about as long as sending the request. While the client has replies left to read, it gains
//! nothing by an early answer. So the session does not listen meanwhile, for as long as the client still has some left when
//! it is answered, and finds several requests at once: what network cards do with their interrupts (interrupt coalescing).
//!
//! How long that may be is found out by trying, since it depends on the client's depth and pace, and nobody tells: the pause
//! grows while the client hardly ever waits for an answer, and shrinks while it does. Where several threads share a
//! connection, one that waits for its reply beside another that has many left waits for a pause more, of 40 µs at most.

use std::time::Duration;

/// The first pause, of which it is not known whether it is too long.
const FIRST: Duration = Duration::from_micros(20);
/// A shorter one costs more than it saves: the timer, and one more call.
const SHORTEST: Duration = Duration::from_micros(10);
/// A longer one saves nothing more.
const LONGEST: Duration = Duration::from_micros(40);
/// After so many answers the pause's length is looked at again.
const WINDOW: u32 = 64;
/// Once more of a window's answers than these came late, it shrinks: waking the client costs as much as several pauses save.
const MANY: u32 = WINDOW / 16;
/// Where no more than these did, it grows.
const FEW: u32 = WINDOW / 64;
/// Answers until the next attempt, where no pause was short enough. They double with each that fails.
const FEWEST_WITHOUT: u32 = 1 << 8;
const MOST_WITHOUT: u32 = 1 << 15;

/// A pause that takes so much longer than it should comes of a timer that is too coarse, or of a machine that is too busy.
const OVERSLEPT: Duration = Duration::from_micros(200);
/// After so many of these in a row there are none for long. (On older kernels each may last until the scheduler's next tick.)
const TOO_OFTEN: u32 = 16;
/// Answers until the next attempt then, at first and at most. They double each time.
const FIRST_DISTRUST: u32 = 1 << 15;
const MOST_DISTRUST: u32 = 1 << 30;

/// What is known of the client's pace.
pub(super) struct Coalescing {
    pause: Duration,
    /// Answers in this window, and those for which the client waited.
    answers: u32,
    late: u32,
    /// Answers that go by without a pause.
    without: u32,
    /// How many it will be next time.
    next_without: u32,
    /// Pauses in a row that were far too long.
    overslept: u32,
    /// Answers that will go by without a pause if these become too many.
    distrust: u32,
    /// What was found out when the client was last answered, if nothing came from it since.
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

    /// The client sent something.
    pub(super) fn received(&mut self) {
        self.found = None;
    }

    /// Replies are about to be sent; has the client earlier ones left to read? How long to let requests gather once all are
    /// answered. What is answered in several parts is judged by the first.
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

    /// The pause is over, and took so long.
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

    /// Over so many answers, the pauses (0 for none) and how many answers were late, with a client that has `depth` requests and
    /// takes `pace` µs for each, and a server that takes `work` µs for each.
    fn serve(coalescing: &mut Coalescing, depth: u64, pace: u64, work: u64, answers: usize) -> (Vec<u64>, usize) {
        let (mut pauses, mut late, mut pause) = (Vec::new(), 0, 0);
        for _ in 0..answers {
            // While requests gather and are carried out, the client reads the replies to all the others.
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
    fn a_client_that_has_much_to_read_is_left_alone_for_as_long_as_that_saves_anything() {
        let (pauses, late) = serve(&mut Coalescing::new(), 32, 4, 2, 1000);
        assert_eq!((pauses[0], pauses[999]), (20, 40));
        assert!(pauses.is_sorted() && late == 0);
    }

    #[test]
    fn a_pause_shrinks_until_the_client_hardly_ever_waits() {
        // 12 requests of 3 µs: the client has 33 µs until it waits.
        let (pauses, late) = serve(&mut Coalescing::new(), 12, 3, 2, 10_000);
        assert!(pauses.iter().all(|pause| *pause == 0 || (10..=26).contains(pause)));
        assert!(pauses.iter().filter(|pause| **pause > 0).count() > 9000);
        assert!((1..700).contains(&late), "{late}");
    }

    #[test]
    fn where_no_pause_is_short_enough_attempts_become_rare() {
        let mut coalescing = Coalescing::new();
        let (_, late) = serve(&mut coalescing, 4, 2, 1, 200_000);
        assert!((1..200).contains(&late), "{late}");
        // The client changes its ways, and is found to within the longest time without.
        let (pauses, _) = serve(&mut coalescing, 64, 4, 2, MOST_WITHOUT as usize + 1000);
        assert_eq!(pauses.last(), Some(&40));
    }

    #[test]
    fn who_waits_for_each_answer_is_not_kept_and_the_kernel_hardly_asked() {
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
    fn where_timers_are_coarse_pauses_become_rare() {
        let (mut coalescing, mut pauses) = (Coalescing::new(), 0);
        for _ in 0..1_000_000 {
            coalescing.received();
            if coalescing.answering(|| true).is_some() {
                pauses += 1;
                coalescing.paused(Duration::from_millis(4));
            }
        }
        // 2^15 answers after the first 16 pauses, and twice as many each time: there is room for five times.
        assert_eq!(pauses, 5 * TOO_OFTEN);
    }

    #[test]
    fn a_pause_that_is_too_long_now_and_then_is_no_sign_of_a_coarse_timer() {
        let mut coalescing = Coalescing::new();
        for round in 0..1000 {
            coalescing.received();
            assert!(coalescing.answering(|| true).is_some());
            coalescing.paused(if round % 10 == 0 { Duration::from_micros(45) } else { Duration::from_millis(4) });
        }
    }

    #[test]
    fn what_is_answered_in_parts_is_judged_by_the_first() {
        let mut coalescing = Coalescing::new();
        assert_eq!(coalescing.answering(|| false), None);
        assert_eq!(coalescing.answering(|| unreachable!("it is known")), None);
        coalescing.received();
        assert!(coalescing.answering(|| true).is_some());
        assert!(coalescing.answering(|| unreachable!("it is known")).is_some());
    }
}

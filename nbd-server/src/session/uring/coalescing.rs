//! How long requests are left to gather before they are received.
//!
//! A session that waits for its client is woken by the client's next request, and it is the client that pays for it: waking a
//! thread on another core takes about as long as sending the request. While the client has replies left to read, it gains
//! nothing by an early answer. So the session does not listen meanwhile, for as long as the client still has some left when
//! it is answered, and finds several requests at once: what network cards do with their interrupts (interrupt coalescing).
//!
//! How long that may be is found out by trying, since it depends on the client's depth and pace, and nobody tells: the pause
//! grows while the client hardly ever waits for an answer, and shrinks while it does.

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

/// What is known of the client's pace.
pub(super) struct Coalescing {
    pause: Duration,
    /// The client had replies left to read when it was last answered.
    is_busy: bool,
    /// Answers in this window, and those for which the client waited.
    answers: u32,
    late: u32,
    /// Answers that go by without a pause.
    without: u32,
    /// How many it will be next time.
    next_without: u32,
}

impl Coalescing {
    pub(super) fn new() -> Self {
        Self { pause: FIRST, is_busy: false, answers: 0, late: 0, without: 0, next_without: FEWEST_WITHOUT }
    }

    /// Replies are about to be sent; has the client earlier ones left to read?
    pub(super) fn answering(&mut self, is_busy: impl FnOnce() -> bool) {
        self.is_busy = false;
        if self.without > 0 {
            self.without -= 1;
            return;
        }
        self.is_busy = is_busy();
        self.answers += 1;
        self.late += u32::from(!self.is_busy);
        if self.late > MANY {
            self.shorten();
        } else if self.answers < WINDOW {
            return;
        } else {
            self.next_without = FEWEST_WITHOUT;
            if self.late <= FEW {
                self.pause = LONGEST.min(self.pause + self.pause / 4);
            }
        }
        (self.answers, self.late) = (0, 0);
    }

    /// How long to let requests gather now that the replies are sent.
    pub(super) fn pause(&self) -> Option<Duration> {
        self.is_busy.then_some(self.pause)
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
            coalescing.answering(|| is_busy);
            late += usize::from(pause > 0 && !is_busy);
            pause = coalescing.pause().map_or(0, |pause| u64::try_from(pause.as_micros()).unwrap());
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
    fn who_waits_for_each_answer_gets_it_at_once() {
        let (pauses, _) = serve(&mut Coalescing::new(), 1, 4, 2, 1000);
        assert!(pauses.iter().all(|pause| *pause == 0));
    }

    #[test]
    fn nobody_asks_the_kernel_while_there_are_no_pauses() {
        let (mut coalescing, mut asked) = (Coalescing::new(), 0);
        for _ in 0..100_000 {
            coalescing.answering(|| {
                asked += 1;
                false
            });
        }
        assert!(asked < 300, "{asked}");
    }
}

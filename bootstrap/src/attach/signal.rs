//! Tells whoever waits that an attachment ended by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Why an attachment ended that nobody here ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// Someone else took the device away.
    #[error("another program detached the device")]
    Disconnected,
    /// The threads that serve it gave up.
    #[error("the device's server stopped: {0}")]
    ServerFailed(String),
}

/// The serving side of an [`EndedSignal`]. The first word counts, and while disarmed none does: an end is expected then.
#[derive(Clone, Debug)]
pub(super) struct EndedSender {
    ended: watch::Sender<Option<Ended>>,
    armed: Arc<AtomicBool>,
}

/// Waits for the end of an attachment. Copies may be held by anyone, longer than the attachment.
#[derive(Clone, Debug)]
pub struct EndedSignal(watch::Receiver<Option<Ended>>);

/// A disarmed sender and its signal.
pub(super) fn ended_signal() -> (EndedSender, EndedSignal) {
    let (ended, receiver) = watch::channel(None);
    (EndedSender { ended, armed: Arc::default() }, EndedSignal(receiver))
}

impl EndedSender {
    /// From now on an end is nobody's wish here, or from now on it is.
    pub(super) fn set_armed(&self, armed: bool) {
        self.armed.store(armed, Ordering::SeqCst);
    }

    pub(super) fn send(&self, ended: Ended) {
        if self.armed.load(Ordering::SeqCst) {
            self.ended.send_if_modified(|state| {
                let first = state.is_none();
                state.get_or_insert(ended);
                first
            });
        }
    }
}

impl EndedSignal {
    /// Why it ended, if it has.
    pub fn get(&self) -> Option<Ended> {
        self.0.borrow().clone()
    }

    /// Waits until it ends by itself; for ever where it is detached in order. Runs in any async runtime, and may be
    /// dropped at any moment.
    pub async fn wait(mut self) -> Ended {
        loop {
            if let Some(ended) = self.0.borrow_and_update().clone() {
                return ended;
            }
            if self.0.changed().await.is_err() {
                // The attachment is gone, and said nothing.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_word_counts_and_reaches_those_who_come_late() {
        let (sender, signal) = ended_signal();
        sender.set_armed(true);
        assert_eq!(signal.get(), None);
        sender.send(Ended::Disconnected);
        sender.send(Ended::ServerFailed("later".to_owned()));
        drop(sender);
        assert_eq!(signal.clone().wait().await, Ended::Disconnected);
        assert_eq!(signal.get(), Some(Ended::Disconnected));
    }

    #[tokio::test]
    async fn an_orderly_end_is_none() {
        let (sender, signal) = ended_signal();
        sender.set_armed(true);
        sender.set_armed(false);
        sender.send(Ended::Disconnected);
        drop(sender);
        let waited = tokio::time::timeout(std::time::Duration::from_millis(20), signal.wait()).await;
        assert!(waited.is_err());
    }
}

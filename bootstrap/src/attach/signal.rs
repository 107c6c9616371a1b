//! Signals that an attachment ended unexpectedly.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Why an attachment ended unexpectedly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// Another program detached the device.
    #[error("another program detached the device")]
    Disconnected,
    /// The threads that serve the device failed.
    #[error("the device's server stopped: {0}")]
    ServerFailed(String),
}

/// The sending side of an [`EndedSignal`]. Only the first end is reported, and none while the signal is disarmed.
#[derive(Clone, Debug)]
pub(super) struct EndedSender {
    ended: watch::Sender<Option<Ended>>,
    armed: Arc<AtomicBool>,
}

/// Waits for the unexpected end of an attachment. Copies may outlive the attachment.
#[derive(Clone, Debug)]
pub struct EndedSignal(watch::Receiver<Option<Ended>>);

/// Returns a disarmed sender and its signal.
pub(super) fn ended_signal() -> (EndedSender, EndedSignal) {
    let (ended, receiver) = watch::channel(None);
    (EndedSender { ended, armed: Arc::default() }, EndedSignal(receiver))
}

impl EndedSender {
    /// Arms or disarms the signal. While disarmed, an end is expected and is not reported.
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
    /// Returns why the attachment ended, or `None` if it has not ended.
    pub fn get(&self) -> Option<Ended> {
        self.0.borrow().clone()
    }

    /// Waits until the attachment ends unexpectedly. If the attachment is detached by
    /// [`detach`](super::Attachment::detach), this waits forever. The future runs in any async runtime, and may be
    /// dropped at any time.
    pub async fn wait(mut self) -> Ended {
        loop {
            if let Some(ended) = self.0.borrow_and_update().clone() {
                return ended;
            }
            if self.0.changed().await.is_err() {
                // The attachment was dropped without an unexpected end.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_end_is_reported_even_to_late_receivers() {
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
    async fn an_orderly_end_is_not_reported() {
        let (sender, signal) = ended_signal();
        sender.set_armed(true);
        sender.set_armed(false);
        sender.send(Ended::Disconnected);
        drop(sender);
        let waited = tokio::time::timeout(std::time::Duration::from_millis(20), signal.wait()).await;
        assert!(waited.is_err());
    }
}

//! The signal that tells a server to stop.

use tokio::sync::watch;

/// Returns a trigger and the signal that it controls.
pub fn shutdown() -> (Trigger, Shutdown) {
    let (sender, receiver) = watch::channel(false);
    (Trigger(sender), Shutdown(receiver))
}

/// Stops everything that holds its [`Shutdown`] when [`Trigger::stop`] is called or the trigger is dropped.
#[derive(Debug)]
pub struct Trigger(watch::Sender<bool>);

impl Trigger {
    /// Sends the signal.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

/// Waits for the signal to stop. Clones wait for the same trigger.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Returns once a stop is requested. Cancellation safe.
    pub async fn requested(&mut self) {
        // An error means that the trigger was dropped.
        let _ = self.0.wait_for(|stop| *stop).await;
    }

    /// Returns whether a stop is requested.
    pub fn is_requested(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }
}

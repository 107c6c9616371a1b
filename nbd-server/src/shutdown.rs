//! How a server is told to stop.

use tokio::sync::watch;

/// Makes a trigger and what waits for it.
pub fn shutdown() -> (Trigger, Shutdown) {
    let (sender, receiver) = watch::channel(false);
    (Trigger(sender), Shutdown(receiver))
}

/// Stops what holds its [`Shutdown`], when told to or when dropped.
#[derive(Debug)]
pub struct Trigger(watch::Sender<bool>);

impl Trigger {
    /// Stops them.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

/// Waits to be told to stop. Clones wait for the same trigger.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Returns when it is time to stop. Cancellation safe.
    pub async fn requested(&mut self) {
        // An error is a trigger that was dropped.
        let _ = self.0.wait_for(|stop| *stop).await;
    }

    /// Whether it is time to stop.
    pub fn is_requested(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }
}

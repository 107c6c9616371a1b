//! Serves a volume that is up: answers clients, mounts the filesystem again if it was unmounted, and takes the volume
//! down.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::events::{Event, answer};
use super::manager::{self, OVERTIME, Overtime, Watchdog};
use super::server::Server;
use super::stopping::Stopping;
use super::summary;
use crate::service::control::{Answer, Question};
use crate::service::status::Condition;
use crate::service::system::{FilesystemInUse, StillWritten};
use crate::steps::{self, Boot, Step};

/// What to do after an event.
enum Next {
    /// Wait for the next event.
    Serve,
    /// Return, because everything is down.
    End,
}

impl Server<'_> {
    /// Serves until the volume is down, or its device is gone.
    ///
    /// # Errors
    /// Fails if the device ended unexpectedly.
    pub(super) fn serve(&self, boot: &mut Boot<'_>, steps: &mut [Box<dyn Step>]) -> Result<()> {
        self.board.set(Condition::Up, None);
        let watchdog = Watchdog::new();
        loop {
            match self.on_event(watchdog.wait(&self.happened)?, boot, steps)? {
                Next::Serve => {}
                Next::End => return Ok(()),
            }
        }
    }

    fn on_event(&self, event: Event, boot: &mut Boot<'_>, steps: &mut [Box<dyn Step>]) -> Result<Next> {
        match event {
            Event::Asked(stream, Question::Status) => answer(&stream, &self.board.answer()),
            Event::Asked(stream, Question::Complete) => {
                let _overtime = Overtime::begin(OVERTIME);
                answer(&stream, &self.complete(boot, steps));
            }
            Event::Asked(stream, Question::Down) => {
                self.board.set(Condition::GoingDown, None);
                // The client may be systemd's `ExecStop=`.
                let _overtime = Overtime::begin(OVERTIME);
                match self.take_down(boot, steps) {
                    Ok(()) => {
                        answer(&stream, &Answer::Down);
                        return Ok(Next::End);
                    }
                    Err(error) => {
                        // Bind mounts may have been unmounted before the one that is in use. They come back, so that the
                        // volume stays up as it was.
                        if boot.is_mounted()
                            && !error.is::<StillWritten>()
                            && let Err(why) = steps::complete(steps, boot)
                        {
                            tracing::error!("not everything that was unmounted could be mounted again: {why:#}");
                        }
                        self.board.set(Condition::Up, None);
                        answer(&stream, &Answer::Failed(self.not_down(boot, &error)));
                    }
                }
            }
            Event::Stop => {
                self.stop(boot, steps)?;
                return Ok(Next::End);
            }
            Event::Ended(ended) => {
                self.board.set(Condition::GoingDown, Some(ended.to_string()));
                let _overtime = Overtime::begin(OVERTIME);
                let state = self.state.borrow().clone();
                state.clean_up().with_context(|| ended.to_string())?;
                let mut state = self.state.borrow_mut();
                (state.attachment, state.mountpoint) = (None, None);
                bail!("{ended}; data that was written but not flushed is lost");
            }
            Event::Secret(_) | Event::NobodyWaits => {}
        }
        Ok(Next::Serve)
    }

    /// Takes the volume down, and tries again for as long as somebody uses the filesystem or the device. Between
    /// attempts, the server reports the users, writes the filesystem out, and answers clients. A stop cannot be called
    /// off.
    ///
    /// # Errors
    /// Fails if the device ends unexpectedly meanwhile.
    pub(super) fn stop(&self, boot: &mut Boot<'_>, steps: &mut [Box<dyn Step>]) -> Result<()> {
        let mut stopping = Stopping::new();
        manager::stopping();
        let _overtime = Overtime::begin(OVERTIME);
        self.doing(Condition::GoingDown, "going down");
        loop {
            let Err(error) = self.take_down(boot, steps) else { return Ok(()) };
            let why = reason(&error);
            if stopping.refused(&why) {
                tracing::warn!("asked to stop, but has to wait: {why}");
                self.doing(Condition::GoingDown, &format!("waiting: {why}"));
            }
            if stopping.is_sync_due(Instant::now()) {
                self.write_out(boot);
            }
            match self.happened.recv_timeout(stopping.pause()) {
                // Another signal changes nothing: the filesystem's last writes matter more.
                Ok(Event::Stop) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Event::Asked(stream, Question::Down)) => match self.take_down(boot, steps) {
                    Ok(()) => {
                        answer(&stream, &Answer::Down);
                        return Ok(());
                    }
                    Err(error) => {
                        let said = self.not_down(boot, &error);
                        answer(&stream, &Answer::Failed(format!("{said} (the server keeps trying)")));
                    }
                },
                Ok(Event::Asked(stream, Question::Complete)) => {
                    let said = format!("{} is going down, and waits: {why}", self.config.name);
                    answer(&stream, &Answer::Failed(said));
                }
                Ok(event) => {
                    self.on_event(event, boot, steps)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn take_down(&self, boot: &mut Boot<'_>, steps: &mut [Box<dyn Step>]) -> Result<()> {
        let result = steps::down(steps, boot, &mut |_, boot| self.note(boot));
        if result.is_err() {
            // A step that failed may have changed something, too.
            self.note(boot);
        }
        result
    }

    /// Makes the kernel write out its dirty data for the device and for the filesystem on it, so that little is lost if
    /// this process is killed. This happens whenever the device is attached, whether or not the filesystem is mounted
    /// here. Other processes may have mounted the filesystem elsewhere, or may write to the device.
    fn write_out(&self, boot: &Boot<'_>) {
        let Some(attached) = boot.attached() else { return };
        let mountpoint = self.config.filesystem.as_ref().filter(|_| boot.is_mounted());
        let mountpoint = mountpoint.map(|filesystem| filesystem.mountpoint.as_path());
        if let Err(error) = boot.outside.filesystems.sync(attached.device(), mountpoint) {
            tracing::warn!(
                "the kernel could not write the data of {} to the disk while the server waits: {error:#}",
                attached.device().display()
            );
        }
    }

    fn complete(&self, boot: &mut Boot<'_>, steps: &mut [Box<dyn Step>]) -> Answer {
        let name = &self.config.name;
        let completed = match boot.attached() {
            Some(_) => steps::complete(steps, boot),
            None => {
                return Answer::Failed(format!("{name} has lost its device; `nbdcrypt down {name}` ends its server"));
            }
        };
        self.note(boot);
        match completed {
            Ok(true) => {
                Answer::Up(format!("{} (it was attached, but not everything was mounted)", summary(self.config, boot)))
            }
            Ok(false) => Answer::Up(summary(self.config, boot)),
            Err(error) if boot.is_mounted() => {
                Answer::Failed(format!("not everything of {name} is mounted: {error:#}"))
            }
            Err(error) => Answer::Failed(format!("{name} is attached but not mounted: {error:#}")),
        }
    }

    /// Describes the state of the volume after a `down` that failed.
    fn not_down(&self, boot: &Boot<'_>, error: &anyhow::Error) -> String {
        let name = &self.config.name;
        if error.is::<StillWritten>() {
            return format!("{name} is not down yet: {error:#}. Then `nbdcrypt down {name}` tries again");
        }
        let device = boot.attached().map(|attached| attached.device().display().to_string());
        match (boot.is_mounted(), device, &self.config.filesystem) {
            (true, ..) => format!("{name} stays up: {error:#}"),
            (false, Some(device), Some(_)) => format!(
                "{name} is no longer mounted, but stays attached as {device}: {error:#}. `nbdcrypt down {name}` tries \
                 again, and `nbdcrypt up {}` mounts it again",
                self.state.borrow().config.display()
            ),
            (false, Some(device), None) => format!("{name} stays attached as {device}: {error:#}"),
            (false, None, _) => format!("{name} is detached, but its server did not end cleanly: {error:#}"),
        }
    }
}

/// Returns briefly why the volume cannot go down now.
fn reason(error: &anyhow::Error) -> String {
    match error.downcast_ref::<FilesystemInUse>() {
        Some(FilesystemInUse { mountpoint, holders }) => {
            format!("{} is in use by {}", mountpoint.display(), holders.join(", "))
        }
        None => format!("{error:#}"),
    }
}

//! Handles events while a volume is coming up: waits for the secret, and notices when the start is called off.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::Instant;

use anyhow::{Context, Result};

use super::Progress;
use super::board::Board;
use super::calling_off::{CallingOff, Reason};
use super::events::{Event, answer};
use super::manager;
use super::server::Server;
use crate::keys::{self, Secret, SecretRequest};
use crate::machine::root::Root;
use crate::machine::selection;
use crate::service::control::{Answer, Question};
use crate::service::late_disks;
use crate::service::status::Condition;
use crate::service::system::LongWork;
use crate::steps::NotUndone;
use crate::volume::data_disks::DataDisks;

impl Server<'_> {
    /// Waits for the secret. A separate thread gets it, since a source may be retried for minutes and a signal must end the
    /// wait.
    ///
    /// # Errors
    /// Fails if there is no secret, or if the start is called off.
    pub(super) fn await_secret(&self, request: SecretRequest, events: &Sender<Event>) -> Result<Secret> {
        let (config, events) = (self.config.key.clone(), events.clone());
        std::thread::Builder::new().name("secret".to_owned()).spawn(move || {
            // If nobody waits any more, the secret is wiped with the event.
            let _ = events.send(Event::Secret(keys::secret(&config, &request).map_err(anyhow::Error::from)));
        })?;
        loop {
            match self.happened.recv()? {
                Event::Secret(result) => return result,
                event => self.not_now(event)?,
            }
            self.may_go_on()?;
        }
    }

    /// Waits until the disks of the volume are there, and records them.
    ///
    /// # Errors
    /// Fails if a disk is missing, or if the start is called off.
    pub(super) fn await_disks(&self, root: &Root, watched: &Watched<'_, '_>) -> Result<DataDisks> {
        let (volume, started) = (&self.config.volume, Instant::now());
        let tell = |what: &str| {
            tracing::warn!("{what}");
            watched.begins(what);
        };
        let mut pause = || {
            match self.happened.recv_timeout(late_disks::PAUSE) {
                Ok(event) => self.not_now(event)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(error @ RecvTimeoutError::Disconnected) => return Err(error.into()),
            }
            self.may_go_on()
        };
        let look = || late_disks::look(volume, root, &selection::use_of);
        let found = late_disks::wait(volume.wait_for, &|| started.elapsed(), &look, &tell, &mut pause)?;
        let found = DataDisks::new(found).context("no disk is selected")?;
        self.record_disk(found.single().map_or_else(|| found.to_string().into(), Path::to_owned))?;
        Ok(found)
    }

    /// Handles the events that arrived during the last step, and checks whether the start is called off.
    ///
    /// # Errors
    /// Fails if the start is called off, or if the device has ended.
    pub(super) fn look_up(&self) -> Result<()> {
        self.happened.try_iter().try_for_each(|event| self.not_now(event))?;
        self.may_go_on()
    }

    fn may_go_on(&self) -> Result<()> {
        self.off.reason().map_or(Ok(()), |reason| Err(reason.into()))
    }

    /// Handles an event while the volume is coming up. A client that asked for `down` gets its answer when the start has ended.
    fn not_now(&self, event: Event) -> Result<()> {
        match event {
            Event::Ended(ended) => Err(ended.into()),
            Event::Asked(stream, Question::Down) => {
                self.waiting.borrow_mut().push(stream);
                self.off.because(Reason::Down);
                Ok(())
            }
            Event::Asked(stream, Question::Complete | Question::Status) => {
                answer(&stream, &Answer::Failed(format!("{} is still coming up", self.config.name)));
                Ok(())
            }
            // The reason is set already.
            Event::Stop | Event::NobodyWaits | Event::Secret(_) => Ok(()),
        }
    }

    /// Concludes a start that failed or was called off. Adds the reason to the error, and answers the clients that asked for
    /// `down`.
    pub(super) fn conclude(&self, mut error: anyhow::Error) -> anyhow::Error {
        let is_undone = error.downcast_ref::<NotUndone>().is_none() && !self.has_made_something();
        if let Some(reason) = self.off.reason() {
            error = match is_undone {
                true => error.context(format!("{reason}; everything was undone")),
                false => error.context(reason),
            };
        }
        for event in self.happened.try_iter() {
            if let Event::Asked(stream, Question::Down) = event {
                self.waiting.borrow_mut().push(stream);
            }
        }
        let name = &self.config.name;
        let said = match (is_undone, self.off.reason()) {
            (true, Some(Reason::Down)) => {
                Answer::CalledOff(format!("{name} was coming up; the start was called off, and everything was undone"))
            }
            (true, _) => Answer::CalledOff(format!("{name} did not come up, and everything was undone: {error:#}")),
            (false, _) => Answer::Failed(format!("{name} was coming up, and not everything was undone: {error:#}")),
        };
        self.waiting.borrow_mut().drain(..).for_each(|stream| answer(&stream, &said));
        error
    }
}

/// The function that reports progress, for the steps and for work within a step.
pub(super) type Teller<'p> = RefCell<&'p mut dyn FnMut(Progress<'_>) -> Result<()>>;

/// Reports work that takes long, and ends it when the start is called off.
pub(super) struct Watched<'w, 'p> {
    pub(super) board: &'w Board,
    pub(super) off: &'w CallingOff,
    pub(super) progress: &'w Teller<'p>,
    /// Set when the volume is up. There is then no start to call off, and the end of the front process is expected.
    pub(super) is_up: Cell<bool>,
}

impl LongWork for Watched<'_, '_> {
    fn begins(&self, what: &str) {
        self.board.set(Condition::ComingUp, Some(what.to_owned()));
        manager::doing(what);
        if let Err(error) = (self.progress.borrow_mut())(Progress::Doing(what)) {
            tracing::debug!("progress could not be reported: {error}");
        }
    }

    fn may_go_on(&self) -> bool {
        self.is_up.get() || self.off.reason().is_none()
    }

    fn can_be_called_off(&self) -> bool {
        !self.is_up.get()
    }
}

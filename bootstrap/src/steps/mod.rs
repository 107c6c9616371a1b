//! The boot as steps, each in a file of its own: what it would do, whether it is done, doing it, and undoing it.
//!
//! ```text
//!  mountpoint ─► disk ─► secret ─► volume ─► device ─► filesystem ─► header ─► mount
//!  free, made    opened  fetched   unlocked  attached  made where    of a new  done
//!  if missing    alone             or begun            there is none volume
//! ```
//! `up` runs them in this order, and when one fails undoes those that ran, the last first. `down` undoes them in the same
//! order for a volume that is to be used again. A step reaches the system through [`Outside`] alone, so that tests see
//! every call and let any of them fail.

mod device;
mod disk;
mod filesystem;
mod header;
mod mount;
mod mountpoint;
pub mod outside;
mod secret;
mod volume;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use engine::key::Passphrase;
use engine::luks::{Disks, PendingFormat, Segment};
use engine::store::BlockStore;
use engine::volume::Volume;
use uuid::Uuid;

use crate::config::Config;
use crate::keys::KmsToken;
pub use outside::Outside;
use outside::{Attached, HeaderLock};

/// One thing that `up` does.
pub trait Step {
    /// One word for it.
    fn name(&self) -> &'static str;

    /// What it would do, as the end of "nbdcrypt up would …".
    fn describe(&self, boot: &Boot<'_>) -> String;

    /// Whether that is done already, as far as can be seen without changing anything; `None` where it can't.
    ///
    /// # Errors
    /// What stands in the way of the step, or of looking.
    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>>;

    /// Does it.
    ///
    /// # Errors
    /// What stood in the way. A step that fails leaves nothing of its own behind.
    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()>;

    /// Takes back what [`Step::run`] did, where it is not to stay.
    ///
    /// # Errors
    /// What stood in the way; things are then as they were.
    fn undo(&mut self, _boot: &mut Boot<'_>, _why: Undo) -> Result<()> {
        Ok(())
    }
}

/// What undoing is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undo {
    /// A later step failed: everything shall be as before.
    Failed,
    /// The volume is taken down: what was made on disk stays.
    Down,
}

/// What the steps hand on to each other.
pub struct Boot<'o> {
    /// What was asked for.
    pub config: &'o Config,
    /// The disk that the configuration comes to on this machine.
    pub disk_path: PathBuf,
    /// The system around.
    pub outside: Outside<'o>,
    disk: Option<Arc<dyn BlockStore>>,
    /// The header's disk, where the header is detached.
    header: Option<Arc<dyn BlockStore>>,
    passphrase: Option<Passphrase>,
    /// What a volume that is made is to carry in its header, and what it is to be called by.
    token: Option<(KmsToken, Uuid)>,
    /// A volume that does not count yet: its header is written when its filesystem is whole.
    pending: Option<PendingFormat>,
    /// A volume was made in this run, and counts.
    header_committed: bool,
    volume: Option<Arc<Volume>>,
    facts: Facts,
    attached: Option<Box<dyn Attached>>,
    mounted: bool,
}

/// What became known of the volume on the way.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// LUKS1, LUKS2 or plain.
    pub kind: Option<&'static str>,
    /// The length of the volume's key in bits, both halves counted.
    pub key_bits: Option<usize>,
    /// Where the data lies on the disk.
    pub segment: Option<Segment>,
    /// The keyslot that opened.
    pub keyslot: Option<usize>,
}

impl<'o> Boot<'o> {
    /// Nothing is done yet.
    pub fn new(config: &'o Config, disk_path: PathBuf, outside: Outside<'o>) -> Self {
        Self {
            config,
            disk_path,
            outside,
            disk: None,
            header: None,
            passphrase: None,
            token: None,
            pending: None,
            header_committed: false,
            volume: None,
            facts: Facts::default(),
            attached: None,
            mounted: false,
        }
    }

    /// Keeps others from the headers on the open disks: the data's, where old ones are wiped, and the one that counts.
    fn lock_headers(&self) -> Result<Vec<Box<dyn HeaderLock>>> {
        let disks = self.disks()?;
        let mut locks = vec![self.outside.disks.lock_header(&self.disk_path, disks.data())?];
        if disks.is_detached() {
            locks.push(self.outside.disks.lock_header(self.header_path(), disks.header())?);
        }
        Ok(locks)
    }

    /// The open disks of header and data.
    fn disks(&self) -> Result<Disks<'_>> {
        let data = need(self.disk.as_ref(), "the open disk")?.as_ref();
        match &self.config.volume.header {
            None => Ok(data.into()),
            Some(_) => Ok(Disks::detached(need(self.header.as_ref(), "the header's disk")?.as_ref(), data)),
        }
    }

    /// Where the header is: on the disk, unless it is detached.
    fn header_path(&self) -> &Path {
        self.config.volume.header.as_ref().unwrap_or(&self.disk_path)
    }

    /// The attached device, once there is one.
    pub fn attached(&self) -> Option<&dyn Attached> {
        self.attached.as_deref()
    }

    /// Whether the filesystem is mounted.
    pub fn is_mounted(&self) -> bool {
        self.mounted
    }

    /// The open volume, once there is one.
    pub fn volume(&self) -> Option<&Arc<Volume>> {
        self.volume.as_ref()
    }

    /// What became known of the volume.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }
}

/// What a step before should have left; that it is missing is a mistake in the order of the steps.
fn need<T>(value: Option<T>, what: &str) -> Result<T> {
    value.ok_or_else(|| anyhow!("internal error: a step needs {what}, which no step before it made"))
}

/// The steps of `up`, in their order. Without a `[filesystem]` the volume is attached, and that is all.
pub fn all(config: &Config) -> Vec<Box<dyn Step>> {
    let filesystem = config.filesystem.as_ref();
    let mut steps: Vec<Box<dyn Step>> = Vec::new();
    if let Some(wanted) = filesystem {
        steps.push(Box::new(mountpoint::Mountpoint::new(wanted)));
    }
    steps.push(Box::new(disk::Disk::default()));
    steps.push(Box::new(secret::Secret));
    steps.push(Box::new(volume::Unlock));
    steps.push(Box::new(device::Attach));
    if let Some(wanted) = filesystem {
        steps.push(Box::new(filesystem::MakeFilesystem::new(wanted)));
    }
    steps.push(Box::new(header::CommitHeader));
    if let Some(wanted) = filesystem {
        steps.push(Box::new(mount::Mount::new(wanted)));
    }
    steps
}

/// Runs the steps in order. `after` sees each one that has run.
///
/// # Errors
/// What stood in the way, with the steps that had run undone; where undoing failed as well, that is said too.
pub fn up(
    steps: &mut [Box<dyn Step>],
    boot: &mut Boot<'_>,
    after: &mut dyn FnMut(&dyn Step, &Boot<'_>) -> Result<()>,
) -> Result<()> {
    for index in 0..steps.len() {
        let step = &mut steps[index];
        let result = step.run(boot).map(|()| index + 1);
        // A step that ran is undone even when it is `after` that failed.
        let (ran, result) = match result {
            Ok(ran) => (ran, after(steps[index].as_ref(), boot)),
            Err(error) => (index, Err(error)),
        };
        if let Err(error) = result {
            return Err(undo_all(&mut steps[..ran], boot, error));
        }
    }
    Ok(())
}

fn undo_all(steps: &mut [Box<dyn Step>], boot: &mut Boot<'_>, mut error: anyhow::Error) -> anyhow::Error {
    for step in steps.iter_mut().rev() {
        if let Err(second) = step.undo(boot, Undo::Failed) {
            tracing::error!("undoing the step {}: {second:#}", step.name());
            error = error.context(format!("and undoing the step `{}` failed: {second:#}", step.name()));
        }
    }
    error
}

/// Undoes the steps of a volume that is up, the last one first.
///
/// # Errors
/// What stood in the way. What was taken down until then stays down, and `down` may be called again.
pub fn down(
    steps: &mut [Box<dyn Step>],
    boot: &mut Boot<'_>,
    after: &mut dyn FnMut(&dyn Step, &Boot<'_>) -> Result<()>,
) -> Result<()> {
    for step in steps.iter_mut().rev() {
        step.undo(boot, Undo::Down).with_context(|| format!("could not undo the step `{}`", step.name()))?;
        after(step.as_ref(), boot)?;
    }
    Ok(())
}

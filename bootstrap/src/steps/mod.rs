//! The boot as steps, each in its own file. A step describes what it would do, tells whether it is done, does it, and undoes
//! it.
//!
//! ```text
//!  mountpoint ─► disk ─► secret ─► volume ─► device ─► filesystem ─► header ─► mount ─► bind
//!  checked,      opened  fetched   unlocked  attached  made if       written   done     done, if
//!  made if       and               or begun            missing       for a new          configured
//!  missing       locked                                              volume
//! ```
//! With `bind` in the configuration, there is a step `mountpoint` and a step `bind` for each target.
//!
//! `up` runs the steps in this order. If a step fails, `up` undoes the steps that ran, the last one first. `down` undoes
//! them in the same reverse order, but keeps what was made on the disk. A step reaches the system only through [`Outside`],
//! so tests see every call and can let any of them fail.

mod bind;
mod block_size;
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

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use engine::key::Passphrase;
use engine::layout::Segment;
use engine::luks::{Disks, PendingFormat};
use engine::store::BlockStore;
use engine::volume::Volume;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::Config;
use crate::keys::KmsToken;
use crate::volume::VolumeType;
use crate::volume::array::OpenArray;
use crate::volume::data_disks::DataDisks;
use crate::volume::ephemeral::Lifetime;
pub use outside::Outside;
use outside::{Attached, HeaderLock};

/// The name of the step after which a new volume is complete, with its filesystem.
pub const COMPLETING: &str = header::NAME;

/// One thing that `up` does.
pub trait Step {
    /// Returns the step's name, which is one word.
    fn name(&self) -> &'static str;

    /// Describes what the step would do, as the end of "nbdcrypt up would …".
    fn describe(&self, boot: &Boot<'_>) -> String;

    /// Returns whether the step is done already, as far as can be seen without changing anything. Returns `None` if this
    /// depends on an earlier step.
    ///
    /// # Errors
    /// Fails if something prevents the step or the check.
    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>>;

    /// Does the step.
    ///
    /// # Errors
    /// Fails if the step cannot be done. Nothing that the step made is then left behind.
    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()>;

    /// Does again what somebody else has undone since [`Step::run`]. Returns `false` if there was nothing to do.
    ///
    /// # Errors
    /// Fails if this cannot be done again.
    fn complete(&mut self, _boot: &mut Boot<'_>) -> Result<bool> {
        Ok(false)
    }

    /// Undoes [`Step::run`]. For [`Undo::Down`], what was made on disk stays.
    ///
    /// # Errors
    /// Fails if the step cannot be undone. Everything is then as before.
    fn undo(&mut self, _boot: &mut Boot<'_>, _why: Undo) -> Result<()> {
        Ok(())
    }
}

/// The reason for undoing a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undo {
    /// A later step failed, and everything must be as before.
    Failed,
    /// The volume is taken down, and what was made on disk stays.
    Down,
}

/// The state that the steps share.
pub struct Boot<'o> {
    /// The configuration.
    pub config: &'o Config,
    /// The configured disks on this machine.
    pub data_disks: DataDisks,
    /// The system around the steps.
    pub outside: Outside<'o>,
    /// The open disk, or the data of the open array.
    disk: Option<Arc<dyn BlockStore>>,
    /// The array, if there are several disks.
    array: Option<OpenArray>,
    /// The header's disk, if the header is detached.
    header: Option<Arc<dyn BlockStore>>,
    passphrase: Option<Passphrase>,
    /// The token for the header of a new volume, and the UUID of that volume.
    token: Option<(KmsToken, Uuid)>,
    /// A new volume whose header is not written yet. The header is written when the filesystem is complete.
    pending: Option<PendingFormat>,
    /// Whether a volume was made in this run and its header is written.
    header_committed: bool,
    /// What the disks hold, if a plan has looked at them.
    foreseen: Cell<Option<Foreseen>>,
    /// Whether the disk is a file or an array that this run made.
    disk_made: bool,
    /// Whether this run made the filesystem.
    filesystem_made: bool,
    /// Whether the new volume is made over what an ephemeral volume has left.
    is_anew: bool,
    volume: Option<Arc<Volume>>,
    facts: Option<Facts>,
    attached: Option<Box<dyn Attached>>,
    mounted: bool,
}

/// What a start made on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Made {
    /// The volume, with its filesystem if one is configured.
    Volume,
    /// The filesystem, in a volume that was blank.
    Filesystem,
}

/// What a plan says about the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Foreseen {
    /// A new volume would be made. The text says what an ephemeral volume has left there, unless the disk is blank.
    New(Option<&'static str>),
    /// There is a volume of this format: LUKS1, LUKS2 or plain.
    There(&'static str),
}

/// What the steps have found out about the volume.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The format.
    pub kind: VolumeType,
    /// The length of the volume key in bits, with both halves counted.
    pub key_bits: usize,
    /// Where the data lies on the disk.
    pub segment: Segment,
    /// The keyslot that opened the volume. `None` for a new volume, and for a plain one.
    pub keyslot: Option<usize>,
}

impl<'o> Boot<'o> {
    /// Starts a boot in which no step has run yet.
    pub fn new(config: &'o Config, data_disks: DataDisks, outside: Outside<'o>) -> Self {
        Self {
            config,
            data_disks,
            outside,
            disk: None,
            array: None,
            header: None,
            passphrase: None,
            token: None,
            pending: None,
            header_committed: false,
            foreseen: Cell::new(None),
            disk_made: false,
            filesystem_made: false,
            is_anew: false,
            volume: None,
            facts: None,
            attached: None,
            mounted: false,
        }
    }

    /// Locks the headers on the open disks against other processes: the current header, and the data disk, where old headers
    /// are wiped.
    fn lock_headers(&self) -> Result<Vec<Box<dyn HeaderLock>>> {
        let disks = self.disks()?;
        let mut locks = match &self.array {
            Some(array) => self.lock_members(array)?,
            None => vec![self.outside.disks.lock_header(self.data_disks.first(), disks.data())?],
        };
        if let Some(header) = &self.config.volume.header {
            locks.push(self.outside.disks.lock_header(header, disks.header())?);
        }
        Ok(locks)
    }

    /// Locks the members of an array against other processes.
    fn lock_members(&self, array: &OpenArray) -> Result<Vec<Box<dyn HeaderLock>>> {
        let members = self.data_disks.paths().zip(&array.members);
        members.map(|(path, member)| self.outside.disks.lock_header(path, &**member)).collect()
    }

    /// Returns the open disks of header and data.
    fn disks(&self) -> Result<Disks<'_>> {
        let data = need(self.disk.as_ref(), "the open disk")?.as_ref();
        match &self.config.volume.header {
            None => Ok(data.into()),
            Some(_) => Ok(Disks::detached(need(self.header.as_ref(), "the header's disk")?.as_ref(), data)),
        }
    }

    /// Returns whether this run makes the array, and has not completed it.
    fn makes_array(&self) -> bool {
        self.array.as_ref().is_some_and(|array| array.pending.is_some())
    }

    /// Returns the disk of the header. This is the data disk, unless the header is detached.
    fn header_disk(&self) -> DataDisks {
        self.config.volume.header.as_ref().map_or_else(|| self.data_disks.clone(), DataDisks::one)
    }

    /// Returns the attached device, once there is one.
    pub fn attached(&self) -> Option<&dyn Attached> {
        self.attached.as_deref()
    }

    /// Returns whether the filesystem is mounted.
    pub fn is_mounted(&self) -> bool {
        self.mounted
    }

    /// Returns what this run made on the disk, if it made anything. If the user meant another disk, which holds data,
    /// this text explains why the filesystem is empty.
    pub fn news(&self) -> Option<String> {
        let (name, disk) = (&self.config.name, &self.data_disks);
        if self.made()? == Made::Volume && self.config.volume.lifetime == Lifetime::OfServer {
            return Some(format!(
                "{name}: made a new, empty volume on {disk}. Its key exists in the memory of this server only, so all data in it is \
                 lost when it goes down: by `nbdcrypt down`, a reboot, or if the server ends"
            ));
        }
        if self.made()? == Made::Volume {
            let header = self.config.volume.header.as_ref();
            let header = header.map(|header| format!(", with its header in {}", header.display())).unwrap_or_default();
            let why = match self.is_anew {
                true => "it replaces what an ephemeral volume had left there",
                false => "no volume was there",
            };
            return Some(format!("{name}: made a new, empty volume on {disk}{header} ({why})"));
        }
        Some(format!("{name}: made a new, empty filesystem in the volume on {disk} (the volume was blank)"))
    }

    /// Returns what this run made on the disk.
    pub fn made(&self) -> Option<Made> {
        // A plain volume has no header. It is new if its disk is new.
        match self.header_committed || self.disk_made {
            true => Some(Made::Volume),
            false => self.filesystem_made.then_some(Made::Filesystem),
        }
    }

    /// Returns the open volume, once there is one.
    pub fn volume(&self) -> Option<&Arc<Volume>> {
        self.volume.as_ref()
    }

    /// Returns what the steps have found out about the volume, once it is open.
    pub fn facts(&self) -> Option<&Facts> {
        self.facts.as_ref()
    }
}

/// Returns whether the volume's device is mounted at `at`.
///
/// # Errors
/// Fails if something else is mounted there.
fn is_mounted(boot: &Boot<'_>, at: &Path) -> Result<bool> {
    let device = need(boot.attached.as_ref(), "the attached device")?.device();
    match boot.outside.filesystems.mounted_on(at)? {
        Some(mount) if mount.source == device => Ok(true),
        Some(mount) => bail!(
            "{} from {} is mounted on {at}; unmount that first (umount {at})",
            mount.filesystem,
            mount.source.display(),
            at = at.display()
        ),
        None => Ok(false),
    }
}

/// Returns a value that an earlier step must have set. If it is missing, the order of the steps is wrong.
fn need<T>(value: Option<T>, what: &str) -> Result<T> {
    value.ok_or_else(|| anyhow!("internal error: a step needs {what}, which no step before it made"))
}

/// Returns the steps of `up` in order. Without a `[filesystem]`, the volume is only attached.
pub fn all(config: &Config) -> Vec<Box<dyn Step>> {
    let filesystem = config.filesystem.as_ref();
    let mut steps: Vec<Box<dyn Step>> = Vec::new();
    if let Some(wanted) = filesystem {
        steps.push(Box::new(mountpoint::Mountpoint::new(wanted)));
        for bind in &wanted.binds {
            steps.push(Box::new(mountpoint::Mountpoint::of_bind(bind, wanted)));
        }
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
        for bind in &wanted.binds {
            steps.push(Box::new(bind::Bind::new(bind, wanted)));
        }
    }
    steps
}

/// Returns the span of a step, which gives the step's name to what is logged meanwhile.
fn step_span(step: &dyn Step) -> tracing::Span {
    tracing::error_span!("step", step = step.name())
}

/// Runs the steps in order. `after` is called after each one.
///
/// # Errors
/// Fails if a step or `after` fails. The steps that had run are then undone. If undoing fails as well, the error says so.
pub fn up(
    steps: &mut [Box<dyn Step>],
    boot: &mut Boot<'_>,
    after: &mut dyn FnMut(&dyn Step, &Boot<'_>) -> Result<()>,
) -> Result<()> {
    for index in 0..steps.len() {
        let step = &mut steps[index];
        let _said = step_span(step.as_ref()).entered();
        let result = step.run(boot).map(|()| index + 1);
        // A step that ran is undone even if `after` failed.
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

/// A start failed, and one of its steps could not be undone.
#[derive(Debug, thiserror::Error)]
#[error("and undoing the step `{step}` failed: {why}")]
pub struct NotUndone {
    /// The step's name.
    pub step: &'static str,
    /// Why the step could not be undone.
    pub why: String,
}

fn undo_all(steps: &mut [Box<dyn Step>], boot: &mut Boot<'_>, mut error: anyhow::Error) -> anyhow::Error {
    for step in steps.iter_mut().rev() {
        if let Err(second) = step.undo(boot, Undo::Failed) {
            tracing::error!("undoing the step {}: {second:#}", step.name());
            error = error.context(NotUndone { step: step.name(), why: format!("{second:#}") });
        }
    }
    error
}

/// Does again what somebody else has undone since `up`. Returns `false` if everything was there.
///
/// # Errors
/// Fails if a step could not be done again.
pub fn complete(steps: &mut [Box<dyn Step>], boot: &mut Boot<'_>) -> Result<bool> {
    let mut did = false;
    for step in steps {
        did |= step.complete(boot).with_context(|| format!("could not do the step `{}` again", step.name()))?;
    }
    Ok(did)
}

/// Undoes the steps of a volume that is up, the last one first. `after` is called after each step. `after` cannot fail, so
/// it cannot keep the volume from going down.
///
/// # Errors
/// Fails if a step could not be undone. The steps undone until then stay undone, and `down` may be called again.
pub fn down(
    steps: &mut [Box<dyn Step>],
    boot: &mut Boot<'_>,
    after: &mut dyn FnMut(&dyn Step, &Boot<'_>),
) -> Result<()> {
    for step in steps.iter_mut().rev() {
        let _said = step_span(step.as_ref()).entered();
        step.undo(boot, Undo::Down).with_context(|| format!("could not undo the step `{}`", step.name()))?;
        after(step.as_ref(), boot);
    }
    Ok(())
}

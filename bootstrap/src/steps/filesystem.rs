//! The step `filesystem`: makes a filesystem in a volume that is new or blank, and never over anything else.

use anyhow::{Context, Result, anyhow, bail};
use engine::signature;

use super::volume::{foresee, refuse_unless_meant};
use super::{Boot, Foreseen, Step, need};
use crate::config::FilesystemConfig;
use crate::steps::block_size;
use crate::volume::VolumeType;
use crate::volume::content::{self, Look};
use crate::volume::new_volume;

pub(super) struct MakeFilesystem {
    wanted: FilesystemConfig,
}

impl MakeFilesystem {
    pub(super) fn new(wanted: &FilesystemConfig) -> Self {
        Self { wanted: wanted.clone() }
    }
}

impl Step for MakeFilesystem {
    fn name(&self) -> &'static str {
        "filesystem"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let kind = &self.wanted.kind;
        match foresee(boot) {
            Ok(Foreseen::New(_)) => format!("make a filesystem of type {kind} in the new volume"),
            // What the volume holds can be seen only with the secret.
            _ => format!("make a filesystem of type {kind} if the volume turns out to be blank"),
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        let is_new = matches!(foresee(boot), Ok(Foreseen::New(_)));
        if is_new {
            boot.outside.filesystems.check_mkfs(&self.wanted.kind)?;
        }
        Ok(is_new.then_some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let volume = need(boot.volume.as_ref(), "the open volume")?;
        // An ephemeral array that is made anew is not examined: what it held is lost, also if its volume has a detached header.
        let is_anew = boot.config.volume.lifetime.is_ephemeral() && boot.makes_array();
        if boot.pending.is_none() && !is_anew {
            let (wanted, at) = (&self.wanted.kind, &boot.data_disks);
            let segment = need(boot.facts.as_ref(), "the volume's facts")?.segment;
            match content::of_plaintext(volume, segment)? {
                content::Plaintext::Holds(found) if found.iter().any(|mark| mark.name == wanted) => return Ok(()),
                content::Plaintext::Holds(found) => bail!(
                    "the volume on {at} holds {}, not {wanted}: set `type` under [filesystem] to what it is",
                    signature::Content::Known(found)
                ),
                content::Plaintext::Unknown(content) => bail!(
                    "the volume on {at} has no {wanted} filesystem, but it was written to: its plaintext holds {content}. \
                     An interrupted mkfs also leaves this. No filesystem is made over that. To look at it, use \
                     `nbdcrypt serve`. If it may be destroyed, remove [filesystem] from the configuration for now, run \
                     `nbdcrypt up`, make the filesystem by hand with `mkfs.{wanted}` on the device that `nbdcrypt status` \
                     shows, and run `nbdcrypt down`"
                ),
                content::Plaintext::NeverWritten if volume.is_read_only() => {
                    bail!("the volume on {at} is blank but read-only, so no filesystem can be made on it")
                }
                content::Plaintext::NeverWritten => {
                    // Without a header, only a blank disk shows that the configuration names the right disk.
                    if boot.config.volume.kind == VolumeType::Plain {
                        refuse_unless_meant(boot)?;
                        let disk_len = need(boot.disk.as_ref(), "the open disk")?.len();
                        let whole = new_volume::sector_size(Some(segment.sector_size), disk_len - segment.offset);
                        whole.with_context(|| format!("no new volume can be begun on {at}"))?;
                        let disk = need(boot.disk.as_ref(), "the open disk")?.as_ref();
                        match boot.data_disks.single() {
                            Some(path) => content::refuse_unless_free(path, disk, Look::All(&[]))?,
                            None => content::refuse_unless_blank_array(&boot.data_disks, disk, Look::All(&[]))?,
                        }
                    }
                }
            }
        }
        let device = need(boot.attached.as_ref(), "the attached device")?.device();
        let sector_size = volume.sector_size().bytes_u64();
        let made = boot.outside.filesystems.make_filesystem(device, &self.wanted).map_err(|error| {
            let said = format!("{error:#}");
            match block_size::why_not_makeable(&said, sector_size) {
                Some(why) => anyhow!("{said}; {why}"),
                None => error,
            }
        });
        made.context("could not make the filesystem")?;
        boot.filesystem_made = true;
        Ok(())
    }
}

//! The filesystem in the volume: made where the volume is new or blank, and never over anything else.

use anyhow::{Context, Result, bail};
use engine::signature;

use super::{Boot, Step, need};
use crate::config::{FilesystemConfig, VolumeType};
use crate::content;

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

    fn describe(&self, _boot: &Boot<'_>) -> String {
        format!("make a filesystem of type {} where the volume has none", self.wanted.kind)
    }

    fn is_done(&self, _boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(None)
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let volume = need(boot.volume.as_ref(), "the open volume")?;
        if boot.pending.is_none() {
            let (wanted, at) = (&self.wanted.kind, boot.disk_path.display());
            let segment = need(boot.facts.segment, "the volume's place")?;
            match content::of_plaintext(volume, segment)? {
                content::Plaintext::Holds(found) if found.iter().any(|mark| mark.name == wanted) => return Ok(()),
                content::Plaintext::Holds(found) => bail!(
                    "the volume on {at} holds {}, not {wanted}: set `type` under [filesystem] to what it is",
                    signature::Content::Known(found)
                ),
                content::Plaintext::Unknown => bail!(
                    "the volume on {at} holds data, but no filesystem that is known: nothing is made over it; look at it \
                     with `nbdcrypt serve`"
                ),
                content::Plaintext::NeverWritten => {
                    // Without a header, nothing but blankness tells that the disk is meant.
                    if boot.config.volume.kind == VolumeType::Plain {
                        content::refuse_unless_free(
                            &boot.disk_path,
                            need(boot.disk.as_ref(), "the open disk")?.as_ref(),
                        )?;
                    }
                }
            }
        }
        let device = need(boot.attached.as_ref(), "the attached device")?.device();
        boot.outside.filesystems.make_filesystem(device, &self.wanted).context("could not make the filesystem")
    }
}

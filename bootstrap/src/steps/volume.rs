//! The volume: unlocked where the disk holds one, begun where the disk is blank, and refused where it holds anything
//! else.

use std::sync::Arc;

use anyhow::{Context, Result};
use engine::key::VolumeKey;
use engine::luks::{self, Limits, LockedVolume, UnlockedVolume, luks1, plain};
use engine::signature::{self, Content};
use engine::store::BlockStore;
use engine::volume::Volume;

use super::{Boot, Step, Undo, need};
use crate::config::VolumeType;
use crate::{content, cpu};

pub(super) struct Unlock;

impl Step for Unlock {
    fn name(&self) -> &'static str {
        "volume"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        match boot.config.volume.kind {
            VolumeType::Luks1 => "unlock the LUKS volume; where the disk is blank, begin a new LUKS1 volume".to_owned(),
            VolumeType::Plain => "open the plain volume (no header: a wrong key is not noticed)".to_owned(),
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        let disks = boot.outside.disks;
        let path = &boot.disk_path;
        if !disks.exists(path)? {
            return Ok(Some(false));
        }
        let disk = disks.look(path)?;
        if boot.config.volume.kind == VolumeType::Plain {
            return Ok(None);
        }
        match signature::examine(disk.as_ref())? {
            Content::Blank | Content::Unfinished => Ok(Some(false)),
            content if content::is_luks(&content) => {
                luks::read(disk.as_ref(), &Limits::default()).with_context(|| path.display().to_string())?;
                Ok(Some(true))
            }
            content => Err(content::refusal(path, &content)),
        }
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let disk = Arc::clone(need(boot.disk.as_ref(), "the open disk")?);
        // Used once, and wiped at the end of this step.
        let passphrase = need(boot.passphrase.take(), "the secret")?;
        let path = &boot.disk_path;
        let name = || path.display().to_string();
        let (key, segment) = match boot.config.volume.kind {
            VolumeType::Plain => {
                boot.facts.kind = Some("plain");
                let key = plain::key_from_file(&passphrase, VolumeKey::AES_256).context(
                    "the secret is the key of a plain volume, so it must have 64 bytes: make it with `head -c 64 /dev/urandom`",
                )?;
                let place = plain::Place { sector_size: boot.config.volume.sector_size, ..plain::Place::default() };
                (key, plain::segment(&place, disk.len()).with_context(name)?)
            }
            VolumeType::Luks1 => match signature::examine(disk.as_ref())? {
                content if content::is_luks(&content) => {
                    let locked = luks::read(disk.as_ref(), &Limits::default()).with_context(name)?;
                    let UnlockedVolume { key, segment, keyslot } =
                        locked.unlock(disk.as_ref(), &passphrase).with_context(name)?;
                    boot.facts.keyslot = Some(keyslot);
                    boot.facts.kind = Some(match locked {
                        LockedVolume::Luks1(_) => "LUKS1",
                        LockedVolume::Luks2(_) => "LUKS2",
                    });
                    (key, segment)
                }
                Content::Blank | Content::Unfinished => {
                    let keys = boot.outside.keys;
                    let mut random = |bytes: &mut [u8]| keys.random(bytes);
                    let key = luks::new_volume_key(&mut random)?;
                    let options = keys.luks1_options()?;
                    let pending =
                        luks1::begin(disk.as_ref(), &options, &passphrase, key, &mut random).with_context(name)?;
                    boot.facts.kind = Some("LUKS1");
                    return open_pending(boot, disk, pending);
                }
                content => return Err(content::refusal(path, &content)),
            },
        };
        boot.facts.key_bits = Some(key.bits());
        boot.facts.segment = Some(segment);
        boot.volume = Some(Arc::new(Volume::with_cipher(disk, segment, cpu::cipher(&key)?).with_context(name)?));
        Ok(())
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        boot.volume = None;
        if let (Some(pending), Undo::Failed) = (boot.pending.take(), why) {
            let disk = need(boot.disk.as_ref(), "the open disk")?;
            pending.abandon(disk.as_ref()).context("the disk could not be made blank again")?;
        }
        Ok(())
    }
}

fn open_pending(boot: &mut Boot<'_>, disk: Arc<dyn BlockStore>, pending: luks::PendingFormat) -> Result<()> {
    boot.facts.key_bits = Some(pending.key().bits());
    boot.facts.segment = Some(pending.segment());
    let volume = cpu::cipher(pending.key())
        .and_then(|cipher| Ok(Volume::with_cipher(Arc::clone(&disk), pending.segment(), cipher)?));
    match volume {
        Ok(volume) => {
            boot.volume = Some(Arc::new(volume));
            boot.pending = Some(pending);
            Ok(())
        }
        Err(error) => {
            pending.abandon(disk.as_ref())?;
            Err(error)
        }
    }
}

//! The volume: unlocked where the disk holds one, begun where the disk is blank, and refused where it holds anything
//! else.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Disks, FormatOptions, LockedVolume, PendingFormat, Segment, UnlockedVolume};
use engine::signature::{self, Content};
use engine::volume::Volume;
use engine::xts::Xts;

use super::{Boot, Step, Undo, need};
use crate::config::VolumeType;
use crate::{content, cpu};

pub(super) struct Unlock;

impl Step for Unlock {
    fn name(&self) -> &'static str {
        "volume"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let new = match boot.config.volume.kind {
            VolumeType::Luks1 => "LUKS1",
            VolumeType::Luks2 => "LUKS2",
            VolumeType::Plain => return "open the plain volume (no header: a wrong key is not noticed)".to_owned(),
        };
        format!("unlock the LUKS volume; where the disk is blank, begin a new {new} volume")
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        let disks = boot.outside.disks;
        let path = &boot.disk_path;
        if !disks.exists(path)? {
            return Ok(Some(false));
        }
        let data = disks.look(path)?;
        if boot.config.volume.kind == VolumeType::Plain {
            return Ok(None);
        }
        let header = match &boot.config.volume.header {
            Some(header) if disks.exists(header)? => Some(disks.look(header)?),
            Some(_) => {
                content::refuse_unless_blank(path, data.as_ref())?;
                return Ok(Some(false));
            }
            None => None,
        };
        let both = match &header {
            Some(header) => Disks::detached(header.as_ref(), data.as_ref()),
            None => data.as_ref().into(),
        };
        if !is_volume(boot, &both)? {
            return Ok(Some(false));
        }
        let limits = boot.config.volume.limits.limits();
        luks::read(both, &limits).with_context(|| boot.header_path().display().to_string())?;
        Ok(Some(true))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        // Used once, and wiped at the end of this step.
        let passphrase = need(boot.passphrase.take(), "the secret")?;
        if boot.config.volume.kind == VolumeType::Plain {
            return open_plain(boot, &passphrase);
        }
        if is_volume(boot, &boot.disks()?)? { unlock(boot, &passphrase) } else { begin(boot, &passphrase) }
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        boot.volume = None;
        if let (Some(pending), Undo::Failed) = (boot.pending.take(), why) {
            abandon(boot, pending)?;
        }
        Ok(())
    }
}

/// Whether there is a LUKS volume; else a new one may be made.
///
/// # Errors
/// What is on the disk, where that is something else.
pub(super) fn is_volume(boot: &Boot<'_>, disks: &Disks<'_>) -> Result<bool> {
    match signature::examine(disks.header())? {
        content if content::is_luks(&content) => Ok(true),
        Content::Blank | Content::Unfinished => {
            if disks.is_detached() {
                // What is there may be the data of a volume whose header was lost or is another file.
                content::refuse_unless_blank(&boot.disk_path, disks.data())?;
            }
            Ok(false)
        }
        content => Err(content::refusal(boot.header_path(), &content)),
    }
}

/// Makes the disk blank again that a volume was begun on, unless somebody else is at work on it, or was.
fn abandon(boot: &Boot<'_>, pending: PendingFormat) -> Result<()> {
    let result = boot.lock_headers().and_then(|_locks| Ok(pending.abandon(boot.disks()?)?));
    result.with_context(|| format!("{} could not be made blank again", boot.header_path().display()))
}

fn open_plain(boot: &mut Boot<'_>, secret: &Passphrase) -> Result<()> {
    let plain = boot.config.volume.plain;
    let key = plain.key(secret).with_context(|| {
        format!(
            "the secret is the key of a plain volume, so it must have {0} bytes: `nbdcrypt provision` has KMS make it, \
             and for a file `head -c {0} /dev/urandom` (or name the `hash` of a passphrase under [volume])",
            plain.key_len
        )
    })?;
    let disk_len = need(boot.disk.as_ref(), "the open disk")?.len();
    let segment = plain.segment(disk_len).with_context(|| boot.disk_path.display().to_string())?;
    boot.facts.kind = Some("plain");
    let cipher = plain.cipher(&key)?;
    boot.volume = Some(open(boot, &key, cipher, segment)?);
    Ok(())
}

fn unlock(boot: &mut Boot<'_>, passphrase: &Passphrase) -> Result<()> {
    let name = || boot.header_path().display().to_string();
    let disks = boot.disks()?;
    let locked = luks::read(disks, &boot.config.volume.limits.limits()).with_context(name)?;
    let UnlockedVolume { key, segment, keyslot } = locked.unlock(disks.header(), passphrase).with_context(name)?;
    boot.facts.keyslot = Some(keyslot);
    boot.facts.kind = Some(match locked {
        LockedVolume::Luks1(_) => "LUKS1",
        LockedVolume::Luks2(_) => "LUKS2",
    });
    boot.volume = Some(open(boot, &key, cpu::cipher(&key)?, segment)?);
    Ok(())
}

fn begin(boot: &mut Boot<'_>, passphrase: &Passphrase) -> Result<()> {
    let keys = boot.outside.keys;
    let mut random = |bytes: &mut [u8]| keys.random(bytes);
    let key = luks::new_volume_key(VolumeKey::AES_256, &mut random)?;
    let mut options = keys.format_options(&boot.config.volume)?;
    if let Some((token, uuid)) = boot.token.take() {
        let FormatOptions::Luks2(options) = &mut options else { bail!("only a LUKS2 header has room for a token") };
        options.uuid = uuid;
        options.tokens = vec![token.to_json()];
    }
    let disks = boot.disks()?;
    let name = || boot.header_path().display().to_string();
    let locks = boot.lock_headers()?;
    if is_volume(boot, &disks)? {
        bail!("{}: somebody else made a volume on it meanwhile: try again", name());
    }
    let pending = options.begin(disks, passphrase, key, &mut random).with_context(name)?;
    drop(locks);
    boot.facts.kind = Some(options.name());
    let segment = pending.segment();
    let opened = cpu::cipher(pending.key()).and_then(|cipher| open(boot, pending.key(), cipher, segment));
    match opened {
        Ok(volume) => {
            boot.volume = Some(volume);
            boot.pending = Some(pending);
            Ok(())
        }
        Err(error) => Err(match abandon(boot, pending) {
            Ok(()) => error,
            Err(second) => error.context(format!("and {second:#}")),
        }),
    }
}

fn open(boot: &mut Boot<'_>, key: &VolumeKey, cipher: Xts, segment: Segment) -> Result<Arc<Volume>> {
    boot.facts.key_bits = Some(key.bits());
    boot.facts.segment = Some(segment);
    let disk = Arc::clone(need(boot.disk.as_ref(), "the open disk")?);
    let volume = Volume::with_cipher(disk, segment, cipher);
    Ok(Arc::new(volume.with_context(|| boot.disk_path.display().to_string())?))
}

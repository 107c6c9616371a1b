//! The step `volume`: unlocks a LUKS volume, or begins a new one if the disk is blank. Refuses a disk that holds anything
//! else.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use engine::key::{Passphrase, VolumeKey};
use engine::layout::Segment;
use engine::luks::luks2::Ephemeral;
use engine::luks::{self, Disks, FormatOptions, LockedVolume, LuksError, PendingFormat, UnlockedVolume};
use engine::signature::Content;
use engine::store::{Allocation, BlockStore};
use engine::volume::Volume;
use engine::xts::Xts;
use uuid::Uuid;

use super::disk::{header_len, open_array};
use super::{Boot, Facts, Foreseen, Step, Undo, need};
use crate::config::{KeyConfig, KeyFile};
use crate::keys::opening::{self, Then};
use crate::volume::VolumeType;
use crate::volume::array::{self, OpenArray};
use crate::volume::content::{self, Look};
use crate::volume::ephemeral::{self, Leftover, Lifetime};
use crate::volume::new_volume;
use crate::volume::new_volume::Strength;

pub(super) struct Unlock;

impl Step for Unlock {
    fn name(&self) -> &'static str {
        "volume"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let kind = boot.config.volume.kind;
        if kind == VolumeType::Plain {
            return "open the plain volume (it has no header, so a wrong key is not noticed)".to_owned();
        }
        match foresee(boot) {
            Ok(Foreseen::New(left)) => {
                let left = left.map(|left| format!(", which holds {left}")).unwrap_or_default();
                let key = match boot.config.volume.lifetime {
                    Lifetime::OfServer => "; its key exists in memory only",
                    Lifetime::OfDisks | Lifetime::Lasting => "",
                };
                format!("make a new {kind} volume on {}{left}{key}", boot.data_disks)
            }
            Ok(Foreseen::There(found)) => format!("unlock the {found} volume"),
            // The plan shows the error as the step's obstacle.
            Err(_) => format!("unlock the LUKS volume, or make a new {kind} volume if the disk is blank"),
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        foresee(boot).map(|_| Some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        // The passphrase is used once, and wiped at the end of this step.
        let passphrase = need(boot.passphrase.take(), "the secret")?;
        let is_plain = boot.config.volume.kind == VolumeType::Plain;
        let is_there = is_plain || is_volume(boot, &boot.disks()?, Look::All(&[]))?;
        if is_there {
            refuse_lone_member(boot, need(boot.disk.as_ref(), "the open disk")?.as_ref())?;
        }
        begin_array(boot)?;
        let opened = match (is_plain, is_there) {
            (true, _) => open_plain(boot, &passphrase),
            (false, true) => unlock(boot, &passphrase),
            (false, false) => begin(boot, &passphrase),
        };
        if opened.is_ok() && is_there {
            remove_markers(boot);
        }
        opened.map_err(|error| match abandon_array(boot) {
            Ok(()) => error,
            Err(second) => error.context(format!("and {second:#}")),
        })
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        boot.volume = None;
        if why == Undo::Failed {
            if let Some(pending) = boot.pending.take() {
                abandon(boot, pending)?;
            }
            abandon_array(boot)?;
        }
        boot.pending = None;
        Ok(())
    }
}

/// Returns what `up` would find on the disks, and checks that nothing there prevents `up`. Changes nothing. The first result
/// is kept for later calls.
///
/// # Errors
/// Fails if the volume could be neither opened nor made, and says why.
pub(super) fn foresee(boot: &Boot<'_>) -> Result<Foreseen> {
    if let Some(foreseen) = boot.foreseen.get() {
        return Ok(foreseen);
    }
    let foreseen = look_ahead(boot)?;
    boot.foreseen.set(Some(foreseen));
    Ok(foreseen)
}

fn look_ahead(boot: &Boot<'_>) -> Result<Foreseen> {
    let disks = boot.outside.disks;
    let volume = &boot.config.volume;
    let mut members: Vec<Arc<dyn BlockStore>> = Vec::new();
    for path in boot.data_disks.paths() {
        members.push(match (disks.exists(path)?, volume.size) {
            (true, _) => disks.look(path)?,
            (false, Some(size)) => Arc::new(ToBeMade(size)),
            (false, None) => bail!("{} does not exist", path.display()),
        });
    }
    let (data, new_array) = match members.as_slice() {
        [disk] => (Arc::clone(disk), None),
        _ => {
            let array = open_array(boot, members)?;
            if array.pending.is_some() {
                refuse_unless_meant(boot)?;
            }
            let left = array.is_replaced().then_some("only what an ephemeral volume has left");
            (array.store, array.pending.map(|_| left))
        }
    };
    if volume.kind == VolumeType::Plain {
        refuse_lone_member(boot, data.as_ref())?;
        return Ok(Foreseen::There("plain"));
    }
    let header: Option<Arc<dyn BlockStore>> = match &volume.header {
        Some(header) if disks.exists(header)? => Some(disks.look(header)?),
        Some(_) => Some(Arc::new(ToBeMade(header_len(volume.kind)))),
        None => None,
    };
    let both = match &header {
        Some(header) => Disks::detached(header.as_ref(), data.as_ref()),
        None => data.as_ref().into(),
    };
    let found = match new_array {
        Some(_) => look_beside_new_array(boot, &both)?,
        None => look_for_volume(boot, &both, Look::All(&[]))?,
    };
    if let Found::Room(left) = found {
        refuse_unless_meant(boot)?;
        check_sector_size(boot, &both)?;
        check_room(boot, &both)?;
        for path in boot.data_disks.paths().chain(volume.header.as_deref()) {
            if disks.exists(path)? {
                let blank = || format!("{} is blank, so a new volume would be made on it", path.display());
                disks.refuse_if_read_only(path).with_context(blank)?;
            }
        }
        return Ok(Foreseen::New(left.map(Leftover::name).or(new_array.flatten())));
    }
    refuse_lone_member(boot, data.as_ref())?;
    let limits = boot.config.volume.limits.limits(boot.outside.machine.memory_kib);
    let locked = luks::read(both, &limits).with_context(|| boot.header_disk().to_string())?;
    opening::warn_of_copies(&boot.header_disk(), both.header(), Then::Stays);
    Ok(Foreseen::There(match locked {
        LockedVolume::Luks1(_) => "LUKS1",
        LockedVolume::Luks2(_) => "LUKS2",
    }))
}

/// What was found in the place of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// A LUKS volume.
    Volume,
    /// Nothing that forbids making a new volume, and what an ephemeral volume has left there.
    Room(Option<Leftover>),
}

/// Returns whether there is a LUKS volume. `false` means that this check found nothing that forbids making a new volume.
///
/// # Errors
/// Fails if the disk holds anything else, and says what.
pub(super) fn is_volume(boot: &Boot<'_>, disks: &Disks<'_>, look: Look<'_>) -> Result<bool> {
    look_for_volume(boot, disks, look).map(|found| found == Found::Volume)
}

fn look_for_volume(boot: &Boot<'_>, disks: &Disks<'_>, look: Look<'_>) -> Result<Found> {
    if boot.makes_array() {
        return look_beside_new_array(boot, disks);
    }
    let header = look.at(disks.header())?;
    let left = leftover(boot, disks.header(), &header, look)?;
    if left.is_none() && content::is_luks(&header) {
        refuse_lasting(boot, disks, &header)?;
        return Ok(Found::Volume);
    }
    if left.is_none() && !matches!(header, Content::Blank | Content::Unfinished) {
        return Err(content::refusal(&boot.header_disk(), disks.header(), &header));
    }
    if !disks.is_detached() {
        return Ok(Found::Room(left));
    }
    // The disk may hold the data of a volume whose header was lost, or is in another file.
    let of_data = look_at_data(boot, disks, look).map_err(|refusal| match header {
        Content::Unfinished => refusal.context(format!(
            "making a volume with the header {} was interrupted. If that was on this disk, the disk holds only the beginning of \
             its filesystem",
            boot.header_disk()
        )),
        _ => refusal,
    })?;
    Ok(Found::Room(left.or(of_data)))
}

/// Looks for a volume, if the array is yet to be made. Only a detached header can then be one. The members were examined when the
/// array was laid out.
fn look_beside_new_array(boot: &Boot<'_>, disks: &Disks<'_>) -> Result<Found> {
    if !disks.is_detached() {
        return Ok(Found::Room(None));
    }
    let look = Look::All(&[]);
    let header = look.at(disks.header())?;
    match leftover(boot, disks.header(), &header, look)? {
        left @ Some(_) => Ok(Found::Room(left)),
        None if content::is_luks(&header) => refuse_lasting(boot, disks, &header).map(|()| Found::Volume),
        None if matches!(header, Content::Blank | Content::Unfinished) => Ok(Found::Room(None)),
        None => Err(content::refusal(&boot.header_disk(), disks.header(), &header)),
    }
}

/// Returns what an ephemeral volume has left on a disk, if the configuration makes such a volume.
fn leftover(boot: &Boot<'_>, disk: &dyn BlockStore, content: &Content, look: Look<'_>) -> Result<Option<Leftover>> {
    let lifetime = boot.config.volume.lifetime;
    if !lifetime.is_ephemeral() {
        return Ok(None);
    }
    let left = ephemeral::leftover(disk, content, look)?;
    // A disk of an array shows that the others may be there, too.
    Ok(left.filter(|left| *left != Leftover::Member || lifetime == Lifetime::OfServer))
}

/// Refuses a volume that a secret opens, if the key of the configured volume exists in memory only.
fn refuse_lasting(boot: &Boot<'_>, disks: &Disks<'_>, content: &Content) -> Result<()> {
    if boot.config.volume.lifetime != Lifetime::OfServer {
        return Ok(());
    }
    let refusal = content::refusal(&boot.header_disk(), disks.header(), content);
    Err(refusal.context(
        "source = \"ephemeral\" makes a new volume with a new key, but a volume that is not ephemeral is there already",
    ))
}

/// Refuses the data disk of a new volume with a detached header, unless it is blank or holds what an ephemeral volume has left.
fn look_at_data(boot: &Boot<'_>, disks: &Disks<'_>, look: Look<'_>) -> Result<Option<Leftover>> {
    let data = disks.data();
    if boot.config.volume.lifetime.is_ephemeral()
        && let Some(left) = leftover(boot, data, &look.at(data)?, look)?
    {
        return Ok(Some(left));
    }
    content::refuse_unless_blank(&boot.data_disks, data, look).map(|()| None)
}

/// Refuses to open a volume without a header of its own on one disk of an array. The volume would decrypt to noise.
fn refuse_lone_member(boot: &Boot<'_>, data: &dyn BlockStore) -> Result<()> {
    let volume = &boot.config.volume;
    match boot.data_disks.single() {
        Some(path) if volume.kind == VolumeType::Plain || volume.header.is_some() => array::refuse_member(path, data),
        _ => Ok(()),
    }
}

/// Takes the members of an array that is yet to be made.
fn begin_array(boot: &Boot<'_>) -> Result<()> {
    let Some(array) = boot.array.as_ref().filter(|array| array.pending.is_some()) else { return Ok(()) };
    let _locks = boot.lock_headers()?;
    array.begin(&boot.data_disks)
}

/// Removes the mark of an unfinished format that a start has left on a complete array, if it was cut off just before its end. If
/// the mark stayed, and a member lost its superblock later, the members could be taken for those of an array that was never
/// completed.
fn remove_markers(boot: &Boot<'_>) {
    let Some(array) = boot.array.as_ref().filter(|array| array.has_markers()) else { return };
    match boot.lock_members(array) {
        Ok(_locks) => array.remove_markers(&boot.data_disks),
        Err(error) => tracing::warn!("the mark of an unfinished format stays on {}: {error:#}", boot.data_disks),
    }
}

/// Undoes the beginning of a new array, unless the array is complete.
fn abandon_array(boot: &mut Boot<'_>) -> Result<()> {
    let Some(mut array) = boot.array.take_if(|array| array.pending.is_some()) else { return Ok(()) };
    let locks = boot.lock_members(&array);
    let abandoned = locks.and_then(|_locks| array.abandon(&boot.data_disks));
    boot.array = Some(array);
    abandoned.with_context(|| format!("{} could not be undone", boot.data_disks))
}

/// Undoes the beginning of a new volume: makes its disk blank again, unless another process uses or has changed the disk.
fn abandon(boot: &Boot<'_>, pending: PendingFormat) -> Result<()> {
    let result = boot.lock_headers().and_then(|_locks| Ok(pending.abandon(boot.disks()?)?));
    result.with_context(|| format!("{} could not be made blank again", boot.header_disk()))
}

fn open_plain(boot: &mut Boot<'_>, secret: &Passphrase) -> Result<()> {
    let plain = boot.config.volume.plain;
    let is_key_file = matches!(&boot.config.key, KeyConfig::File(KeyFile::Path(_)));
    if plain.ignores_hash(is_key_file) {
        tracing::warn!(
            "`hash` under [volume] is ignored, as cryptsetup does with a key file: the file's bytes are the key. To hash them, \
             set `hash-key-file = true` as well; otherwise leave `hash` out"
        );
    }
    let key = plain.key(secret, is_key_file).map_err(|why| {
        anyhow!(
            "the secret is not the key of the plain volume on {1}: {why}. `key-size = {2}` needs exactly {0} bytes: \
             `nbdcrypt provision` has KMS make them, and `head -c {0} /dev/urandom` makes them for a file. \
             `keyfile-size = {0}` under [volume] takes the first {0} bytes of a longer secret. For a passphrase, name \
             its `hash`, and set `hash-key-file = true` if it is in a file",
            plain.key_len,
            boot.data_disks,
            8 * plain.key_len
        )
    })?;
    let disk_len = need(boot.disk.as_ref(), "the open disk")?.len();
    let segment = plain.segment(disk_len).with_context(|| boot.data_disks.to_string())?;
    let cipher = plain.cipher(&key, boot.outside.machine.cpu)?;
    open(boot, cipher, Facts { kind: VolumeType::Plain, key_bits: key.bits(), segment, keyslot: None })
}

fn unlock(boot: &mut Boot<'_>, passphrase: &Passphrase) -> Result<()> {
    let name = || boot.header_disk().to_string();
    let disks = boot.disks()?;
    let locked =
        luks::read(disks, &boot.config.volume.limits.limits(boot.outside.machine.memory_kib)).with_context(name)?;
    opening::warn_of_copies(&boot.header_disk(), disks.header(), Then::Stays);
    let unlocked = locked.unlock(disks.header(), passphrase).map_err(|error| {
        let keyslot = |other: &Passphrase| locked.unlock(disks.header(), other).map(|unlocked| unlocked.keyslot);
        opening::explained(error, opening::key_file_of(&boot.config.key), passphrase, keyslot)
    });
    let UnlockedVolume { key, segment, keyslot } = unlocked.with_context(name)?;
    let kind = match locked {
        LockedVolume::Luks1(_) => VolumeType::Luks1,
        LockedVolume::Luks2(_) => VolumeType::Luks2,
    };
    let cipher = Xts::with_path(&key, boot.outside.machine.cpu)?;
    open(boot, cipher, Facts { kind, key_bits: key.bits(), segment, keyslot: Some(keyslot) })
}

/// Checks that the configuration means exactly the blank disks on which a new volume is about to be made.
pub(super) fn refuse_unless_meant(boot: &Boot<'_>) -> Result<()> {
    let volume = &boot.config.volume;
    let mut paths = boot.data_disks.paths().chain(volume.header.as_deref());
    paths.try_for_each(|path| boot.outside.disks.refuse_unless_meant(&volume.devices, path))
}

fn begin(boot: &mut Boot<'_>, passphrase: &Passphrase) -> Result<()> {
    refuse_unless_meant(boot)?;
    new_volume::check_strength(boot.config.strength, passphrase.expose().len())?;
    check_sector_size(boot, &boot.disks()?)?;
    let new = New::planned(boot)?;
    let keys = boot.outside.keys;
    let mut random = |bytes: &mut [u8]| keys.random(bytes);
    let disks = boot.disks()?;
    let name = || boot.header_disk().to_string();
    for (place, disk) in [(boot.header_disk(), disks.header()), (boot.data_disks.clone(), disks.data())] {
        if disk.is_read_only() {
            bail!("{place} is blank but read-only, so no volume can be made on it");
        }
    }
    let locks = boot.lock_headers()?;
    // The whole disk was checked just before. If another process has made a volume or a filesystem on it since, this shows at
    // one end of the disk.
    let Found::Room(left) = look_for_volume(boot, &disks, Look::Ends)? else {
        bail!("{}: another process made a volume on it at the same time; try again", name());
    };
    if let Some(left) = left {
        tracing::info!("{} is made anew: it holds {}", name(), left.name());
    }
    let pending = match new {
        New::Lasting(options) => {
            let key = luks::new_volume_key(VolumeKey::AES_256, &mut random)?;
            options.begin(disks, passphrase, key, &mut random)
        }
        // This secret is the volume key itself.
        New::Ephemeral(new) => VolumeKey::new(passphrase.expose().to_vec())
            .map_err(LuksError::from)
            .and_then(|key| new.begin(disks, key, &mut random)),
    };
    let pending = pending.with_context(name)?;
    drop(locks);
    boot.is_anew = left.is_some() || boot.array.as_ref().is_some_and(OpenArray::is_replaced);
    let (kind, key_bits, segment) = (boot.config.volume.kind, pending.key().bits(), pending.segment());
    let cipher = Xts::with_path(pending.key(), boot.outside.machine.cpu).map_err(anyhow::Error::from);
    match cipher.and_then(|cipher| open(boot, cipher, Facts { kind, key_bits, segment, keyslot: None })) {
        Ok(()) => {
            boot.pending = Some(pending);
            Ok(())
        }
        Err(error) => Err(match abandon(boot, pending) {
            Ok(()) => error,
            Err(second) => error.context(format!("and {second:#}")),
        }),
    }
}

/// What a new volume is to be like.
enum New {
    /// A secret opens it.
    Lasting(FormatOptions),
    /// Only this process has its key.
    Ephemeral(Ephemeral),
}

impl New {
    fn planned(boot: &mut Boot<'_>) -> Result<Self> {
        let (volume, keys) = (&boot.config.volume, boot.outside.keys);
        let data_len = boot.disks()?.data().len();
        if volume.lifetime == Lifetime::OfServer {
            let sector_size = new_volume::sector_size(volume.sector_size, data_len)?;
            let uuid = new_volume::new_uuid(&mut |bytes| keys.random(bytes))?;
            return Ok(Self::Ephemeral(Ephemeral { sector_size, uuid }));
        }
        let mut options = keys.format_options(volume, data_len)?;
        if let Some((token, uuid)) = boot.token.take() {
            let FormatOptions::Luks2(options) = &mut options else { bail!("only a LUKS2 header has room for a token") };
            options.uuid = uuid;
            options.tokens = vec![token.to_json()];
        }
        Ok(Self::Lasting(options))
    }
}

/// Fails if the configuration asks for a sector size that a new volume on this disk cannot have.
fn check_sector_size(boot: &Boot<'_>, disks: &Disks<'_>) -> Result<()> {
    let volume = &boot.config.volume;
    let fits = new_volume::sector_size(volume.sector_size, disks.data().len());
    fits.map(drop).with_context(|| format!("`sector-size` under [volume] does not fit {}", boot.data_disks))
}

/// Fails if a new volume does not fit the disks.
fn check_room(boot: &Boot<'_>, disks: &Disks<'_>) -> Result<()> {
    let volume = &boot.config.volume;
    let sector_size = new_volume::sector_size(volume.sector_size, disks.data().len())?;
    if volume.lifetime == Lifetime::OfServer {
        let new = Ephemeral { sector_size, uuid: Uuid::nil() };
        return new.check_room(*disks).with_context(|| boot.data_disks.to_string());
    }
    // Only the sizes matter here. It would take time to calibrate the key derivation, so the cheapest one is used.
    let options = new_volume::options(volume.kind, sector_size, Strength::Random, Uuid::nil())?;
    options.check_room(*disks, VolumeKey::AES_256).with_context(|| boot.data_disks.to_string())
}

/// Stands for a file of this many bytes that does not exist yet. All its bytes read as zeros.
struct ToBeMade(u64);

impl BlockStore for ToBeMade {
    fn len(&self) -> u64 {
        self.0
    }

    fn allocation(&self, offset: u64) -> std::io::Result<Allocation> {
        Ok(Allocation { is_hole: true, end: self.0.max(offset) })
    }

    fn read_at(&self, data: &mut [u8], _offset: u64) -> std::io::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

/// Opens the volume that `facts` describe on the open disk.
fn open(boot: &mut Boot<'_>, cipher: Xts, facts: Facts) -> Result<()> {
    let disk = placed(Arc::clone(need(boot.disk.as_ref(), "the open disk")?), &facts.segment)
        .with_context(|| boot.data_disks.to_string())?;
    boot.disk = Some(Arc::clone(&disk));
    let volume = Volume::with_cipher(disk, facts.segment, cipher);
    boot.volume = Some(Arc::new(volume.with_context(|| boot.data_disks.to_string())?));
    boot.facts = Some(facts);
    Ok(())
}

/// Returns the disk. Direct I/O needs whole blocks, so it is turned off if the data does not begin and end at a block
/// boundary. This is the case with LUKS1 volumes of old cryptsetup versions.
fn placed(disk: Arc<dyn BlockStore>, segment: &Segment) -> std::io::Result<Arc<dyn BlockStore>> {
    if (segment.offset | segment.len).is_multiple_of(disk.alignment() as u64) {
        return Ok(disk);
    }
    Ok(disk.buffered()?.unwrap_or(disk))
}

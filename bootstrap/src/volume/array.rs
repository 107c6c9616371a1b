//! Several disks as one: opens the array that they form, or lays out a new array on blank disks.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use engine::raid::{self, Found, NewArray, OpenError, PendingArray, PendingError, Superblock, Together};
use engine::signature::{self, Content, Survey};
use engine::store::BlockStore;

use super::content::{self, Look};
use super::data_disks::DataDisks;
use super::ephemeral::{self, Leftover, Lifetime};
use crate::machine::disk;
use crate::text;

/// The open members of an array.
pub struct OpenArray {
    /// The array's data.
    pub store: Arc<dyn BlockStore>,
    /// The members, in the order of their paths.
    pub members: Vec<Arc<dyn BlockStore>>,
    /// The array does not exist on the members yet.
    pub pending: Option<PendingArray>,
    /// If the array is made over what an ephemeral volume has left: what each member holds at its ends.
    replaced: Option<Vec<Content>>,
}

/// What a new array is to be like.
pub struct Wanted<'w> {
    /// The volume's name, which becomes the array's.
    pub name: &'w str,
    /// The chunk in bytes.
    pub chunk: u64,
    /// The seconds since 1970.
    pub now: u64,
    /// How long the volume must be kept.
    pub lifetime: Lifetime,
}

impl OpenArray {
    /// Opens the array that the members form. If all of them are blank, lays out a new array. For an ephemeral volume, also if all
    /// of them are blank or hold what such a volume has left. Writes nothing.
    ///
    /// # Errors
    /// Fails if the members neither form an array nor may become one. The text names the member and says what is wrong.
    pub fn open(
        disks: &DataDisks,
        members: Vec<Arc<dyn BlockStore>>,
        wanted: &Wanted<'_>,
        random: &mut dyn FnMut(&mut [u8]) -> std::io::Result<()>,
    ) -> Result<Self> {
        let replaced = match raid::look(&members) {
            Ok(Together::Array(opened)) => {
                return Ok(Self { store: Arc::new(opened.1), members, pending: None, replaced: None });
            }
            Ok(Together::Unfinished) => None,
            Ok(Together::NoArray) if wanted.lifetime.is_ephemeral() => {
                replaceable(disks, &members, wanted.lifetime, None)?
            }
            Ok(Together::NoArray) => {
                refuse_unless_free(disks, &members, Look::All(&[]))?;
                None
            }
            Err(error @ OpenError::Array(_)) if wanted.lifetime.is_ephemeral() => {
                replaceable(disks, &members, wanted.lifetime, Some(error))?
            }
            Err(error) => return Err(explained(disks, error)),
        };
        let mut uuid = || {
            let mut bytes = [0; 16];
            random(&mut bytes).map(|()| uuid::Builder::from_random_bytes(bytes).into_uuid())
        };
        let mut sizes = Vec::with_capacity(members.len());
        for member in &members {
            sizes.push((member.len(), uuid()?));
        }
        let name = ephemeral::array_name(wanted.name, wanted.lifetime);
        let new = NewArray { uuid: uuid()?, name, now: wanted.now, chunk: wanted.chunk, members: sizes };
        let pending = PendingArray::new(&members, &new).map_err(|error| explained(disks, error.into()))?;
        Ok(Self { store: Arc::new(pending.store()), members, pending: Some(pending), replaced })
    }

    /// Returns whether the array is made over what an ephemeral volume has left.
    pub fn is_replaced(&self) -> bool {
        self.replaced.is_some()
    }

    /// Takes the members for a new array, after another look at their ends. They must be locked. Does nothing if the array
    /// exists.
    ///
    /// # Errors
    /// Fails if a member is no longer free, or cannot be written to.
    pub fn begin(&self, disks: &DataDisks) -> Result<()> {
        let Some(pending) = &self.pending else { return Ok(()) };
        for (path, member) in disks.paths().zip(&self.members) {
            if member.is_read_only() {
                bail!("{} is blank but read-only, so no array can be made on it", path.display());
            }
        }
        if let Some(before) = &self.replaced {
            for ((path, member), before) in disks.paths().zip(&self.members).zip(before) {
                let now = Look::Ends.at(&**member)?;
                if now != *before {
                    bail!("{} was written to at the same time, and now holds {now}; try again", path.display());
                }
            }
            tracing::info!("{disks} is made anew: it held only what an ephemeral volume has left");
        // A member of an array that was begun before has the marker, and perhaps a superblock.
        } else if !matches!(raid::look(&self.members).map_err(|error| explained(disks, error))?, Together::Unfinished) {
            refuse_unless_free(disks, &self.members, Look::Ends)?;
        }
        pending.begin().map_err(|error| named(disks, error))
    }

    /// Writes the superblocks of a new array. They are durable afterwards, and so is everything in the array.
    ///
    /// # Errors
    /// Fails if another program has written to a member, or if a member fails.
    pub fn write(&self, disks: &DataDisks) -> Result<()> {
        self.pending.as_ref().map_or(Ok(()), |pending| pending.write().map_err(|error| named(disks, error)))
    }

    /// Removes what shows that the array was not complete. What cannot be removed does no harm, and is logged.
    pub fn complete(&mut self, disks: &DataDisks) {
        self.pending = None;
        self.remove_markers(disks);
    }

    /// Returns whether a member of a complete array has the mark of an unfinished format. A start that was cut off after the array
    /// was complete has left it.
    pub fn has_markers(&self) -> bool {
        let has_marker = |member: &Arc<dyn BlockStore>| signature::has_marker(&**member).unwrap_or(false);
        self.pending.is_none() && self.members.iter().any(has_marker)
    }

    /// Removes the mark of an unfinished format from the members of a complete array. The members must be locked. A mark that
    /// cannot be removed does no harm as long as each member has its superblock, and is logged.
    pub fn remove_markers(&self, disks: &DataDisks) {
        if self.pending.is_some() || self.members.iter().any(|member| member.is_read_only()) {
            return;
        }
        if let Err(error) = raid::remove_markers(&self.members) {
            let error = named(disks, error);
            tracing::warn!("the mark of an unfinished format could not be removed, which does no harm: {error:#}");
        }
    }

    /// Undoes the beginning of a new array. Members that hold nothing else become blank again.
    ///
    /// # Errors
    /// Fails if another program has written to a member, or if a member fails.
    pub fn abandon(&mut self, disks: &DataDisks) -> Result<()> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        let data = signature::first_written(&*self.store, 0..self.store.len(), &Survey::default());
        let is_blank = data.context("the array's data could not be read")?.is_none();
        pending.abandon(is_blank).map_err(|error| named(disks, error))
    }
}

/// Opens a disk, or the array of several disks, read-only, to look at it. The disks may be in use.
///
/// # Errors
/// Fails if a disk cannot be opened, or if several disks do not form an array.
pub fn open_to_look(disks: &DataDisks) -> Result<Arc<dyn BlockStore>> {
    let open = |path| Ok(Arc::new(disk::open_to_look(path)?) as Arc<dyn BlockStore>);
    if let Some(path) = disks.single() {
        return open(path);
    }
    let members = disks.paths().map(open).collect::<Result<Vec<_>>>()?;
    match raid::look(&members).map_err(|error| explained(disks, error))? {
        Together::Array(opened) => Ok(Arc::new(opened.1)),
        Together::Unfinished | Together::NoArray => {
            bail!("{disks} does not exist: no disk has a superblock of an array")
        }
    }
}

/// Checks that a single disk is not a member of an array. If a volume has no header on its disk, nothing else shows that the other
/// members are missing.
///
/// # Errors
/// Fails if the disk has a superblock of a RAID 0 array. The text says to name all members.
pub fn refuse_member(path: &Path, disk: &dyn BlockStore) -> Result<()> {
    let at = text::path(path);
    let Ok(Superblock { array, members, .. }) = raid::read_member(disk).with_context(|| at.clone())?.superblock else {
        return Ok(());
    };
    bail!(
        "{at} does not hold a volume by itself: it is one of the {members} disks of the array {array} (Linux md RAID 0). `nbdcrypt up` opens \
         the array if all of them are listed as `devices` under [volume]. If the array is of no use any more, remove its mark \
         with `wipefs --all --types linux_raid_member {at}`"
    )
}

/// Checks that each disk of an ephemeral volume may become a member of a new array: that it is blank, or holds what such a volume
/// has left. Returns what they hold at their ends if one of them is not blank. `broken` says why the disks are no array, if some
/// are members of one.
///
/// With [`Lifetime::OfDisks`], the array is given up only if at least one of the disks is not a member of an ephemeral array: that
/// disk has taken the place of a lost one. If all disks are members, the missing disk may be late, or the configuration may name
/// the wrong disks.
fn replaceable(
    disks: &DataDisks,
    members: &[Arc<dyn BlockStore>],
    lifetime: Lifetime,
    broken: Option<OpenError>,
) -> Result<Option<Vec<Content>>> {
    let (mut is_blank, mut is_lost) = (true, false);
    let mut ends = Vec::with_capacity(members.len());
    for (path, member) in disks.paths().zip(members) {
        let look = Look::All(&[]);
        let content = look.at(&**member)?;
        let left = ephemeral::leftover(&**member, &content, look)?;
        if left.is_none() && !matches!(content, Content::Blank | Content::Unfinished) {
            // Such an array is whole again once its missing disk is back, so the text must not say how to empty this one.
            if let Some(error) =
                broken.filter(|_| matches!(raid::read_member(&**member), Ok(Found { superblock: Ok(_), .. })))
            {
                let member = text::path(path);
                return Err(explained(disks, error).context(format!(
                    "no new array is made: {member} belongs to an array that is not an ephemeral volume's"
                )));
            }
            let refusal = content::refusal(&DataDisks::one(path), &**member, &content);
            return Err(refusal.context(format!(
                "{disks} is not a complete array, so a new one would be made, but not all of its disks are blank or left by an \
                 ephemeral volume"
            )));
        }
        is_blank &= left.is_none();
        is_lost |= left != Some(Leftover::Member);
        ends.push(Look::Ends.at(&**member)?);
    }
    match broken {
        Some(error) if lifetime == Lifetime::OfDisks && !is_lost => Err(explained(disks, error)),
        _ => Ok((!is_blank).then_some(ends)),
    }
}

/// Checks that each disk may become a member of a new array.
fn refuse_unless_free(disks: &DataDisks, members: &[Arc<dyn BlockStore>], look: Look<'_>) -> Result<()> {
    for (path, member) in disks.paths().zip(members) {
        match look.at(&**member)? {
            Content::Blank | Content::Unfinished => {}
            content => {
                return Err(content::refusal(&DataDisks::one(path), &**member, &content).context(format!(
                    "{disks} is not an array, so a new array would be made, but not all of them are blank"
                )));
            }
        }
    }
    Ok(())
}

fn explained(disks: &DataDisks, error: OpenError) -> anyhow::Error {
    let disk = match &error {
        OpenError::Read { disk, .. } => Some(*disk),
        OpenError::Array(error) => error.disk(),
    };
    let place = disk.and_then(|disk| disks.paths().nth(disk)).map(text::path);
    // One sentence names both: a cause that only repeats a path would not be shown.
    let because = place.map(|place| format!(" because of {place}")).unwrap_or_default();
    anyhow!(error).context(format!("{disks} cannot be opened{because}"))
}

fn named(disks: &DataDisks, error: PendingError) -> anyhow::Error {
    let place = disks.paths().nth(error.disk()).map(text::path).unwrap_or_default();
    anyhow!(error).context(place)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use engine::store::{FaultyStore, MemoryStore, Operation};

    use super::*;

    const LEN: usize = 8 << 20;

    fn disks(count: usize) -> (DataDisks, Vec<Arc<dyn BlockStore>>) {
        let paths = (0..count).map(|n| format!("/dev/d{n}").into());
        let members = (0..count).map(|_| Arc::new(MemoryStore::zeroed(LEN)) as Arc<dyn BlockStore>).collect();
        (DataDisks::new(paths).unwrap(), members)
    }

    fn open(disks: &DataDisks, members: &[Arc<dyn BlockStore>]) -> Result<OpenArray> {
        open_as(Lifetime::Lasting, disks, members)
    }

    fn open_as(lifetime: Lifetime, disks: &DataDisks, members: &[Arc<dyn BlockStore>]) -> Result<OpenArray> {
        let mut random = |bytes: &mut [u8]| crate::machine::random::fill(bytes);
        let wanted = Wanted { name: "scratch", chunk: 64 << 10, now: 1, lifetime };
        OpenArray::open(disks, members.to_vec(), &wanted, &mut random)
    }

    fn made(disks: &DataDisks, members: &[Arc<dyn BlockStore>]) {
        let mut array = open(disks, members).unwrap();
        array.begin(disks).unwrap();
        array.store.write_at(&[5; 4096], 0).unwrap();
        array.write(disks).unwrap();
        array.complete(disks);
    }

    #[test]
    fn a_member_that_does_not_belong_is_named_and_nothing_is_written() {
        let (names, members) = disks(2);
        made(&names, &members);
        let (_, others) = disks(2);
        made(&names, &others);
        let blank: Arc<dyn BlockStore> = Arc::new(MemoryStore::zeroed(LEN));
        let small: Arc<dyn BlockStore> = Arc::new(MemoryStore::zeroed(4 << 20));
        let mut superblock = [0; 4096];
        members[1].read_at(&mut superblock, 4096).unwrap();
        small.write_at(&superblock, 4096).unwrap();
        let ext4: Arc<dyn BlockStore> = Arc::new(MemoryStore::zeroed(LEN));
        ext4.write_at(&[0x53, 0xef], 1024 + 0x38).unwrap();
        for (second, says) in [
            (&blank, "/dev/d1: there is no md superblock"),
            (&others[1], "/dev/d1: it belongs to the array"),
            (&members[0], "/dev/d1: it has the same role 0"),
            (&small, "/dev/d1: the array's data on it ends at"),
            (&ext4, "/dev/d1: there is no md superblock"),
        ] {
            let pair = [Arc::clone(&members[0]), Arc::clone(second)];
            let error = format!("{:#}", open(&names, &pair).err().unwrap());
            assert!(error.contains(says) && error.contains("the array of /dev/d0 and /dev/d1"), "{error}");
        }
        let error = format!("{:#}", open(&names, &[blank, ext4]).err().unwrap());
        assert!(error.contains("/dev/d1 is not blank: it holds ext2 filesystem"), "{error}");
        let one = DataDisks::one("/dev/d0");
        let error = format!("{:#}", open(&one, &members[..1]).err().unwrap());
        assert!(error.contains("only 1 of the array's 2 members are given (missing roles: 1)"), "{error}");
    }

    #[test]
    fn members_are_found_in_any_order() {
        let (names, members) = disks(3);
        made(&names, &members);
        let turned = [Arc::clone(&members[2]), Arc::clone(&members[0]), Arc::clone(&members[1])];
        let array = open(&names, &turned).unwrap();
        let mut data = [0; 4096];
        array.store.read_at(&mut data, 0).unwrap();
        assert!(array.pending.is_none() && data == [5; 4096]);
    }

    /// Disks that all fail after some number of writes.
    fn failing(members: &[Arc<dyn BlockStore>], writes: u32) -> Vec<Arc<dyn BlockStore>> {
        let left = Arc::new(AtomicU32::new(writes));
        let failing = |member: &Arc<dyn BlockStore>| {
            let (left, memory) = (Arc::clone(&left), MemoryStore::zeroed(LEN));
            let mut bytes = vec![0; LEN];
            member.read_at(&mut bytes, 0).unwrap();
            memory.write_at(&bytes, 0).unwrap();
            let store = FaultyStore::new(memory, move |operation| {
                let is_write = matches!(operation, Operation::Write(..));
                let fails = is_write
                    && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err();
                fails.then_some(std::io::ErrorKind::NotConnected)
            });
            Arc::new(store) as Arc<dyn BlockStore>
        };
        members.iter().map(failing).collect()
    }

    /// A start that replaces an array with a lost disk can be repeated, wherever it was cut off.
    #[test]
    fn an_ephemeral_array_can_be_made_again_after_every_write() {
        for lifetime in [Lifetime::OfDisks, Lifetime::OfServer] {
            let (names, mut members) = disks(3);
            let mut array = open_as(lifetime, &names, &members).unwrap();
            array.begin(&names).unwrap();
            array.write(&names).unwrap();
            array.complete(&names);
            members[1] = Arc::new(MemoryStore::zeroed(LEN));
            assert!(open(&names, &members).is_err(), "an array that lasts is not made again");
            for writes in 0.. {
                let cut = failing(&members, writes);
                let mut array = open_as(lifetime, &names, &cut).unwrap();
                assert!(array.is_replaced());
                let made = array.begin(&names).and_then(|()| array.write(&names));
                if made.is_ok() {
                    array.complete(&names);
                }
                let again = open_as(lifetime, &names, &failing(&cut, u32::MAX));
                let again = again.unwrap_or_else(|error| panic!("{lifetime:?}, after {writes} writes: {error:#}"));
                assert!(made.is_err() || again.pending.is_none());
                if made.is_ok() {
                    assert!(writes >= 6, "{writes}");
                    break;
                }
            }
        }
    }

    #[test]
    fn only_a_lost_disk_gives_up_what_a_key_can_open() {
        let (names, members) = disks(2);
        let lasting = |members: &[Arc<dyn BlockStore>]| open_as(Lifetime::OfDisks, &names, members);
        let made = |members: &[Arc<dyn BlockStore>]| {
            let mut array = lasting(members).unwrap();
            array.begin(&names).unwrap();
            array.write(&names).unwrap();
            array.complete(&names);
        };
        made(&members);
        let (_, others) = disks(2);
        made(&others);
        let mixed = [Arc::clone(&members[0]), Arc::clone(&others[1])];
        let error = format!("{:#}", lasting(&mixed).err().unwrap());
        assert!(error.contains("/dev/d1: it belongs to the array"), "{error}");
        assert!(open_as(Lifetime::OfServer, &names, &mixed).unwrap().is_replaced());
        let mut noise = vec![0; LEN];
        crate::machine::random::fill(&mut noise).unwrap();
        for lost in [vec![0; LEN], noise] {
            let lost = [Arc::clone(&members[0]), Arc::new(MemoryStore::from(lost)) as Arc<dyn BlockStore>];
            assert!(lasting(&lost).unwrap().is_replaced());
            // Another program takes a disk before it is locked.
            let array = lasting(&lost).unwrap();
            lost[1].write_at(&[0x53, 0xef], 1024 + 0x38).unwrap();
            let error = format!("{:#}", array.begin(&names).unwrap_err());
            assert!(error.contains("/dev/d1 was written to at the same time"), "{error}");
            let mut first = [0; 512];
            lost[0].read_at(&mut first, 0).unwrap();
            assert_eq!(first, [0; 512]);
        }
    }

    #[test]
    fn an_array_that_lasts_is_not_to_be_emptied() {
        let (names, members) = disks(2);
        let mut array = open(&names, &members).unwrap();
        array.begin(&names).unwrap();
        array.write(&names).unwrap();
        array.complete(&names);
        let lost = [Arc::clone(&members[0]), Arc::new(MemoryStore::zeroed(LEN)) as Arc<dyn BlockStore>];
        for lifetime in [Lifetime::OfDisks, Lifetime::OfServer] {
            let error = format!("{:#}", open_as(lifetime, &names, &lost).err().unwrap());
            assert!(error.contains("/dev/d0 belongs to an array that is not an ephemeral volume's"), "{error}");
            assert!(error.contains("/dev/d1") && !error.contains("empty it"), "{error}");
        }
    }

    #[test]
    fn a_disk_that_was_written_to_meanwhile_is_kept() {
        let (names, members) = disks(2);
        let array = open(&names, &members).unwrap();
        members[1].write_at(&[0x53, 0xef], 1024 + 0x38).unwrap();
        let error = format!("{:#}", array.begin(&names).unwrap_err());
        assert!(error.contains("/dev/d1 is not blank"), "{error}");
        let mut first = [0; 512];
        members[0].read_at(&mut first, 0).unwrap();
        assert_eq!(first, [0; 512]);
    }
}

//! Striping as Linux does it (md RAID 0): which byte of an array lies on which byte of which member.
//!
//! The array is cut into chunks. The chunks go to the members in turn. If members differ in size, the array has several zones.
//! The first zone uses all members up to the size of the smallest one. Each further zone uses the members that are larger, up to
//! the next size:
//!
//! ```text
//!   member 0   0 2 4 │
//!   member 1   1 3 5 │ 6 7 8        chunks 0 to 5 are zone 0, chunks 6 to 8 are zone 1
//! ```
//!
//! Source: `create_strip_zones` and `map_sector` of Linux, drivers/md/raid0.c.

/// Which member holds the first chunk of a zone after the first one. Linux has two answers, because Linux 3.14 changed it by
/// mistake. They differ only if an array has several zones, and a zone after the first one has several members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZoneLayout {
    /// Chunks are counted from the start of the array (`RAID0_ORIG_LAYOUT`, 1).
    Original,
    /// Chunks are counted from the start of the zone (`RAID0_ALT_MULTIZONE_LAYOUT`, 2).
    Alternate,
}

/// The part of a member that holds data, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberSpace {
    /// Bytes from the start of the member to its data.
    pub offset: u64,
    /// The length of the data. What is left after the last whole chunk is not used.
    pub len: u64,
}

/// Why members do not form a stripe set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StripedError {
    /// There is no member.
    #[error("an array needs at least one member")]
    NoMember,
    /// The chunk size is not supported. Linux also has chunks that are no power of two.
    #[error("chunks of {0} bytes are not supported here, only powers of two from 4096 bytes to 1 GiB")]
    Chunk(u64),
    /// A member has no room for one chunk.
    #[error("member {member} has room for {len} bytes, which is less than one chunk")]
    MemberTooSmall {
        /// The member's place in the list.
        member: usize,
        /// The length of its data in bytes.
        len: u64,
    },
    /// The members' sizes add up to more than 2⁶⁴ bytes, or a member's data ends beyond byte 2⁶⁴.
    #[error("the members' sizes are larger than any disk")]
    Overflow,
    /// The members differ in size, and the array does not say which of Linux's two layouts it has.
    #[error("the members differ in size, and the array does not say how its zones are laid out")]
    UnknownZoneLayout,
}

/// A contiguous part of an array that lies on one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The member's place in the list.
    pub member: usize,
    /// The first byte, counted from the start of the member.
    pub offset: u64,
    /// The length in bytes.
    pub len: u64,
}

/// A part of the array in which the same members take turns.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Zone {
    /// The first byte of the array that lies in the zone.
    start: u64,
    /// The first byte of the array after the zone.
    end: u64,
    /// Where the zone starts on each of its members, in bytes from the start of the member's data.
    member_start: u64,
    /// The members that take turns, in the array's order.
    members: Vec<usize>,
    /// The chunk of the array, or of the zone, that lies on the first of these members is a multiple of their number. This
    /// is added to the chunk's number within the zone.
    first_turn: u64,
}

/// The map of an array: a value, without input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Striped {
    chunk: u64,
    members: Vec<MemberSpace>,
    zones: Vec<Zone>,
}

impl Striped {
    /// The smallest chunk in bytes.
    pub const MIN_CHUNK: u64 = 4096;
    /// The largest chunk in bytes. mdadm counts a chunk's bytes in 31 bits.
    pub const MAX_CHUNK: u64 = 1 << 30;

    /// Returns the map of an array of these members, in the order of their roles. `layout` is what the array says about its
    /// zones, if it says anything.
    ///
    /// # Errors
    /// [`StripedError`] says what is wrong with the members.
    pub fn new(chunk: u64, members: &[MemberSpace], layout: Option<ZoneLayout>) -> Result<Self, StripedError> {
        if !chunk.is_power_of_two() || !(Self::MIN_CHUNK..=Self::MAX_CHUNK).contains(&chunk) {
            return Err(StripedError::Chunk(chunk));
        }
        let mut used = Vec::with_capacity(members.len());
        let mut total = 0u64;
        for (member, space) in members.iter().enumerate() {
            let len = space.len - space.len % chunk;
            if len == 0 {
                return Err(StripedError::MemberTooSmall { member, len: space.len });
            }
            space.offset.checked_add(len).ok_or(StripedError::Overflow)?;
            total = total.checked_add(len).ok_or(StripedError::Overflow)?;
            used.push(MemberSpace { offset: space.offset, len });
        }
        if used.is_empty() {
            return Err(StripedError::NoMember);
        }
        let zones = zones(chunk, &used, layout)?;
        debug_assert_eq!(zones.last().map(|zone| zone.end), Some(total));
        Ok(Self { chunk, members: used, zones })
    }

    /// Returns the length of the array in bytes.
    pub fn len(&self) -> u64 {
        self.zones.last().map_or(0, |zone| zone.end)
    }

    /// Returns `false`: each member has at least one chunk.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the chunk size in bytes.
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Returns the members with what is used of them, in the order of their roles.
    pub fn members(&self) -> &[MemberSpace] {
        &self.members
    }

    /// Returns whether the members differ in the number of their chunks.
    pub fn has_several_zones(&self) -> bool {
        self.zones.len() > 1
    }

    /// Returns where the byte at `offset` lies, and how many bytes from there on lie beside it up to the end of its chunk.
    /// Returns `None` at and after the end of the array.
    pub fn locate(&self, offset: u64) -> Option<Piece> {
        // Nearly every array has one zone.
        let zone = self.zones.iter().find(|zone| offset < zone.end)?;
        let in_zone = offset - zone.start;
        let (turn, in_chunk) = (in_zone / self.chunk, in_zone % self.chunk);
        let count = zone.members.len() as u64;
        let place = usize::try_from((turn + zone.first_turn) % count).ok()?;
        let member = *zone.members.get(place)?;
        let on_member = zone.member_start + turn / count * self.chunk + in_chunk;
        Some(Piece { member, offset: self.members[member].offset + on_member, len: self.chunk - in_chunk })
    }

    /// Returns the pieces of the `len` bytes at `offset`, in the order of the array. Stops at the end of the array.
    pub fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + '_ {
        let end = offset.saturating_add(len).min(self.len());
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let mut piece = self.locate(at)?;
            piece.len = piece.len.min(end - at);
            at += piece.len;
            Some(piece)
        })
    }

    /// Returns the contiguous parts of the members that the `len` bytes at `offset` cover. Each member's chunks lie beside each
    /// other, so there are at most as many parts as there are members in each zone. They are in no order.
    pub fn extents(&self, offset: u64, len: u64) -> Vec<Piece> {
        let mut extents = Vec::new();
        let end = offset.saturating_add(len).min(self.len());
        for zone in &self.zones {
            let (from, to) = (offset.max(zone.start), end.min(zone.end));
            if from < to {
                self.extents_in(zone, from, to, &mut extents);
            }
        }
        extents
    }

    /// Adds what the range from `from` to `to`, which lies in the zone, covers of each of the zone's members.
    fn extents_in(&self, zone: &Zone, from: u64, to: u64, extents: &mut Vec<Piece>) {
        let count = zone.members.len() as u64;
        let (first, last) = ((from - zone.start) / self.chunk, (to - 1 - zone.start) / self.chunk);
        // The first chunk of each member lies within one round from the start of the range, its last chunk within one round
        // before the end.
        for turn in first..=last.min(first + count - 1) {
            let final_turn = last - (last - turn) % count;
            let begin = from.max(zone.start + turn * self.chunk);
            let finish = to.min(zone.start + (final_turn + 1) * self.chunk);
            let (Some(start), Some(end)) = (self.locate(begin), self.locate(finish - 1)) else { return };
            debug_assert_eq!(start.member, end.member);
            extents.push(Piece { member: start.member, offset: start.offset, len: end.offset + 1 - start.offset });
        }
    }
}

/// Returns the zones of members whose lengths are multiples of the chunk.
fn zones(chunk: u64, members: &[MemberSpace], layout: Option<ZoneLayout>) -> Result<Vec<Zone>, StripedError> {
    let mut zones: Vec<Zone> = Vec::new();
    let (mut start, mut member_start) = (0, 0);
    loop {
        let larger: Vec<usize> = (0..members.len()).filter(|member| members[*member].len > member_start).collect();
        let Some(smallest) = larger.iter().map(|member| members[*member].len).min() else { return Ok(zones) };
        let count = larger.len() as u64;
        let first_turn = match (zones.is_empty() || count == 1, layout) {
            (true, _) | (_, Some(ZoneLayout::Alternate)) => 0,
            (_, Some(ZoneLayout::Original)) => start / chunk % count,
            (_, None) => return Err(StripedError::UnknownZoneLayout),
        };
        let end = start + (smallest - member_start) * count;
        zones.push(Zone { start, end, member_start, members: larger, first_turn });
        (start, member_start) = (end, smallest);
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test data is small")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNK: u64 = 4096;

    fn space(chunks: u64) -> MemberSpace {
        MemberSpace { offset: 1 << 20, len: chunks * CHUNK }
    }

    /// Linux's own calculation, chunk by chunk: raid0.c, `raid0_make_request` and `map_sector`. Returns the member and the chunk
    /// of the member.
    fn as_linux(sizes: &[u64], layout: ZoneLayout) -> Vec<(usize, u64)> {
        // `strip_zone`: the end of the zone in the array, where it starts on its members, and its members.
        let mut zones: Vec<(u64, u64, Vec<usize>)> = Vec::new();
        let mut smallest = *sizes.iter().min().unwrap();
        zones.push((smallest * sizes.len() as u64, 0, (0..sizes.len()).collect()));
        while smallest < *sizes.iter().max().unwrap() {
            let dev_start = smallest;
            let devices: Vec<usize> = (0..sizes.len()).filter(|device| sizes[*device] > dev_start).collect();
            smallest = devices.iter().map(|device| sizes[*device]).min().unwrap();
            let end = zones.last().unwrap().0 + (smallest - dev_start) * devices.len() as u64;
            zones.push((end, dev_start, devices));
        }
        let total: u64 = sizes.iter().sum();
        (0..total)
            .map(|chunk| {
                let index = zones.iter().position(|zone| chunk < zone.0).unwrap();
                let (_, dev_start, devices) = &zones[index];
                let in_zone = chunk - if index == 0 { 0 } else { zones[index - 1].0 };
                let nb_dev = devices.len() as u64;
                let counted = if layout == ZoneLayout::Original { chunk } else { in_zone };
                (devices[(counted % nb_dev) as usize], in_zone / nb_dev + dev_start)
            })
            .collect()
    }

    #[test]
    fn equal_members_take_turns() {
        let map = Striped::new(CHUNK, &[space(2), space(2)], None).unwrap();
        assert_eq!(map.len(), 4 * CHUNK);
        let pieces: Vec<_> =
            map.pieces(100, 2 * CHUNK).map(|piece| (piece.member, piece.offset - (1 << 20), piece.len)).collect();
        assert_eq!(pieces, [(0, 100, CHUNK - 100), (1, 0, CHUNK), (0, CHUNK, 100)]);
        assert_eq!(map.locate(4 * CHUNK), None);
        assert_eq!(map.pieces(3 * CHUNK, u64::MAX).map(|piece| piece.len).sum::<u64>(), CHUNK);
    }

    #[test]
    fn what_is_no_array_is_refused() {
        assert_eq!(Striped::new(CHUNK, &[], None), Err(StripedError::NoMember));
        for chunk in [0, 512, 4097, 12288, 1 << 31] {
            assert_eq!(Striped::new(chunk, &[space(4)], None), Err(StripedError::Chunk(chunk)));
        }
        let small = MemberSpace { offset: 0, len: CHUNK - 1 };
        let error = StripedError::MemberTooSmall { member: 1, len: CHUNK - 1 };
        assert_eq!(Striped::new(CHUNK, &[space(1), small], None), Err(error));
        let huge = MemberSpace { offset: 0, len: 1 << 63 };
        assert_eq!(Striped::new(CHUNK, &[huge, huge, huge], None), Err(StripedError::Overflow));
        let far = MemberSpace { offset: u64::MAX - 100, len: CHUNK };
        assert_eq!(Striped::new(CHUNK, &[far], None), Err(StripedError::Overflow));
        // Three sizes make a second zone of two members, whose order must be known. One larger member has no order.
        let sizes = [space(1), space(2), space(2)];
        assert_eq!(Striped::new(CHUNK, &sizes, None), Err(StripedError::UnknownZoneLayout));
        assert!(Striped::new(CHUNK, &[space(1), space(1), space(2)], None).is_ok());
    }

    proptest! {
        #[test]
        fn the_map_is_that_of_linux(
            sizes in prop::collection::vec(1u64..9, 1..7),
            original: bool,
            rest in 0..CHUNK,
        ) {
            let layout = if original { ZoneLayout::Original } else { ZoneLayout::Alternate };
            let members: Vec<_> = sizes
                .iter()
                .enumerate()
                .map(|(n, chunks)| MemberSpace { offset: n as u64 * 512, len: chunks * CHUNK + rest })
                .collect();
            let map = Striped::new(CHUNK, &members, Some(layout)).unwrap();
            let model = as_linux(&sizes, layout);
            prop_assert_eq!(map.len(), model.len() as u64 * CHUNK);
            for (chunk, (member, on_member)) in model.iter().enumerate() {
                let at = chunk as u64 * CHUNK;
                let expected = *member as u64 * 512 + on_member * CHUNK;
                let piece = Piece { member: *member, offset: expected, len: CHUNK };
                prop_assert_eq!(map.locate(at), Some(piece));
                let piece = Piece { member: *member, offset: expected + rest, len: CHUNK - rest };
                prop_assert_eq!(map.locate(at + rest), Some(piece));
            }
        }

        #[test]
        fn extents_cover_the_same_bytes_as_pieces(
            sizes in prop::collection::vec(1u64..9, 1..6),
            original: bool,
            ends in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
        ) {
            let layout = if original { ZoneLayout::Original } else { ZoneLayout::Alternate };
            let members: Vec<_> = sizes.iter().map(|chunks| space(*chunks)).collect();
            let map = Striped::new(CHUNK, &members, Some(layout)).unwrap();
            let (a, b) = (ends.0.index(map.len() as usize + 1) as u64, ends.1.index(map.len() as usize + 1) as u64);
            let (from, len) = (a.min(b), a.max(b) - a.min(b));
            // Each extent lies within one member. Joining the pieces member by member gives the same extents.
            let mut joined: Vec<Piece> = Vec::new();
            let mut pieces: Vec<_> = map.pieces(from, len).collect();
            pieces.sort_by_key(|piece| (piece.member, piece.offset));
            for piece in pieces {
                match joined.last_mut() {
                    Some(last) if last.member == piece.member && last.offset + last.len == piece.offset => last.len += piece.len,
                    _ => joined.push(piece),
                }
            }
            let mut extents = map.extents(from, len);
            extents.sort_by_key(|piece| (piece.member, piece.offset));
            let mut merged: Vec<Piece> = Vec::new();
            for piece in extents {
                match merged.last_mut() {
                    Some(last) if last.member == piece.member && last.offset + last.len == piece.offset => last.len += piece.len,
                    _ => merged.push(piece),
                }
            }
            prop_assert_eq!(merged, joined);
        }
    }
}

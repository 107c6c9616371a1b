//! The binary header (4096 bytes, big-endian), and the two copies of binary header and JSON (LUKS2 specification, section 2.1).

use zerocopy::byteorder::big_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BrokenCopy, Header, HeaderCopy, Label, Metadata, RefusedCopy};
use crate::luks::hash::HashAlgorithm;
use crate::luks::{HeaderUuid, LuksError};
use crate::signature::is_unfinished;
use crate::signature::{self, Kind, LUKS_MAGIC};
use crate::store::{BlockStore, read_unaligned};

/// The length of the binary header in bytes. The JSON follows it.
pub(super) const BINARY_LEN: usize = 4096;
/// The possible sizes in bytes of a binary header with its JSON, and so the possible offsets of the secondary copy.
pub(super) const HEADER_SIZES: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];
/// The length of the salt in bytes. The salt makes each copy's checksum different.
pub(super) const SALT_LEN: usize = 64;

const MAGIC_PRIMARY: [u8; 6] = LUKS_MAGIC;
const MAGIC_SECONDARY: [u8; 6] = *b"SKUL\xba\xbe";
const VERSION: u16 = 2;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_LEN: usize = 64;

/// One of the two copies of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copy {
    Primary,
    /// The secondary copy, at this byte of the disk.
    Secondary(u64),
}

/// The contents of the binary header that both copies have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BinaryHeader {
    /// The size of one copy in bytes, including the JSON: 16 KiB to 4 MiB.
    pub header_size: u64,
    /// The sequence number, which counts the updates. The copy with the higher number is newer.
    pub sequence_id: u64,
    /// A label. Empty means none.
    pub label: Label,
    /// A second label. Empty means none.
    pub subsystem: Label,
    /// The hash of the checksum.
    pub checksum_algorithm: HashAlgorithm,
    /// The UUID of the volume.
    pub uuid: HeaderUuid,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 6],
    version: U16,
    hdr_size: U64,
    seqid: U64,
    label: [u8; 48],
    csum_alg: [u8; 32],
    salt: [u8; SALT_LEN],
    uuid: [u8; 40],
    subsystem: [u8; 48],
    hdr_offset: U64,
    padding: [u8; 184],
    csum: [u8; CHECKSUM_LEN],
}

const _: () = assert!(size_of::<RawHeader>() == 512 && std::mem::offset_of!(RawHeader, csum) == CHECKSUM_AT);

/// What was found in the place of one copy of the header.
#[derive(Debug)]
pub(super) enum Found {
    /// Not a complete copy: there is none, it cannot be read, or its checksum is wrong.
    Broken(LuksError),
    /// A copy with a correct checksum, so a program wrote it on purpose. But its contents are refused.
    Refused {
        /// Decides which copy is newer.
        sequence_id: u64,
        /// Where the secondary copy should be, according to this copy.
        header_size: u64,
        /// Why the contents are refused.
        error: LuksError,
    },
    /// A copy with a correct checksum and valid contents.
    Whole(Box<Whole>),
}

/// A copy of the header that has been checked completely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    pub(super) header: Header,
    /// The JSON area, including the zeros after the text.
    pub(super) area: Vec<u8>,
}

impl Whole {
    /// Returns whether both copies have the same contents, however their JSON is formatted.
    pub(super) fn says_the_same_as(&self, other: &Self) -> bool {
        let facts = |it: &Self| {
            let binary = &it.header.binary;
            (binary.header_size, binary.label.clone(), binary.subsystem.clone(), binary.uuid.clone())
        };
        facts(self) == facts(other) && self.header.metadata == other.header.metadata
    }
}

/// Both copies of a header. Each is checked completely before one of them is chosen.
#[derive(Debug)]
pub(super) struct Copies {
    pub(super) primary: Found,
    pub(super) secondary: Found,
}

impl Copies {
    /// Reads both copies and checks all of their contents.
    pub(super) fn read(store: &dyn BlockStore) -> Self {
        let primary = read_copy(store, Copy::Primary);
        let stated = match &primary {
            Found::Whole(whole) => Some(whole.header.binary.header_size),
            Found::Refused { header_size, .. } => Some(*header_size),
            Found::Broken(LuksError::Unfinished) => {
                return Self { primary, secondary: Found::Broken(LuksError::Unfinished) };
            }
            Found::Broken(_) => None,
        };
        // The primary copy says where the secondary copy is, so that offset is tried first. The primary copy may be wrong about
        // this unless it is whole.
        let is_trusted = matches!(primary, Found::Whole(_));
        let others = HEADER_SIZES.into_iter().filter(|size| !is_trusted && Some(*size) != stated);
        let mut secondary = Found::Broken(LuksError::NotLuks);
        for offset in stated.into_iter().chain(others) {
            let found = read_copy(store, Copy::Secondary(offset));
            let is_better = match (&secondary, &found) {
                (_, Found::Whole(_)) | (Found::Broken(_), Found::Refused { .. }) => true,
                (Found::Broken(LuksError::NotLuks), Found::Broken(_)) => is_trusted,
                _ => false,
            };
            if is_better {
                secondary = found;
            }
            if matches!(secondary, Found::Whole(_)) {
                break;
            }
        }
        Self { primary, secondary }
    }

    /// Returns the copy that is refused, if the other copy is whole.
    pub(super) fn refused(&self) -> Option<RefusedCopy> {
        let (copy, refused, whole) = match (&self.primary, &self.secondary) {
            (refused @ Found::Refused { .. }, Found::Whole(whole)) => (HeaderCopy::Primary, refused, whole),
            (Found::Whole(whole), refused @ Found::Refused { .. }) => (HeaderCopy::Secondary, refused, whole),
            _ => return None,
        };
        let Found::Refused { sequence_id, error, .. } = refused else { return None };
        let (sequence_id, whole_sequence_id) = (*sequence_id, whole.header.binary.sequence_id);
        let reason = match error {
            // The header as a whole is not corrupt, because the other copy is valid.
            LuksError::Corrupt { field, found } => format!("{field} is {found}"),
            error => error.to_string(),
        };
        Some(RefusedCopy { copy, sequence_id, whole_sequence_id, reason })
    }

    /// Returns the copy that is broken or missing, if the other copy is whole.
    pub(super) fn broken(&self) -> Option<BrokenCopy> {
        let (copy, error) = match (&self.primary, &self.secondary) {
            (Found::Broken(error), Found::Whole(_)) => (HeaderCopy::Primary, error),
            (Found::Whole(_), Found::Broken(error)) => (HeaderCopy::Secondary, error),
            _ => return None,
        };
        let reason = match error {
            // The texts of these errors are about the whole header. Here only one copy is broken.
            LuksError::Corrupt { field, found } => format!("{field} is {found}"),
            LuksError::NotLuks => "there is no LUKS header in its place".to_owned(),
            error => error.to_string(),
        };
        Some(BrokenCopy { copy, reason })
    }

    /// Returns the whole copies, the preferred copy first. This is the newer copy, or the primary copy if both are
    /// equally old.
    ///
    /// # Errors
    /// [`LuksError::NotLuks`] if there is no copy. Otherwise the error of the newer copy.
    pub(super) fn whole(self, store: &dyn BlockStore) -> Result<Vec<Whole>, LuksError> {
        match (self.primary, self.secondary) {
            (Found::Whole(primary), Found::Whole(secondary)) => {
                let is_newer = secondary.header.binary.sequence_id > primary.header.binary.sequence_id;
                Ok(if is_newer { vec![*secondary, *primary] } else { vec![*primary, *secondary] })
            }
            (Found::Whole(primary), _) => Ok(vec![*primary]),
            (Found::Broken(LuksError::NotLuks), secondary @ (Found::Whole(_) | Found::Refused { .. })) => {
                // The volume may have been abandoned, and the disk may have a new owner. The remains of the volume must then be
                // ignored.
                if signature::probe(store)?.into_iter().any(|found| found.kind != Kind::Encryption) {
                    return Err(LuksError::NotLuks);
                }
                match secondary {
                    Found::Whole(secondary) => Ok(vec![*secondary]),
                    Found::Refused { error, .. } | Found::Broken(error) => Err(error),
                }
            }
            (_, Found::Whole(secondary)) => Ok(vec![*secondary]),
            (
                Found::Refused { sequence_id: first, error, .. },
                Found::Refused { sequence_id: second, error: newer, .. },
            ) => Err(if second > first { newer } else { error }),
            (Found::Refused { error, .. }, Found::Broken(_)) | (Found::Broken(_), Found::Refused { error, .. }) => {
                Err(error)
            }
            (Found::Broken(error), Found::Broken(_)) => Err(error),
        }
    }
}

pub(super) fn read_copy(store: &dyn BlockStore, copy: Copy) -> Found {
    let offset = copy.offset();
    let mut start = [0; BINARY_LEN];
    if offset.saturating_add(BINARY_LEN as u64) > store.len() {
        return Found::Broken(LuksError::NotLuks);
    }
    if let Err(error) = read_unaligned(store, &mut start, offset) {
        return Found::Broken(error.into());
    }
    let (raw, checksum_algorithm) = match RawHeader::recognise(&start, copy) {
        Ok(recognised) => recognised,
        Err(error) => return Found::Broken(error),
    };
    let (header_size, sequence_id) = (raw.hdr_size.get(), raw.seqid.get());
    let end = offset + header_size;
    if end > store.len() {
        return Found::Broken(LuksError::TooSmall { needed: end, available: store.len() });
    }
    // No truncation: a header has at most 4 MiB.
    let mut bytes = vec![0; usize::try_from(header_size).unwrap_or(BINARY_LEN)];
    if let Err(error) = read_unaligned(store, &mut bytes, offset) {
        return Found::Broken(error.into());
    }
    if !verify(&mut bytes, checksum_algorithm) {
        return Found::Broken(LuksError::corrupt("csum", "not the checksum of the header"));
    }
    let area = bytes.split_off(BINARY_LEN);
    match check(raw, checksum_algorithm, copy, &area, store.len()) {
        Ok(header) => Found::Whole(Box::new(Whole { header, area })),
        Err(error) => Found::Refused { sequence_id, header_size, error },
    }
}

/// Checks all contents of a copy. Only this function decides whether they are valid.
fn check(
    raw: &RawHeader,
    checksum_algorithm: HashAlgorithm,
    copy: Copy,
    area: &[u8],
    available: u64,
) -> Result<Header, LuksError> {
    let binary = BinaryHeader::parse(raw, checksum_algorithm, copy)?;
    let metadata = Metadata::parse(&binary, area)?;
    let needed = 2 * binary.header_size + metadata.config.keyslots_size;
    if needed > available {
        return Err(LuksError::TooSmall { needed, available });
    }
    Ok(Header { binary, metadata })
}

impl Copy {
    pub(super) fn offset(self) -> u64 {
        match self {
            Self::Primary => 0,
            Self::Secondary(offset) => offset,
        }
    }
}

impl RawHeader {
    /// Recognises a copy by the fields that are needed to verify its checksum: magic, version, size and checksum algorithm.
    fn recognise(bytes: &[u8], copy: Copy) -> Result<(&Self, HashAlgorithm), LuksError> {
        let magic = match copy {
            Copy::Primary => MAGIC_PRIMARY,
            Copy::Secondary(_) => MAGIC_SECONDARY,
        };
        if is_unfinished(bytes) {
            return Err(LuksError::Unfinished);
        }
        let Some((raw, _)) = Self::ref_from_prefix(bytes).ok().filter(|(raw, _)| raw.magic == magic) else {
            return Err(LuksError::NotLuks);
        };
        if raw.version.get() != VERSION {
            return Err(LuksError::Version(raw.version.get()));
        }
        let header_size = raw.hdr_size.get();
        let [least, .., most] = HEADER_SIZES;
        if !(least..=most).contains(&header_size) {
            return Err(LuksError::corrupt("hdr_size", header_size.to_string()));
        }
        let name = text("csum_alg", &raw.csum_alg)?;
        let algorithm = HashAlgorithm::supported("checksum", &name)?;
        Ok((raw, algorithm))
    }
}

impl BinaryHeader {
    fn parse(raw: &RawHeader, checksum_algorithm: HashAlgorithm, copy: Copy) -> Result<Self, LuksError> {
        let header_size = raw.hdr_size.get();
        if !HEADER_SIZES.contains(&header_size) {
            return Err(LuksError::corrupt("hdr_size", header_size.to_string()));
        }
        if raw.hdr_offset.get() != copy.offset() {
            return Err(LuksError::corrupt("hdr_offset", raw.hdr_offset.get().to_string()));
        }
        if matches!(copy, Copy::Secondary(offset) if offset != header_size) {
            let found = format!("{header_size}, but this copy is at byte {}", copy.offset());
            return Err(LuksError::corrupt("hdr_size", found));
        }
        Ok(Self {
            header_size,
            sequence_id: raw.seqid.get(),
            label: Label::from_field(&raw.label),
            subsystem: Label::from_field(&raw.subsystem),
            checksum_algorithm,
            uuid: HeaderUuid::from_field(&raw.uuid),
        })
    }

    /// Returns one copy, including its checksum. `json` is truncated or padded with zeros to fill the header.
    pub(super) fn to_bytes(&self, copy: Copy, salt: [u8; SALT_LEN], json: &[u8]) -> Vec<u8> {
        let magic = match copy {
            Copy::Primary => MAGIC_PRIMARY,
            Copy::Secondary(_) => MAGIC_SECONDARY,
        };
        let raw = RawHeader {
            magic,
            version: VERSION.into(),
            hdr_size: self.header_size.into(),
            seqid: self.sequence_id.into(),
            label: padded(self.label.as_bytes()),
            csum_alg: padded(self.checksum_algorithm.name().as_bytes()),
            salt,
            uuid: self.uuid.to_field(),
            subsystem: padded(self.subsystem.as_bytes()),
            hdr_offset: copy.offset().into(),
            padding: [0; 184],
            csum: [0; CHECKSUM_LEN],
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.resize(BINARY_LEN, 0);
        bytes.extend_from_slice(json);
        bytes.resize(usize::try_from(self.header_size).unwrap_or(BINARY_LEN), 0);
        let checksum = self.checksum(&bytes);
        bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_LEN].copy_from_slice(&checksum);
        bytes
    }

    /// Returns the checksum of a copy whose checksum field is zero.
    fn checksum(&self, bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
        checksum(self.checksum_algorithm, bytes)
    }
}

/// Returns whether the checksum is correct. Zeroes the checksum field.
fn verify(bytes: &mut [u8], algorithm: HashAlgorithm) -> bool {
    let mut stored = [0; CHECKSUM_LEN];
    stored.copy_from_slice(&bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_LEN]);
    bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_LEN].fill(0);
    let len = algorithm.output_len();
    stored[..len] == checksum(algorithm, bytes)[..len]
}

fn checksum(algorithm: HashAlgorithm, bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
    let mut checksum = [0; CHECKSUM_LEN];
    algorithm.digest_into(&[bytes], &mut checksum[..algorithm.output_len()]);
    checksum
}

/// Reads a text that is padded with NULs.
fn text(field: &str, bytes: &[u8]) -> Result<String, LuksError> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    match std::str::from_utf8(text) {
        Ok(text) if text.len() < bytes.len() && !text.contains(char::is_control) => Ok(text.to_owned()),
        _ => Err(LuksError::corrupt(field, format!("\"{}\", which is not a text", text.escape_ascii()))),
    }
}

/// Returns a text in a field of `N` bytes, with at least one NUL after it.
fn padded<const N: usize>(text: &[u8]) -> [u8; N] {
    let mut field = [0; N];
    field.iter_mut().take(N - 1).zip(text).for_each(|(to, from)| *to = *from);
    field
}

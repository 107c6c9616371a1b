//! The binary header, 4096 bytes big-endian, and the two copies of it with their JSON (LUKS2 specification, section 2.1).

use std::str::FromStr;

use uuid::Uuid;
use zerocopy::byteorder::big_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Label;
use crate::luks::LuksError;
use crate::luks::hash::HashAlgorithm;
use crate::signature::is_unfinished;
use crate::signature::{self, Kind};
use crate::store::{BlockStore, read_unaligned};

/// Bytes of the binary header; the JSON follows.
pub(super) const BINARY_LEN: usize = 4096;
/// Bytes that a header with its JSON may have, and so where the secondary one may begin.
pub(super) const HEADER_SIZES: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];
/// Bytes of the salt, which makes every copy's checksum its own.
pub(super) const SALT_LEN: usize = 64;

const MAGIC_PRIMARY: [u8; 6] = *b"LUKS\xba\xbe";
const MAGIC_SECONDARY: [u8; 6] = *b"SKUL\xba\xbe";
const VERSION: u16 = 2;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_LEN: usize = 64;

/// One of the two copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copy {
    Primary,
    /// It lies at this byte of the disk.
    Secondary(u64),
}

/// What stands in the binary header, apart from what each copy has for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BinaryHeader {
    /// Bytes of one copy, JSON and all: 16 KiB to 4 MiB.
    pub header_size: u64,
    /// Counts the updates; the copy with the higher number is the newer.
    pub sequence_id: u64,
    /// A label, or nothing.
    pub label: Label,
    /// A second label, or nothing.
    pub subsystem: Label,
    /// The hash of the checksum.
    pub checksum_algorithm: HashAlgorithm,
    /// What the volume is called by.
    pub uuid: Uuid,
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

/// A copy's binary header and JSON area, or what is wrong with it.
type Found = Result<(BinaryHeader, Vec<u8>), LuksError>;

/// Reads the copies that are whole, the newer first: what cannot be understood of the first may be in order in the second.
///
/// # Errors
/// [`LuksError::NotLuks`] when neither is there, else what is wrong with the primary one.
pub(super) fn read(store: &dyn BlockStore) -> Result<Vec<(BinaryHeader, Vec<u8>)>, LuksError> {
    let (primary, secondary) = read_copies(store);
    match (primary, secondary) {
        (Ok(primary), Ok(secondary)) if secondary.0.sequence_id > primary.0.sequence_id => Ok(vec![secondary, primary]),
        (Ok(primary), secondary) => Ok([primary].into_iter().chain(secondary).collect()),
        (Err(LuksError::NotLuks), Ok(secondary)) => {
            // The volume may have been given up, and the disk have a new owner: then what is left of it is no volume.
            let new_owner = signature::probe(store)?.into_iter().any(|found| found.kind != Kind::Encryption);
            if new_owner { Err(LuksError::NotLuks) } else { Ok(vec![secondary]) }
        }
        (Err(_), Ok(secondary)) => Ok(vec![secondary]),
        (Err(error), Err(_)) => Err(error),
    }
}

/// The primary copy and the secondary one.
pub(super) fn read_copies(store: &dyn BlockStore) -> (Found, Found) {
    let primary = read_copy(store, Copy::Primary);
    let secondary = match &primary {
        Ok((header, _)) => read_copy(store, Copy::Secondary(header.header_size)),
        Err(LuksError::Unfinished) => Err(LuksError::Unfinished),
        // Its size is not known, so every place is tried.
        Err(_) => HEADER_SIZES
            .iter()
            .map(|size| read_copy(store, Copy::Secondary(*size)))
            .find(Result::is_ok)
            .unwrap_or(Err(LuksError::NotLuks)),
    };
    (primary, secondary)
}

fn read_copy(store: &dyn BlockStore, copy: Copy) -> Result<(BinaryHeader, Vec<u8>), LuksError> {
    let offset = match copy {
        Copy::Primary => 0,
        Copy::Secondary(offset) => offset,
    };
    let mut start = [0; BINARY_LEN];
    if offset + BINARY_LEN as u64 > store.len() {
        return Err(LuksError::NotLuks);
    }
    read_unaligned(store, &mut start, offset)?;
    let header = BinaryHeader::parse(&start, copy)?;
    if offset + header.header_size > store.len() {
        return Err(LuksError::TooSmall { needed: offset + header.header_size, available: store.len() });
    }
    // No truncation: parse allows 4 MiB at most.
    let mut bytes = vec![0; usize::try_from(header.header_size).unwrap_or(BINARY_LEN)];
    read_unaligned(store, &mut bytes, offset)?;
    header.verify(&mut bytes)?;
    Ok((header, bytes.split_off(BINARY_LEN)))
}

impl BinaryHeader {
    pub(super) fn parse(bytes: &[u8], copy: Copy) -> Result<Self, LuksError> {
        let (magic, offset) = match copy {
            Copy::Primary => (MAGIC_PRIMARY, 0),
            Copy::Secondary(offset) => (MAGIC_SECONDARY, offset),
        };
        if is_unfinished(bytes) {
            return Err(LuksError::Unfinished);
        }
        let Some((raw, _)) = RawHeader::ref_from_prefix(bytes).ok().filter(|(raw, _)| raw.magic == magic) else {
            return Err(LuksError::NotLuks);
        };
        if raw.version.get() != VERSION {
            return Err(LuksError::Version(raw.version.get()));
        }
        let header_size = raw.hdr_size.get();
        if !HEADER_SIZES.contains(&header_size) {
            return Err(LuksError::corrupt("hdr_size", header_size.to_string()));
        }
        if raw.hdr_offset.get() != offset {
            return Err(LuksError::corrupt("hdr_offset", raw.hdr_offset.get().to_string()));
        }
        if matches!(copy, Copy::Secondary(offset) if offset != header_size) {
            return Err(LuksError::corrupt("hdr_size", format!("{header_size}, in a copy at byte {offset}")));
        }
        let algorithm = text("csum_alg", &raw.csum_alg)?;
        let checksum_algorithm = HashAlgorithm::from_name(&algorithm).ok_or(LuksError::Unsupported {
            what: "checksum",
            found: algorithm,
            supported: HashAlgorithm::SUPPORTED,
        })?;
        let uuid = text("uuid", &raw.uuid)?;
        Ok(Self {
            header_size,
            sequence_id: raw.seqid.get(),
            label: label("label", &raw.label)?,
            subsystem: label("subsystem", &raw.subsystem)?,
            checksum_algorithm,
            uuid: Uuid::from_str(&uuid).map_err(|_| LuksError::corrupt("uuid", format!("\"{uuid}\"")))?,
        })
    }

    /// One copy, with its checksum over `json`, which is cut off or filled up with zeros to the header's size.
    pub(super) fn to_bytes(&self, copy: Copy, salt: [u8; SALT_LEN], json: &[u8]) -> Vec<u8> {
        let (magic, offset) = match copy {
            Copy::Primary => (MAGIC_PRIMARY, 0),
            Copy::Secondary(offset) => (MAGIC_SECONDARY, offset),
        };
        let raw = RawHeader {
            magic,
            version: VERSION.into(),
            hdr_size: self.header_size.into(),
            seqid: self.sequence_id.into(),
            label: padded(self.label.as_bytes()),
            csum_alg: padded(self.checksum_algorithm.name().as_bytes()),
            salt,
            uuid: padded(self.uuid.hyphenated().to_string().as_bytes()),
            subsystem: padded(self.subsystem.as_bytes()),
            hdr_offset: offset.into(),
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

    /// Compares the checksum; the field is zero afterwards.
    fn verify(&self, bytes: &mut [u8]) -> Result<(), LuksError> {
        let mut stored = [0; CHECKSUM_LEN];
        stored.copy_from_slice(&bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_LEN]);
        bytes[CHECKSUM_AT..CHECKSUM_AT + CHECKSUM_LEN].fill(0);
        let len = self.checksum_algorithm.output_len();
        if stored[..len] != self.checksum(bytes)[..len] {
            return Err(LuksError::corrupt("csum", "not the checksum of the header"));
        }
        Ok(())
    }

    /// The checksum of a copy whose checksum field is zero.
    fn checksum(&self, bytes: &[u8]) -> [u8; CHECKSUM_LEN] {
        let mut checksum = [0; CHECKSUM_LEN];
        self.checksum_algorithm.digest_into(&[bytes], &mut checksum[..self.checksum_algorithm.output_len()]);
        checksum
    }
}

fn label(field: &str, bytes: &[u8]) -> Result<Label, LuksError> {
    let no_end = || LuksError::corrupt(field, format!("\"{}\", without an end", bytes.escape_ascii()));
    Label::from_field(bytes).ok_or_else(no_end)
}

/// A text that NUL bytes fill up.
fn text(field: &str, bytes: &[u8]) -> Result<String, LuksError> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    match std::str::from_utf8(text) {
        Ok(text) if text.len() < bytes.len() && !text.contains(char::is_control) => Ok(text.to_owned()),
        _ => Err(LuksError::corrupt(field, format!("\"{}\", which is no text", text.escape_ascii()))),
    }
}

/// A text in a field of `N` bytes, with at least one NUL after it.
fn padded<const N: usize>(text: &[u8]) -> [u8; N] {
    let mut field = [0; N];
    field.iter_mut().take(N - 1).zip(text).for_each(|(to, from)| *to = *from);
    field
}

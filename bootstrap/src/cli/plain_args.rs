//! Options that describe a volume without a header, as for `cryptsetup open --type plain`.

use anyhow::{Result, bail};
use engine::key::VolumeKey;
use engine::luks::HashAlgorithm;
use engine::luks::plain::{PassphraseHash, PlainSegment};
use engine::sector::{Lba512, SectorSize};

use super::format::{key_size, sector_size};
use crate::volume::plain::{PlainCipher, PlainVolume};

/// Each option names this heading itself. clap's `next_help_heading` would also apply to the options of `serve` that come
/// after these.
const HEADING: &str = "Options for --type plain, as in cryptsetup";

#[derive(Debug, clap::Args)]
pub(super) struct PlainArgs {
    /// The sector size, which is the encryption unit, in bytes: 512, 1024, 2048 or 4096. [default: 512]
    #[arg(help_heading = HEADING, long, value_name = "BYTES", value_parser = sector_size)]
    sector_size: Option<SectorSize>,
    /// The length of the key in bits, with both halves counted: 512 (AES-256-XTS) or 256 (AES-128-XTS). [default: 512]
    #[arg(help_heading = HEADING, short = 's', long, value_name = "BITS", value_parser = key_size)]
    key_size: Option<usize>,
    /// Where the data begins, in sectors of 512 bytes. [default: 0]
    #[arg(help_heading = HEADING, short = 'o', long, value_name = "SECTORS")]
    offset: Option<u64>,
    /// The IV of the first sector, counted in units of 512 bytes. The number of bytes must be a multiple of the sector size.
    /// [default: 0]
    #[arg(help_heading = HEADING, short = 'p', long, value_name = "SECTORS")]
    skip: Option<u64>,
    /// The length of the data, in sectors of 512 bytes. [default: to the end of the disk]
    #[arg(help_heading = HEADING, short = 'b', long, value_name = "SECTORS")]
    size: Option<u64>,
    /// Use only this number of bytes of the key file, from its start. Without this option, the file must have exactly as
    /// many bytes as the key.
    #[arg(help_heading = HEADING, short = 'l', long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..))]
    keyfile_size: Option<u32>,
    /// The hash that makes the key from a passphrase, which is typed or comes with `--key-file -`. `plain` uses the
    /// passphrase's bytes, filled up with zeros. Without this option, the bytes of the passphrase are the key itself. As
    /// with cryptsetup, the bytes of a key file are always the key, unless --hash-key-file is given.
    #[arg(help_heading = HEADING, long, value_name = "HASH", value_parser = hash)]
    hash: Option<PassphraseHash>,
    /// With --hash: also hash the bytes of a key file.
    #[arg(help_heading = HEADING, long, requires = "hash")]
    hash_key_file: bool,
    /// Count the IV in sectors of `--sector-size` bytes, instead of in units of 512 bytes.
    #[arg(help_heading = HEADING, long)]
    iv_large_sectors: bool,
    /// The cipher: aes-xts-plain64, or aes-xts-plain on a volume of at most 2 TiB. [default: aes-xts-plain64]
    #[arg(help_heading = HEADING, short = 'c', long, value_name = "CIPHER", value_parser = PlainCipher::from_name)]
    cipher: Option<PlainCipher>,
}

impl PlainArgs {
    /// Refuses these options for a volume that has a header.
    ///
    /// # Errors
    /// Fails if one of the options is given, and names it.
    pub(super) fn refuse(&self) -> Result<()> {
        let Self {
            sector_size,
            key_size,
            offset,
            skip,
            size,
            keyfile_size,
            hash,
            hash_key_file,
            iv_large_sectors,
            cipher,
        } = self;
        let given = [
            ("--sector-size", sector_size.is_some()),
            ("--key-size", key_size.is_some()),
            ("--offset", offset.is_some()),
            ("--skip", skip.is_some()),
            ("--size", size.is_some()),
            ("--keyfile-size", keyfile_size.is_some()),
            ("--hash", hash.is_some()),
            ("--hash-key-file", *hash_key_file),
            ("--iv-large-sectors", *iv_large_sectors),
            ("--cipher", cipher.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => bail!("{option} is only for --type plain: the header of a LUKS volume contains this"),
            None => Ok(()),
        }
    }

    /// Returns the volume that the options describe.
    pub(super) fn volume(&self) -> PlainVolume {
        let data = PlainSegment {
            offset: self.offset.unwrap_or(0),
            size: self.size,
            skip: Lba512(self.skip.unwrap_or(0)),
            sector_size: self.sector_size.unwrap_or(SectorSize::B512),
        };
        let key_len = self.key_size.map_or(VolumeKey::AES_256, |bits| bits / 8);
        PlainVolume {
            data,
            key_len,
            keyfile_size: self.keyfile_size.and_then(|size| usize::try_from(size).ok()),
            hash: self.hash,
            hash_key_file: self.hash_key_file,
            iv_large_sectors: self.iv_large_sectors,
            cipher: self.cipher.unwrap_or_default(),
        }
    }
}

fn hash(name: &str) -> Result<PassphraseHash, String> {
    PassphraseHash::from_name(name).ok_or_else(|| {
        let names: Vec<_> = HashAlgorithm::ALL.iter().map(|hash| hash.name()).collect();
        format!("the hashes are plain, {}", names.join(", "))
    })
}

//! A volume without a header: what `cryptsetup open --type plain` is told.

use anyhow::{Result, bail};
use engine::key::VolumeKey;
use engine::luks::HashAlgorithm;
use engine::luks::plain::{PassphraseHash, Place};
use engine::sector::{Lba512, SectorSize};

use super::format::{key_size, sector_size};
use crate::plain::PlainVolume;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "With --type plain, as cryptsetup has them")]
pub(super) struct PlainArgs {
    /// The encryption unit in bytes: 512, 1024, 2048 or 4096. [default: 512]
    #[arg(long, value_name = "BYTES", value_parser = sector_size)]
    sector_size: Option<SectorSize>,
    /// The length of the key in bits, both halves counted: 512 (AES-256-XTS) or 256 (AES-128-XTS). [default: 512]
    #[arg(short = 's', long, value_name = "BITS", value_parser = key_size)]
    key_size: Option<usize>,
    /// Where the data begins, in sectors of 512 bytes. [default: 0]
    #[arg(short = 'o', long, value_name = "SECTORS")]
    offset: Option<u64>,
    /// The IV of the first sector, counted in 512 bytes: a multiple of the encryption unit. [default: 0]
    #[arg(short = 'p', long, value_name = "SECTORS")]
    skip: Option<u64>,
    /// How much data there is, in sectors of 512 bytes. [default: to the end of the disk]
    #[arg(short = 'b', long, value_name = "SECTORS")]
    size: Option<u64>,
    /// The key file holds a passphrase, which becomes the key by this hash; `plain` takes its bytes and fills up with zeros.
    /// Without it the file holds the key itself.
    #[arg(long, value_name = "HASH", value_parser = hash)]
    hash: Option<PassphraseHash>,
    /// Count the IV in encryption units, not in 512 bytes.
    #[arg(long)]
    iv_large_sectors: bool,
}

impl PlainArgs {
    /// Fails where any of it was given, for a volume whose header says it.
    ///
    /// # Errors
    /// Which.
    pub(super) fn refuse(&self) -> Result<()> {
        let Self { sector_size, key_size, offset, skip, size, hash, iv_large_sectors } = self;
        let given = [
            ("--sector-size", sector_size.is_some()),
            ("--key-size", key_size.is_some()),
            ("--offset", offset.is_some()),
            ("--skip", skip.is_some()),
            ("--size", size.is_some()),
            ("--hash", hash.is_some()),
            ("--iv-large-sectors", *iv_large_sectors),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => bail!("{option} goes with --type plain: a LUKS volume's header says it"),
            None => Ok(()),
        }
    }

    /// The volume that was described.
    pub(super) fn volume(&self) -> PlainVolume {
        let place = Place {
            offset: self.offset.unwrap_or(0),
            size: self.size,
            skip: Lba512(self.skip.unwrap_or(0)),
            sector_size: self.sector_size.unwrap_or(SectorSize::B512),
        };
        let key_len = self.key_size.map_or(VolumeKey::AES_256, |bits| bits / 8);
        PlainVolume { place, key_len, hash: self.hash, iv_large_sectors: self.iv_large_sectors }
    }
}

fn hash(name: &str) -> Result<PassphraseHash, String> {
    PassphraseHash::from_name(name).ok_or_else(|| {
        let names: Vec<_> = HashAlgorithm::ALL.iter().map(|hash| hash.name()).collect();
        format!("the hashes are plain, {}", names.join(", "))
    })
}

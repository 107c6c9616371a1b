//! Where a volume's header is, and how much work it may ask for.

use std::num::NonZeroU32;
use std::path::PathBuf;

use engine::luks::Limits;

use crate::config::{self, LimitsConfig};

/// `--header`, as cryptsetup has it.
#[derive(Debug, clap::Args)]
pub(super) struct HeaderArgs {
    /// The disk or file that holds the LUKS header, where the header is detached.
    #[arg(long, value_name = "FILE")]
    pub(super) header: Option<PathBuf>,
}

/// What a header may ask for.
#[derive(Debug, clap::Args)]
pub(super) struct LimitArgs {
    /// The most memory that a keyslot's Argon2 may take, such as 8G. Without it 4G, or what the machine has if that is less.
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    max_kdf_memory: Option<u32>,
    /// The most iterations of a keyslot's PBKDF2. Without it 100 million.
    #[arg(long, value_name = "N")]
    max_kdf_iterations: Option<NonZeroU32>,
    /// The most passes of a keyslot's Argon2 over the most memory; over less, as many more as take the same time. Without
    /// it 100.
    #[arg(long, value_name = "N")]
    max_kdf_passes: Option<NonZeroU32>,
}

impl LimitArgs {
    /// The limits, with what was asked for.
    pub(super) fn limits(&self) -> Limits {
        self.limits_or(LimitsConfig::default())
    }

    /// The limits, with what was asked for here, or else in a configuration.
    pub(super) fn limits_or(&self, configured: LimitsConfig) -> Limits {
        let asked = LimitsConfig {
            kdf_memory: self.max_kdf_memory,
            kdf_iterations: self.max_kdf_iterations,
            kdf_passes: self.max_kdf_passes,
        };
        asked.or(configured).limits()
    }
}

/// KiB, from a size.
fn memory(text: &str) -> Result<u32, String> {
    let kib = config::parse_size(text).and_then(|bytes| u32::try_from(bytes / 1024).ok());
    kib.ok_or_else(|| "a size is a number of bytes, or of K, M, G or T, such as 8G, and at most 4095G".to_owned())
}

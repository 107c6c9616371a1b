//! Options that say where a volume's header is, and options that limit the work that the header may ask for.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use engine::luks::Limits;

use crate::config::{self, LimitsConfig};
use crate::machine::{disk, memory};
use crate::text;

/// `--header`, as in cryptsetup.
#[derive(Debug, clap::Args)]
pub(super) struct HeaderArgs {
    /// The disk or file that holds the LUKS header, if the header is detached.
    #[arg(long, value_name = "FILE")]
    pub(super) header: Option<PathBuf>,
}

impl HeaderArgs {
    /// Fails if `--header` names `disk` itself, which cannot be opened twice.
    ///
    /// # Errors
    /// The text says to leave `--header` out.
    pub(super) fn refuse_same(&self, disk: &Path) -> Result<()> {
        match &self.header {
            Some(header) if disk::is_same(header, disk) => {
                bail!("--header names {} itself: leave it out, unless the header is on another disk", text::path(disk))
            }
            _ => Ok(()),
        }
    }
}

/// The volume whose header a command reads or changes.
#[derive(Debug, clap::Args)]
pub(super) struct VolumeArgs {
    /// The disk or file. With `--header`, only the header is used.
    device: PathBuf,
    #[command(flatten)]
    header: HeaderArgs,
}

impl VolumeArgs {
    /// Returns the disk or file that holds the header.
    pub(super) fn path(&self) -> &Path {
        self.header.header.as_ref().unwrap_or(&self.device)
    }

    /// Returns the name of the disk or file that holds the header, for messages.
    pub(super) fn name(&self) -> String {
        text::path(self.path())
    }
}

const HEADING: &str = "Limits of key derivation";

/// The limits on the work that a header may ask for.
#[derive(Debug, clap::Args)]
pub(super) struct LimitArgs {
    /// The maximum memory that Argon2 may use for a keyslot, such as 8G. [default: 4G, or the machine's memory if that is
    /// less]
    #[arg(help_heading = HEADING, long, value_name = "SIZE", value_parser = memory)]
    max_kdf_memory: Option<u32>,
    /// The maximum number of PBKDF2 iterations that a keyslot may ask for. [default: 100 million]
    #[arg(help_heading = HEADING, long, value_name = "N")]
    max_kdf_iterations: Option<NonZeroU32>,
    /// The maximum number of Argon2 passes that a keyslot may ask for, if it uses the maximum memory. A keyslot that uses
    /// less memory may ask for more passes in proportion. [default: 100]
    #[arg(help_heading = HEADING, long, value_name = "N")]
    max_kdf_passes: Option<NonZeroU32>,
}

impl LimitArgs {
    /// Returns the limits with the values from the command line.
    pub(super) fn limits(&self) -> Limits {
        self.limits_or(LimitsConfig::default())
    }

    /// Returns the limits with the values from the command line, or else from a configuration.
    pub(super) fn limits_or(&self, configured: LimitsConfig) -> Limits {
        let asked = LimitsConfig {
            kdf_memory: self.max_kdf_memory,
            kdf_iterations: self.max_kdf_iterations,
            kdf_passes: self.max_kdf_passes,
        };
        asked.or(configured).limits(memory::limit_kib())
    }
}

/// Parses a size, and returns it in KiB.
fn memory(text: &str) -> Result<u32, String> {
    let kib = config::parse_size(text).and_then(|bytes| u32::try_from(bytes / 1024).ok());
    kib.ok_or_else(|| {
        "a size is a number of bytes, or a number with K, M, G or T, such as 8G, and at most 4095G".to_owned()
    })
}

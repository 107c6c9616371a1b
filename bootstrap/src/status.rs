//! What `nbdcrypt status` tells of a volume.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A volume that is up, or what is left of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// The volume's name.
    pub name: String,
    /// What it is doing.
    pub condition: Condition,
    /// The server's process id.
    pub pid: u32,
    /// The configuration it was started with.
    pub config: PathBuf,
    /// The disk that holds the ciphertext.
    pub disk: PathBuf,
    /// The attached block device.
    pub device: Option<PathBuf>,
    /// How it is attached: `nbd` or `fuse`.
    pub method: Option<String>,
    /// Where the filesystem is mounted.
    pub mountpoint: Option<PathBuf>,
    /// How the data is encrypted. Only a living server knows.
    pub volume: Option<VolumeFacts>,
}

/// What a volume is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// It is served.
    Up,
    /// Its server is at work on the steps of `up`, or of `down`.
    Busy,
    /// Its server died, and left something behind.
    Dead,
}

/// How a volume's data is encrypted, and where it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeFacts {
    /// LUKS1, LUKS2 or plain.
    #[serde(rename = "type")]
    pub kind: String,
    /// As dm-crypt names it.
    pub cipher: String,
    /// The key's length, both halves counted.
    pub key_bits: usize,
    /// Which AES that is: `AES-256-XTS` or `AES-128-XTS`.
    pub algorithm: String,
    /// The keyslot that opened.
    pub keyslot: Option<usize>,
    /// The disk or file of the header, where the header is detached.
    #[serde(default)]
    pub header: Option<PathBuf>,
    /// The encryption unit in bytes.
    pub sector_size: u64,
    /// Where the data begins on the disk, in bytes.
    pub offset: u64,
    /// The length of the data in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What an AES-XTS key of so many bits, both halves counted, really is.
pub fn algorithm(key_bits: usize) -> &'static str {
    if key_bits == 256 { "AES-128-XTS" } else { "AES-256-XTS" }
}

impl fmt::Display for Status {
    /// In the manner of `cryptsetup status`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, condition, pid, config, disk, device, method, mountpoint, volume } = self;
        match condition {
            Condition::Up => writeln!(f, "{name} is up.")?,
            Condition::Busy => writeln!(f, "{name} is on its way up or down.")?,
            Condition::Dead => writeln!(
                f,
                "{name} is dead: its server (process {pid}) is gone. `nbdcrypt down {name}` clears up what it left."
            )?,
        }
        let mut line = |label: &str, value: String| writeln!(f, "  {label:<12} {value}");
        if let Some(volume) = volume {
            line("type:", volume.kind.clone())?;
            line("cipher:", volume.cipher.clone())?;
            line("keysize:", format!("{} bits ({})", volume.key_bits, volume.algorithm))?;
            if let Some(keyslot) = volume.keyslot {
                line("keyslot:", keyslot.to_string())?;
            }
        }
        line("disk:", disk.display().to_string())?;
        if let Some(header) = volume.as_ref().and_then(|volume| volume.header.as_ref()) {
            line("header:", header.display().to_string())?;
        }
        if let Some(volume) = volume {
            line("sector size:", format!("{} bytes", volume.sector_size))?;
            line("offset:", format!("{} bytes", volume.offset))?;
            line("size:", format!("{} bytes", volume.size))?;
            line("mode:", if volume.read_only { "read-only" } else { "read/write" }.to_owned())?;
        }
        if let Some(device) = device {
            line("device:", format!("{} ({})", device.display(), method.as_deref().unwrap_or("?")))?;
        }
        if let Some(mountpoint) = mountpoint {
            line("mountpoint:", mountpoint.display().to_string())?;
        }
        line("config:", config.display().to_string())?;
        line("process:", pid.to_string())
    }
}

//! The status of a volume, as `nbdcrypt status` shows it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use engine::text::{bytes, human};
use nbd_server::statistics::Snapshot;
use serde::{Deserialize, Serialize};

use crate::attach::{self, Remains};
use crate::machine::bare_folder::{self, Writers};
use crate::machine::mounts;
use crate::text::path;
use crate::volume::VolumeType;

/// The status of a volume that is up, or that a dead server left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// The volume's name.
    pub name: String,
    /// The volume's condition, as observed at this moment.
    pub condition: Condition,
    /// What the server is doing or waiting for, or what is wrong.
    #[serde(default)]
    pub doing: Option<String>,
    /// The server's process id. 0 if it is not known: the server is in another PID namespace, and has recorded nothing.
    pub pid: u32,
    /// The configuration that the server was started with.
    pub config: PathBuf,
    /// The disk that holds the ciphertext.
    pub disk: PathBuf,
    /// The attached block device, if it exists.
    pub device: Option<PathBuf>,
    /// How the volume is attached: `nbd` or `fuse`.
    pub method: Option<String>,
    /// The folder on which the filesystem is mounted, if it is mounted.
    pub mountpoint: Option<PathBuf>,
    /// The folder on which the filesystem is configured to be mounted.
    #[serde(default)]
    pub configured_mountpoint: Option<PathBuf>,
    /// Who can write into the folder on which the filesystem should be mounted, if nothing is mounted there.
    #[serde(default)]
    pub mountpoint_writers: Option<Writers>,
    /// How the data is encrypted. Only a living server knows this.
    pub volume: Option<VolumeFacts>,
    /// The requests that were answered. Only a living server knows this, and only if the volume is attached by NBD.
    #[serde(default)]
    pub requests: Option<Requests>,
    /// A warning about how the device is used.
    #[serde(default)]
    pub warning: Option<String>,
}

/// The condition of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// The volume is attached, and mounted where it is configured to be mounted.
    Up,
    /// The volume is attached and served, but not mounted where it is configured to be mounted.
    Attached,
    /// The server is running the steps of `up`.
    ComingUp,
    /// The server is undoing the steps of `up`, or the device is gone and the server is about to end.
    GoingDown,
    /// The server is alive but does not answer.
    Silent,
    /// The server is gone and has left something behind.
    Dead,
}

impl Status {
    /// Corrects the recorded status with what mountinfo and /sys show now: whether the device `attachment` exists, and whether
    /// it is mounted at the configured mountpoint.
    ///
    /// # Errors
    /// Fails if /proc cannot be read.
    pub fn seen(mut self, attachment: Option<&Remains>) -> io::Result<Self> {
        let there = attachment.filter(|remains| attach::is_attached(remains));
        self.device = there.map(|remains| remains.device.clone());
        self.method = there.map(|remains| remains.method.to_string());
        self.warning = there.and_then(attach::swap_warning);
        self.mountpoint = None;
        let mut wrong = None;
        if let (Some(remains), Some(at)) = (there, &self.configured_mountpoint) {
            match mounts::at(&remains.device, at)? {
                mounts::At::Mounted => self.mountpoint = Some(at.clone()),
                mounts::At::Covered(by) | mounts::At::Other(by) => {
                    let (at, kind, source) = (path(at), by.filesystem, path(by.source));
                    wrong = Some(format!("{kind} from {source} is mounted on {at}; unmount that first (umount {at})"));
                }
                mounts::At::Nothing => {}
            }
        }
        if self.condition == Condition::Up {
            if self.device.is_none() {
                self.condition = Condition::GoingDown;
                self.doing = Some("its device was removed".to_owned());
            } else if self.mountpoint.is_none() && self.configured_mountpoint.is_some() {
                self.condition = Condition::Attached;
                self.doing = wrong;
            }
        }
        Ok(self)
    }

    /// Describes the server: "the server of scratch (process 708)".
    pub fn server(&self) -> String {
        match self.pid {
            0 => format!("the server of {}", self.name),
            pid => format!("the server of {} (process {pid})", self.name),
        }
    }

    /// Returns advice about a server that does not answer.
    pub fn cure_of_silence(&self) -> String {
        match self.pid {
            0 => "if it was stopped, continue it (kill -CONT, from where it runs)".to_owned(),
            pid => format!("if it was stopped, continue it (kill -CONT {pid})"),
        }
    }

    /// Corrects the status with what this process sees. This process and the server may be in different mount
    /// namespaces, and another mount may hide the mountpoint. The server itself must not call this, since this function
    /// accesses the mounted filesystem.
    pub fn seen_from_here(mut self) -> Self {
        if let (Condition::Up, Some(at)) = (self.condition, &self.mountpoint)
            && !self.device.as_ref().is_some_and(|device| mounts::leads_to(at, device))
        {
            self.doing = Some(format!(
                "it is mounted on {} for its server (process {}), but not for this process, which is in another mount \
                 namespace or finds another mount over it",
                path(at),
                self.pid
            ));
            (self.condition, self.mountpoint) = (Condition::Attached, None);
        }
        if let (Condition::Attached, None, Some(at)) = (self.condition, &self.doing, &self.configured_mountpoint) {
            self.mountpoint_writers = bare_folder::writers(at).ok();
        }
        self
    }
}

/// How a volume's data is encrypted, and where it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeFacts {
    /// The format.
    #[serde(rename = "type")]
    pub kind: VolumeType,
    /// The cipher, by dm-crypt's name.
    pub cipher: String,
    /// The key length in bits, with both halves counted.
    pub key_bits: usize,
    /// The algorithm: `AES-256-XTS` or `AES-128-XTS`.
    pub algorithm: String,
    /// The keyslot that opened the volume.
    pub keyslot: Option<usize>,
    /// The disk or file of the header, if the header is detached.
    #[serde(default)]
    pub header: Option<PathBuf>,
    /// The sector size, which is the encryption unit, in bytes.
    pub sector_size: u64,
    /// Where the data begins on the disk, in bytes.
    pub offset: u64,
    /// The length of the data in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// The requests that a server has answered since it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Requests {
    /// All requests that were answered.
    pub answered: u64,
    /// The requests that were answered with an error, whether the client or the disk was at fault.
    pub failed: u64,
    /// The bytes that were read from the volume for clients.
    pub bytes_read: u64,
    /// The bytes that clients wrote to the volume.
    pub bytes_written: u64,
}

impl From<Snapshot> for Requests {
    fn from(counters: Snapshot) -> Self {
        let Snapshot { requests, errors, bytes_read, bytes_written, .. } = counters;
        Self { answered: requests, failed: errors, bytes_read, bytes_written }
    }
}

impl fmt::Display for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answered, failed, bytes_read, bytes_written } = self;
        write!(
            f,
            "{answered} answered, {failed} failed; {} read, {} written",
            human(*bytes_read),
            human(*bytes_written)
        )
    }
}

/// Returns the algorithm of an AES-XTS key of this many bits, with both halves counted.
pub fn algorithm(key_bits: usize) -> &'static str {
    if key_bits == 256 { "AES-128-XTS" } else { "AES-256-XTS" }
}

impl fmt::Display for Status {
    /// Formats the status like `cryptsetup status`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            condition,
            doing,
            pid,
            config,
            disk,
            device,
            method,
            mountpoint,
            configured_mountpoint,
            mountpoint_writers,
            volume,
            requests,
            warning,
        } = self;
        match condition {
            Condition::Up => writeln!(f, "{name} is up.")?,
            Condition::Attached => {
                let at = path(configured_mountpoint.as_deref().unwrap_or_else(|| "its mountpoint".as_ref()));
                let consequence = match mountpoint_writers {
                    Some(Writers::Nobody) => format!("nothing can be written to {at} until it is mounted again"),
                    Some(Writers::Root) => {
                        format!("only root can write to {at} now, and such files are not encrypted")
                    }
                    Some(Writers::AsUsual) | None => {
                        format!("files that are written to {at} now are not encrypted")
                    }
                };
                writeln!(
                    f,
                    "{name} is attached but not mounted: {consequence}. `nbdcrypt up {}` mounts it again.",
                    path(config)
                )?;
            }
            Condition::ComingUp => writeln!(f, "{name} is coming up.")?,
            Condition::GoingDown => writeln!(f, "{name} is going down.")?,
            Condition::Silent => writeln!(f, "{} does not answer.", self.server())?,
            Condition::Dead => writeln!(
                f,
                "{name} is dead: its server (process {pid}) is gone. `nbdcrypt down {name}` cleans up what it left."
            )?,
        }
        let mut line = |label: &str, value: String| writeln!(f, "  {label:<12} {value}");
        if let Some(doing) = doing {
            line("now:", doing.clone())?;
        }
        if let Some(volume) = volume {
            line("type:", volume.kind.to_string())?;
            line("cipher:", volume.cipher.clone())?;
            line("keysize:", format!("{} bits ({})", volume.key_bits, volume.algorithm))?;
            if let Some(keyslot) = volume.keyslot {
                line("keyslot:", keyslot.to_string())?;
            }
        }
        if !disk.as_os_str().is_empty() {
            line("disk:", path(disk))?;
        }
        if let Some(header) = volume.as_ref().and_then(|volume| volume.header.as_ref()) {
            line("header:", path(header))?;
        }
        if let Some(volume) = volume {
            line("sector size:", bytes(volume.sector_size))?;
            line("offset:", bytes(volume.offset))?;
            line("size:", bytes(volume.size))?;
            line("mode:", if volume.read_only { "read-only" } else { "read/write" }.to_owned())?;
        }
        if let Some(device) = device {
            line("device:", format!("{} ({})", path(device), method.as_deref().unwrap_or("?")))?;
        }
        if let Some(mountpoint) = mountpoint {
            line("mountpoint:", path(mountpoint))?;
        }
        if let Some(requests) = requests {
            line("requests:", requests.to_string())?;
        }
        if let Some(warning) = warning {
            line("warning:", warning.clone())?;
        }
        if !config.as_os_str().is_empty() {
            line("config:", path(config))?;
        }
        match pid {
            0 => Ok(()),
            pid => line("process:", pid.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing can be written into an immutable folder, so a warning about unencrypted files would be wrong.
    #[test]
    fn a_volume_that_is_not_mounted_says_who_can_write_below() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        let said = |doing: Option<&str>| {
            let status = Status {
                name: "scratch".to_owned(),
                condition: Condition::Attached,
                doing: doing.map(str::to_owned),
                pid: 1,
                config: "/etc/nbdcrypt/scratch.toml".into(),
                disk: "/dev/vdb".into(),
                device: None,
                method: None,
                mountpoint: None,
                configured_mountpoint: Some(at.clone()),
                mountpoint_writers: None,
                volume: None,
                requests: None,
                warning: None,
            };
            status.seen_from_here().to_string()
        };
        let at = at.clone();
        assert!(said(None).contains("now are not encrypted"), "{}", said(None));
        let words = match bare_folder::protect(&at).unwrap() {
            bare_folder::Protection::Immutable | bare_folder::Protection::ReadOnly => "nothing can be written to",
            bare_folder::Protection::Mode(_) => "only root can write to",
        };
        // Only root may look into a folder with mode 000.
        if bare_folder::writers(&at).is_ok() {
            assert!(said(None).contains(words) && said(None).contains("mounts it again"), "{}", said(None));
        }
        assert!(said(Some("xfs is mounted there")).contains("not encrypted"));
        bare_folder::unprotect(&at).unwrap();
    }

    #[test]
    fn requests_are_shown_with_their_failures() {
        let counters =
            Snapshot { requests: 12, errors: 3, bytes_read: 4096, bytes_written: 1 << 20, ..Snapshot::default() };
        assert_eq!(Requests::from(counters).to_string(), "12 answered, 3 failed; 4 KiB read, 1 MiB written");
    }
}

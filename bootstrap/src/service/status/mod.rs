//! The status of a volume, as `nbdcrypt status` shows it.

mod activity;
mod health;
mod show;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::attach::{self, Method, Remains};
use crate::machine::bare_folder::{self, Writers};
use crate::machine::mounts;
use crate::steps::Made;
use crate::text::path;
use crate::volume::VolumeType;

pub use activity::{Errors, Kind, Latency, Requests, Throughput, age};
pub use health::Health;

/// The flag of a device that passes discards on to the disk. A device under FUSE does not: its discards must read as zeros.
const DISCARDS: &str = "discards";

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
    /// Who can write into [`Status::not_mounted_on`], if nothing is mounted there.
    #[serde(default)]
    pub mountpoint_writers: Option<Writers>,
    /// The folders of the filesystem that are configured to be mounted elsewhere as well.
    #[serde(default)]
    pub binds: Vec<Bind>,
    /// How the data is encrypted. Only a living server knows this.
    pub volume: Option<VolumeFacts>,
    /// The secret that opened the volume. Only a living server knows this.
    #[serde(default)]
    pub key: Option<KeyFacts>,
    /// What this start made, if the volume or its filesystem was not there before.
    #[serde(default)]
    pub made: Option<Made>,
    /// What the device allows, as dm-crypt's flags: `discards`.
    #[serde(default)]
    pub flags: Vec<String>,
    /// The kernel's connections to the server, if the volume is attached by NBD.
    #[serde(default)]
    pub connections: Option<u64>,
    /// The requests that were answered. Only a living server knows this.
    #[serde(default)]
    pub requests: Option<Requests>,
    /// How fast data was read and written in the last seconds.
    #[serde(default)]
    pub throughput: Option<Throughput>,
    /// How many seconds ago the server was started.
    #[serde(default)]
    pub uptime: Option<u64>,
    /// What is wrong although the volume is up.
    #[serde(default)]
    pub problems: Vec<String>,
    /// A warning about how the device is used.
    #[serde(default)]
    pub warning: Option<String>,
}

/// A folder of the filesystem that is configured to be mounted elsewhere as well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Bind {
    /// The folder inside the filesystem.
    pub folder: PathBuf,
    /// Where it is configured to be mounted.
    pub target: PathBuf,
    /// Whether it is mounted there.
    pub mounted: bool,
}

impl Bind {
    /// Describes a folder that is not mounted at its target yet, as far as is known.
    pub fn not_mounted(folder: &Path, target: &Path) -> Self {
        Self { folder: folder.to_owned(), target: target.to_owned(), mounted: false }
    }
}

/// The condition of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// The volume is attached, and mounted where it is configured to be mounted.
    Up,
    /// The volume is attached and served, but not mounted everywhere where it is configured to be mounted.
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
    /// Returns the status of a volume of which only the name and the condition are known.
    pub fn new(name: &str, condition: Condition) -> Self {
        Self {
            name: name.to_owned(),
            condition,
            doing: None,
            pid: 0,
            config: PathBuf::new(),
            disk: PathBuf::new(),
            device: None,
            method: None,
            mountpoint: None,
            configured_mountpoint: None,
            mountpoint_writers: None,
            binds: Vec::new(),
            volume: None,
            key: None,
            made: None,
            flags: Vec::new(),
            connections: None,
            requests: None,
            throughput: None,
            uptime: None,
            problems: Vec::new(),
            warning: None,
        }
    }

    /// Corrects the recorded status with what mountinfo and /sys show now: whether the device `attachment` exists, and whether
    /// it is mounted at the configured mountpoints.
    ///
    /// # Errors
    /// Fails if /proc cannot be read.
    pub fn seen(mut self, attachment: Option<&Remains>) -> io::Result<Self> {
        let there = attachment.filter(|remains| attach::is_attached(remains));
        self.device = there.map(|remains| remains.device.clone());
        self.method = there.map(|remains| remains.method.to_string());
        self.flags =
            there.filter(|remains| remains.method == Method::Nbd).map(|_| DISCARDS.to_owned()).into_iter().collect();
        self.warning = there.and_then(attach::swap_warning);
        self.mountpoint = None;
        let mut wrong = None;
        let mut is_mounted = |device: &Path, at: &Path| {
            Ok::<_, io::Error>(match mounts::at(device, at)? {
                mounts::At::Mounted => true,
                mounts::At::Covered(by) | mounts::At::Other(by) => {
                    let (at, kind, source) = (path(at), by.filesystem, path(by.source));
                    wrong.get_or_insert(format!(
                        "{kind} from {source} is mounted on {at}; unmount that first (umount {at})"
                    ));
                    false
                }
                mounts::At::Nothing => false,
            })
        };
        if let Some(remains) = there {
            self.mountpoint = match &self.configured_mountpoint {
                Some(at) if is_mounted(&remains.device, at)? => Some(at.clone()),
                _ => None,
            };
            for bind in &mut self.binds {
                bind.mounted = is_mounted(&remains.device, &bind.target)?;
            }
        } else {
            self.binds.iter_mut().for_each(|bind| bind.mounted = false);
        }
        if self.condition == Condition::Up {
            if self.device.is_none() {
                self.condition = Condition::GoingDown;
                self.doing = Some("its device was removed".to_owned());
            } else if self.not_mounted_on().is_some() {
                self.condition = Condition::Attached;
                self.doing = wrong;
            }
        }
        Ok(self)
    }

    /// Returns the first of the configured mountpoints on which the filesystem is not mounted: the one of the filesystem itself,
    /// or the target of a bind mount.
    pub fn not_mounted_on(&self) -> Option<&Path> {
        let own = self.configured_mountpoint.as_deref().filter(|_| self.mountpoint.is_none());
        own.or_else(|| self.binds.iter().find(|bind| !bind.mounted).map(|bind| bind.target.as_path()))
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
        let leads_there = |at: &Path| self.device.as_ref().is_some_and(|device| mounts::leads_to(at, device));
        let places = self.mountpoint.iter().chain(self.binds.iter().map(|bind| &bind.target));
        let unseen = places.filter(|_| self.condition == Condition::Up).find(|at| !leads_there(at)).cloned();
        if let Some(at) = unseen {
            self.doing = Some(format!(
                "it is mounted on {} for its server (process {}), but not for this process, which is in another mount \
                 namespace or finds another mount over it",
                path(&at),
                self.pid
            ));
            self.condition = Condition::Attached;
            self.mountpoint = self.mountpoint.filter(|mountpoint| *mountpoint != at);
            self.binds.iter_mut().filter(|bind| bind.target == at).for_each(|bind| bind.mounted = false);
        }
        if let (Condition::Attached, None, Some(at)) = (self.condition, &self.doing, self.not_mounted_on()) {
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
    /// The instructions of the CPU that the cipher uses, such as `vaes512`.
    #[serde(default)]
    pub cpu_path: Option<String>,
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

/// The secret that opened a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct KeyFacts {
    /// Where the secret came from: `s3+kms`, `token+kms`, `file` or `stdin`.
    pub source: String,
    /// How many seconds ago the server unlocked the volume.
    pub age: u64,
}

/// Returns the algorithm of an AES-XTS key of this many bits, with both halves counted.
pub fn algorithm(key_bits: usize) -> &'static str {
    if key_bits == 256 { "AES-128-XTS" } else { "AES-256-XTS" }
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
                doing: doing.map(str::to_owned),
                pid: 1,
                config: "/etc/nbdcrypt/scratch.toml".into(),
                disk: "/dev/vdb".into(),
                configured_mountpoint: Some(at.clone()),
                ..Status::new("scratch", Condition::Attached)
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

    /// A bind mount that is missing is as bad as a missing mountpoint: files may go to the root disk.
    #[test]
    fn a_missing_bind_mount_is_named() {
        let mut status = Status::new("scratch", Condition::Attached);
        status.configured_mountpoint = Some("/mnt/x".into());
        let mounted = Bind { mounted: true, ..Bind::not_mounted("a".as_ref(), "/srv/a".as_ref()) };
        status.binds = vec![mounted, Bind::not_mounted("b/c".as_ref(), "/srv/c".as_ref())];
        assert_eq!(status.not_mounted_on(), Some("/mnt/x".as_ref()));
        status.mountpoint = status.configured_mountpoint.clone();
        assert_eq!(status.not_mounted_on(), Some("/srv/c".as_ref()));
        let said = status.to_string();
        for words in [
            "not mounted on /srv/c: files that are written to /srv/c now",
            "a on /srv/a\n",
            "b/c on /srv/c (not mounted)\n",
        ] {
            assert!(said.contains(words), "{words}: {said}");
        }
        status.binds.clear();
        assert_eq!(status.not_mounted_on(), None);
        // A status of an older server has no binds.
        let mut old = serde_json::to_value(&status).unwrap();
        old.as_object_mut().unwrap().remove("binds");
        assert_eq!(serde_json::from_value::<Status>(old).unwrap(), status);
    }
}

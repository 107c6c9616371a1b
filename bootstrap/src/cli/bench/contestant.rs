//! Who is measured: this server, with and without its cipher, the yardstick, and every peer that is installed.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use super::dm_crypt::{self, DmCrypt};
use super::server_process::ServerProcess;
use super::stage::Stage;
use super::subject::Subject;
use crate::process;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contestant {
    Nbdcrypt,
    NbdcryptPlaintext,
    Yardstick,
    NbdkitLuks,
    QemuNbdLuks,
    NbdkitPlaintext,
    /// The kernel's own: a block device, no server.
    DmCrypt,
    /// This server, attached by the kernel.
    AttachedNbd,
}

impl Contestant {
    pub(super) const ALL: [Self; 8] = [
        Self::Nbdcrypt,
        Self::NbdcryptPlaintext,
        Self::Yardstick,
        Self::NbdkitLuks,
        Self::QemuNbdLuks,
        Self::NbdkitPlaintext,
        Self::DmCrypt,
        Self::AttachedNbd,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nbdcrypt => "nbdcrypt",
            Self::NbdcryptPlaintext => "nbdcrypt, plaintext",
            Self::Yardstick => "yardstick, plaintext",
            Self::NbdkitLuks => "nbdkit luks",
            Self::QemuNbdLuks => "qemu-nbd LUKS",
            Self::NbdkitPlaintext => "nbdkit file, plaintext",
            Self::DmCrypt => "dm-crypt",
            Self::AttachedNbd => "nbdcrypt on /dev/nbd",
        }
    }

    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Nbdcrypt | Self::NbdcryptPlaintext | Self::Yardstick)
    }

    /// Why it cannot take part on this machine, if so.
    pub(super) fn missing(self) -> Option<String> {
        let lacks = |program: &str, package: &str| {
            let missing = !installed(program);
            missing.then(|| format!("{program} is not installed (apt-get install {package})"))
        };
        // What the kernel must have, and only root may use.
        let no_device = |sign: &str, what: &str| {
            if !Path::new(sign).exists() {
                Some(format!("this kernel has no {what}, or has not loaded it: {sign} is not there"))
            } else if !process::is_root() {
                Some(format!("this kernel has {what}, but only root may use it: run this with sudo"))
            } else {
                None
            }
        };
        match self {
            Self::Nbdcrypt | Self::NbdcryptPlaintext | Self::Yardstick => None,
            Self::NbdkitLuks | Self::NbdkitPlaintext => lacks("nbdkit", "nbdkit"),
            Self::QemuNbdLuks => lacks("qemu-nbd", "qemu-utils"),
            Self::DmCrypt => no_device("/sys/class/misc/device-mapper", "device-mapper")
                .or_else(|| lacks("cryptsetup", "cryptsetup-bin")),
            Self::AttachedNbd => no_device("/sys/module/nbd", "network block device"),
        }
    }

    /// Whether it is a block device, which no NBD client can drive.
    pub(super) fn is_device(self) -> bool {
        matches!(self, Self::DmCrypt | Self::AttachedNbd)
    }

    /// Starts it on the stage's image, encrypted or plain.
    pub(super) fn start(self, stage: &Stage, page_cache: bool) -> Result<Subject> {
        self.begin(stage, page_cache).with_context(|| self.name().to_owned())
    }

    fn begin(self, stage: &Stage, page_cache: bool) -> Result<Subject> {
        Ok(match self {
            Self::DmCrypt => Subject::Mapped(DmCrypt::open(&stage.luks, &stage.key())?),
            Self::AttachedNbd => {
                let (server, device) = ServerProcess::attach(self.command(stage, page_cache)?, &stage.log())?;
                Subject::Attached(server, device)
            }
            _ => {
                let socket = stage.socket();
                let server = ServerProcess::listen(self.command(stage, page_cache)?, &socket, &stage.log())?;
                Subject::Listening(server, socket)
            }
        })
    }

    /// What is typed to start it.
    pub(super) fn command(self, stage: &Stage, page_cache: bool) -> Result<Command> {
        let socket = stage.socket();
        let key = stage.key();
        let ours = || std::env::current_exe().context("this program's own file").map(Command::new);
        let cache: &[&str] = if page_cache { &["--page-cache"] } else { &[] };
        Ok(match self {
            Self::Nbdcrypt => {
                let mut command = ours()?;
                command.arg("serve").args(cache).arg("--key-file").arg(key).arg("--socket").arg(socket);
                command.arg(&stage.luks);
                command
            }
            Self::NbdcryptPlaintext | Self::Yardstick => {
                let mut command = ours()?;
                let what = if self == Self::Yardstick { "yardstick" } else { "plaintext" };
                command.args(["bench", what]);
                if self == Self::NbdcryptPlaintext {
                    command.args(cache);
                }
                command.arg("--socket").arg(socket).arg(&stage.plain);
                command
            }
            Self::NbdkitLuks => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--filter=luks", "--unix"]).arg(socket).arg("file").arg(&stage.luks);
                command.arg(format!("passphrase=+{}", key.display()));
                command
            }
            Self::NbdkitPlaintext => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--unix"]).arg(socket).arg("file").arg(&stage.plain);
                command
            }
            Self::QemuNbdLuks => {
                let mut command = Command::new("qemu-nbd");
                command.args(["--persistent", "--shared=16", "--socket"]).arg(socket);
                command.arg("--object").arg(format!("secret,id=key,file={}", commas(&key)));
                command
                    .arg("--image-opts")
                    .arg(format!("driver=luks,key-secret=key,file.driver=file,file.filename={}", commas(&stage.luks)));
                command
            }
            Self::DmCrypt => dm_crypt::open_command(&stage.luks, &key),
            Self::AttachedNbd => {
                let mut command = ours()?;
                command.args(["bench", "attached"]).args(cache).arg("--key-file").arg(key).arg(&stage.luks);
                command
            }
        })
    }
}

/// A path within qemu's option lists, where a comma is written twice.
fn commas(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Whether a program of that name is in the path.
pub(super) fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

//! Who is measured: this server, with and without its cipher, the yardstick, a server that does nothing, and every peer that is
//! installed.

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
    /// With nothing behind it.
    Null,
    NbdkitLuks,
    QemuNbdLuks,
    NbdkitPlaintext,
    /// The kernel's own: a block device, no server.
    DmCrypt,
    /// This server, attached by the kernel.
    AttachedNbd,
}

/// How this server reads and writes the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Io {
    /// Through the kernel's page cache.
    PageCache,
    /// Direct I/O, where the filesystem allows.
    Direct,
    /// The same without registering buffers.
    Unregistered,
}

impl Io {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::PageCache => &["--page-cache"],
            Self::Direct => &[],
            Self::Unregistered => &["--no-registered-buffers"],
        }
    }
}

impl Contestant {
    pub(super) const ALL: [Self; 9] = [
        Self::Nbdcrypt,
        Self::NbdcryptPlaintext,
        Self::Yardstick,
        Self::Null,
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
            Self::Null => "null server",
            Self::NbdkitLuks => "nbdkit luks",
            Self::QemuNbdLuks => "qemu-nbd LUKS",
            Self::NbdkitPlaintext => "nbdkit file, plaintext",
            Self::DmCrypt => "dm-crypt",
            Self::AttachedNbd => "nbdcrypt on /dev/nbd",
        }
    }

    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Nbdcrypt | Self::NbdcryptPlaintext | Self::Yardstick | Self::Null)
    }

    /// Why it cannot take part on this machine, if so.
    pub(super) fn missing(self) -> Option<String> {
        self.missing_where(|sign| Path::new(sign).exists(), installed, process::is_root())
    }

    /// The same of a machine that has these paths and these programs.
    fn missing_where(
        self,
        exists: impl Fn(&str) -> bool,
        installed: impl Fn(&str) -> bool,
        is_root: bool,
    ) -> Option<String> {
        let lacks = |program: &str, package: &str| {
            let missing = !installed(program);
            missing.then(|| format!("{program} is not installed (apt-get install {package})"))
        };
        // What the kernel must have, and only root may use.
        let no_device = |sign: &str, module: &str, what: &str| {
            if !exists(sign) {
                Some(format!(
                    "this kernel has no {what}, or has not loaded it ({sign} is not there): `modprobe {module}` as root loads \
                     it, if there is such a module"
                ))
            } else if !is_root {
                Some(format!("this kernel has {what}, but only root may use it: run this with sudo"))
            } else {
                None
            }
        };
        match self {
            Self::Nbdcrypt | Self::NbdcryptPlaintext | Self::Yardstick | Self::Null => None,
            Self::NbdkitLuks | Self::NbdkitPlaintext => lacks("nbdkit", "nbdkit"),
            Self::QemuNbdLuks => lacks("qemu-nbd", "qemu-utils"),
            // The target itself is no sign: the kernel shows no trace of one that is built in, and loads one that is not
            // when it is asked for.
            Self::DmCrypt => no_device("/sys/class/misc/device-mapper", "dm_crypt", "device-mapper")
                .or_else(|| lacks("cryptsetup", "cryptsetup-bin")),
            Self::AttachedNbd => no_device("/sys/module/nbd", "nbd", "network block device"),
        }
    }

    /// What to try where it could not be started, beside what that failed with.
    fn advice(self, exists: impl Fn(&str) -> bool) -> Option<&'static str> {
        match self {
            Self::DmCrypt if !exists("/sys/module/dm_crypt") => {
                Some("if the kernel lacks its target crypt, `modprobe dm_crypt` loads it")
            }
            Self::AttachedNbd if !exists("/dev/nbd0") => Some(
                "there is no /dev/nbd0: a container must be given it, and `modprobe nbd` makes it where nothing else does",
            ),
            _ => None,
        }
    }

    /// The program that it is, if that is somebody else's.
    pub(super) fn program(self) -> Option<&'static str> {
        match self {
            Self::Nbdcrypt | Self::NbdcryptPlaintext | Self::Yardstick | Self::Null | Self::AttachedNbd => None,
            Self::NbdkitLuks | Self::NbdkitPlaintext => Some("nbdkit"),
            Self::QemuNbdLuks => Some("qemu-nbd"),
            Self::DmCrypt => Some("cryptsetup"),
        }
    }

    /// Whether it is a block device, which no NBD client can drive.
    pub(super) fn is_device(self) -> bool {
        matches!(self, Self::DmCrypt | Self::AttachedNbd)
    }

    /// Starts it on the stage's image, encrypted or plain.
    pub(super) fn start(self, stage: &Stage, io: Io) -> Result<Subject> {
        self.begin(stage, io).with_context(|| match self.advice(|sign| Path::new(sign).exists()) {
            Some(advice) => format!("{} ({advice})", self.name()),
            None => self.name().to_owned(),
        })
    }

    fn begin(self, stage: &Stage, io: Io) -> Result<Subject> {
        Ok(match self {
            Self::DmCrypt => Subject::Mapped(DmCrypt::open(&stage.luks, &stage.key())?),
            Self::AttachedNbd => {
                let (server, device) = ServerProcess::attach(self.command(stage, io)?, &stage.log())?;
                Subject::Attached(server, device)
            }
            _ => {
                let socket = stage.socket();
                let server = ServerProcess::listen(self.command(stage, io)?, &socket, &stage.log())?;
                Subject::Listening(server, socket)
            }
        })
    }

    /// What is typed to start it.
    pub(super) fn command(self, stage: &Stage, io: Io) -> Result<Command> {
        let socket = stage.socket();
        let key = stage.key();
        let ours = || std::env::current_exe().context("this program's own file").map(Command::new);
        Ok(match self {
            Self::Nbdcrypt => {
                let mut command = ours()?;
                command.arg("serve").args(io.arguments()).arg("--key-file").arg(key).arg("--socket").arg(socket);
                command.arg(&stage.luks);
                command
            }
            Self::NbdcryptPlaintext | Self::Yardstick | Self::Null => {
                let mut command = ours()?;
                let what = match self {
                    Self::Yardstick => "yardstick",
                    Self::Null => "null",
                    _ => "plaintext",
                };
                command.args(["bench", what]);
                if self == Self::NbdcryptPlaintext {
                    command.args(io.arguments());
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
                command.args(["bench", "attached"]).args(io.arguments()).arg("--key-file").arg(key).arg(&stage.luks);
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

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: [(Contestant, &str, &str); 2] = [
        (Contestant::DmCrypt, "/sys/class/misc/device-mapper", "`modprobe dm_crypt`"),
        (Contestant::AttachedNbd, "/sys/module/nbd", "`modprobe nbd`"),
    ];

    #[test]
    fn a_device_that_the_kernel_lacks_is_a_module_to_load() {
        for (contestant, sign, modprobe) in DEVICES {
            for is_root in [false, true] {
                let reason = contestant.missing_where(|_| false, |_| true, is_root).unwrap();
                assert!(reason.contains(sign) && reason.contains(modprobe), "{reason}");
            }
        }
    }

    #[test]
    fn a_device_that_the_kernel_has_is_roots() {
        for (contestant, sign, _) in DEVICES {
            let reason = contestant.missing_where(|path| path == sign, |_| true, false).unwrap();
            assert!(reason.contains("sudo") && !reason.contains("modprobe"), "{reason}");
            assert_eq!(contestant.missing_where(|path| path == sign, |_| true, true), None);
        }
    }

    #[test]
    fn a_program_that_is_missing_is_a_package_to_install() {
        for (contestant, package) in [
            (Contestant::NbdkitLuks, "nbdkit"),
            (Contestant::NbdkitPlaintext, "nbdkit"),
            (Contestant::QemuNbdLuks, "qemu-utils"),
            (Contestant::DmCrypt, "cryptsetup-bin"),
        ] {
            let program = contestant.program().unwrap();
            let reason = contestant.missing_where(|_| true, |installed| installed != program, true).unwrap();
            assert!(reason.contains(program) && reason.contains(&format!("apt-get install {package}")), "{reason}");
            assert_eq!(contestant.missing_where(|_| true, |installed| installed == program, true), None);
        }
    }

    #[test]
    fn ours_need_nothing() {
        for contestant in Contestant::ALL.into_iter().filter(|contestant| contestant.is_ours()) {
            assert_eq!(contestant.missing_where(|_| false, |_| false, false), None);
            assert_eq!(contestant.advice(|_| false), None);
        }
    }

    #[test]
    fn a_start_that_failed_for_want_of_a_module_says_which() {
        for (contestant, sign, modprobe) in [
            (Contestant::DmCrypt, "/sys/module/dm_crypt", "`modprobe dm_crypt`"),
            (Contestant::AttachedNbd, "/dev/nbd0", "`modprobe nbd`"),
        ] {
            assert!(contestant.advice(|path| path != sign).is_some_and(|advice| advice.contains(modprobe)));
            assert_eq!(contestant.advice(|path| path == sign), None);
        }
    }
}

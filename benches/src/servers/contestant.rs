//! The contestants: this server with and without its cipher, the yardstick, the null server, and every peer that is
//! installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::dm_crypt::{self, DmCrypt};
use super::server_process::ServerProcess;
use super::subject::Subject;
use bootstrap::bench::stage::Stage;
use bootstrap::machine::{packages, process};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contestant {
    Nbdcrypt,
    NbdcryptPlaintext,
    Yardstick,
    /// A server without storage.
    Null,
    NbdkitLuks,
    QemuNbdLuks,
    NbdkitPlaintext,
    /// The kernel's own block device, without a server.
    DmCrypt,
    /// This server, attached to the kernel.
    AttachedNbd,
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

    /// Returns why the contestant cannot take part on this machine, or `None` if it can.
    pub(super) fn missing(self) -> Option<String> {
        self.missing_where(|sign| Path::new(sign).exists(), installed, process::is_root())
    }

    /// Does what [`Self::missing`] does, for a machine with the given paths and programs.
    fn missing_where(
        self,
        exists: impl Fn(&str) -> bool,
        installed: impl Fn(&str) -> bool,
        is_root: bool,
    ) -> Option<String> {
        let lacks = |program: &str| {
            let missing = !installed(program);
            missing.then(|| format!("{program} is not installed: {}", packages::hint(program)))
        };
        // Checks for a device that the kernel must have and that only root may use.
        let no_device = |sign: &str, module: &str, what: &str| {
            if !exists(sign) {
                Some(format!(
                    "this kernel has no {what}, or has not loaded it ({sign} does not exist): run `modprobe {module}` as root to load \
                     it, if the module exists"
                ))
            } else if !is_root {
                Some(format!("this kernel has {what}, but only root may use it: run this with sudo or as root"))
            } else {
                None
            }
        };
        match self {
            Self::Nbdcrypt | Self::NbdcryptPlaintext | Self::Yardstick | Self::Null => None,
            Self::NbdkitLuks | Self::NbdkitPlaintext => lacks("nbdkit"),
            Self::QemuNbdLuks => lacks("qemu-nbd"),
            // Whether the kernel has the crypt target cannot be checked. The kernel shows nothing about a built-in target,
            // and it loads the module only when the target is used.
            Self::DmCrypt => {
                no_device("/sys/class/misc/device-mapper", "dm_crypt", "device-mapper").or_else(|| lacks("cryptsetup"))
            }
            Self::AttachedNbd => no_device("/sys/module/nbd", "nbd", "network block device"),
        }
    }

    /// Returns advice for the case that the contestant could not be started. The error itself is shown separately.
    fn advice(self, exists: impl Fn(&str) -> bool) -> Option<&'static str> {
        match self {
            Self::DmCrypt if !exists("/sys/module/dm_crypt") => {
                Some("if the kernel has not loaded its crypt target, run `modprobe dm_crypt`")
            }
            Self::AttachedNbd if !exists("/dev/nbd0") => {
                Some("/dev/nbd0 does not exist: pass it to the container, or run `modprobe nbd` to create it")
            }
            _ => None,
        }
    }

    /// Returns the contestant's program, unless it is this project's own.
    pub(super) fn program(self) -> Option<&'static str> {
        match self {
            Self::Nbdcrypt | Self::NbdcryptPlaintext | Self::Yardstick | Self::Null | Self::AttachedNbd => None,
            Self::NbdkitLuks | Self::NbdkitPlaintext => Some("nbdkit"),
            Self::QemuNbdLuks => Some("qemu-nbd"),
            Self::DmCrypt => Some("cryptsetup"),
        }
    }

    /// Returns whether the contestant is a block device, which an NBD client cannot drive.
    pub(super) fn is_device(self) -> bool {
        matches!(self, Self::DmCrypt | Self::AttachedNbd)
    }

    /// Starts the contestant on the encrypted or the plaintext image.
    pub(super) fn start(self, stage: &Stage) -> Result<Subject> {
        self.begin(stage).with_context(|| match self.advice(|sign| Path::new(sign).exists()) {
            Some(advice) => format!("{} ({advice})", self.name()),
            None => self.name().to_owned(),
        })
    }

    fn begin(self, stage: &Stage) -> Result<Subject> {
        Ok(match self {
            Self::DmCrypt => Subject::Mapped(DmCrypt::open(&stage.luks, &stage.key())?),
            Self::AttachedNbd => {
                let (server, device) = ServerProcess::attach(self.command(stage)?, &stage.log())?;
                Subject::Attached(server, device)
            }
            _ => {
                let socket = stage.socket();
                let server = ServerProcess::listen(self.command(stage)?, &socket, &stage.log())?;
                Subject::Listening(server, socket)
            }
        })
    }

    /// Returns the command that starts the contestant.
    pub(super) fn command(self, stage: &Stage) -> Result<Command> {
        let socket = stage.socket();
        let key = stage.key();
        // This program contains the servers that exist only for the comparison. The server that is measured is
        // `nbdcrypt`.
        let helper = || std::env::current_exe().context("cannot find this program's own file").map(Command::new);
        Ok(match self {
            Self::Nbdcrypt => {
                let mut command = Command::new(nbdcrypt()?);
                command.arg("serve").arg("--page-cache").arg("--key-file").arg(key).arg("--socket").arg(socket);
                command.arg(&stage.luks);
                command
            }
            Self::NbdcryptPlaintext | Self::Yardstick | Self::Null => {
                let mut command = helper()?;
                let what = match self {
                    Self::Yardstick => "yardstick",
                    Self::Null => "null",
                    _ => "plaintext",
                };
                command.arg(what);
                if self == Self::NbdcryptPlaintext {
                    command.arg("--page-cache");
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
                let mut command = helper()?;
                command.arg("attached").arg("--page-cache").arg("--key-file").arg(key).arg(&stage.luks);
                command
            }
        })
    }
}

/// Returns the `nbdcrypt` to measure: the program in this program's directory, or else the program in `PATH`.
pub(crate) fn nbdcrypt() -> Result<PathBuf> {
    let beside = std::env::current_exe().context("cannot find this program's own file")?.with_file_name("nbdcrypt");
    if beside.is_file() {
        return Ok(beside);
    }
    ensure!(
        installed("nbdcrypt"),
        "{} does not exist, and no nbdcrypt is in PATH: build it with `cargo build --release --bin nbdcrypt`, or install \
         it",
        beside.display()
    );
    Ok(PathBuf::from("nbdcrypt"))
}

/// Writes a path for qemu's option lists, where a comma is doubled.
fn commas(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Returns whether a program of that name is in `PATH`.
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
    fn a_missing_kernel_device_names_its_module() {
        for (contestant, sign, modprobe) in DEVICES {
            for is_root in [false, true] {
                let reason = contestant.missing_where(|_| false, |_| true, is_root).unwrap();
                assert!(reason.contains(sign) && reason.contains(modprobe), "{reason}");
            }
        }
    }

    #[test]
    fn a_kernel_device_needs_root() {
        for (contestant, sign, _) in DEVICES {
            let reason = contestant.missing_where(|path| path == sign, |_| true, false).unwrap();
            assert!(reason.contains("sudo") && !reason.contains("modprobe"), "{reason}");
            assert_eq!(contestant.missing_where(|path| path == sign, |_| true, true), None);
        }
    }

    #[test]
    fn a_missing_program_names_its_package() {
        for contestant in
            [Contestant::NbdkitLuks, Contestant::NbdkitPlaintext, Contestant::QemuNbdLuks, Contestant::DmCrypt]
        {
            let program = contestant.program().unwrap();
            let reason = contestant.missing_where(|_| true, |installed| installed != program, true).unwrap();
            assert!(reason.contains(program) && reason.contains("install the package"), "{reason}");
            assert_eq!(contestant.missing_where(|_| true, |installed| installed == program, true), None);
        }
    }

    #[test]
    fn this_projects_servers_need_nothing() {
        for contestant in Contestant::ALL.into_iter().filter(|contestant| contestant.is_ours()) {
            assert_eq!(contestant.missing_where(|_| false, |_| false, false), None);
            assert_eq!(contestant.advice(|_| false), None);
        }
    }

    #[test]
    fn a_failed_start_names_the_module_that_may_be_missing() {
        for (contestant, sign, modprobe) in [
            (Contestant::DmCrypt, "/sys/module/dm_crypt", "`modprobe dm_crypt`"),
            (Contestant::AttachedNbd, "/dev/nbd0", "`modprobe nbd`"),
        ] {
            assert!(contestant.advice(|path| path != sign).is_some_and(|advice| advice.contains(modprobe)));
            assert_eq!(contestant.advice(|path| path == sign), None);
        }
    }
}

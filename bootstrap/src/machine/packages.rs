//! Knows which package contains a program, and how this distribution installs it.

use crate::machine::root::Root;

/// Families of distributions, by their package manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Debian,
    Fedora,
    /// Before dnf: Amazon Linux 2, CentOS 7.
    OldFedora,
    Suse,
    Arch,
    Alpine,
    Unknown,
}

/// Returns advice on a program that this machine lacks: "install the package xfsprogs (dnf install xfsprogs)".
pub fn hint(program: &str) -> String {
    hint_at(&Root::of_this_machine(), program)
}

/// Returns the advice of [`hint`] for the machine at `root`.
pub fn hint_at(root: &Root, program: &str) -> String {
    hint_on(Family::of(&release(root)), program)
}

/// Returns the text of os-release(5).
fn release(root: &Root) -> String {
    ["/etc/os-release", "/usr/lib/os-release"].into_iter().find_map(|path| root.text(path)).unwrap_or_default()
}

/// Returns advice on a driver that the running kernel lacks.
pub fn driver_hint(root: &Root, module: &str) -> String {
    let kernel = root.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let installed = root.names("/lib/modules");
    if installed.is_empty() {
        return format!("load it on the host (modprobe {module}): there are no modules here, as in a container");
    }
    if !installed.contains(&kernel) {
        return format!(
            "reboot: the modules of the running kernel, {kernel}, are gone, as after an update of the kernel"
        );
    }
    let package = match Family::of(&release(root)) {
        Family::Debian if release(root).contains("ubuntu") => format!("linux-modules-extra-{kernel}"),
        Family::Debian => "linux-image-amd64".to_owned(),
        Family::Fedora | Family::OldFedora => format!("kernel-modules-extra-{kernel}"),
        Family::Suse => "kernel-default".to_owned(),
        Family::Alpine => "linux-lts".to_owned(),
        Family::Arch => "linux".to_owned(),
        Family::Unknown => return format!("install the package of your kernel that contains the module {module}"),
    };
    let install = Family::of(&release(root)).install().unwrap_or_default();
    let is_of_kernel = package.ends_with(&kernel);
    let reboot = if is_of_kernel { "" } else { ", and boot its kernel" };
    format!("install the kernel package that contains the module {module} ({install} {package}){reboot}")
}

fn hint_on(family: Family, program: &str) -> String {
    let Some(package) = family.package_of(program) else {
        return match program.strip_prefix("mkfs.") {
            Some(kind) => {
                format!("no known package contains it: is `{kind}` the right name of the filesystem type?")
            }
            None => format!("install {program}"),
        };
    };
    match family.install() {
        Some(install) => format!("install the package {package} ({install} {package})"),
        None => format!("install the package {package}, or its equivalent in this distribution"),
    }
}

impl Family {
    /// Returns the family of the distribution that os-release(5) describes.
    fn of(release: &str) -> Self {
        let field = |name: &str| {
            let value = release.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
        };
        let (id, like, version) = (field("ID"), field("ID_LIKE"), field("VERSION_ID"));
        let of = |name: &str| match name {
            "debian" | "ubuntu" => Some(Self::Debian),
            "fedora" | "rhel" | "centos" | "amzn" => Some(Self::Fedora),
            "suse" | "opensuse" | "sles" => Some(Self::Suse),
            "arch" => Some(Self::Arch),
            "alpine" => Some(Self::Alpine),
            _ => None,
        };
        let family = std::iter::once(id.as_str()).chain(like.split_whitespace()).find_map(of);
        match family {
            Some(Self::Fedora) if (id == "amzn" && version == "2") || (id == "centos" && version == "7") => {
                Self::OldFedora
            }
            family => family.unwrap_or(Self::Unknown),
        }
    }

    fn install(self) -> Option<&'static str> {
        match self {
            Self::Debian => Some("apt-get install"),
            Self::Fedora => Some("dnf install"),
            Self::OldFedora => Some("yum install"),
            Self::Suse => Some("zypper install"),
            Self::Arch => Some("pacman -S"),
            Self::Alpine => Some("apk add"),
            Self::Unknown => None,
        }
    }

    fn package_of(self, program: &str) -> Option<&'static str> {
        Some(match (program, self) {
            ("mkfs.ext2" | "mkfs.ext3" | "mkfs.ext4", _) => "e2fsprogs",
            ("mkfs.xfs", _) => "xfsprogs",
            ("mkfs.btrfs", Self::Suse) => "btrfsprogs",
            ("mkfs.btrfs", _) => "btrfs-progs",
            ("mkfs.f2fs", _) => "f2fs-tools",
            ("mkfs.vfat" | "mkfs.fat" | "mkfs.msdos", _) => "dosfstools",
            ("mkfs.exfat", _) => "exfatprogs",
            ("mkfs.ntfs", Self::Debian | Self::Arch) => "ntfs-3g",
            ("mkfs.ntfs", Self::Alpine) => "ntfs-3g-progs",
            ("mkfs.ntfs", _) => "ntfsprogs",
            ("mkfs.bcachefs", _) => "bcachefs-tools",
            ("mkfs.nilfs2", Self::Debian) => "nilfs-tools",
            ("mkfs.nilfs2", _) => "nilfs-utils",
            ("mkfs.jfs", _) => "jfsutils",
            ("mkfs.minix" | "mkfs.cramfs" | "mkfs.bfs", _) => "util-linux",
            ("mount" | "umount" | "losetup", Self::Debian) => "mount",
            ("mount" | "umount" | "losetup", Self::Alpine) => match program {
                "mount" => "mount",
                "umount" => "umount",
                _ => "losetup",
            },
            ("mount" | "umount" | "losetup", _) => "util-linux",
            ("blockdev", _) => "util-linux",
            ("modprobe", _) => "kmod",
            ("fio", _) => "fio",
            ("nbdkit", _) => "nbdkit",
            ("qemu-nbd", Self::Debian) => "qemu-utils",
            ("qemu-nbd", Self::Suse) => "qemu-tools",
            ("qemu-nbd", _) => "qemu-img",
            ("cryptsetup", Self::Debian) => "cryptsetup-bin",
            ("cryptsetup", _) => "cryptsetup",
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_distribution_has_its_own_command_and_names() {
        for (release, program, said) in [
            ("ID=debian\nVERSION_ID=\"12\"\n", "mkfs.xfs", "xfsprogs (apt-get install xfsprogs)"),
            ("ID=ubuntu\nID_LIKE=debian\n", "losetup", "mount (apt-get install mount)"),
            ("ID=\"amzn\"\nID_LIKE=\"fedora\"\nVERSION_ID=\"2023\"\n", "mkfs.ext4", "(dnf install e2fsprogs)"),
            ("ID=\"amzn\"\nID_LIKE=\"centos rhel fedora\"\nVERSION_ID=\"2\"\n", "mkfs.xfs", "(yum install xfsprogs)"),
            ("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n", "losetup", "(dnf install util-linux)"),
            ("ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n", "mkfs.btrfs", "(zypper install btrfsprogs)"),
            ("ID=manjaro\nID_LIKE=arch\n", "mkfs.vfat", "(pacman -S dosfstools)"),
            ("ID=alpine\n", "losetup", "(apk add losetup)"),
            ("", "mkfs.xfs", "install the package xfsprogs, or its equivalent in this distribution"),
            ("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", "qemu-nbd", "(apt-get install qemu-utils)"),
        ] {
            let hint = hint_on(Family::of(release), program);
            assert!(hint.contains(said), "{release:?}: {hint}");
            if !release.contains("debian") {
                assert!(!hint.contains("apt"), "{release:?}: {hint}");
            }
        }
    }

    #[test]
    fn no_package_is_invented_for_an_unknown_program() {
        for family in [Family::Debian, Family::Fedora, Family::Unknown] {
            let hint = hint_on(family, "mkfs.ext5");
            assert!(hint.contains("is `ext5` the right name") && !hint.contains("util-linux"), "{hint}");
        }
    }
}

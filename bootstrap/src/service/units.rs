//! Makes the files that systemd needs for a volume, in addition to the unit `nbdcrypt@NAME.service`, which is the same
//! for every volume.
//!
//! A generator (systemd.generator(7)) writes two files for each configuration:
//! - **A mount unit**, and one for each target of `bind`, which requires the service. systemd finds the mount by its mountpoint. So
//!   `RequiresMountsFor=/mnt/scratch` in another unit starts the volume and waits for it. If the volume fails, the other
//!   unit fails, too. Without a mount unit, systemd orders units only after mounts that already exist.
//! - **A drop-in** for the service. It names what must exist before the server starts, and until the server has stopped: the
//!   filesystems of the files that the configuration names, the disk, and the network.
//!
//! The server mounts the filesystem before it reports that it is ready. So systemd finds that the filesystem is already
//! mounted, and does nothing. The same is true of a volume that was brought up by hand, whose
//! service is not active.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::config::{Config, KeyConfig, KeyFile, VolumeName};
use crate::machine::selection::Selection;

/// A file for systemd.
#[derive(Debug, PartialEq, Eq)]
pub struct UnitFile {
    /// Its path below the folder of the generator's files.
    pub path: PathBuf,
    /// Its content.
    pub text: String,
}

/// Returns the files for the volume of `config`, which was read from `path`. Returns `None` if the file's name cannot be the
/// name of an instance of the service. The service uses the name without escapes, and a unit's name cannot contain every
/// character.
pub fn of(config: &Config, path: &Path) -> Option<Vec<UnitFile>> {
    let instance = VolumeName::new(path.file_stem()?.to_str()?)?;
    let service = format!("nbdcrypt@{instance}.service");
    let drop_in =
        UnitFile { path: Path::new(&format!("{service}.d")).join("50-nbdcrypt.conf"), text: drop_in(config, path) };
    let mounts = mountpoints(config).into_iter().map(|mountpoint| UnitFile {
        path: unit_of_path(mountpoint, "mount").into(),
        text: mount_unit(&service, path, mountpoint),
    });
    Some(std::iter::once(drop_in).chain(mounts).collect())
}

/// Returns where the volume's filesystem is mounted, and where folders of it are mounted as well.
fn mountpoints(config: &Config) -> Vec<&Path> {
    let filesystem = config.filesystem.iter();
    filesystem
        .flat_map(|filesystem| {
            let targets = filesystem.binds.iter().map(|bind| bind.target.as_path());
            std::iter::once(filesystem.mountpoint.as_path()).chain(targets)
        })
        .collect()
}

/// The first line of each file.
const HEAD: &str = "# Made by nbdcrypt-generator.\n";

fn drop_in(config: &Config, path: &Path) -> String {
    // A disk that is selected by what it is has no name before it is there. The server waits for it.
    let disks = match &config.volume.devices {
        Selection::Paths(paths) => paths.as_slice(),
        Selection::InstanceStore | Selection::Serials { .. } => &[],
    };
    let key = match &config.key {
        KeyConfig::File(KeyFile::Path(path)) => Some(path.as_path()),
        _ => None,
    };
    let mountpoints = mountpoints(config);
    let parents = mountpoints.iter().filter_map(|mountpoint| mountpoint.parent());
    let header = config.volume.header.as_deref();
    let mut text = format!("{HEAD}[Unit]\n");
    // /dev and /run are always there. systemd itself makes /run/credentials for the service.
    let is_elsewhere = |path: &&Path| !path.starts_with("/dev") && !path.starts_with("/run");
    let devices = || disks.iter().map(PathBuf::as_path).chain(header);
    let files = std::iter::once(path).chain(devices()).chain(key).chain(parents);
    for file in files.filter(is_elsewhere) {
        let _ = writeln!(text, "RequiresMountsFor={}", quoted(file));
    }
    // The device is wanted and not required, so that the server starts and can report what is wrong with a disk.
    for device in devices().filter(|path| path.starts_with("/dev")) {
        let device = unit_of_path(device, "device");
        let _ = writeln!(text, "Wants={device}\nAfter={device}");
    }
    if matches!(config.key, KeyConfig::Aws(_)) {
        text.push_str("Wants=network-online.target\nAfter=network-online.target\n");
    }
    for mountpoint in &mountpoints {
        let _ = writeln!(text, "Before={}", unit_of_path(mountpoint, "mount"));
    }
    text
}

fn mount_unit(service: &str, config: &Path, mountpoint: &Path) -> String {
    // The default dependencies would order the mount before `local-fs.target`, but the service starts after that target.
    // systemd never mounts this itself. If it tried, mount(8) would fail because it does not know the type, and would mount
    // nothing. With `BindsTo=`, systemd would at once unmount a volume that was brought up by hand, because its service is
    // not active.
    format!(
        "{HEAD}[Unit]\n\
         SourcePath={}\n\
         DefaultDependencies=no\n\
         Requires={service}\n\
         After={service}\n\
         Before=remote-fs.target umount.target\n\
         Conflicts=umount.target\n\
         \n\
         [Mount]\n\
         What=nbdcrypt\n\
         Type=nbdcrypt\n\
         Where={}\n",
        unexpanded(config),
        unexpanded(mountpoint)
    )
}

/// Returns the name of the unit of this type for an absolute path, as `systemd-escape --path --suffix` does.
pub fn unit_of_path(path: &Path, suffix: &str) -> String {
    let parts: Vec<&[u8]> = path.as_os_str().as_bytes().split(|byte| *byte == b'/').collect();
    let parts: Vec<&[u8]> = parts.into_iter().filter(|part| !part.is_empty() && *part != b".").collect();
    let name = if parts.is_empty() { "-".to_owned() } else { escape(&parts.join(&b'/')) };
    format!("{name}.{suffix}")
}

/// Escapes a string for a unit's name (systemd.unit(5), "String Escaping for Inclusion in Unit Names").
fn escape(text: &[u8]) -> String {
    let mut escaped = String::new();
    for (index, byte) in text.iter().enumerate() {
        match byte {
            b'/' => escaped.push('-'),
            b'.' if index == 0 => escaped.push_str("\\x2e"),
            b'.' | b':' | b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => escaped.push(char::from(*byte)),
            _ => {
                let _ = write!(escaped, "\\x{byte:02x}");
            }
        }
    }
    escaped
}

/// Returns the path for a setting that takes the rest of its line. `%` would start a specifier.
fn unexpanded(path: &Path) -> String {
    path.to_string_lossy().replace('%', "%%")
}

/// Returns the path for a setting that takes a list (systemd.syntax(7), "Quoting").
fn quoted(path: &Path) -> String {
    format!("\"{}\"", unexpanded(path).replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(path: &str, volume: &str, key: &str, filesystem: &str) -> Option<Vec<(String, String)>> {
        let path = Path::new(path);
        let config = Config::parse(&format!("[volume]\n{volume}\n[key]\n{key}\n{filesystem}"), path).unwrap();
        let files = of(&config, path)?;
        Some(files.into_iter().map(|file| (file.path.to_str().unwrap().to_owned(), file.text)).collect())
    }

    #[test]
    fn a_volume_gets_a_drop_in_and_a_mount_unit() {
        let made = units(
            "/etc/nbdcrypt/my-disk.toml",
            "devices = [\"/srv/a 100%/disk\"]\nsize = \"64M\"\nheader = \"/dev/vdb1\"",
            "source = \"file\"\npath = \"/keys/one\"",
            "[filesystem]\nmountpoint = \"/mnt/my-data\"",
        );
        let drop_in = "# Made by nbdcrypt-generator.\n[Unit]\n\
             RequiresMountsFor=\"/etc/nbdcrypt/my-disk.toml\"\nRequiresMountsFor=\"/srv/a 100%%/disk\"\n\
             RequiresMountsFor=\"/keys/one\"\nRequiresMountsFor=\"/mnt\"\n\
             Wants=dev-vdb1.device\nAfter=dev-vdb1.device\nBefore=mnt-my\\x2ddata.mount\n";
        let mount = "# Made by nbdcrypt-generator.\n[Unit]\nSourcePath=/etc/nbdcrypt/my-disk.toml\n\
             DefaultDependencies=no\nRequires=nbdcrypt@my-disk.service\nAfter=nbdcrypt@my-disk.service\n\
             Before=remote-fs.target umount.target\nConflicts=umount.target\n\n\
             [Mount]\nWhat=nbdcrypt\nType=nbdcrypt\nWhere=/mnt/my-data\n";
        let expected = [
            ("nbdcrypt@my-disk.service.d/50-nbdcrypt.conf".to_owned(), drop_in.to_owned()),
            ("mnt-my\\x2ddata.mount".to_owned(), mount.to_owned()),
        ];
        assert_eq!(made.unwrap(), expected);
    }

    #[test]
    fn each_bind_mount_gets_a_mount_unit() {
        let made = units(
            "/etc/nbdcrypt/x.toml",
            "devices = [\"/dev/vdb\"]",
            "source = \"file\"\npath = \"/run/key\"",
            "[filesystem]\nmountpoint = \"/mnt/x\"\nbind = { containerd = \"/var/lib/containerd\" }",
        );
        let made = made.unwrap();
        let names: Vec<_> = made.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(names, ["nbdcrypt@x.service.d/50-nbdcrypt.conf", "mnt-x.mount", "var-lib-containerd.mount"]);
        for line in ["RequiresMountsFor=\"/var/lib\"", "Before=mnt-x.mount", "Before=var-lib-containerd.mount"] {
            assert!(made[0].1.lines().any(|other| other == line), "{line}: {}", made[0].1);
        }
        assert!(
            made[2].1.contains("Requires=nbdcrypt@x.service\n") && made[2].1.ends_with("Where=/var/lib/containerd\n")
        );
    }

    #[test]
    fn only_a_key_in_aws_waits_for_the_network() {
        let device = "devices = [\"/dev/nvme1n1\"]";
        let aws = units("/etc/x.toml", device, "source = \"aws\"\nobject = \"s3://bucket/key\"", "").unwrap();
        assert!(aws[0].1.contains("\nAfter=network-online.target\n"), "{}", aws[0].1);
        let file = units("/etc/x.toml", device, "source = \"file\"\npath = \"/run/credentials/x/key\"", "").unwrap();
        assert!(!file[0].1.contains("network") && !file[0].1.contains("credentials"), "{}", file[0].1);
        assert_eq!(file.len(), 1, "without a filesystem there is no mount unit");
    }

    #[test]
    fn a_file_with_an_impossible_name_gets_no_units() {
        let volume = "devices = [\"/dev/vdb\"]\nname = \"fine\"";
        assert_eq!(units("/etc/nbdcrypt/not fine.toml", volume, "source = \"file\"\npath = \"/key\"", ""), None);
    }

    #[test]
    fn paths_are_escaped_as_systemd_escape_does() {
        let escaped = |path: &str| unit_of_path(Path::new(path), "mount");
        assert_eq!(escaped("/"), "-.mount");
        assert_eq!(escaped("//mnt/./x/"), "mnt-x.mount");
        assert_eq!(escaped("/.a/b.c:_9"), "\\x2ea-b.c:_9.mount");
        assert_eq!(escaped("/ü-\\ %"), "\\xc3\\xbc\\x2d\\x5c\\x20\\x25.mount");
    }
}

//! The system's own programs that nbdcrypt leaves work to: mkfs, mount, umount.

use std::io;
use std::process::{Command, Stdio};

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It is not there.
    #[error("the program {program} is not installed: install the package {package} (apt-get install {package})")]
    Missing {
        /// What was to run.
        program: String,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// It could not be started.
    #[error("the program {program} could not be started: {source}")]
    Start {
        /// What was to run.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// It ran, and said no.
    #[error("{program} failed ({status}): {said}")]
    Failed {
        /// What ran.
        program: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it printed on standard error, in one line.
        said: String,
    },
}

/// Runs a program to its end with no standard input, in the C locale, and returns what it printed.
///
/// # Errors
/// [`ProgramError`], with what the program said on standard error.
pub fn run(program: &str, args: &[&std::ffi::OsStr]) -> Result<String, ProgramError> {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        // At boot, and under sudo, the path may lack the folders of these programs.
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                ProgramError::Missing { program: program.to_owned(), package: package_of(program) }
            }
            _ => ProgramError::Start { program: program.to_owned(), source },
        })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    Err(ProgramError::Failed { program: program.to_owned(), status: output.status, said })
}

fn package_of(program: &str) -> &'static str {
    match program {
        "mkfs.ext2" | "mkfs.ext3" | "mkfs.ext4" => "e2fsprogs",
        "mkfs.xfs" => "xfsprogs",
        "mkfs.btrfs" => "btrfs-progs",
        "mkfs.f2fs" => "f2fs-tools",
        "mkfs.vfat" => "dosfstools",
        "mount" | "umount" => "mount",
        _ => "util-linux",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = run("mkfs.no-such-filesystem", &[]).unwrap_err();
        assert!(error.to_string().contains("mkfs.no-such-filesystem is not installed"), "{error}");
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = run("sh", &["-c".as_ref(), "echo went wrong >&2; exit 3".as_ref()]).unwrap_err();
        assert!(error.to_string().contains("went wrong") && error.to_string().contains('3'), "{error}");
    }
}

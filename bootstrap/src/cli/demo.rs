//! `nbdcrypt demo`: makes, mounts and removes a volume on this machine, with the commands that a user types.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use tokio::signal::unix::{SignalKind, signal};

use super::tell;
use crate::machine::{bare_folder, process, random};

/// The text that is written and then searched for.
const TEXT: &str = "the quick brown fox jumps over the lazy dog, and nobody may know";

#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: Args) -> Result<()> {
    if !process::is_root() {
        bail!("the demo mounts a filesystem, which only root may do: run it with sudo");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    // From here on, Ctrl-C ends the commands that this process waits for. This process goes on, since it must clean up.
    let _signals = [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
    let stage = Stage::set()?;
    let result = play(&stage);
    // The folder is removed in every case. An error of the removal is returned only if nothing else failed.
    let cleared = stage.clear();
    result.and(cleared)?;
    tell("\nDone. The demo has left no mount, no device, no process and no file.\n")
}

fn play(stage: &Stage) -> Result<()> {
    let text_file = stage.mountpoint().join("secret.txt");

    tell(format_args!("A configuration with a key file and a disk, which is a file that does not exist yet:\n\n"))?;
    tell(format_args!("{}\n", indented(&fs::read_to_string(stage.config())?)))?;

    tell(format_args!(
        "`up` makes the file, formats and attaches it, makes a filesystem and mounts it. Then the demo writes a text.\n"
    ))?;
    stage.nbdcrypt(&["up"])?;
    fs::write(&text_file, TEXT)?;
    // Writes the text from the kernel's cache to the disk.
    fs::File::open(&text_file)?.sync_all()?;
    stage.nbdcrypt(&["status"])?;

    tell(format_args!("Can someone who reads the raw bytes find the text?\n"))?;
    let device = stage.device()?;
    let through_the_device = count(&device)?;
    let in_the_file = count(&stage.disk())?;
    tell(format_args!("  {}, the decrypted device: found {through_the_device} times\n", device.display()))?;
    tell(format_args!("  {}, the encrypted file: found {in_the_file} times\n\n", stage.disk().display()))?;
    ensure!(through_the_device > 0, "the text was not found on the device either, so the search proves nothing");
    ensure!(in_the_file == 0, "the text was found unencrypted on the disk");

    tell(format_args!("`down`, and `up` again: the text is still there.\n"))?;
    stage.nbdcrypt(&["down"])?;
    ensure!(!text_file.exists(), "the filesystem is still mounted");
    stage.nbdcrypt(&["up"])?;
    let back = fs::read_to_string(&text_file)?;
    tell(format_args!("  {}: {back}\n\n", text_file.display()))?;
    ensure!(back == TEXT, "the text that was read is not the text that was written");
    stage.nbdcrypt(&["down"])
}

/// The demo's own folder. Everything happens in it.
struct Stage {
    folder: PathBuf,
}

impl Stage {
    fn set() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("nbdcrypt-demo-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&folder).with_context(|| folder.display().to_string())?;
        let stage = Self { folder };
        let mut key = [0; 32];
        random::fill(&mut key)?;
        stage.write("key", &key)?;
        let config = format!(
            "[volume]\ndevices = [\"{disk}\"]\nsize = \"64M\"\n[key]\nsource = \"file\"\npath = \"{key}\"\nrandom = true\n\
             [filesystem]\ntype = \"ext4\"\nmountpoint = \"{mountpoint}\"\n",
            disk = stage.disk().display(),
            key = stage.folder.join("key").display(),
            mountpoint = stage.mountpoint().display(),
        );
        stage.write("demo.toml", config.as_bytes())?;
        Ok(stage)
    }

    /// Makes a file that only root may read and write, whatever the umask is.
    fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        let made = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.and_then(|mut file| file.write_all(content)).with_context(|| path.display().to_string())
    }

    fn config(&self) -> PathBuf {
        self.folder.join("demo.toml")
    }

    fn disk(&self) -> PathBuf {
        self.folder.join("secretfs")
    }

    fn mountpoint(&self) -> PathBuf {
        self.folder.join("mnt")
    }

    /// Prints a command, runs it as a user would, and prints its output.
    fn nbdcrypt(&self, command: &[&str]) -> Result<()> {
        tell(format_args!("  # nbdcrypt {} {}\n", command.join(" "), self.config().display()))?;
        let output = self.command(command).stderr(Stdio::inherit()).output()?;
        tell(format_args!("{}\n", indented(&String::from_utf8_lossy(&output.stdout))))?;
        ensure!(output.status.success(), "nbdcrypt {} failed", command.join(" "));
        Ok(())
    }

    fn command(&self, command: &[&str]) -> Command {
        let program = std::env::current_exe().unwrap_or_else(|_| "nbdcrypt".into());
        let mut started = Command::new(program);
        started.arg("--run-dir").arg(self.folder.join("run")).args(command).arg(self.config());
        started
    }

    /// Returns the attached device, as `status` reports it.
    fn device(&self) -> Result<PathBuf> {
        let output = self.command(&["status", "--json"]).output()?;
        let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let device = status[0]["device"].as_str().context("status names no device")?;
        Ok(device.into())
    }

    /// Takes the volume down if it is still up, then removes the folder.
    fn clear(self) -> Result<()> {
        let down = self.command(&["down"]).output()?;
        if !down.status.success() {
            bail!("something is still up: {}", String::from_utf8_lossy(&down.stderr).trim());
        }
        // `down` leaves the empty mountpoint immutable.
        if self.mountpoint().exists() {
            bare_folder::unprotect(&self.mountpoint())?;
        }
        fs::remove_dir_all(&self.folder).with_context(|| self.folder.display().to_string())
    }
}

/// Returns how often the raw bytes of a device or file contain the text.
fn count(path: &Path) -> Result<usize> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
    let first = TEXT.as_bytes()[0];
    let starts = bytes.iter().enumerate().filter(|(_, byte)| **byte == first);
    Ok(starts.filter(|(at, _)| bytes[*at..].starts_with(TEXT.as_bytes())).count())
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

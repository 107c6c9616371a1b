//! `nbdcrypt demo`: the whole job on this machine, with the very commands that a user types, and cleaned up after.

use std::fs;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use tokio::signal::unix::{SignalKind, signal};

use super::tell;
use crate::{process, system};

/// What is written, and searched for.
const TEXT: &str = "the quick brown fox jumps over the lazy dog, and nobody may know";

#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: Args) -> Result<()> {
    if !process::is_root() {
        bail!("the demo mounts a filesystem, which only root may do: run it with sudo");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    // From here on Ctrl-C ends what this process waits for, and not this process, which has to clear up.
    let _signals = [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?];
    let stage = Stage::set()?;
    let result = play(&stage);
    // In any case, and what it says counts only where nothing else went wrong.
    let cleared = stage.clear();
    result.and(cleared)?;
    tell("\nDone. Nothing is left of it: no mount, no device, no process, no file.\n")
}

fn play(stage: &Stage) -> Result<()> {
    let text_file = stage.mountpoint().join("secret.txt");

    tell(format_args!("A configuration, a key, and a disk that is a file yet to be made:\n\n"))?;
    tell(format_args!("{}\n", indented(&fs::read_to_string(stage.config())?)))?;

    tell(format_args!("Up: made, formatted, attached, mkfs, mounted. Then a text is written.\n"))?;
    stage.nbdcrypt(&["up"])?;
    fs::write(&text_file, TEXT)?;
    // Out of the kernel's cache, down to the disk.
    fs::File::open(&text_file)?.sync_all()?;
    stage.nbdcrypt(&["status"])?;

    tell(format_args!("Is the text there to be found, by anyone who reads the raw bytes?\n"))?;
    let device = stage.device()?;
    let through_the_device = count(&device)?;
    let in_the_file = count(&stage.disk())?;
    tell(format_args!("  {}, which decrypts: found {through_the_device} times\n", device.display()))?;
    tell(format_args!("  {}, which lies on the disk: found {in_the_file} times\n\n", stage.disk().display()))?;
    ensure!(through_the_device > 0, "the text is not even on the device: the search proves nothing");
    ensure!(in_the_file == 0, "the text lies on the disk in the clear");

    tell(format_args!("Down, and up again: the text is still there.\n"))?;
    stage.nbdcrypt(&["down"])?;
    ensure!(!text_file.exists(), "the filesystem is still mounted");
    stage.nbdcrypt(&["up"])?;
    let back = fs::read_to_string(&text_file)?;
    tell(format_args!("  {}: {back}\n\n", text_file.display()))?;
    ensure!(back == TEXT, "another text came back");
    stage.nbdcrypt(&["down"])
}

/// A folder of the demo's own, where everything happens.
struct Stage {
    folder: PathBuf,
}

impl Stage {
    fn set() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("nbdcrypt-demo-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&folder).with_context(|| folder.display().to_string())?;
        let stage = Self { folder };
        let mut key = [0; 32];
        system::random(&mut key)?;
        fs::write(stage.folder.join("key"), key)?;
        fs::set_permissions(stage.folder.join("key"), std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let config = format!(
            "[volume]\ndevices = [\"{disk}\"]\nsize = \"64M\"\n[key]\nsource = \"file\"\npath = \"{key}\"\nrandom = true\n\
             [filesystem]\ntype = \"ext4\"\nmountpoint = \"{mountpoint}\"\n",
            disk = stage.disk().display(),
            key = stage.folder.join("key").display(),
            mountpoint = stage.mountpoint().display(),
        );
        fs::write(stage.config(), config)?;
        Ok(stage)
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

    /// Runs this program as a user would, and shows how.
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

    /// The attached device, as `status` tells it.
    fn device(&self) -> Result<PathBuf> {
        let output = self.command(&["status", "--json"]).output()?;
        let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let device = status[0]["device"].as_str().context("status names no device")?;
        Ok(device.into())
    }

    /// Takes down what may still be up, then removes the folder.
    fn clear(self) -> Result<()> {
        let down = self.command(&["down"]).output()?;
        if !down.status.success() {
            bail!("something is still up: {}", String::from_utf8_lossy(&down.stderr).trim());
        }
        fs::remove_dir_all(&self.folder).with_context(|| self.folder.display().to_string())
    }
}

/// How often the text stands in the raw bytes of a device or file.
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

//! A Linux kernel to attach devices to: Debian's user-mode-linux, a kernel as an ordinary process, with the modules nbd,
//! dm-crypt and loop. It needs neither root nor KVM.
//!
//! Inside, every program and file of this machine is there, at its path; what the guest writes stays in its memory, except
//! for [`Kernel::dir`]. It has one processor, no udev and no network, and it is root there. Its AES is portable code.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// Where Debian's package keeps the modules, in a directory named for the kernel's release.
const MODULES: &str = "/usr/lib/uml/modules";

/// Mebibytes of memory. They are taken as the guest uses them.
const MEMORY: u64 = 1024;

/// The longest that a script may take, boot included, unless told otherwise: a start takes a second or two.
const PATIENCE: Duration = Duration::from_secs(180);

/// A kernel to run scripts under; each run boots it anew.
pub struct Kernel {
    job: tempfile::TempDir,
    program: PathBuf,
    modules: PathBuf,
    patience: Duration,
}

/// How a script ended.
#[derive(Debug)]
pub struct Finished {
    /// The script's exit code; `None` when the guest died or was killed before the script's end.
    pub code: Option<i32>,
    /// What the script wrote, to standard output and standard error.
    pub output: String,
    /// What the guest's console showed, the kernel's own messages among it.
    pub console: String,
}

impl Kernel {
    /// A kernel.
    ///
    /// # Panics
    /// When there is none, with what to install.
    #[expect(clippy::new_without_default, reason = "it finds out about the machine")]
    pub fn new() -> Self {
        let missing = "no user-mode-linux here: run tests/setup test, or apt-get install user-mode-linux kmod";
        let program = PathBuf::from("/usr/bin/linux.uml");
        assert!(program.exists(), "{missing}");
        let releases = fs::read_dir(MODULES).unwrap_or_else(|error| panic!("{missing}: {MODULES}: {error}"));
        let modules = releases.flatten().map(|entry| entry.path()).max();
        let modules = modules.unwrap_or_else(|| panic!("{missing}: {MODULES} is empty"));
        let job = tempfile::Builder::new().prefix("kernel-").tempdir().expect("a directory for the job");
        Self { job, program, modules, patience: PATIENCE }
    }

    /// Gives scripts another time to end in.
    #[must_use]
    pub fn patient(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The directory that guest and host share, at the same path for both, and the script's working directory. Kept from
    /// run to run, and removed with this value.
    pub fn dir(&self) -> &Path {
        self.job.path()
    }

    /// Boots, runs `script` by bash as root (with `set -euo pipefail`), and returns how it ended. Kills the guest when that
    /// takes too long.
    ///
    /// # Panics
    /// When the kernel cannot be started.
    pub fn run(&self, script: &str) -> Finished {
        for leftover in ["output", "exit-code"] {
            let _ = fs::remove_file(self.dir().join(leftover));
        }
        fs::write(self.dir().join("script"), script).expect("the script is written");
        let mut guest = Guest::start(self);
        guest.wait(self.patience);
        let console = guest.stop();
        let code = fs::read_to_string(self.dir().join("exit-code")).ok().and_then(|code| code.trim().parse().ok());
        let output = fs::read(self.dir().join("output")).unwrap_or_default();
        Finished { code, output: String::from_utf8_lossy(&output).into_owned(), console }
    }

    /// As [`Kernel::run`], for a script that succeeds; returns what it wrote.
    ///
    /// # Panics
    /// When it fails or does not end, with all that was seen on the console.
    pub fn expect(&self, script: &str) -> String {
        let finished = self.run(script);
        assert!(
            finished.code == Some(0),
            "the script in the kernel ended with {:?}. Its console:\n{}",
            finished.code,
            finished.console
        );
        finished.output
    }
}

/// A running kernel: a group of processes. Dropping it kills them.
struct Guest {
    child: Child,
    ended: bool,
    console: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Guest {
    fn start(kernel: &Kernel) -> Self {
        let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel/init");
        let job = kernel.dir().display();
        let mut child = Command::new(&kernel.program)
            .arg(format!("mem={MEMORY}M"))
            // Its control socket, which nobody uses: beside the job, where it disturbs no other guest.
            .args(["umid=guest".to_owned(), format!("uml_dir={job}/")])
            .args(["rootfstype=hostfs", "rootflags=/", "ro", "con=null", "con0=fd:0,fd:1", "loglevel=4"])
            .arg(format!("init={}", init.display()))
            .arg(format!("NBDCRYPT_JOB={job}"))
            .arg(format!("NBDCRYPT_MODULES={}", kernel.modules.display()))
            // The guest's memory is a file there, without a name.
            .env("TMPDIR", memory_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the kernel is started");
        let console = Arc::new(Mutex::new(Vec::new()));
        let out = child.stdout.take().map(|pipe| collect(pipe, &console));
        let err = child.stderr.take().map(|pipe| collect(pipe, &console));
        Self { child, ended: false, console, readers: out.into_iter().chain(err).collect() }
    }

    fn wait(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            self.ended = self.child.try_wait().expect("the kernel is our child").is_some();
            if self.ended {
                return;
            }
            if Instant::now() > deadline {
                let note = format!("\n[killed after {} s]\n", patience.as_secs());
                self.console.lock().expect("nobody panicked").extend(note.as_bytes());
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills what is left of it, and returns the console.
    fn stop(mut self) -> String {
        self.kill();
        for reader in self.readers.drain(..) {
            reader.join().expect("the console is read");
        }
        let console = self.console.lock().expect("nobody panicked");
        String::from_utf8_lossy(&console).replace('\r', "")
    }

    fn kill(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // The guest's processes are the host's, and of this group.
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}

fn collect(mut pipe: impl Read + Send + 'static, console: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let console = Arc::clone(console);
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(len @ 1..) = pipe.read(&mut piece) {
            console.lock().expect("nobody panicked").extend(&piece[..len]);
        }
    })
}

/// Memory, where it is large enough: containers are often given 64 MiB of it.
fn memory_dir() -> PathBuf {
    let shm = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shm).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    if free >= MEMORY << 20 { shm.to_owned() } else { std::env::temp_dir() }
}

//! A Linux kernel to attach devices to: Debian's user-mode-linux. It runs as an ordinary process, needs neither root nor
//! KVM, and has the modules nbd, dm-crypt and loop.
//!
//! The guest sees every program and file of this machine at the same path. What the guest writes stays in its memory,
//! except in [`Kernel::dir`]. The guest has one processor, no udev and no network. Its user is root, and its AES is
//! portable code.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// Where Debian's package keeps the modules, in a directory named after the kernel's release.
const MODULES: &str = "/usr/lib/uml/modules";

/// The guest's memory in mebibytes. The host's memory is taken only as the guest uses it.
const MEMORY: u64 = 1024;

/// How long a script may take by default. The boot, which takes a second or two, is included.
const PATIENCE: Duration = Duration::from_secs(180);

/// A kernel to run scripts under. Each run boots it again.
pub struct Kernel {
    job: tempfile::TempDir,
    program: PathBuf,
    modules: PathBuf,
    patience: Duration,
    shown: Vec<PathBuf>,
    init: &'static str,
}

/// How a script ended.
#[derive(Debug)]
pub struct Finished {
    /// The script's exit code, or `None` if the guest died or was killed before the script ended.
    pub code: Option<i32>,
    /// What the script wrote to standard output and standard error.
    pub output: String,
    /// What the guest's console showed, including the kernel's messages.
    pub console: String,
}

impl Kernel {
    /// Prepares a kernel whose job directory lies in the folder for temporary files.
    ///
    /// # Panics
    /// If there is no kernel. The message says what to install.
    #[expect(clippy::new_without_default, reason = "it finds out about the machine")]
    pub fn new() -> Self {
        Self::with_job_in(&std::env::temp_dir())
    }

    /// Prepares a kernel whose job directory lies below `folder`. Guest and host share this directory.
    ///
    /// # Panics
    /// If there is no kernel. The message says what to install.
    pub fn with_job_in(folder: &Path) -> Self {
        let missing = "no user-mode-linux here: run tests/setup test, or apt-get install user-mode-linux kmod";
        let program = PathBuf::from("/usr/bin/linux.uml");
        assert!(program.exists(), "{missing}");
        let releases = fs::read_dir(MODULES).unwrap_or_else(|error| panic!("{missing}: {MODULES}: {error}"));
        let modules = releases.flatten().map(|entry| entry.path()).max();
        let modules = modules.unwrap_or_else(|| panic!("{missing}: {MODULES} is empty"));
        let job = tempfile::Builder::new().prefix("kernel-").tempdir_in(folder).expect("the job directory can be made");
        Self { job, program, modules, patience: PATIENCE, shown: vec![checkout(), programs()], init: "" }
    }

    /// Shows the guest one more directory of the host, read-only and at the same path. Only a directory below /tmp, /run or
    /// /dev needs this, because the guest has empty filesystems of its own there. The guest always sees the checkout and
    /// the folder of the programs under test.
    #[must_use]
    pub fn showing(mut self, dir: &Path) -> Self {
        self.shown.push(dir.canonicalize().expect("the directory exists"));
        self
    }

    /// Sets how long a script may take.
    #[must_use]
    pub fn patient(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Makes systemd the guest's first process. The script runs as a service, after `basic.target`. The journal is the only
    /// other service that runs. When the script has ended, the file `off` in [`Kernel::dir`] is sourced if there is one.
    /// Otherwise `systemctl poweroff` switches the machine off.
    #[must_use]
    pub fn with_systemd(mut self) -> Self {
        self.init = "systemd";
        self
    }

    /// Returns the directory that guest and host share, at the same path for both. It is the script's working directory. It
    /// is kept from run to run and removed when this value is dropped.
    pub fn dir(&self) -> &Path {
        self.job.path()
    }

    /// Boots, runs `script` in bash as root with `set -euo pipefail`, and returns how it ended. Kills the guest if the
    /// script takes too long.
    ///
    /// # Panics
    /// If the kernel cannot be started.
    pub fn run(&self, script: &str) -> Finished {
        for leftover in ["output", "exit-code"] {
            let _ = fs::remove_file(self.dir().join(leftover));
        }
        fs::write(self.dir().join("script"), script).expect("the script can be written");
        let mut guest = Guest::start(self);
        guest.wait(self.patience);
        let ended = guest.ended;
        let console = guest.stop();
        let code = fs::read_to_string(self.dir().join("exit-code")).ok().filter(|_| ended);
        let code = code.and_then(|code| code.trim().parse().ok());
        let output = fs::read(self.dir().join("output")).unwrap_or_default();
        Finished { code, output: String::from_utf8_lossy(&output).into_owned(), console }
    }

    /// Runs a script that must succeed, as [`Kernel::run`] does, and returns what it wrote.
    ///
    /// # Panics
    /// If the script fails or does not end. The message shows the whole console.
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

/// A running kernel, which is a group of processes. Dropping it kills them.
struct Guest {
    child: Child,
    ended: bool,
    console: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Guest {
    fn start(kernel: &Kernel) -> Self {
        let job = kernel.dir().display();
        let init = checkout().join("tests/kernel/init");
        fs::copy(init, kernel.dir().join("init")).expect("the guest's first program can be copied");
        // The guest's first root filesystem is the host's root. But the kernel may automatically mount devtmpfs on /dev, and the
        // job directory may lie below /dev. So the job directory is mounted once more.
        let start = format!("mkdir -p {job}; mount -t hostfs -o {job} job {job}; exec /bin/bash {job}/init");
        let shown: Vec<_> = kernel.shown.iter().map(|dir| dir.display().to_string()).collect();
        let mut child = Command::new(&kernel.program)
            .arg(format!("mem={MEMORY}M"))
            // The kernel's control socket is not used. It lies in the job directory, so that it does not collide with
            // another guest's.
            .args(["umid=guest".to_owned(), format!("uml_dir={job}/")])
            .args(["rootfstype=hostfs", "rootflags=/", "ro", "con=null", "con0=fd:0,fd:1", "loglevel=4"])
            .arg("init=/bin/bash")
            .arg(format!("NBDCRYPT_JOB={job}"))
            .arg(format!("NBDCRYPT_MODULES={}", kernel.modules.display()))
            .arg(format!("NBDCRYPT_SHOWN={}", shown.join(":")))
            .arg(format!("NBDCRYPT_INIT={}", kernel.init))
            // The arguments after this are for the guest's first program. The kernel removes the quotes.
            .args(["--", "-c", &format!("\"{start}\"")])
            // Without this library, the guest does not run on CPUs with AMX.
            .env("LD_PRELOAD", env!("NBDCRYPT_XSTATE"))
            // The guest's memory is an unnamed file in this directory.
            .env("TMPDIR", memory_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the kernel can be started");
        let console = Arc::new(Mutex::new(Vec::new()));
        let out = child.stdout.take().map(|pipe| collect(pipe, &console));
        let err = child.stderr.take().map(|pipe| collect(pipe, &console));
        Self { child, ended: false, console, readers: out.into_iter().chain(err).collect() }
    }

    fn wait(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        loop {
            self.ended = self.child.try_wait().expect("the kernel is a child process").is_some();
            if self.ended {
                return;
            }
            if Instant::now() > deadline {
                let note = format!("\n[killed after {} s]\n", patience.as_secs());
                self.console.lock().expect("no reader panicked").extend(note.as_bytes());
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills what is left of the guest and returns the console's text.
    fn stop(mut self) -> String {
        self.kill();
        for reader in self.readers.drain(..) {
            reader.join().expect("the reader of the console does not panic");
        }
        let console = self.console.lock().expect("no reader panicked");
        String::from_utf8_lossy(&console).replace('\r', "")
    }

    fn kill(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // The guest's processes are processes of the host, in this process group.
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
            console.lock().expect("no reader panicked").extend(&piece[..len]);
        }
    })
}

/// Returns the root of the checkout.
fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package lies in the checkout")
        .canonicalize()
        .expect("the checkout exists")
}

/// Returns the folder into which Cargo built the programs under test: `debug` or `release` in the target folder.
fn programs() -> PathBuf {
    let test = std::env::current_exe().and_then(|test| test.canonicalize()).expect("the test's own path is known");
    test.ancestors().nth(2).expect("the test lies in a target folder").to_owned()
}

/// Returns /dev/shm if it is large enough, else the folder for temporary files. Containers often give /dev/shm only 64 MiB.
fn memory_dir() -> PathBuf {
    let shm = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shm).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    if free >= MEMORY << 20 { shm.to_owned() } else { std::env::temp_dir() }
}

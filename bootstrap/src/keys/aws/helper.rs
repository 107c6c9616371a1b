//! The process that talks to AWS: this program, started again for one task.
//!
//! The SDK, its HTTP client and TLS copy what they send and receive, and free the copies without wiping them. In a
//! separate process, the copies disappear when the process ends, because the kernel clears its memory. The server keeps
//! only one copy, which wipes itself.
//!
//! ```text
//!   parent ── stdin: request (JSON), secret ──► helper ── HTTPS ──► AWS
//!          ◄── stdout: one answer: secret, result or error ──
//!          ◄── stderr: the log, which both share
//! ```
//! The helper watches its standard input: when the parent ends, the helper ends as well.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use engine::key::Passphrase;
use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;
use zeroize::Zeroizing;

use super::kms::Ciphertext;
use super::probe::Finding;
use super::work;
use crate::config::AwsKeyConfig;

/// The hidden subcommand that runs [`answer`].
pub const SUBCOMMAND: &str = "ask-aws";

/// The maximum number of bytes in a request, secret or answer. A ciphertext has at most 6144 bytes, and an error is a few
/// sentences.
const MAX_FRAME: u32 = 1 << 20;

/// Why AWS provided no secret, or why none was stored there.
#[derive(Debug, thiserror::Error)]
pub enum AwsKeyError {
    /// The helper reported this error.
    #[error("{0}")]
    Said(String),
    /// The token in the header is malformed, or belongs to another volume.
    #[error("the token in the LUKS2 header cannot be used: {0}")]
    Token(String),
    /// The helper could not be started.
    #[error("the process that asks AWS for the secret could not be started from /proc/self/exe: {0}")]
    Start(io::Error),
    /// The helper ended without an answer.
    #[error(
        "the process that asks AWS for the secret ended without an answer ({0}); try again; if it was killed, check the \
         kernel's log (`dmesg`): memory may have run out"
    )]
    Ended(ExitStatus),
    /// The helper wrote something else to its standard output.
    #[error("the process that asks AWS for the secret gave a malformed answer: {0}")]
    Answer(String),
}

/// What the helper should do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// Only find region and credentials.
    FindCredentials,
    /// Fetch the object and decrypt it.
    Fetch,
    /// Check whether AWS would give the secret, without decrypting it.
    Probe {
        /// The ciphertexts in the header's tokens.
        ciphertexts: Vec<Ciphertext>,
    },
    /// Decrypt the first of these ciphertexts that can be decrypted.
    Decrypt(Vec<Ciphertext>),
    /// Encrypt the secret, and decrypt it again to check that this machine can decrypt it.
    Encrypt,
    /// Encrypt the secret and put it into S3.
    Store {
        /// Whether to replace an existing object.
        replace: bool,
    },
    /// Put a new key that KMS makes into S3.
    StoreNewKey {
        /// The length of the key in bytes.
        len: usize,
        /// Whether to replace an existing object.
        replace: bool,
    },
}

/// The result of a task.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The result of `Fetch` and `Decrypt`.
    Secret(Passphrase),
    /// The result of `Probe`.
    Found(Vec<Finding>),
    /// The result of the other tasks.
    Made(Made),
}

/// A new ciphertext.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Made {
    pub(super) ciphertext: Vec<u8>,
    /// The ARN of the KMS key that produced this ciphertext.
    pub(super) key_arn: String,
    /// Why the object could not be read back, if it could not.
    pub(super) not_read_back: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Request {
    config: AwsKeyConfig,
    task: Task,
}

/// The first byte of an answer, which says its kind.
const SECRET: u8 = b'S';
const MADE: u8 = b'M';
const FOUND: u8 = b'F';
const ERROR: u8 = b'E';

/// Starts a helper for the task, and waits until it ends. Blocks.
///
/// # Errors
/// [`AwsKeyError`], if the helper reports an error, cannot be started, ends early, or its answer is malformed.
pub(super) fn ask(config: &AwsKeyConfig, task: Task, secret: Option<&Passphrase>) -> Result<Outcome, AwsKeyError> {
    let request = serde_json::to_vec(&Request { config: config.clone(), task })
        .map_err(|error| AwsKeyError::Answer(error.to_string()))?;
    let mut helper = Helper::start(config)?;
    // If the helper has ended already, its exit status says more than the broken pipe.
    let sent = helper.send(&request).and_then(|()| helper.send(secret.map_or(&[], Passphrase::expose)));
    let answer = helper.stdout().and_then(read_answer);
    match (sent, answer) {
        (_, Ok(answer)) => answer,
        (_, Err(error)) if error.kind() == io::ErrorKind::InvalidData => Err(AwsKeyError::Answer(error.to_string())),
        (_, Err(_)) => Err(AwsKeyError::Ended(helper.0.wait().map_err(AwsKeyError::Start)?)),
    }
}

/// A running helper. It is killed when this value is dropped.
struct Helper(Child);

impl Helper {
    fn start(config: &AwsKeyConfig) -> Result<Self, AwsKeyError> {
        // The helper is not started by the program's path, because an update may have replaced that file.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(std::env::args_os().next().unwrap_or_else(|| "nbdcrypt".into()))
            .args(verbosity())
            .arg(SUBCOMMAND)
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        for (name, value) in environment(config, &|name| std::env::var_os(name)) {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.spawn().map(Self).map_err(AwsKeyError::Start)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let stdin = self.0.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        stdin.write_all(&length(bytes)?.to_le_bytes())?;
        // The secret is written directly from memory that wipes itself, because a pipe of the standard library has no
        // buffer.
        stdin.write_all(bytes)
    }

    fn stdout(&mut self) -> io::Result<&mut ChildStdout> {
        self.0.stdout.as_mut().ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The helper has answered and has nothing left to do, or it has not answered and nobody waits for it any
        // longer.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the options that give the helper the log level of this process.
fn verbosity() -> &'static [&'static str] {
    match LevelFilter::current() {
        LevelFilter::TRACE => &["-vvv"],
        LevelFilter::DEBUG => &["-vv"],
        LevelFilter::INFO => &["-v"],
        _ => &[],
    }
}

/// Returns the changes to the helper's environment. The SDK looks for the home folder and the profile only there.
fn environment(config: &AwsKeyConfig, own: &dyn Fn(&str) -> Option<OsString>) -> [(&'static str, Option<OsString>); 2] {
    let own = |name: &str| own(name).filter(|value| !value.is_empty());
    // systemd sets no HOME for system services. Without it, the AWS CLI looks up the user, as Python's `expanduser` does.
    let home = own("HOME").or_else(|| {
        let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
        home_of(rustix::process::getuid().as_raw(), &passwd).map(Into::into)
    });
    let profile = config.profile.as_ref().map(Into::into);
    let profile = profile.or_else(|| own("AWS_PROFILE")).or_else(|| own("AWS_DEFAULT_PROFILE"));
    [("HOME", home), ("AWS_PROFILE", profile)]
}

/// The variables that name files for the SDK.
const FILE_VARIABLES: [&str; 6] = [
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CA_BUNDLE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "SSL_CERT_FILE",
];

/// Returns the variables of this environment that name files for AWS by relative paths, each with its absolute path. A
/// process that starts here and then works in another folder needs these to find the files.
pub fn absolute_aws_files() -> Vec<(&'static str, PathBuf)> {
    let absolute = |name: &'static str| {
        let path = PathBuf::from(std::env::var_os(name).filter(|path| !path.is_empty())?);
        // The SDK expands `~` itself.
        let is_relative = path.is_relative() && !path.starts_with("~");
        Some((name, std::path::absolute(path).ok().filter(|_| is_relative)?))
    };
    FILE_VARIABLES.into_iter().filter_map(absolute).collect()
}

/// Returns a user's home folder from passwd(5). The file is read directly, because a boot must not wait for a directory
/// server.
fn home_of(uid: u32, passwd: &str) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let is_user = fields.get(2)?.parse() == Ok(uid);
        fields.get(5).copied().filter(|home| is_user && !home.is_empty())
    })
}

fn length(bytes: &[u8]) -> io::Result<u32> {
    let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= MAX_FRAME);
    len.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "longer than any request or answer"))
}

fn read_frame(from: &mut impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len);
    if len > MAX_FRAME {
        return Err(invalid("it is too long"));
    }
    // The vector has its full size from the start. A vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; len as usize]);
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_answer(from: &mut impl Read) -> io::Result<Result<Outcome, AwsKeyError>> {
    let mut kind = [0];
    from.read_exact(&mut kind)?;
    let mut bytes = read_frame(from)?;
    match kind[0] {
        SECRET => Ok(Ok(Outcome::Secret(Passphrase::new(std::mem::take(&mut *bytes))))),
        MADE => serde_json::from_slice(&bytes)
            .map(|made| Ok(Outcome::Made(made)))
            .map_err(|_| invalid("it is not a result")),
        FOUND => serde_json::from_slice(&bytes)
            .map(|found| Ok(Outcome::Found(found)))
            .map_err(|_| invalid("it is not a list of findings")),
        ERROR => Ok(Err(AwsKeyError::Said(String::from_utf8_lossy(&bytes).into_owned()))),
        _ => Err(invalid("its kind is unknown")),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Runs in the helper: reads the task from standard input, does it, and writes the answer to standard output.
///
/// # Errors
/// If the request is malformed, or cannot be read, or the answer cannot be written. If the task itself fails, its error
/// is the answer.
pub fn answer() -> io::Result<()> {
    let mut stdin = io::stdin().lock();
    if io::IsTerminal::is_terminal(&stdin) {
        return Err(invalid("nbdcrypt starts this command itself when it needs a secret from AWS"));
    }
    let request: Request = serde_json::from_slice(&read_frame(&mut stdin)?)?;
    let mut secret = read_frame(&mut stdin)?;
    let secret = Passphrase::new(std::mem::take(&mut *secret));
    drop(stdin);
    std::thread::Builder::new().name("parent".to_owned()).spawn(end_with_parent)?;
    let (kind, bytes) = match work::run(&request.config, request.task, &secret) {
        Ok(Outcome::Secret(secret)) => (SECRET, Zeroizing::new(secret.expose().to_vec())),
        Ok(Outcome::Found(found)) => (FOUND, Zeroizing::new(serde_json::to_vec(&found)?)),
        Ok(Outcome::Made(made)) => (MADE, Zeroizing::new(serde_json::to_vec(&made)?)),
        Err(error) => (ERROR, Zeroizing::new(error.to_string().into_bytes())),
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(&[kind])?;
    stdout.write_all(&length(&bytes)?.to_le_bytes())?;
    stdout.write_all(&bytes)?;
    stdout.flush()
}

/// Ends this process when the parent closes its end of standard input, which also happens when the parent ends.
fn end_with_parent() {
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    std::process::exit(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, KeyConfig};
    use std::path::Path;

    #[test]
    fn a_users_home_is_found_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nx:y\ndaemon:x:1:1::/usr/sbin:\nnobody:x:65534:1:::\n";
        assert_eq!(home_of(0, passwd), Some("/root"));
        assert_eq!(home_of(1, passwd), Some("/usr/sbin"));
        assert_eq!(home_of(65534, passwd), None);
        assert_eq!(home_of(7, passwd), None);
    }

    #[test]
    fn the_configured_profile_overrides_the_environment() {
        let config = |profile: &str| {
            let text = format!(
                "[volume]\ndevices = [\"/x\"]\n[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\n{profile}"
            );
            match Config::parse(&text, Path::new("/etc/x.toml")).unwrap().key {
                KeyConfig::Aws(aws) => aws,
                KeyConfig::File(_) | KeyConfig::Ephemeral => panic!(),
            }
        };
        let profile = |configured: &str, set: &[(&str, &str)]| {
            let own = |name: &str| set.iter().find(|(own, _)| *own == name).map(|(_, value)| value.into());
            environment(&config(configured), &own)[1].1.clone().map(|profile| profile.into_string().unwrap())
        };
        assert_eq!(profile("", &[]), None);
        assert_eq!(profile("", &[("AWS_PROFILE", "")]), None);
        assert_eq!(profile("", &[("AWS_DEFAULT_PROFILE", "b")]), Some("b".to_owned()));
        assert_eq!(profile("", &[("AWS_PROFILE", "a"), ("AWS_DEFAULT_PROFILE", "b")]), Some("a".to_owned()));
        assert_eq!(profile("profile = \"c\"", &[("AWS_PROFILE", "a")]), Some("c".to_owned()));
    }

    #[test]
    fn a_truncated_or_malformed_answer_is_an_error() {
        let read = |bytes: &[u8]| read_answer(&mut &bytes[..]);
        assert!(matches!(read(b"S\x03\0\0\0abc"), Ok(Ok(Outcome::Secret(secret))) if secret.expose() == b"abc"));
        assert!(matches!(read(b"E\x02\0\0\0no"), Ok(Err(AwsKeyError::Said(text))) if text == "no"));
        for cut in [&b""[..], b"S", b"S\x03\0\0", b"S\x03\0\0\0ab"] {
            assert_eq!(read(cut).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
        for strange in [&b"X\x01\0\0\0a"[..], b"M\x01\0\0\0a", b"S\xff\xff\xff\xffa"] {
            assert_eq!(read(strange).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}

//! How `nbdcrypt status`, `up` and `down` talk to the server of a volume. A client asks one question and gets one answer,
//! over a unix socket in the volume's folder. Only root can enter that folder. Question and answer are each a line of JSON.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The maximum length in bytes of a question or an answer.
const LONGEST: u64 = 64 * 1024;

/// A question to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// What is the volume's status?
    Status,
    /// Take everything down, and end.
    Down,
    /// Do what is missing: mount the filesystem again if somebody unmounted it.
    Complete,
}

/// The server's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Answers [`Question::Status`].
    Status(Box<crate::service::status::Status>),
    /// Answers [`Question::Down`]: everything is down, and the server ends now.
    Down,
    /// Answers [`Question::Down`] if the volume was coming up. The text says how the start ended.
    CalledOff(String),
    /// Answers [`Question::Complete`]: everything is there. The text says so.
    Up(String),
    /// The request failed. The text says why, and describes the present state of the volume.
    Failed(String),
}

/// Asks the server behind the socket at `path`. Waits at most `patience` for the answer.
///
/// # Errors
/// Returns `NotFound` or `ConnectionRefused` if there is no server, `WouldBlock` or `TimedOut` if it does not answer in time,
/// and `InvalidData` if it sends something other than an answer.
pub fn ask(path: &Path, question: Question, patience: Duration) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(&line(&question)?)?;
    parse(&stream)
}

/// Reads a question from an accepted connection. Waits at most 5 seconds for it.
///
/// # Errors
/// Returns `InvalidData` if the client sends something else, or the error of the socket.
pub fn question(stream: &UnixStream) -> io::Result<Question> {
    // A client that connects and sends nothing must not keep other clients waiting.
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    parse(stream)
}

/// Sends the answer.
///
/// # Errors
/// Returns the error of the socket.
pub fn answer(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    stream.write_all(&line(answer)?)
}

fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

fn parse<T: for<'de> Deserialize<'de>>(stream: &UnixStream) -> io::Result<T> {
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}

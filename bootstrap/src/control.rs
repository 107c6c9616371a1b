//! How `nbdcrypt status` and `nbdcrypt down` talk to the server of a volume: one question and one answer, each a line of
//! JSON, over a unix socket in the volume's folder (which only root can enter).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// No question and no answer is longer, in bytes.
const LONGEST: u64 = 64 * 1024;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// What is going on?
    Status,
    /// Take everything down, and end.
    Down,
}

/// What the server says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// To [`Question::Status`].
    Status(Box<crate::status::Status>),
    /// All is down; the server ends now.
    Down,
    /// It could not be done; everything is as it was.
    Failed(String),
}

/// Asks the server behind the socket at `path`.
///
/// # Errors
/// What the system said: `NotFound` or `ConnectionRefused` when there is no server, `InvalidData` when it answers nonsense.
pub fn ask(path: &Path, question: Question, patience: Duration) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(&line(&question)?)?;
    parse(&stream)
}

/// Reads a question from a connection that was accepted.
///
/// # Errors
/// `InvalidData` when it is none, else what the system said.
pub fn question(stream: &UnixStream) -> io::Result<Question> {
    // Whoever connects and says nothing must not keep others from being heard.
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    parse(stream)
}

/// Answers.
///
/// # Errors
/// What the system said.
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

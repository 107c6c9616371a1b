//! A passphrase that is typed at the terminal. The terminal does not show it.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};

use engine::key::Passphrase;
use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{KeyError, KeySource};

/// The maximum number of bytes that can be typed. This is cryptsetup's limit for interactive passphrases (cryptsetup(8), "NOTES
/// ON PASSPHRASE PROCESSING").
const MAX_TYPED: usize = 512;

/// A question to the user at the terminal.
#[derive(Debug)]
pub struct Prompt {
    question: String,
    /// The question that asks for the same passphrase again.
    again: Option<String>,
}

/// Why no passphrase was typed.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// Standard input is not a terminal.
    #[error(
        "no {0} was given, and standard input is not a terminal to ask for it: name its file, or `-` for standard input"
    )]
    NoTerminal(&'static str),
    /// Reading from or writing to the terminal failed.
    #[error("could not read the passphrase from the terminal: {0}")]
    Io(#[from] io::Error),
    /// The user typed only Enter.
    #[error("no passphrase was typed")]
    Empty,
    /// The passphrase has more than 512 bytes.
    #[error("a typed passphrase has at most {MAX_TYPED} bytes: put a longer one into a key file")]
    TooLong,
    /// The two answers differ.
    #[error("the two passphrases are not the same: nothing was changed")]
    Different,
    /// The user typed Ctrl-C, Ctrl-\ or Ctrl-Z.
    #[error("interrupted: nothing was changed")]
    Interrupted,
}

impl Prompt {
    /// Makes a prompt for an existing passphrase. `option` names another way to give it.
    ///
    /// # Errors
    /// [`PromptError::NoTerminal`], if standard input is not a terminal. This does not ask yet.
    pub fn existing(question: impl Into<String>, option: &'static str) -> Result<Self, PromptError> {
        if !io::stdin().is_terminal() {
            return Err(PromptError::NoTerminal(option));
        }
        Ok(Self { question: question.into(), again: None })
    }

    /// Makes a prompt for a new passphrase, which must be typed twice.
    ///
    /// # Errors
    /// The same as [`Prompt::existing`].
    pub fn new_passphrase(question: impl Into<String>, option: &'static str) -> Result<Self, PromptError> {
        Ok(Self { again: Some("The same again: ".to_owned()), ..Self::existing(question, option)? })
    }

    fn ask(&self) -> Result<Zeroizing<Vec<u8>>, PromptError> {
        let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
        let typed = ask(&mut terminal, &self.question)?;
        if typed.is_empty() {
            return Err(PromptError::Empty);
        }
        if let Some(again) = &self.again
            && !bool::from(ask(&mut terminal, again)?.ct_eq(&typed))
        {
            return Err(PromptError::Different);
        }
        Ok(typed)
    }
}

impl KeySource for Prompt {
    fn describe(&self) -> String {
        "the passphrase typed at the terminal".to_owned()
    }

    fn check(&self) -> Result<(), KeyError> {
        Ok(())
    }

    fn passphrase(&self) -> Result<Passphrase, KeyError> {
        Ok(Passphrase::new(std::mem::take(&mut *self.ask()?)))
    }
}

/// A terminal that does not echo and whose keys send no signals. Dropping this value restores its settings.
struct Silent<'t> {
    terminal: &'t File,
    before: Termios,
}

impl<'t> Silent<'t> {
    fn new(terminal: &'t File) -> io::Result<Self> {
        let before = termios::tcgetattr(terminal)?;
        let mut silent = before.clone();
        // Without ISIG, no signal can end the process while the terminal does not echo. Without ICANON, the process sees
        // Ctrl-C at once, and the kernel buffers no line.
        silent.local_modes -= LocalModes::ECHO | LocalModes::ISIG | LocalModes::ICANON;
        // The terminal has echoed what was typed before the question, so that input is discarded.
        termios::tcsetattr(terminal, OptionalActions::Flush, &silent)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        // An error cannot be handled any better than by going on.
        let _ = termios::tcsetattr(self.terminal, OptionalActions::Flush, &self.before);
    }
}

fn ask(terminal: &mut File, question: &str) -> Result<Zeroizing<Vec<u8>>, PromptError> {
    let other_end = terminal.try_clone()?;
    let silent = Silent::new(&other_end)?;
    terminal.write_all(question.as_bytes())?;
    let typed = read_line(terminal);
    // The user's Enter was not echoed.
    terminal.write_all(b"\r\n")?;
    drop(silent);
    typed
}

/// Reads a line up to Enter. Backspace and Ctrl-U work as usual.
fn read_line(from: &mut impl Read) -> Result<Zeroizing<Vec<u8>>, PromptError> {
    // The vector never grows, so it leaves no copy behind.
    let mut line = Zeroizing::new(Vec::with_capacity(MAX_TYPED));
    let mut key = Zeroizing::new([0u8; 1]);
    loop {
        let got = match from.read(&mut key[..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            got => got?,
        };
        match key[0] {
            _ if got == 0 => return Ok(line),
            b'\n' | b'\r' | 0x04 => return Ok(line),
            // Ctrl-C, Ctrl-\, Ctrl-Z.
            0x03 | 0x1c | 0x1a => return Err(PromptError::Interrupted),
            0x15 => {
                line.iter_mut().for_each(|byte| *byte = 0);
                line.clear();
            }
            0x08 | 0x7f => {
                // Removes one character of UTF-8. Its bytes after the first start with the bits 10.
                while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
            }
            _ if line.len() == MAX_TYPED => return Err(PromptError::TooLong),
            byte => line.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &[u8]) -> Result<Vec<u8>, String> {
        read_line(&mut &keys[..]).map(|line| line.to_vec()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_line_is_edited_as_at_a_terminal() {
        assert_eq!(typed(b"secret\nmore").unwrap(), b"secret");
        assert_eq!(typed(b"secret\r").unwrap(), b"secret");
        assert_eq!(typed("sä\u{7f}e\u{7f}\u{7f}\u{7f}word\n".as_bytes()).unwrap(), b"word");
        assert_eq!(typed(b"wrong\x15right\n").unwrap(), b"right");
        assert_eq!(typed(b"ends\x04").unwrap(), b"ends");
        assert!(typed(b"secr\x03et\n").unwrap_err().contains("interrupted"));
        assert_eq!(typed(&[b'x'; MAX_TYPED]).unwrap().len(), MAX_TYPED);
        assert!(typed(&[b'x'; MAX_TYPED + 1]).unwrap_err().contains("512 bytes"));
    }
}

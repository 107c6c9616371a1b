//! The log: lines on standard error, or entries with fields in the systemd journal if standard error leads there.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, Targets, dynamic_filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::journal::{self, Journal, ToJournal};
use super::telling;

/// Where the log goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// The journal, if standard error leads there. Otherwise standard error.
    JournalIfThere,
    /// Standard error, until [`open_journal`] is called.
    StandardError,
}

/// Starts the log. `verbose` is how often the user gave `-v`.
pub(super) fn start(verbose: u8, to: To) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // At every level, only our own crates are logged. The AWS SDK's warnings quote answers that it cannot parse, and these
    // contain credentials.
    let told = Targets::new()
        .with_default(LevelFilter::OFF)
        .with_target("bootstrap", level)
        .with_target("nbd_server", level)
        .with_target("engine", level);
    let with_colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let to_stderr = tracing_subscriber::fmt::layer()
        .with_writer(move || SafeStderr { with_colours })
        // Internal errors would be printed with `eprintln!`, which panics if writing to standard error fails.
        .log_internal_errors(false)
        .with_ansi(with_colours)
        .with_target(false)
        .without_time();
    // Spans give the journal a field. They are not printed.
    let not_in_journal = dynamic_filter_fn(|metadata, _| metadata.is_event() && JOURNAL.get().is_none());
    // Without this hint, every event of a higher level would be looked at.
    let not_in_journal = not_in_journal.with_max_level_hint(level);
    let to_journal = ToJournal { journal: || JOURNAL.get(), safe, otherwise: print };
    if to == To::JournalIfThere {
        open_journal(None);
    }
    let log = tracing_subscriber::registry().with(to_stderr.with_filter(told.clone().and(not_in_journal)));
    log.with(to_journal.with_filter(told)).init();
}

/// Sends the log to the journal from now on, if standard error leads there. Each entry has the name of the volume, if it is
/// known.
///
/// This opens a socket. A process that closes the files that it inherited must do that first.
pub(super) fn open_journal(volume: Option<&str>) {
    if leads_to_journal()
        && let Ok(journal) = Journal::new(Path::new(journal::SOCKET), volume)
    {
        let _ = JOURNAL.set(journal);
    }
}

/// The journal, once it is open.
static JOURNAL: OnceLock<Journal> = OnceLock::new();

/// Returns whether standard error leads to the journal. The service manager sets `$JOURNAL_STREAM` to the device and inode of
/// the journal's stream (systemd.exec(5)). If standard error was redirected, it has others.
fn leads_to_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// Returns the text as it is logged. Characters that a terminal would obey are shown by their number.
fn safe(text: &str) -> String {
    engine::text::printable(&tidy(text))
}

/// Returns the text without the numbers of the system's errors, and without a cause that the text before it has quoted.
fn tidy(text: &str) -> String {
    telling::once(&telling::without_number(text))
}

/// Prints an event that the journal does not take.
fn print(level: &Level, text: &str) {
    // If standard error takes nothing either, the event is lost.
    let _ = std::io::stderr().lock().write_all(format!("{level:>5} {text}\n").as_bytes());
}

/// Standard error for the log. Each event is one line, whatever names and labels it contains. Characters that a terminal
/// would obey are shown by their number. The numbers of the system's errors are left out.
#[derive(Clone, Copy)]
struct SafeStderr {
    /// Whether the text contains escape sequences for colours.
    with_colours: bool,
}

impl SafeStderr {
    /// Returns the event as it is printed.
    fn shown(self, event: &[u8]) -> String {
        let text = String::from_utf8_lossy(event);
        let (line, end) = text.strip_suffix('\n').map_or((&*text, ""), |line| (line, "\n"));
        let safe = match self.with_colours {
            // The subscriber lets no ESC of a message through, so each ESC belongs to a colour.
            true => tidy(line).split('\u{1b}').map(engine::text::printable).collect::<Vec<_>>().join("\u{1b}"),
            false => safe(line),
        };
        safe + end
    }
}

impl std::io::Write for SafeStderr {
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        std::io::stderr().lock().write_all(self.shown(event).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_has_no_error_numbers_or_control_characters() {
        let event = " WARN disk\u{202e}\n: Operation not permitted (os error 1)\n".as_bytes();
        let shown = SafeStderr { with_colours: false }.shown(event);
        assert_eq!(shown, " WARN disk\\u{202e}\\u{a}: Operation not permitted\n");
    }

    /// `{:#}` of an error repeats a cause that the error's own text contains.
    #[test]
    fn a_cause_is_logged_once() {
        let denied = "Operation not permitted (os error 1)";
        let said = format!("could not listen on /x: {denied}: {denied}");
        assert_eq!(safe(&said), "could not listen on /x: Operation not permitted");
        for with_colours in [false, true] {
            let shown = SafeStderr { with_colours }.shown(format!(" WARN {said}\n").as_bytes());
            assert_eq!(shown, " WARN could not listen on /x: Operation not permitted\n");
        }
    }
}

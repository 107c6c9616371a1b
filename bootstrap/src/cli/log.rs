//! The log: lines on standard error, or entries with fields in the systemd journal if standard error leads there.

use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id};
use tracing::{Event, Subscriber};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, Targets, dynamic_filter_fn};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

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
    // A span is only a field for the journal.
    let not_in_journal = dynamic_filter_fn(|metadata, _| metadata.is_event() && JOURNAL.get().is_none());
    if to == To::JournalIfThere {
        open_journal(None);
    }
    let log = tracing_subscriber::registry().with(to_stderr.with_filter(told.clone().and(not_in_journal)));
    log.with(Journal.with_filter(told)).init();
}

/// From now on, logs to the journal, if standard error leads there. Each entry has the name of the volume, if it is known.
///
/// This opens a file. So a process that closes the files that it inherited does that first.
pub(super) fn open_journal(volume: Option<&str>) {
    if leads_to_journal()
        && let Ok(layer) = journal()
    {
        let _ = JOURNAL.set(layer.with_custom_fields(volume.map(|name| ("NBDCRYPT_VOLUME", name))));
    }
}

/// The connection to the journal, once it is open.
static JOURNAL: OnceLock<tracing_journald::Layer> = OnceLock::new();

/// Returns whether standard error leads to the journal: the service manager gives its device and inode (systemd.exec(5),
/// `$JOURNAL_STREAM`). A redirection makes them differ.
fn leads_to_journal() -> bool {
    let Some(stream) = std::env::var("JOURNAL_STREAM").ok() else { return false };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// Connects to the journal.
fn journal() -> std::io::Result<tracing_journald::Layer> {
    let priorities = PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        trace: Priority::Debug,
        ..PriorityMappings::new()
    };
    let layer = tracing_journald::layer()?.with_priority_mappings(priorities);
    Ok(layer.with_syslog_identifier("nbdcrypt".to_owned()).with_field_prefix(Some("NBDCRYPT".to_owned())))
}

/// The journal as a place for events. Until it is open, it does nothing.
struct Journal;

impl<S: Subscriber + for<'span> LookupSpan<'span>> Layer<S> for Journal {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(journal) = JOURNAL.get() {
            journal.on_new_span(attributes, id, context);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if let Some(journal) = JOURNAL.get() {
            journal.on_event(event, context);
        }
    }
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
        let text = super::telling::without_number(&String::from_utf8_lossy(event));
        let (line, end) = text.strip_suffix('\n').map_or((&*text, ""), |line| (line, "\n"));
        let safe = match self.with_colours {
            // The subscriber lets no ESC of a message through, so each ESC belongs to a colour.
            true => line.split('\u{1b}').map(engine::text::printable).collect::<Vec<_>>().join("\u{1b}"),
            false => engine::text::printable(line),
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
}

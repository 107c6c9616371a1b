//! The systemd journal as a place for the log. Entries with fields are sent to it by its native protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).
//!
//! # Nothing waits for the journal
//! The journal's files may lie on a volume that this process serves. Then journald may wait for this process. If this process
//! waited for journald at the same time, both would wait for ever. The queue of the journal's socket holds the entries of all
//! programs, so it may be full although this process logs little. An entry that the journal does not take at once goes to
//! standard error instead. For this reason `tracing-journald` is not used: it waits.

use std::fmt::{self, Write};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// The socket on which journald takes entries.
pub(super) const SOCKET: &str = "/run/systemd/journal/socket";

/// A connection to the journal.
#[derive(Debug)]
pub(super) struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    volume: Option<String>,
}

impl Journal {
    /// Makes a socket for entries to the journal at `path`. Each entry has the name of the volume, if it is known.
    ///
    /// # Errors
    /// Fails if the system refuses a socket.
    pub(super) fn new(path: &Path, volume: Option<&str>) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned(), volume: volume.map(str::to_owned) })
    }

    /// Sends an entry.
    ///
    /// # Errors
    /// Fails if the journal does not take the entry at once, for example because its queue is full.
    fn send(&self, entry: &[u8]) -> io::Result<()> {
        // The address is given each time, so that journald may be restarted.
        self.socket.send_to(entry, &self.path).map(drop)
    }

    fn entry(&self, metadata: &Metadata<'_>, message: &str, step: Option<&str>) -> Vec<u8> {
        let mut entry = Vec::with_capacity(256 + message.len());
        put(&mut entry, "PRIORITY", priority(metadata.level()));
        put(&mut entry, "MESSAGE", message);
        put(&mut entry, "SYSLOG_IDENTIFIER", "nbdcrypt");
        put(&mut entry, "TARGET", metadata.target());
        if let (Some(file), Some(line)) = (metadata.file(), metadata.line()) {
            put(&mut entry, "CODE_FILE", file);
            put(&mut entry, "CODE_LINE", &line.to_string());
        }
        for (name, value) in [("NBDCRYPT_VOLUME", self.volume.as_deref()), ("NBDCRYPT_STEP", step)] {
            if let Some(value) = value {
                put(&mut entry, name, value);
            }
        }
        entry
    }
}

/// Appends a field. Its value may contain any bytes, because its length comes first.
fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    entry.extend_from_slice(name.as_bytes());
    entry.push(b'\n');
    entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    entry.extend_from_slice(value.as_bytes());
    entry.push(b'\n');
}

/// Returns the priority of syslog(3) for a level.
fn priority(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

/// The layer that sends events to the journal. Until there is a journal, it does nothing.
pub(super) struct ToJournal<J> {
    /// Returns the journal, once it is open.
    pub(super) journal: J,
    /// Makes a text safe to print.
    pub(super) safe: fn(&str) -> String,
    /// Prints an event that the journal does not take.
    pub(super) otherwise: fn(&Level, &str),
}

/// The step of `up` or `down`, which is a field of a span.
struct Step(String);

impl<S, J> Layer<S> for ToJournal<J>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    J: Fn() -> Option<&'static Journal> + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut step = None;
        attributes.record(&mut FindStep(&mut step));
        if let (Some(step), Some(span)) = (step, context.span(id)) {
            span.extensions_mut().insert(Step(step));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let Some(journal) = (self.journal)() else { return };
        let mut text = Text(String::new());
        event.record(&mut text);
        let message = (self.safe)(&text.0);
        let spans = context.lookup_current().into_iter().flat_map(|span| span.scope());
        let step = spans.into_iter().find_map(|span| span.extensions().get::<Step>().map(|step| step.0.clone()));
        if journal.send(&journal.entry(event.metadata(), &message, step.as_deref())).is_err() {
            (self.otherwise)(event.metadata().level(), &message);
        }
    }
}

/// Finds the field `step`.
struct FindStep<'f>(&'f mut Option<String>);

impl Visit for FindStep<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "step" {
            *self.0 = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

/// An event as one text: the message, and then its other fields.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let space = if self.0.is_empty() { "" } else { " " };
        // Writing to a `String` cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{space}{value:?}"),
            name => write!(self.0, "{space}{name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// A journal at a socket that only the test reads.
    fn journal(folder: &Path) -> (UnixDatagram, &'static Journal) {
        let path = folder.join("journal");
        let taken = UnixDatagram::bind(&path).unwrap();
        (taken, Box::leak(Box::new(Journal::new(&path, Some("scratch")).unwrap())))
    }

    fn subscriber(journal: &'static Journal, otherwise: fn(&Level, &str)) -> impl Subscriber {
        let journal = move || Some(journal);
        tracing_subscriber::registry().with(ToJournal { journal, safe: engine::text::printable, otherwise })
    }

    #[test]
    fn an_entry_has_fields_and_no_control_characters() {
        let folder = tempfile::tempdir().unwrap();
        let (taken, journal) = journal(folder.path());
        let subscriber = subscriber(journal, |_, text| panic!("not taken: {text}"));
        tracing::subscriber::with_default(subscriber, || {
            let _step = tracing::error_span!("step", step = "mount").entered();
            tracing::warn!(number = 7, "a disk called {}", "x\nPRIORITY=0\u{1b}[2K");
        });
        let mut buffer = [0; 4096];
        let length = taken.recv(&mut buffer).unwrap();
        let mut fields = Vec::new();
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let name = rest.iter().position(|byte| *byte == b'\n').unwrap();
            let (head, tail) = rest.split_at(name + 9);
            let value = usize::try_from(u64::from_le_bytes(head[name + 1..].try_into().unwrap())).unwrap();
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            fields.push((text(&head[..name]), text(&tail[..value])));
            assert_eq!(tail[value], b'\n');
            rest = &tail[value + 1..];
        }
        let line = fields.iter().position(|(name, _)| name == "CODE_LINE").map(|at| fields.remove(at).1).unwrap();
        assert!(line.parse::<u32>().unwrap() > 0);
        let expected = [
            ("PRIORITY", "4"),
            ("MESSAGE", "a disk called x\\u{a}PRIORITY=0\\u{1b}[2K number=7"),
            ("SYSLOG_IDENTIFIER", "nbdcrypt"),
            ("TARGET", module_path!()),
            ("CODE_FILE", file!()),
            ("NBDCRYPT_VOLUME", "scratch"),
            ("NBDCRYPT_STEP", "mount"),
        ];
        assert_eq!(fields, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    /// Nobody reads the journal's socket, so its queue becomes full. Without the mode "non-blocking", this test does not end.
    #[test]
    fn entries_go_elsewhere_while_the_journal_is_stuck() {
        static ELSEWHERE: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let folder = tempfile::tempdir().unwrap();
        let (taken, journal) = journal(folder.path());
        let subscriber = subscriber(journal, |_, text| ELSEWHERE.lock().unwrap().push(text.to_owned()));
        let mut sent = 0;
        tracing::subscriber::with_default(subscriber, || {
            while ELSEWHERE.lock().unwrap().is_empty() {
                tracing::warn!("entry {sent}");
                sent += 1;
            }
        });
        assert_eq!(*ELSEWHERE.lock().unwrap(), [format!("entry {}", sent - 1)]);
        // A journal that is gone is no reason to wait or to fail, either.
        drop(taken);
        assert!(journal.send(b"MESSAGE=x\n").is_err());
    }
}

//! Turns everything that happens outside the steps (signals, questions of clients, the end of the device) into events
//! for the main thread.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags};

use super::board::Board;
use super::calling_off::{CallingOff, Reason};
use crate::attach::{Ended, EndedSignal};
use crate::keys::Secret;
use crate::machine::process;
use crate::service::control::{self, Answer, Question};

/// What may happen while a volume is up or coming up.
#[derive(Debug)]
pub(super) enum Event {
    /// SIGTERM, SIGINT or SIGHUP.
    Stop,
    /// A client asks for something that only the main thread can do.
    Asked(UnixStream, Question),
    /// The device ended unexpectedly.
    Ended(Ended),
    /// The secret has arrived, or getting it has failed.
    Secret(Result<Secret>),
    /// The front process has ended.
    NobodyWaits,
}

/// Turns signals into events, from now on and as long as the returned runtime lives.
pub(super) fn watch_signals(events: &Sender<Event>, off: &CallingOff) -> Result<tokio::runtime::Runtime> {
    use tokio::signal::unix::{SignalKind, signal};
    // tokio panics if the system refuses a thread.
    nbd_server::threads::can_start(1)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("the thread that waits for signals could not be started")?;
    let mut kinds = vec![(SignalKind::terminate(), "SIGTERM"), (SignalKind::interrupt(), "SIGINT")];
    // Under nohup(1), the end of the terminal must not end this process.
    if !process::is_hangup_ignored() {
        kinds.push((SignalKind::hangup(), "SIGHUP"));
    }
    for (kind, name) in kinds {
        let (events, off) = (events.clone(), off.clone());
        let _inside = runtime.enter();
        let mut signals = signal(kind)?;
        runtime.spawn(async move {
            while signals.recv().await.is_some() {
                // The reason is set before the event is sent, so that anyone who sees the event finds the reason.
                off.because(Reason::Signal(name));
                if events.send(Event::Stop).is_err() {
                    return;
                }
            }
        });
    }
    Ok(runtime)
}

/// Answers questions over the control socket. Questions about the status are answered from `board` at once, whatever the
/// main thread is doing. Other questions become events.
pub(super) fn listen(path: &Path, events: &Sender<Event>, board: &Board, off: &CallingOff) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
    let (events, board, off) = (events.clone(), board.clone(), off.clone());
    std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            match control::question(&stream) {
                Ok(Question::Status) => answer(&stream, &board.answer()),
                Ok(question) => {
                    if events.send(Event::Asked(stream, question)).is_err() {
                        return;
                    }
                    // The reason is set after the event is sent, so that anyone who sees the reason finds the question.
                    if question == Question::Down {
                        off.because(Reason::Down);
                    }
                }
                Err(error) => tracing::debug!("a client of the control socket asked no question: {error}"),
            }
        }
    })?;
    Ok(())
}

/// Sends an answer. The client may be gone by now.
pub(super) fn answer(stream: &UnixStream, answer: &Answer) {
    if let Err(error) = control::answer(stream, answer) {
        tracing::debug!("the client of the control socket is gone: {error}");
    }
}

/// Turns the device's end into an event.
pub(super) fn watch_device(ended: Option<EndedSignal>, events: &Sender<Event>) {
    let Some(ended) = ended else { return };
    let events = events.clone();
    let wait = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        if let Ok(runtime) = runtime {
            let _ = events.send(Event::Ended(runtime.block_on(ended.wait())));
        }
    };
    if let Err(error) = std::thread::Builder::new().name("device".to_owned()).spawn(wait) {
        tracing::warn!("the end of the device will not be noticed, since no thread could be started: {error}");
    }
}

/// Turns the end of the front process into an event. Standard output is a pipe that only the front process reads.
pub(super) fn watch_front(events: &Sender<Event>, off: &CallingOff) -> Result<()> {
    // The descriptor is duplicated, since standard output is closed once the volume is up.
    let pipe = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).context("standard output")?;
    let (events, off) = (events.clone(), off.clone());
    let wait = move || {
        // No events are requested. The kernel reports the end of the reader (POLLERR) in any case.
        let mut polled = [PollFd::new(&pipe, PollFlags::empty())];
        while let Ok(0) | Err(rustix::io::Errno::INTR) = rustix::event::poll(&mut polled, None) {}
        off.because(Reason::NobodyWaits);
        let _ = events.send(Event::NobodyWaits);
    };
    std::thread::Builder::new().name("front".to_owned()).spawn(wait).context("a thread")?;
    Ok(())
}

//! The process behind a volume that is up: it takes the steps, serves until told to stop, and undoes them.
//!
//! One thread, the main one, owns the steps. Everything that may happen meanwhile (a signal, a question over the control
//! socket, the end of the device) reaches it as an event.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, anyhow, bail};
use engine::store::Caching;

use crate::attach::{self, Ended, Remains};
use crate::config::{AttachMethod, Config, KeyConfig, SYSFS};
use crate::control::{self, Answer, Question};
use crate::keys::{self, Secret, SecretRequest};
use crate::run_dir::{Begun, Claim, State};
use crate::status::{Condition, Status, VolumeFacts, algorithm};
use crate::steps::{self, Boot, Outside, Step};
use crate::system::{RealDevices, RealDisks, RealFilesystems, RealKeys};

/// What may happen while a volume is up or coming up.
#[derive(Debug)]
enum Event {
    /// SIGTERM or SIGINT.
    Stop,
    /// Somebody asks.
    Asked(UnixStream, Question),
    /// The device ended without being asked to.
    Ended(Ended),
    /// The secret is there, or it is known why not.
    Secret(Result<Secret>),
}

/// What is told on the way up.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'p> {
    /// A server that died had left something, which is cleared up now.
    ClearingUp,
    /// This step is done.
    Done(&'static str),
    /// Everything is up; in these words.
    Up(&'p str),
}

/// Brings the volume up, serves it until told to stop, takes it down.
///
/// # Errors
/// What stood in the way of coming up, with everything undone; or what ended the device from outside.
pub fn run(
    config: &Config,
    config_path: &Path,
    claim: Claim,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<()> {
    let dir = claim.dir().clone();
    if let Some(state) = dir.state()? {
        progress(Progress::ClearingUp)?;
        state.clear_up().context("could not clear up what a server that died had left")?;
    }
    let disk_path = match config.volume.device.resolve(Path::new(SYSFS)) {
        Ok(path) => path,
        Err(error) => {
            claim.remove()?;
            return Err(error.into());
        }
    };
    let options = attach_options(config, dir.fuse());
    let begun = Begun {
        attachment: Remains {
            method: attach::Method::Auto,
            device: PathBuf::new(),
            identifier: options.identifier.clone(),
            mount_dir: Some(options.mount_dir.clone()),
        },
        mountpoint: config.filesystem.as_ref().map(|filesystem| filesystem.mountpoint.clone()),
    };
    let mut state = State {
        pid: std::process::id(),
        config: config_path.to_owned(),
        disk: disk_path.clone(),
        begun: Some(begun),
        ..State::default()
    };
    claim.record(&state).with_context(|| dir.path().display().to_string())?;

    let (events, happened) = channel();
    let result = watch_signals(&events).and_then(|_runtime| {
        listen(&dir.control(), &events)?;
        let fetch = |request| await_secret(config.key.clone(), request, &events, &happened);
        let keys =
            RealKeys { described: keys::source(&config.key).describe(), fetch: &fetch, strength: config.strength };
        let devices = RealDevices { options };
        let outside = Outside {
            keys: &keys,
            disks: &RealDisks { caching: Caching::Direct },
            devices: &devices,
            filesystems: &RealFilesystems,
        };
        let mut boot = Boot::new(config, disk_path.clone(), outside);
        let mut steps = steps::all(config);

        let came_up = steps::up(&mut steps, &mut boot, &mut |step, boot| {
            record(&claim, &mut state, boot)?;
            progress(Progress::Done(step.name()))?;
            refuse_interruption(&happened)
        });
        if let Err(error) = came_up {
            note(&claim, &mut state, &boot);
            return Err(error);
        }
        watch_device(&boot, &events);
        if let Err(error) = progress(Progress::Up(&summary(config, &boot))) {
            // Nobody is left to be told: they think that it failed.
            match take_down(&mut state, &claim, &mut boot, &mut steps) {
                Ok(()) => return Err(error),
                Err(why) => tracing::error!("nobody is told that it is up, and it stays up: {why:#}"),
            }
        }
        serve(config, &mut state, &claim, &mut boot, &mut steps, &happened)
    });
    // Kept where something could not be undone, for `down` to clear up.
    if result.is_ok() || (state.attachment.is_none() && state.mountpoint.is_none()) {
        claim.remove()?;
    }
    result
}

/// Answers until the volume is down, or its device is gone.
fn serve(
    config: &Config,
    state: &mut State,
    claim: &Claim,
    boot: &mut Boot<'_>,
    steps: &mut [Box<dyn Step>],
    happened: &Receiver<Event>,
) -> Result<()> {
    loop {
        match happened.recv()? {
            Event::Asked(stream, Question::Status) => {
                let status = status(config, state, boot);
                answer(&stream, &Answer::Status(Box::new(status)));
            }
            Event::Asked(stream, Question::Down) => match take_down(state, claim, boot, steps) {
                Ok(()) => {
                    answer(&stream, &Answer::Down);
                    return Ok(());
                }
                Err(error) => answer(&stream, &Answer::Failed(format!("{error:#}"))),
            },
            Event::Stop => match take_down(state, claim, boot, steps) {
                Ok(()) => return Ok(()),
                Err(error) => tracing::error!("told to stop, but still up: {error:#}"),
            },
            Event::Ended(ended) => {
                state.clear_up().with_context(|| ended.to_string())?;
                (state.attachment, state.mountpoint) = (None, None);
                bail!("{ended}; what was written and not flushed is lost");
            }
            Event::Secret(_) => {}
        }
    }
}

fn take_down(state: &mut State, claim: &Claim, boot: &mut Boot<'_>, steps: &mut [Box<dyn Step>]) -> Result<()> {
    steps::down(steps, boot, &mut |_, boot| record(claim, state, boot))
}

/// Writes down what `down` would have to clear up if this process died now.
fn record(claim: &Claim, state: &mut State, boot: &Boot<'_>) -> Result<()> {
    let attachment = boot.attached().map(steps::outside::Attached::remains);
    let mountpoint = boot.config.filesystem.as_ref().filter(|_| boot.is_mounted()).map(|fs| fs.mountpoint.clone());
    if state.attachment != attachment || state.mountpoint != mountpoint {
        state.attachment = attachment;
        state.mountpoint = mountpoint;
        claim.record(state)?;
    }
    Ok(())
}

/// The same, where something else is to be told of.
fn note(claim: &Claim, state: &mut State, boot: &Boot<'_>) {
    if let Err(error) = record(claim, state, boot) {
        tracing::error!("{}: {error:#}", claim.dir().path().display());
    }
}

fn summary(config: &Config, boot: &Boot<'_>) -> String {
    let device = boot.attached().map(|attached| attached.device().display().to_string()).unwrap_or_default();
    let algorithm = boot.facts().key_bits.map_or("", algorithm);
    let kind = boot.facts().kind.unwrap_or("plain");
    match &config.filesystem {
        Some(filesystem) => {
            format!("{} is up: {device} ({kind}, {algorithm}) on {}", config.name, filesystem.mountpoint.display())
        }
        None => format!("{} is up: {device} ({kind}, {algorithm})", config.name),
    }
}

fn status(config: &Config, state: &State, boot: &Boot<'_>) -> Status {
    let volume = boot.volume().zip(boot.facts().segment).zip(boot.facts().key_bits);
    Status {
        name: config.name.to_string(),
        condition: Condition::Up,
        pid: state.pid,
        config: state.config.clone(),
        disk: state.disk.clone(),
        device: state.attachment.as_ref().map(|remains| remains.device.clone()),
        method: state.attachment.as_ref().map(|remains| remains.method.to_string()),
        mountpoint: state.mountpoint.clone(),
        volume: volume.map(|((volume, segment), key_bits)| VolumeFacts {
            kind: boot.facts().kind.unwrap_or("plain").to_owned(),
            cipher: "aes-xts-plain64".to_owned(),
            key_bits,
            algorithm: algorithm(key_bits).to_owned(),
            keyslot: boot.facts().keyslot,
            header: config.volume.header.clone(),
            sector_size: segment.sector_size.bytes_u64(),
            offset: segment.offset,
            size: volume.len(),
            read_only: volume.is_read_only(),
        }),
    }
}

fn attach_options(config: &Config, mount_dir: PathBuf) -> attach::Options {
    attach::Options {
        method: match config.attach.method {
            AttachMethod::Auto => attach::Method::Auto,
            AttachMethod::Nbd => attach::Method::Nbd,
            AttachMethod::Fuse => attach::Method::Fuse,
        },
        device: config.attach.nbd_device.map(|number| PathBuf::from(format!("/dev/nbd{number}"))),
        connections: usize::from(config.attach.connections),
        read_only: false,
        identifier: format!("nbdcrypt-{}", config.name),
        mount_dir,
    }
}

/// Waits for the secret in a thread of its own, since a source may try for minutes, and a signal ends the wait.
fn await_secret(
    config: KeyConfig,
    request: SecretRequest,
    events: &Sender<Event>,
    happened: &Receiver<Event>,
) -> Result<Secret> {
    let events = events.clone();
    std::thread::Builder::new().name("secret".to_owned()).spawn(move || {
        // Where nobody waits any more, the secret is wiped with the event.
        let _ = events.send(Event::Secret(keys::secret(&config, &request).map_err(anyhow::Error::from)));
    })?;
    loop {
        match happened.recv()? {
            Event::Secret(result) => return result,
            event => refuse(event)?,
        }
    }
}

/// Between two steps: has anyone asked to stop?
fn refuse_interruption(happened: &Receiver<Event>) -> Result<()> {
    happened.try_iter().try_for_each(refuse)
}

/// What is not for now, while the volume is coming up.
fn refuse(event: Event) -> Result<()> {
    match event {
        Event::Stop => Err(anyhow!("interrupted; everything was undone")),
        Event::Ended(ended) => Err(ended.into()),
        Event::Asked(stream, _) => {
            answer(&stream, &Answer::Failed("the volume is still coming up".to_owned()));
            Ok(())
        }
        Event::Secret(_) => Ok(()),
    }
}

fn answer(stream: &UnixStream, answer: &Answer) {
    if let Err(error) = control::answer(stream, answer) {
        tracing::debug!("whoever asked is gone: {error}");
    }
}

/// Turns signals into events, from now on and as long as the returned runtime lives.
fn watch_signals(events: &Sender<Event>) -> Result<tokio::runtime::Runtime> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
        let events = events.clone();
        let _inside = runtime.enter();
        let mut signals = signal(kind)?;
        runtime.spawn(async move {
            while signals.recv().await.is_some() {
                if events.send(Event::Stop).is_err() {
                    return;
                }
            }
        });
    }
    Ok(runtime)
}

/// Turns questions over the control socket into events.
fn listen(path: &Path, events: &Sender<Event>) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
    let events = events.clone();
    std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        for stream in listener.incoming().filter_map(Result::ok) {
            match control::question(&stream) {
                Ok(question) if events.send(Event::Asked(stream, question)).is_err() => return,
                Ok(_) => {}
                Err(error) => tracing::debug!("not a question: {error}"),
            }
        }
    })?;
    Ok(())
}

/// Turns the device's end into an event.
fn watch_device(boot: &Boot<'_>, events: &Sender<Event>) {
    let Some(ended) = boot.attached().and_then(|attached| attached.ended()) else { return };
    let events = events.clone();
    let wait = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        if let Ok(runtime) = runtime {
            let _ = events.send(Event::Ended(runtime.block_on(ended.wait())));
        }
    };
    if let Err(error) = std::thread::Builder::new().name("device".to_owned()).spawn(wait) {
        tracing::warn!("nobody will notice the device's end: {error}");
    }
}

//! The server's data besides the steps: the record for cleaning up, the reports to clients, and the events.

use std::cell::RefCell;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use anyhow::{Context, Result};

use super::board::{Board, Built};
use super::calling_off::CallingOff;
use super::events::Event;
use super::manager;
use crate::config::Config;
use crate::service::run_dir::{Claim, State};
use crate::service::status::{Condition, VolumeFacts, algorithm};
use crate::steps::{Boot, Facts, outside};

/// The server of a volume, as its main thread uses it.
pub(super) struct Server<'c> {
    pub(super) config: &'c Config,
    pub(super) claim: Claim,
    pub(super) state: RefCell<State>,
    pub(super) board: Board,
    pub(super) off: CallingOff,
    pub(super) happened: Receiver<Event>,
    /// The clients that asked for `down` while the volume was coming up, and have no answer yet.
    pub(super) waiting: RefCell<Vec<UnixStream>>,
}

impl Server<'_> {
    /// Records what `down` would have to clean up if this process died now, and updates the board.
    ///
    /// # Errors
    /// Fails if the state cannot be written, for example because /run is full.
    pub(super) fn record(&self, boot: &Boot<'_>) -> Result<()> {
        let attachment = boot.attached().map(outside::Attached::remains);
        let filesystem = boot.config.filesystem.as_ref().filter(|_| boot.is_mounted());
        let mountpoint = filesystem.map(|filesystem| filesystem.mountpoint.clone());
        self.board.build(Built {
            volume: boot.volume().map(Arc::downgrade).unwrap_or_default(),
            facts: facts(self.config, boot),
            made: boot.made(),
            attachment: attachment.clone(),
            statistics: boot.attached().map(outside::Attached::statistics),
        });
        let mut state = self.state.borrow_mut();
        if state.attachment != attachment || state.mountpoint != mountpoint {
            (state.attachment, state.mountpoint) = (attachment, mountpoint);
            self.claim.record(&state).with_context(|| {
                format!("the state of the volume could not be written to {}", self.claim.dir().path().display())
            })?;
        }
        Ok(())
    }

    /// Records the disk of the ciphertext, once it is found.
    ///
    /// # Errors
    /// Fails if the state cannot be written, for example because /run is full.
    pub(super) fn record_disk(&self, disk: PathBuf) -> Result<()> {
        let mut state = self.state.borrow_mut();
        if state.disk != disk {
            self.board.set_disk(disk.clone());
            state.disk = disk;
            self.claim.record(&state).with_context(|| {
                format!("the state of the volume could not be written to {}", self.claim.dir().path().display())
            })?;
        }
        Ok(())
    }

    /// Does what [`Server::record`] does, but only logs a failure, so that a full /run does not prevent going down.
    pub(super) fn note(&self, boot: &Boot<'_>) {
        if let Err(error) = self.record(boot) {
            tracing::error!("{error:#}; going down continues without it");
        }
    }

    /// Returns whether something is attached or mounted, according to the record.
    pub(super) fn has_made_something(&self) -> bool {
        let state = self.state.borrow();
        state.attachment.is_some() || state.mountpoint.is_some()
    }

    /// Reports what the server is doing, on the board and to the service manager.
    pub(super) fn doing(&self, condition: Condition, what: &str) {
        self.board.set(condition, Some(what.to_owned()));
        manager::doing(what);
    }
}

fn facts(config: &Config, boot: &Boot<'_>) -> Option<VolumeFacts> {
    let (volume, Facts { kind, key_bits, segment, keyslot }) = boot.volume().zip(boot.facts().cloned())?;
    Some(VolumeFacts {
        kind,
        cipher: "aes-xts-plain64".to_owned(),
        key_bits,
        algorithm: algorithm(key_bits).to_owned(),
        cpu_path: Some(boot.outside.machine.cpu.name().to_owned()),
        keyslot,
        header: config.volume.header.clone(),
        sector_size: segment.sector_size.bytes_u64(),
        offset: segment.offset,
        size: volume.len(),
        read_only: volume.is_read_only(),
    })
}

//! `nbdcrypt dump`: shows a volume's header.

use std::path::PathBuf;

use anyhow::{Context, Result};
use engine::luks::{self, Dump, luks1, luks2};
use serde_json::json;

use super::header_args::HeaderArgs;
use super::{tell, tell_json};
use crate::keys::opening::{self, Then};
use crate::machine::disk;
use crate::text;
use crate::volume::data_disks::DataDisks;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The disk or file. With `--header`, only the header is read.
    device: PathBuf,
    #[command(flatten)]
    header: HeaderArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    let path = args.header.header.as_ref().unwrap_or(&args.device);
    // No lock is taken, since a header may be read while its volume is up.
    let disk = disk::open_to_look(path)?;
    let header = luks::dump(&disk).with_context(|| path.display().to_string())?;
    opening::warn_of_copies(&DataDisks::one(path), &disk, Then::Stays);
    if args.json {
        return tell_json(format_args!("{:#}", as_json(&header)));
    }
    tell(header.display(&text::path(path)))
}

fn as_json(dump: &Dump) -> serde_json::Value {
    match dump {
        Dump::Luks1(header) => luks1_as_json(header),
        Dump::Luks2(header) => luks2_as_json(header),
    }
}

/// Returns the fields of the binary header, and the JSON area unchanged.
fn luks2_as_json(header: &luks2::Header) -> serde_json::Value {
    json!({
        "version": 2,
        "uuid": header.binary.uuid.to_string(),
        "label": header.binary.label.to_string(),
        "subsystem": header.binary.subsystem.to_string(),
        "sequence-id": header.binary.sequence_id,
        "algorithm": header.encryption(),
        "metadata": header.metadata.json,
    })
}

fn luks1_as_json(header: &luks1::Header) -> serde_json::Value {
    let keyslots: Vec<_> = header
        .keyslots
        .iter()
        .map(|slot| {
            json!({
                "enabled": slot.is_enabled(),
                "damaged-state": match slot.state {
                    luks1::KeyslotState::Undecided(word) => Some(format!("{word:#010x}")),
                    _ => None,
                },
                "iterations": slot.iterations,
                "salt": hex(&slot.salt),
                "material-offset-sectors": slot.material_offset,
                "stripes": slot.stripes,
            })
        })
        .collect();
    json!({
        "version": 1,
        "uuid": header.uuid.to_string(),
        "cipher": format!("{}-{}", header.cipher_name, header.cipher_mode),
        "hash": header.hash_spec,
        "key-bits": header.key_bytes * 8,
        "algorithm": header.encryption(),
        "payload-offset-sectors": header.payload_offset,
        "digest": hex(&header.digest),
        "digest-salt": hex(&header.digest_salt),
        "digest-iterations": header.digest_iterations,
        "keyslots": keyslots,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

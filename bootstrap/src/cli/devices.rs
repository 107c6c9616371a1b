//! `nbdcrypt devices`: shows the disks of this machine, and whether `up` would take them.

use std::fmt::Write;

use anyhow::Result;
use engine::text::{human, printable};
use serde_json::{Value, json};

use super::{tell, tell_json};
use crate::machine::holders::holders_of;
use crate::machine::root::Root;
use crate::text;
use crate::volume::candidate::{self, Candidate, Take, Unseen};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON: a list of disks.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let found = candidate::all(&Root::of_this_machine(), &holders_of);
    if args.json {
        return tell_json(format_args!("{:#}", Value::Array(found.iter().map(row).collect())));
    }
    found.iter().try_for_each(|found| tell(block(found)))?;
    match found.iter().any(|found| found.seen == Err(Unseen::NeedsRoot)) {
        true => tell("Only root can see what the disks hold, and all of their users: sudo nbdcrypt devices\n"),
        false if found.is_empty() => tell("this machine shows no disks in /sys/block\n"),
        false => Ok(()),
    }
}

/// Returns what is known about a disk as a line, and indented lines below it.
fn block(found: &Candidate) -> String {
    let Candidate { disk, users, seen, take, why } = found;
    let named = |value: &Option<String>, lacking: &str| printable(value.as_deref().unwrap_or(lacking));
    let (model, serial) = (named(&disk.model, "unknown model"), named(&disk.serial, "no serial number"));
    let read_only = if disk.read_only { ", read-only" } else { "" };
    let mut block = format!("{}: {}, {model}, {serial}{read_only}\n", text::path(&disk.path), human(disk.size));
    let holds = match seen {
        Ok(seen) => seen.content.to_string(),
        Err(unseen) => format!("not known: {unseen}"),
    };
    let take = match take {
        Take::Yes => "yes",
        Take::IfNamed => "if named",
        Take::No => "no",
        Take::Unknown => "not known",
    };
    let users = users.iter().map(|user| ("used", user.to_string()));
    let names = disk.by_id.iter().map(|name| ("name", text::path(name)));
    let lines = [("holds", holds)].into_iter().chain(users).chain(names).chain([("up", format!("{take}: {why}"))]);
    for (name, value) in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(block, "  {:<6} {value}", format!("{name}:"));
    }
    block
}

fn row(found: &Candidate) -> Value {
    let Candidate { disk, users, seen, take, why } = found;
    json!({
        "device": disk.path,
        "kind": disk.origin,
        "model": disk.model,
        "serial": disk.serial,
        "size": disk.size,
        "read_only": disk.read_only,
        "by_id": disk.by_id,
        "holds": seen.as_ref().ok().map(|seen| seen.content.to_string()),
        "blank": seen.as_ref().ok().map(|seen| seen.content == engine::signature::Content::Blank),
        "used_by": users.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "up": take,
        "why": why,
    })
}

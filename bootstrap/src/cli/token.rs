//! `nbdcrypt token`: lists, imports, exports and removes the tokens in a LUKS2 header. A token says how to get a passphrase.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::luks::{self, Dump, luks2};
use engine::store::FileStore;
use engine::text::printable;
use serde_json::{Value, json};

use super::examples;
use super::header_args::VolumeArgs;
use super::{tell, tell_json};
use crate::keys::opening::{self, Then};
use crate::machine::disk::HeaderLock;
use crate::machine::{disk, random};
use crate::volume::data_disks::DataDisks;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List the tokens with their types and keyslots.
    #[command(after_help = examples::TOKEN)]
    List {
        #[command(flatten)]
        volume: VolumeArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Add a token.
    #[command(after_help = examples::TOKEN)]
    Import {
        #[command(flatten)]
        volume: VolumeArgs,
        /// A file with the token's JSON; `-` is standard input.
        #[arg(long, value_name = "FILE", default_value = "-")]
        json_file: PathBuf,
        /// The token's number. [default: the first free one]
        #[arg(long, value_name = "N")]
        token_id: Option<u32>,
        /// Replace a token that has this number.
        #[arg(long)]
        force: bool,
    },
    /// Print a token's JSON.
    #[command(after_help = examples::TOKEN)]
    Export {
        #[command(flatten)]
        volume: VolumeArgs,
        /// The token's number.
        #[arg(long, value_name = "N")]
        token_id: u32,
    },
    /// Remove a token. Its keyslots stay.
    #[command(after_help = examples::TOKEN)]
    Remove {
        #[command(flatten)]
        volume: VolumeArgs,
        /// The token's number.
        #[arg(long, value_name = "N")]
        token_id: u32,
    },
}

impl VolumeArgs {
    fn open_to_look(&self) -> Result<FileStore> {
        // No lock is taken, since a header may be read while its volume is up.
        Ok(disk::open_to_look(self.path())?)
    }

    /// Opens the header of a LUKS2 volume for this process only.
    fn open_luks2(&self) -> Result<(FileStore, HeaderLock)> {
        let (disk, lock) = disk::open_header(self.path())?;
        header(&disk, &self.name())?;
        opening::warn_of_copies(&DataDisks::one(self.path()), &disk, Then::Changes);
        Ok((disk, lock))
    }
}

fn header(disk: &FileStore, name: &str) -> Result<Box<luks2::Header>> {
    match luks::dump(disk).with_context(|| name.to_owned())? {
        Dump::Luks2(header) => Ok(header),
        Dump::Luks1(_) => bail!("{name}: {}", luks::LuksError::Luks2Only("tokens")),
    }
}

pub(super) fn run(command: Command) -> Result<()> {
    match command {
        Command::List { volume, json } => list(&volume, json),
        Command::Import { volume, json_file, token_id, force } => {
            let json = read(&json_file).with_context(|| json_file.display().to_string())?;
            let (disk, _lock) = volume.open_luks2()?;
            let id =
                luks2::import_token(&disk, &json, token_id, force, &mut random::fill).with_context(|| volume.name())?;
            tell(format_args!("{}: token {id}\n", volume.name()))
        }
        Command::Export { volume, token_id } => {
            let disk = volume.open_to_look()?;
            header(&disk, &volume.name())?;
            let token = luks2::export_token(&disk, token_id).with_context(|| volume.name())?;
            tell_json(token)
        }
        Command::Remove { volume, token_id } => {
            let (disk, _lock) = volume.open_luks2()?;
            luks2::remove_token(&disk, token_id, &mut random::fill).with_context(|| volume.name())?;
            tell(format_args!("{}: token {token_id} removed\n", volume.name()))
        }
    }
}

fn list(volume: &VolumeArgs, as_json: bool) -> Result<()> {
    let disk = volume.open_to_look()?;
    let header = header(&disk, &volume.name())?;
    opening::warn_of_copies(&DataDisks::one(volume.path()), &disk, Then::Stays);
    let tokens = &header.metadata.tokens;
    if as_json {
        let row =
            |(id, token): (&u32, &luks2::Token)| json!({ "token": id, "type": token.kind, "keyslots": token.keyslots });
        return tell_json(format_args!("{:#}", tokens.iter().map(row).collect::<Value>()));
    }
    if tokens.is_empty() && std::io::stdout().is_terminal() {
        return tell(format_args!("{}: no token is in the header\n", volume.name()));
    }
    let line = |(id, token): (&u32, &luks2::Token)| {
        let keyslots: Vec<String> = token.keyslots.iter().map(u32::to_string).collect();
        format!("{id:>2}  {}  keyslots: {}\n", printable(&token.kind), keyslots.join(", "))
    };
    tell(tokens.iter().map(line).collect::<String>())
}

/// Reads the whole file, up to the size of the largest header.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = (4 << 20) + 1;
    if path == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
    } else {
        std::fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

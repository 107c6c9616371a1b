//! `nbdcrypt token`: what else is in a LUKS2 header that helps to open the volume.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::luks::{self, Dump, luks2};
use engine::store::{Access, Caching, FileStore};
use serde_json::{Value, json};

use super::header_args::HeaderArgs;
use super::{tell, tell_json};
use crate::disk::HeaderLock;
use crate::{disk, system};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// The tokens, with their types and keyslots.
    List {
        #[command(flatten)]
        place: Place,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Add a token.
    Import {
        #[command(flatten)]
        place: Place,
        /// The token's JSON; `-` is standard input.
        #[arg(long, value_name = "FILE", default_value = "-")]
        json_file: PathBuf,
        /// Its number; the first free one by default.
        #[arg(long, value_name = "N")]
        token_id: Option<u32>,
        /// Replace the token that has the number.
        #[arg(long)]
        force: bool,
    },
    /// Print a token's JSON.
    Export {
        #[command(flatten)]
        place: Place,
        /// Its number.
        #[arg(long, value_name = "N")]
        token_id: u32,
    },
    /// Remove a token. Its keyslots stay.
    Remove {
        #[command(flatten)]
        place: Place,
        /// Its number.
        #[arg(long, value_name = "N")]
        token_id: u32,
    },
}

#[derive(Debug, clap::Args)]
struct Place {
    /// The disk or file; with `--header` only the header is touched.
    device: PathBuf,
    #[command(flatten)]
    header: HeaderArgs,
}

impl Place {
    fn path(&self) -> &Path {
        self.header.header.as_ref().unwrap_or(&self.device)
    }

    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn look(&self) -> Result<FileStore> {
        // No lock: a header may be looked at while its volume is up.
        FileStore::open(self.path(), Access::ReadOnly, Caching::PageCache).with_context(|| self.name())
    }

    /// For this process alone, a LUKS2 volume.
    fn open(&self) -> Result<(FileStore, HeaderLock)> {
        let (disk, lock) = disk::open_header(self.path())?;
        header(&disk, &self.name())?;
        Ok((disk, lock))
    }
}

fn header(disk: &FileStore, name: &str) -> Result<Box<luks2::Header>> {
    match luks::dump(disk).with_context(|| name.to_owned())? {
        Dump::Luks2(header) => Ok(header),
        Dump::Luks1(_) => bail!("{name}: {}", luks::LuksError::Luks2Only("tokens")),
    }
}

pub(super) fn run(args: Args) -> Result<()> {
    match args.command {
        Command::List { place, json } => list(&place, json),
        Command::Import { place, json_file, token_id, force } => {
            let json = read(&json_file).with_context(|| json_file.display().to_string())?;
            let (disk, _lock) = place.open()?;
            let id = luks2::import_token(&disk, &json, token_id, force, &mut system::random)
                .with_context(|| place.name())?;
            tell(format_args!("{}: token {id}\n", place.name()))
        }
        Command::Export { place, token_id } => {
            let disk = place.look()?;
            header(&disk, &place.name())?;
            let token = luks2::export_token(&disk, token_id).with_context(|| place.name())?;
            tell_json(token)
        }
        Command::Remove { place, token_id } => {
            let (disk, _lock) = place.open()?;
            luks2::remove_token(&disk, token_id, &mut system::random).with_context(|| place.name())?;
            tell(format_args!("{}: token {token_id} removed\n", place.name()))
        }
    }
}

fn list(place: &Place, as_json: bool) -> Result<()> {
    let header = header(&place.look()?, &place.name())?;
    let tokens = &header.metadata.tokens;
    if as_json {
        let row =
            |(id, token): (&u32, &luks2::Token)| json!({ "token": id, "type": token.kind, "keyslots": token.keyslots });
        return tell_json(format_args!("{:#}", tokens.iter().map(row).collect::<Value>()));
    }
    let line = |(id, token): (&u32, &luks2::Token)| {
        let keyslots: Vec<String> = token.keyslots.iter().map(u32::to_string).collect();
        format!("{id:>2}  {}  keyslots: {}\n", token.kind.escape_debug(), keyslots.join(", "))
    };
    tell(tokens.iter().map(line).collect::<String>())
}

/// All of it, up to the size of the largest header.
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

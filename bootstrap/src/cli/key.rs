//! `nbdcrypt key`: the keys that open a volume.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use engine::key::Passphrase;
use engine::luks::luks2::{self, Kdf, KdfOptions};
use engine::luks::{self, Dump, Limits, LockedVolume, NewKey};
use engine::store::{Access, Caching, FileStore};
use serde_json::{Value, json};

use super::header_args::{HeaderArgs, LimitArgs};
use super::kdf_args::{KdfArgs, Pbkdf};
use super::{of, passphrase, tell, tell_json};
use crate::config::{Config, KeyConfig, LimitsConfig};
use crate::disk::HeaderLock;
use crate::keys::{self, KmsToken};
use crate::rewrap;
use crate::{disk, process, system};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// The keyslots that hold a key.
    List(List),
    /// Add a key, beside one that opens the volume.
    Add(Add),
    /// Replace a key by another. The old one opens the volume until the new one does.
    Change(Change),
    /// Have KMS encrypt anew what it keeps for a volume, under another KMS key or the newest material of the same one: in the
    /// header's token or in S3, wherever the configuration says it is. Keyslots and keys stay as they are.
    Rewrap(Rewrap),
    /// Remove a key, by itself or by its keyslot; its key material is overwritten.
    Remove(Remove),
    /// Say when a keyslot of a LUKS2 volume is tried: only when it is named, in its turn, or before all others.
    Priority(SetPriority),
}

#[derive(Debug, clap::Args)]
struct List {
    #[command(flatten)]
    place: Place,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// The disk or file; with `--header` only the header is touched.
    device: PathBuf,
    #[command(flatten)]
    header: HeaderArgs,
}

/// A passphrase of the volume, and how much it may cost to try.
#[derive(Debug, clap::Args)]
struct Opener {
    /// A passphrase that opens the volume (the one that goes, where one does): the file's bytes, all of them; `-` is standard
    /// input. Without it, it is asked for.
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    key_file: Option<PathBuf>,
    /// Get that passphrase from where this configuration has it: S3, a token in the header, a file.
    #[arg(long, value_name = "CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    limits: LimitArgs,
}

#[derive(Debug, clap::Args)]
struct Add {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    opener: Opener,
    /// The passphrase to add; `-` is standard input. Without it, it is asked for, twice.
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,
    /// The keyslot for it; the first free one by default.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
    #[command(flatten)]
    kdf: KdfArgs,
}

#[derive(Debug, clap::Args)]
struct Change {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    opener: Opener,
    /// The passphrase that takes its place; `-` is standard input. Without it, it is asked for, twice.
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,
    /// The keyslot that holds the old one; by default the first that it opens.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
    /// Replace even the passphrase that KMS, or the configuration, keeps for `nbdcrypt up`.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    kdf: KdfArgs,
}

#[derive(Debug, clap::Args)]
struct Remove {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    opener: Opener,
    /// The keyslot to clear, whatever passphrase is in it.
    #[arg(short = 'S', long, value_name = "N", conflicts_with_all = ["key_file", "config"])]
    key_slot: Option<usize>,
    /// Remove even the last key, after which nobody can ever read the data.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct Rewrap {
    #[command(flatten)]
    place: Place,
    /// The volume's configuration, whose `kms-key` decrypts.
    #[arg(long, value_name = "CONFIG")]
    config: PathBuf,
    /// The KMS key to encrypt under, by id, ARN or alias; the configured one without it.
    #[arg(long, value_name = "KEY")]
    new_kms_key: Option<String>,
}

#[derive(Debug, clap::Args)]
struct SetPriority {
    #[command(flatten)]
    place: Place,
    /// The keyslot.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: usize,
    /// When it is tried.
    #[arg(value_enum)]
    priority: Priority,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Priority {
    /// Only when it is named with --key-slot.
    Ignore,
    /// In its turn.
    Normal,
    /// Before all others.
    Prefer,
}

impl Place {
    fn path(&self) -> &Path {
        self.header.header.as_ref().unwrap_or(&self.device)
    }

    /// The disk for this process alone, and its header as it is now. cryptsetup may go on to work on it, for as long as
    /// passphrases are typed and keys derived.
    fn read(&self, limits: &Limits) -> Result<(FileStore, LockedVolume)> {
        let disk = disk::open(self.path(), Access::ReadWrite, Caching::PageCache)?;
        let volume = luks::read_for_keys(&disk, limits)?;
        Ok((disk, volume))
    }

    /// Keeps cryptsetup from a header that is still what it was when it was read.
    fn lock(&self, disk: &FileStore, was: &LockedVolume, limits: &Limits) -> Result<HeaderLock> {
        let lock = disk::lock_header(self.path(), disk.file())?;
        if luks::read_for_keys(disk, limits)? != *was {
            bail!("its header was changed by somebody else meanwhile, and is left as it is: try again");
        }
        Ok(lock)
    }
}

pub(super) fn run(args: Args) -> Result<()> {
    process::protect_secrets();
    match args.command {
        Command::List(args) => list(&args),
        Command::Add(args) => {
            let name = args.place.path().display().to_string();
            add(&args)
                .map_err(|error| of(&name, error))
                .and_then(|slot| tell(format_args!("{name}: key in keyslot {slot}\n")))
        }
        Command::Change(args) => {
            let name = args.place.path().display().to_string();
            change(&args)
                .map_err(|error| of(&name, error))
                .and_then(|slot| tell(format_args!("{name}: new key in keyslot {slot}\n")))
        }
        Command::Rewrap(args) => {
            let name = args.place.path().display().to_string();
            rewrap(args).map_err(|error| of(&name, error))
        }
        Command::Priority(args) => {
            let name = args.place.path().display().to_string();
            set_priority(&args).map_err(|error| of(&name, error))?;
            let said = match args.priority {
                Priority::Ignore => "is tried only when it is named",
                Priority::Normal => "is tried in its turn",
                Priority::Prefer => "is tried before the others",
            };
            tell(format_args!("{name}: keyslot {} {said}\n", args.key_slot))
        }
        Command::Remove(args) => {
            let name = args.place.path().display().to_string();
            remove(&args)
                .map_err(|error| of(&name, error))
                .and_then(|slot| tell(format_args!("{name}: keyslot {slot} cleared\n")))
        }
    }
}

impl Opener {
    fn load(&self) -> Result<(Option<KeyConfig>, Limits)> {
        let config = self.config.as_deref().map(Config::load).transpose()?;
        let configured = config.as_ref().map_or_else(LimitsConfig::default, |config| config.volume.limits);
        Ok((config.map(|config| config.key), self.limits.limits_or(configured)))
    }

    fn passphrase(&self, configured: Option<&KeyConfig>, disk: &FileStore, place: &Place) -> Result<Passphrase> {
        match configured {
            Some(key) => Ok(keys::secret(key, &keys::request_for(key, disk)?)?.passphrase),
            None => passphrase::existing(self.key_file.as_deref(), place.path()),
        }
    }
}

fn add(args: &Add) -> Result<usize> {
    let Add { place, opener, .. } = args;
    passphrase::refuse_both_on_standard_input(opener.key_file.as_deref(), args.new_key_file.as_deref())?;
    let (configured, limits) = opener.load()?;
    let (disk, volume) = place.read(&limits)?;
    let unlocked = volume.unlock(&disk, &opener.passphrase(configured.as_ref(), &disk, place)?)?;
    let new = passphrase::new(args.new_key_file.as_deref(), place.path(), "--new-key-file")?;
    let new = NewKey { passphrase: &new, kdf: kdf(&args.kdf, &volume)?, hash: args.kdf.hash };
    let _lock = place.lock(&disk, &volume, &limits)?;
    Ok(volume.add_key(&disk, &limits, &unlocked.key, &new, args.key_slot, &mut system::random)?)
}

fn change(args: &Change) -> Result<usize> {
    let Change { place, opener, .. } = args;
    passphrase::refuse_both_on_standard_input(opener.key_file.as_deref(), args.new_key_file.as_deref())?;
    let (configured, limits) = opener.load()?;
    if let Some(config) = opener.config.as_ref().filter(|_| !args.force) {
        bail!(
            "the passphrase that {} names is the one that `nbdcrypt up` opens the volume with: with another one in its \
             keyslot it would not. Add the new passphrase beside it (`nbdcrypt key add`), or use --force to mean it",
            config.display()
        );
    }
    let (disk, volume) = place.read(&limits)?;
    let old = opener.passphrase(configured.as_ref(), &disk, place)?;
    let unlocked = volume.unlock_keyslot(&disk, args.key_slot, &old, &limits)?;
    if !args.force {
        refuse_what_kms_keeps(&disk, unlocked.keyslot)?;
    }
    let new = passphrase::new(args.new_key_file.as_deref(), place.path(), "--new-key-file")?;
    let new = NewKey { passphrase: &new, kdf: kdf(&args.kdf, &volume)?, hash: args.kdf.hash };
    let _lock = place.lock(&disk, &volume, &limits)?;
    Ok(volume.change_key(&disk, &limits, &unlocked.key, unlocked.keyslot, &new, &mut system::random)?)
}

/// A token holds its keyslot's passphrase, and would go on to hold the old one.
fn refuse_what_kms_keeps(disk: &FileStore, keyslot: usize) -> Result<()> {
    let Dump::Luks2(header) = luks::dump(disk)? else { return Ok(()) };
    match KmsToken::of_keyslot(&header, keyslot) {
        None => Ok(()),
        Some(token) => bail!(
            "the passphrase in keyslot {keyslot} is the one that token {token} has KMS unlock: with another one there, \
             `nbdcrypt up` would open the volume no more. Add the new passphrase beside it (`nbdcrypt key add`), or use \
             --force to mean it"
        ),
    }
}

fn remove(args: &Remove) -> Result<usize> {
    let Remove { place, opener, .. } = args;
    let (configured, limits) = opener.load()?;
    let (disk, volume) = place.read(&limits)?;
    let slot = match args.key_slot {
        Some(slot) => slot,
        None => volume.unlock(&disk, &opener.passphrase(configured.as_ref(), &disk, place)?)?.keyslot,
    };
    let _lock = place.lock(&disk, &volume, &limits)?;
    volume.remove_key(&disk, slot, args.force, &mut system::random)?;
    Ok(slot)
}

fn rewrap(args: Rewrap) -> Result<()> {
    let name = args.place.path().display().to_string();
    let config = Config::load(&args.config)?;
    let disk = disk::open(args.place.path(), Access::ReadWrite, Caching::PageCache)?;
    let lock = || disk::lock_header(args.place.path(), disk.file());
    let rewrapped = rewrap::rewrap(&config.key, config.volume.limits, &disk, &lock, args.new_kms_key.clone())?;
    if let Err(error) = &rewrapped.read_back {
        tracing::warn!("the secret is stored, but could not be read back to be checked: {error}");
    }
    let place = match rewrapped.place {
        rewrap::Place::Token(id) => format!("{name}: token {id}"),
        rewrap::Place::Object(object) => object,
    };
    tell(format_args!("{place}: the secret is encrypted under {} now\n", rewrapped.key_arn))?;
    if let Some(key) = args.new_kms_key {
        let config = args.config.display();
        tell(format_args!("{config}: write `kms-key = \"{key}\"` under [key], or `up` is refused\n"))?;
    }
    Ok(())
}

fn set_priority(args: &SetPriority) -> Result<()> {
    let (disk, _lock) = disk::open_header(args.place.path())?;
    if let Dump::Luks1(_) = luks::dump(&disk)? {
        return Err(luks::LuksError::Luks2Only("priorities of keyslots").into());
    }
    let priority = match args.priority {
        Priority::Ignore => luks2::Priority::Ignore,
        Priority::Normal => luks2::Priority::Normal,
        Priority::Prefer => luks2::Priority::Prefer,
    };
    Ok(luks2::set_priority(&disk, args.key_slot, priority, &mut system::random)?)
}

fn kdf(args: &KdfArgs, volume: &LockedVolume) -> Result<KdfOptions> {
    match volume {
        LockedVolume::Luks2(_) => args.options(Pbkdf::Argon2id),
        // With the volume's own hash, whatever `--hash` says: LUKS1 has one for all.
        LockedVolume::Luks1(volume) => {
            let hash = volume.hash();
            Ok(KdfOptions::Pbkdf2 { hash, iterations: args.pbkdf2_iterations(hash)? })
        }
    }
}

fn list(args: &List) -> Result<()> {
    let path = args.place.path();
    let name = || path.display().to_string();
    // No lock: a header may be looked at while its volume is up.
    let disk = FileStore::open(path, Access::ReadOnly, Caching::PageCache).with_context(name)?;
    let rows = rows(&luks::dump(&disk).with_context(name)?);
    if args.json {
        return tell_json(format_args!("{:#}", Value::Array(rows)));
    }
    let line = |row: &Value| {
        let text = |name: &str| row[name].as_str().map_or_else(|| row[name].to_string(), str::to_owned);
        format!("{:>2}  {:<8}  {}\n", text("keyslot"), text("priority"), text("kdf"))
    };
    tell(rows.iter().map(line).collect::<String>())
}

fn rows(dump: &Dump) -> Vec<Value> {
    match dump {
        Dump::Luks1(header) => {
            let used = header.keyslots.iter().enumerate().filter(|(_, slot)| slot.enabled);
            let row = |(index, slot): (usize, &luks::luks1::Keyslot)| {
                let kdf = format!("pbkdf2-{}, {} iterations", header.hash_spec, slot.iterations);
                json!({ "keyslot": index, "priority": "normal", "kdf": kdf })
            };
            used.map(row).collect()
        }
        Dump::Luks2(header) => {
            let row = |(id, slot): (&u32, &luks::luks2::Keyslot)| {
                let kdf = match slot.opening.as_ref().map(|(kdf, _)| kdf) {
                    Some(Kdf::Pbkdf2 { hash, iterations, .. }) => format!("pbkdf2-{hash}, {iterations} iterations"),
                    Some(Kdf::Argon2 { is_id, time, memory, cpus, .. }) => {
                        let name = if *is_id { "argon2id" } else { "argon2i" };
                        format!("{name}, {time} passes, {memory} KiB, {cpus} lanes")
                    }
                    Some(Kdf::Other(name)) => name.clone(),
                    None => slot.kind.clone(),
                };
                let priority = match slot.priority {
                    0 => "ignored",
                    2 => "preferred",
                    _ => "normal",
                };
                json!({ "keyslot": id, "priority": priority, "kdf": kdf })
            };
            header.metadata.keyslots.iter().map(row).collect()
        }
    }
}

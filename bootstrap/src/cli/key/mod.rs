//! `nbdcrypt key`: lists, adds, changes, tests and removes the keys that open a volume.

mod verify;

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use engine::key::Passphrase;
use engine::luks::kdf::KdfOptions;
use engine::luks::{self, Dump, Limits, LockedVolume, LuksError, NewKey, UnlockedVolume, luks2};
use engine::store::{Access, Caching, FileStore};
use engine::text::printable;
use serde_json::{Value, json};

use super::advice::Settings;
use super::examples;
use super::header_args::{LimitArgs, VolumeArgs};
use super::kdf_args::{KdfArgs, Pbkdf};
use super::{of, passphrase, tell, tell_json};
use crate::config::{Config, KeyConfig, KeyFile, LimitsConfig};
use crate::keys::opening::{self, Then, is_wrong_passphrase};
use crate::keys::{self, KmsToken, rewrap};
use crate::machine::disk::HeaderLock;
use crate::machine::{disk, process, random};
use crate::text;
use crate::volume::data_disks::DataDisks;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List the keyslots that hold a key.
    #[command(after_help = examples::KEY_LIST)]
    List(List),
    /// Add a key to a volume. One of its present keys must open it.
    #[command(after_help = examples::KEY_ADD)]
    Add(Add),
    /// Replace a key by another one. The old key opens the volume until the new one does.
    #[command(after_help = examples::KEY_CHANGE)]
    Change(Change),
    /// Let KMS encrypt a volume's secret again, under another KMS key or the newest material of the same key. The secret is
    /// in the header's token or in S3, as the configuration says. Keyslots and keys do not change.
    #[command(after_help = examples::KEY_REWRAP)]
    Rewrap(Rewrap),
    /// Remove a key, named by its passphrase or by its keyslot. Its key material is overwritten.
    #[command(after_help = examples::KEY_REMOVE)]
    Remove(Remove),
    /// Show which keyslot a passphrase opens. Nothing is changed, and the volume may be up.
    #[command(after_help = examples::KEY_TEST)]
    Test(Test),
    /// Prove that the secret that a configuration names opens its volume: get the secret, for example from S3 and KMS, and
    /// open a keyslot with it. Nothing is changed, attached or mounted, and the volume may be up.
    #[command(after_help = examples::KEY_VERIFY)]
    Verify(verify::Args),
    /// Set when a keyslot of a LUKS2 volume is tried: only if it is named, in the order of keyslot numbers, or before all others.
    #[command(after_help = examples::KEY_PRIORITY)]
    Priority(SetPriority),
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    header: VolumeArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A passphrase of the volume, and the limits on trying it.
#[derive(Debug, clap::Args)]
struct Opener {
    /// A file with a passphrase that opens the volume. All bytes of the file are the passphrase; `-` is standard input.
    /// Without this option, nbdcrypt asks for it. `key change` needs the old passphrase. `key remove` needs the passphrase
    /// to remove or, with --key-slot, one that stays.
    #[arg(short = 'd', long, value_name = "FILE", conflicts_with = "config")]
    key_file: Option<PathBuf>,
    /// Get that passphrase from the source that this configuration names: S3, a token in the header, or a file.
    #[arg(long, value_name = "CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    limits: LimitArgs,
}

/// A new passphrase, and how its keyslot's key is derived.
#[derive(Debug, clap::Args)]
struct New {
    /// A file with the new passphrase; `-` is standard input. Without this option, nbdcrypt asks for it twice.
    #[arg(long, value_name = "FILE")]
    new_key_file: Option<PathBuf>,
    #[command(flatten)]
    kdf: KdfArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct Add {
    #[command(flatten)]
    header: VolumeArgs,
    #[command(flatten)]
    opener: Opener,
    #[command(flatten)]
    new: New,
    /// The keyslot for the new key. [default: the first free one]
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Change {
    #[command(flatten)]
    header: VolumeArgs,
    #[command(flatten)]
    opener: Opener,
    #[command(flatten)]
    new: New,
    /// The keyslot that holds the old passphrase. [default: the first that it opens]
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
    /// Replace even a passphrase that KMS or the configuration keeps for `nbdcrypt up`. If the header has no room for both
    /// keys, write the new key over the old one: after a crash in between, neither opens that keyslot.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    #[command(flatten)]
    header: VolumeArgs,
    #[command(flatten)]
    opener: Opener,
    /// The keyslot to clear, whatever its passphrase is. The passphrase that nbdcrypt asks for, or that --key-file or
    /// --config gives, must open another keyslot. This proves that a key remains.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
    /// Remove even the last key, after which nobody can ever read the data. With --key-slot, do not require proof that a key
    /// remains.
    #[arg(long)]
    force: bool,
    /// Ask nothing at the terminal. Without --key-file or --config, fail.
    #[arg(short = 'q', long = "batch-mode", visible_alias = "batch")]
    batch: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Test {
    #[command(flatten)]
    header: VolumeArgs,
    #[command(flatten)]
    opener: Opener,
    /// Try only this keyslot. Without this option, every keyslot is tried. Keyslots that are set to be ignored come last.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Rewrap {
    #[command(flatten)]
    header: VolumeArgs,
    /// The volume's configuration. Its `kms-key` decrypts the secret.
    #[arg(long, value_name = "CONFIG")]
    config: PathBuf,
    /// The KMS key that encrypts the secret, by id, ARN or alias. [default: the configured one]
    #[arg(long, value_name = "KEY")]
    new_kms_key: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct SetPriority {
    #[command(flatten)]
    header: VolumeArgs,
    /// The keyslot.
    #[arg(short = 'S', long, value_name = "N")]
    key_slot: usize,
    /// When the keyslot is tried.
    #[arg(value_enum, ignore_case = true)]
    priority: Priority,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Priority {
    /// Only if it is named with --key-slot.
    Ignore,
    /// In the order of keyslot numbers, after the preferred keyslots.
    Normal,
    /// Before all others.
    Prefer,
}

impl Command {
    /// Returns how the command gets the settings that advice may name.
    pub(super) fn settings(&self) -> Settings {
        match self {
            Self::Rewrap(_) | Self::Verify(_) => Settings::Configuration,
            Self::Change(_) | Self::Test(_) => Settings::Options { key_slot: true },
            Self::List(_) | Self::Add(_) | Self::Remove(_) | Self::Priority(_) => Settings::Options { key_slot: false },
        }
    }
}

impl VolumeArgs {
    /// Opens the disk for this process only, and reads the header. cryptsetup may still change the header while the user
    /// types passphrases and keys are derived.
    fn read(&self, limits: &Limits) -> Result<(FileStore, LockedVolume)> {
        let disk = disk::open(self.path(), Access::ReadWrite, Caching::PageCache)?;
        let volume = luks::read_for_keys(&disk, limits)?;
        opening::warn_of_copies(&DataDisks::one(self.path()), &disk, Then::Changes);
        Ok((disk, volume))
    }

    /// Opens the disk without a lock, and reads the header. The volume may be up.
    fn look(&self, limits: &Limits) -> Result<(FileStore, LockedVolume)> {
        let disk = disk::open_to_look(self.path())?;
        let volume = luks::read_for_keys(&disk, limits)?;
        Ok((disk, volume))
    }

    /// Locks the header against cryptsetup, and checks that it is still what [`VolumeArgs::read`] found.
    fn lock(&self, disk: &FileStore, was: &LockedVolume, limits: &Limits) -> Result<HeaderLock> {
        let lock = disk::lock_header(self.path(), disk.file())?;
        if luks::read_for_keys(disk, limits)? != *was {
            bail!("another program changed the header at the same time. Nothing was changed; try again");
        }
        Ok(lock)
    }
}

pub(super) fn run(command: Command) -> Result<()> {
    process::protect_secrets();
    match command {
        Command::List(args) => list(&args),
        Command::Add(args) => {
            let name = args.header.name();
            add(&args)
                .map_err(|error| of(&name, error))
                .and_then(|slot| tell(format_args!("{name}: key in keyslot {slot}\n")))
        }
        Command::Change(args) => {
            let name = args.header.name();
            change(&args)
                .map_err(|error| of(&name, error))
                .and_then(|slot| tell(format_args!("{name}: new key in keyslot {slot}\n")))
        }
        Command::Rewrap(args) => {
            let name = args.header.name();
            rewrap(args).map_err(|error| of(&name, error))
        }
        Command::Priority(args) => {
            let name = args.header.name();
            set_priority(&args).map_err(|error| of(&name, error))?;
            let said = match args.priority {
                Priority::Ignore => "is tried only if it is named",
                Priority::Normal => "is tried in the order of keyslot numbers",
                Priority::Prefer => "is tried before the others",
            };
            tell(format_args!("{name}: keyslot {} {said}\n", args.key_slot))
        }
        Command::Remove(args) => {
            let name = args.header.name();
            remove(&args)
                .map_err(|error| of(&name, error))
                .and_then(|slot| tell(format_args!("{name}: keyslot {slot} cleared\n")))
        }
        Command::Test(args) => {
            let name = args.header.name();
            test(&args, &name).map_err(|error| of(&name, error))
        }
        Command::Verify(args) => verify::run(&args),
    }
}

impl Opener {
    fn load(&self) -> Result<(Option<KeyConfig>, Limits)> {
        let config = self.config.as_deref().map(Config::load).transpose()?;
        let configured = config.as_ref().map_or_else(LimitsConfig::default, |config| config.volume.limits);
        Ok((config.map(|config| config.key), self.limits.limits_or(configured)))
    }

    fn passphrase(&self, configured: Option<&KeyConfig>, disk: &FileStore, header: &VolumeArgs) -> Result<Passphrase> {
        self.passphrase_asked_as(configured, disk, format!("Passphrase of {}: ", header.name()))
    }

    /// Does what [`Opener::passphrase`] does, but asks `question`.
    fn passphrase_asked_as(
        &self,
        configured: Option<&KeyConfig>,
        disk: &FileStore,
        question: String,
    ) -> Result<Passphrase> {
        match configured {
            Some(KeyConfig::Ephemeral) => bail!(
                "the configuration names no secret: with source = \"ephemeral\" the key exists only in the memory of the server"
            ),
            Some(key) => Ok(keys::secret(key, &keys::request_for(key, disk)?)?.passphrase),
            None => passphrase::asked_as(self.key_file.as_deref(), question),
        }
    }

    /// Returns the key file that the passphrase comes from, if it comes from one.
    fn file(&self, configured: Option<&KeyConfig>) -> Option<KeyFile> {
        match configured {
            Some(key) => opening::key_file_of(key).cloned(),
            None => self.key_file.as_deref().map(passphrase::key_file),
        }
    }

    /// Returns the result of `opens` with the passphrase. An error explains what else is known about the passphrase.
    fn opened(
        &self,
        configured: Option<&KeyConfig>,
        passphrase: &Passphrase,
        opens: impl Fn(&Passphrase) -> Result<UnlockedVolume, LuksError>,
    ) -> Result<UnlockedVolume> {
        opens(passphrase).map_err(|error| {
            let keyslot = |passphrase: &Passphrase| opens(passphrase).map(|unlocked| unlocked.keyslot);
            opening::explained(error, self.file(configured).as_ref(), passphrase, keyslot)
        })
    }

    /// Returns whether nbdcrypt must ask for the passphrase.
    fn is_to_be_typed(&self) -> bool {
        self.key_file.is_none() && self.config.is_none()
    }
}

impl New {
    fn passphrase(&self, header: &VolumeArgs) -> Result<Passphrase> {
        passphrase::new(self.new_key_file.as_deref(), header.path(), "--new-key-file")
    }

    /// Measures the key derivation.
    fn key<'p>(&self, passphrase: &'p Passphrase, volume: &LockedVolume) -> Result<NewKey<'p>> {
        let kdf = match volume {
            LockedVolume::Luks2(_) => self.kdf.options(Pbkdf::Argon2id)?,
            // Uses the volume's own hash and ignores `--hash`, since LUKS1 has one hash for all.
            LockedVolume::Luks1(volume) => {
                let hash = volume.hash();
                KdfOptions::Pbkdf2 { hash, iterations: self.kdf.pbkdf2_iterations(hash)? }
            }
        };
        Ok(NewKey { passphrase, kdf, hash: self.kdf.hash })
    }
}

fn add(args: &Add) -> Result<usize> {
    let Add { header, opener, .. } = args;
    passphrase::refuse_both_on_standard_input(opener.key_file.as_deref(), args.new.new_key_file.as_deref())?;
    let (configured, limits) = opener.load()?;
    let (disk, volume) = header.read(&limits)?;
    volume.free_keyslot(args.key_slot)?;
    let passphrase = opener.passphrase(configured.as_ref(), &disk, header)?;
    let unlocked = opener.opened(configured.as_ref(), &passphrase, |passphrase| volume.unlock(&disk, passphrase))?;
    let passphrase = args.new.passphrase(header)?;
    let new = args.new.key(&passphrase, &volume)?;
    let _lock = header.lock(&disk, &volume, &limits)?;
    Ok(volume.add_key(&disk, &limits, &unlocked.key, &new, args.key_slot, &mut random::fill)?)
}

fn change(args: &Change) -> Result<usize> {
    let Change { header, opener, .. } = args;
    passphrase::refuse_both_on_standard_input(opener.key_file.as_deref(), args.new.new_key_file.as_deref())?;
    let (configured, limits) = opener.load()?;
    if let Some(config) = opener.config.as_ref().filter(|_| !args.force) {
        bail!(
            "`nbdcrypt up` opens the volume with the passphrase that {} names. After this change it could not open the \
             volume. Add the new passphrase in another keyslot (`nbdcrypt key add`), or use --force to change it \
             anyway",
            config.display()
        );
    }
    let (disk, volume) = header.read(&limits)?;
    if let Some(slot) = args.key_slot.filter(|slot| !is_in_use(&volume, *slot)) {
        return Err(LuksError::NoSuchKeyslot(slot).into());
    }
    let old = opener.passphrase(configured.as_ref(), &disk, header)?;
    let unlocked = opener
        .opened(configured.as_ref(), &old, |passphrase| volume.unlock_keyslot(&disk, args.key_slot, passphrase))?;
    if !args.force {
        let advice = "Add the new passphrase in another keyslot (`nbdcrypt key add`)";
        refuse_what_kms_keeps(&disk, unlocked.keyslot, "changed", advice)?;
    }
    let passphrase = args.new.passphrase(header)?;
    let new = args.new.key(&passphrase, &volume)?;
    let _lock = header.lock(&disk, &volume, &limits)?;
    Ok(volume.change_key(&disk, &limits, &unlocked.key, unlocked.keyslot, &new, args.force, &mut random::fill)?)
}

/// Refuses to change or remove a passphrase that a token holds, encrypted by KMS. The token would still hold the passphrase,
/// which would no longer open the volume.
fn refuse_what_kms_keeps(disk: &FileStore, keyslot: usize, then: &str, advice: &str) -> Result<()> {
    let Dump::Luks2(header) = luks::dump(disk)? else { return Ok(()) };
    match KmsToken::of_keyslot(&header, keyslot) {
        None => Ok(()),
        Some(token) => bail!(
            "`nbdcrypt up` opens the volume with the passphrase in keyslot {keyslot}, which KMS decrypts from token {token}. \
             If this passphrase is {then}, `nbdcrypt up` can no longer open the volume. {advice}, or use --force to do it \
             anyway"
        ),
    }
}

fn remove(args: &Remove) -> Result<usize> {
    let Remove { header, opener, .. } = args;
    let (configured, limits) = opener.load()?;
    let (disk, volume) = header.read(&limits)?;
    let refuse_what_up_needs = |slot| match args.force {
        true => Ok(()),
        false => refuse_what_kms_keeps(&disk, slot, "removed", "Keep it"),
    };
    let slot = match args.key_slot {
        Some(slot) => {
            refuse_what_up_needs(slot)?;
            if !args.force {
                prove_another_key(args, slot, configured.as_ref(), &disk, &volume)?;
            }
            slot
        }
        None => {
            if opener.is_to_be_typed() && args.batch {
                bail!(
                    "with --batch-mode, nbdcrypt does not ask for a passphrase. Name the key to remove with --key-file FILE \
                     (`-` is standard input) or --config CONFIG, or name its keyslot with --key-slot N"
                );
            }
            let passphrase = opener.passphrase(configured.as_ref(), &disk, header)?;
            let opens = |passphrase: &Passphrase| volume.unlock(&disk, passphrase);
            let slot = opener.opened(configured.as_ref(), &passphrase, opens)?.keyslot;
            refuse_what_up_needs(slot)?;
            slot
        }
    };
    let _lock = header.lock(&disk, &volume, &limits)?;
    volume.remove_key(&disk, slot, args.force, &mut random::fill)?;
    warn_if_only_ignored_remain(header, &volume, slot);
    Ok(slot)
}

/// Checks that a passphrase from the user opens a keyslot other than `slot`, as `cryptsetup luksKillSlot` does. This proves
/// that a key remains. A keyslot that is set to be ignored counts, because it opens if its number is given. An unbound
/// keyslot does not count.
fn prove_another_key(
    args: &Remove,
    slot: usize,
    configured: Option<&KeyConfig>,
    disk: &FileStore,
    volume: &LockedVolume,
) -> Result<()> {
    if !is_in_use(volume, slot) {
        return Err(LuksError::NoSuchKeyslot(slot).into());
    }
    if volume.keyslots() == [slot] {
        return Err(LuksError::LastKeyslot(slot).into());
    }
    if args.opener.is_to_be_typed() && (args.batch || !std::io::stdin().is_terminal()) {
        bail!(
            "keyslot {slot} was not removed, because nothing proves that another key remains. Give a passphrase that opens \
             another keyslot with --key-file FILE (`-` is standard input) or --config CONFIG, or use --force to remove the \
             keyslot without proof"
        );
    }
    let name = args.header.name();
    let question = format!("Passphrase of another keyslot of {name}, which stays: ");
    let passphrase = args.opener.passphrase_asked_as(configured, disk, question)?;
    let Err(error) = volume.unlock_other(disk, slot, &passphrase) else { return Ok(()) };
    if !is_wrong_passphrase(&error) {
        let explained = opening::explained(error, None, &passphrase, |_| Err(LuksError::WrongPassphrase));
        return Err(explained
            .context(format!("keyslot {slot} was not removed, because nothing proves that another key remains")));
    }
    let advice = format!(
        "Give a passphrase that opens another keyslot (`nbdcrypt key test {name}` shows which keyslot a passphrase opens), or use \
         --force to remove the keyslot without proof"
    );
    if volume.unlock_keyslot(disk, Some(slot), &passphrase).is_ok() {
        bail!("the passphrase opens keyslot {slot}, which is to be removed, but no other keyslot. {advice}");
    }
    let keyslot = |other: &Passphrase| volume.unlock_other(disk, slot, other).map(|unlocked| unlocked.keyslot);
    let hint = args.opener.file(configured).and_then(|file| opening::newline_hint(&file, &passphrase, keyslot));
    bail!(
        "keyslot {slot} was not removed: the passphrase opens no other keyslot, so it does not prove that another key remains. {}",
        hint.unwrap_or(advice)
    )
}

/// Returns whether the keyslot exists, bound or unbound.
fn is_in_use(volume: &LockedVolume, slot: usize) -> bool {
    match volume {
        LockedVolume::Luks1(_) => volume.keyslots().contains(&slot),
        LockedVolume::Luks2(volume) => volume.header().metadata.keyslots.keys().any(|id| *id as usize == slot),
    }
}

/// Warns if every keyslot that remains is set to be ignored. An ignored keyslot opens the volume only if it is named,
/// and `nbdcrypt up` names none.
fn warn_if_only_ignored_remain(header: &VolumeArgs, volume: &LockedVolume, gone: usize) {
    let mut left = volume.keyslots();
    left.retain(|slot| *slot != gone);
    if let Some(first) = left.first()
        && left.iter().all(|slot| volume.is_ignored(*slot))
    {
        let device = header.name();
        tracing::warn!(
            "all remaining keyslots of {device} are set to be ignored, so `nbdcrypt up` tries none of them. To let it try \
             keyslot {first} again, run `nbdcrypt key priority --key-slot {first} {device} normal`"
        );
    }
}

fn test(args: &Test, name: &str) -> Result<()> {
    let Test { header, opener, .. } = args;
    let (configured, limits) = opener.load()?;
    let (disk, volume) = header.look(&limits)?;
    opening::warn_of_copies(&DataDisks::one(header.path()), &disk, Then::Stays);
    if let Some(slot) = args.key_slot.filter(|slot| !is_in_use(&volume, *slot)) {
        return Err(LuksError::NoSuchKeyslot(slot).into());
    }
    let passphrase = opener.passphrase(configured.as_ref(), &disk, header)?;
    let opens = |passphrase: &Passphrase| match args.key_slot {
        None => volume.unlock_any(&disk, passphrase),
        named => volume.unlock_keyslot(&disk, named, passphrase),
    };
    match opens(&passphrase) {
        Ok(unlocked) => {
            let slot = unlocked.keyslot;
            let is_ignored = volume.is_ignored(slot);
            if args.json {
                return tell_json(format_args!(
                    "{:#}",
                    json!({ "device": header.path(), "opens": true, "keyslot": slot, "ignored": is_ignored })
                ));
            }
            let ignored = match is_ignored {
                true => ", which is set to be ignored: it is tried only if it is named",
                false => "",
            };
            tell(format_args!("{name}: the passphrase opens keyslot {slot}{ignored}\n"))
        }
        Err(error) => {
            if args.json && is_wrong_passphrase(&error) {
                tell_json(format_args!("{:#}", json!({ "device": header.path(), "opens": false, "keyslot": null })))?;
            }
            let keyslot = |passphrase: &Passphrase| opens(passphrase).map(|unlocked| unlocked.keyslot);
            Err(opening::explained(error, opener.file(configured.as_ref()).as_ref(), &passphrase, keyslot))
        }
    }
}

fn rewrap(args: Rewrap) -> Result<()> {
    let name = args.header.name();
    let config = Config::load(&args.config)?;
    let disk = disk::open(args.header.path(), Access::ReadWrite, Caching::PageCache)?;
    opening::warn_of_copies(&DataDisks::one(args.header.path()), &disk, Then::Changes);
    let lock = || disk::lock_header(args.header.path(), disk.file());
    let rewrapped = rewrap::rewrap(&config.key, config.volume.limits, &disk, &lock, args.new_kms_key.clone())?;
    if let Err(error) = &rewrapped.read_back {
        tracing::warn!("the secret is stored, but could not be read back to check it: {error}");
    }
    let location = match rewrapped.location {
        rewrap::Location::Token(id) => format!("{name}: token {id}"),
        rewrap::Location::Object(object) => object,
    };
    tell(format_args!("{location}: the secret is now encrypted under {}\n", rewrapped.key_arn))?;
    if let Some(key) = args.new_kms_key
        && let Some(what) = to_write(&config.key, &key)
    {
        tell(format_args!("{}: {what}\n", text::path(&args.config)))?;
    }
    Ok(())
}

/// Returns what must change in the configuration after the secret was encrypted under `key`. Returns `None` if nothing must.
fn to_write(configured: &KeyConfig, key: &str) -> Option<String> {
    let keys = match configured {
        KeyConfig::Aws(aws) => aws.kms_keys.as_slice(),
        KeyConfig::File(_) | KeyConfig::Ephemeral => &[],
    };
    match keys {
        [first, ..] if first == key => None,
        [_, others @ ..] if others.iter().any(|listed| listed == key) => Some(format!(
            "move \"{key}\" to the start of the list `kms-key` under [key], so that `nbdcrypt up` asks it first"
        )),
        [_, _, ..] => Some(format!(
            "put \"{key}\" at the start of the list `kms-key` under [key], or `nbdcrypt up` will refuse the secret"
        )),
        _ => Some(format!("write `kms-key = \"{key}\"` under [key], or `nbdcrypt up` will refuse the secret")),
    }
}

fn set_priority(args: &SetPriority) -> Result<()> {
    let (disk, _lock) = disk::open_header(args.header.path())?;
    if let Dump::Luks1(_) = luks::dump(&disk)? {
        return Err(luks::LuksError::Luks2Only("priorities of keyslots").into());
    }
    opening::warn_of_copies(&DataDisks::one(args.header.path()), &disk, Then::Changes);
    let priority = match args.priority {
        Priority::Ignore => luks2::Priority::Ignore,
        Priority::Normal => luks2::Priority::Normal,
        Priority::Prefer => luks2::Priority::Prefer,
    };
    Ok(luks2::set_priority(&disk, args.key_slot, priority, &mut random::fill)?)
}

fn list(args: &List) -> Result<()> {
    let path = args.header.path();
    let name = || text::path(path);
    // No lock is taken, since a header may be read while its volume is up.
    let disk = disk::open_to_look(path)?;
    let rows = rows(&luks::dump(&disk).with_context(name)?);
    opening::warn_of_copies(&DataDisks::one(path), &disk, Then::Stays);
    if args.json {
        return tell_json(format_args!("{:#}", Value::Array(rows)));
    }
    if rows.is_empty() && std::io::stdout().is_terminal() {
        return tell(format_args!("{}: no keyslot holds a key, so nothing opens the volume\n", name()));
    }
    let line = |row: &Value| {
        let text = |name: &str| row[name].as_str().map_or_else(|| row[name].to_string(), str::to_owned);
        // Unbound keyslots hold keys that do not open the volume.
        let unbound = if row["unbound"] == true { "  (unbound: holds another key)" } else { "" };
        format!("{:>2}  {:<9}  {}{unbound}\n", text("keyslot"), text("priority"), printable(&text("kdf")))
    };
    tell(rows.iter().map(line).collect::<String>())
}

fn rows(dump: &Dump) -> Vec<Value> {
    match dump {
        Dump::Luks1(header) => {
            let used = header.keyslots.iter().enumerate().filter(|(_, slot)| slot.is_enabled());
            let row = |(index, slot): (usize, &luks::luks1::Keyslot)| {
                let kdf = format!("pbkdf2-{}, {} iterations", header.hash_spec, slot.iterations);
                json!({ "keyslot": index, "priority": "normal", "kdf": kdf, "unbound": false })
            };
            used.map(row).collect()
        }
        Dump::Luks2(header) => {
            let row = |(id, slot): (&u32, &luks::luks2::Keyslot)| {
                let kdf = slot.opening.as_ref().map_or_else(|| slot.kind.clone(), |(kdf, _)| kdf.to_string());
                json!({
                    "keyslot": id,
                    "priority": slot.priority.to_string(),
                    "kdf": kdf,
                    "unbound": !header.metadata.is_bound(*id),
                })
            };
            header.metadata.keyslots.iter().map(row).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_rewrap_only_what_is_missing_is_to_be_written() {
        let said = |configured: &str| {
            let text = format!(
                "[volume]\ndevices = [\"/x\"]\n[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\n{configured}\n"
            );
            to_write(&Config::parse(&text, std::path::Path::new("/etc/x.toml")).unwrap().key, "alias/new")
        };
        assert_eq!(said("kms-key = \"alias/new\""), None);
        assert_eq!(said("kms-key = [\"alias/new\", \"alias/old\"]"), None);
        let listed = said("kms-key = [\"alias/old\", \"alias/new\"]").unwrap();
        assert!(listed.contains("move") && !listed.contains("refuse"), "{listed}");
        let unlisted = said("kms-key = [\"alias/old\", \"alias/older\"]").unwrap();
        assert!(unlisted.contains("at the start of the list") && unlisted.contains("refuse"), "{unlisted}");
        let another = said("kms-key = \"alias/old\"").unwrap();
        assert!(another.contains("write `kms-key = \"alias/new\"`") && another.contains("refuse"), "{another}");
    }
}

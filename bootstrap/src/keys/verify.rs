//! Tries every secret that a configuration names: gets the secret from its source, and opens a keyslot with it. Changes
//! nothing.

use anyhow::{Result, bail};
use engine::key::Passphrase;
use engine::luks::{self, Disks, Dump};
use engine::signature::Content;

use super::{KmsToken, NoTokenSecret, Secret, SecretRequest, is_in_header, opening, secret, source};
use crate::config::{Config, KeyConfig, KeyFile};
use crate::volume::VolumeType;
use crate::volume::content::Look;
use crate::volume::ephemeral::Lifetime;

/// One secret for a volume, and what it opens.
#[derive(Debug)]
pub struct Way {
    /// A description of where the secret comes from.
    pub source: String,
    /// What the secret opens, or why it opens nothing.
    pub opens: Result<Opens>,
}

/// What a secret opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opens {
    /// This keyslot.
    Keyslot(usize),
    /// The secret is a possible key of the plain volume. Nothing on the disk shows whether it is the right key.
    Plain,
}

/// Tries every secret that the configuration names, as `up` does. Asks S3 and KMS if the secret is stored there.
/// Blocks, as [`super::KeySource::passphrase`] does.
///
/// `memory_kib` is the memory in KiB that this process may use. If the secret is in the header, every token of the type
/// `aws-kms` is tried, although `up` stops at the first one that KMS decrypts.
pub fn ways(config: &Config, disks: Disks<'_>, memory_kib: u64) -> Vec<Way> {
    let described = source(&config.key).describe();
    let requests = match is_in_header(&config.key) {
        false => vec![(described, Ok(SecretRequest::Configured))],
        true => match of_tokens(disks) {
            Ok(requests) => requests,
            Err(error) => vec![(described, Err(error))],
        },
    };
    let opens = |request: Result<SecretRequest>| request.and_then(|request| opens(config, disks, memory_kib, &request));
    requests.into_iter().map(|(source, request)| Way { source, opens: opens(request) }).collect()
}

/// Returns a description and a request for each token of the type `aws-kms` in the header.
fn of_tokens(disks: Disks<'_>) -> Result<Vec<(String, Result<SecretRequest>)>> {
    refuse_blank(disks, "the volume's secret is made together with it")?;
    let Dump::Luks2(header) = luks::dump(disks.header())? else { return Err(NoTokenSecret::Missing.into()) };
    let volume = header.binary.uuid.parsed()?;
    let tokens = KmsToken::all(&header);
    if tokens.is_empty() {
        return Err(NoTokenSecret::Missing.into());
    }
    let request = |(id, token): (u32, Result<KmsToken, String>)| {
        let request = token
            .map(|token| SecretRequest::Unwrap { tokens: vec![(id, token)], volume })
            .map_err(NoTokenSecret::Unusable);
        (format!("the password in token {id}, decrypted by KMS"), request.map_err(anyhow::Error::from))
    };
    Ok(tokens.into_iter().map(request).collect())
}

fn opens(config: &Config, disks: Disks<'_>, memory_kib: u64, request: &SecretRequest) -> Result<Opens> {
    if config.volume.lifetime == Lifetime::OfServer {
        bail!(
            "there is no secret to verify: with source = \"ephemeral\" each `nbdcrypt up` makes a new volume with a new key, \
             which is never stored"
        )
    }
    let Secret { passphrase, .. } = secret(&config.key, request)?;
    if config.volume.kind == VolumeType::Plain {
        let is_key_file = matches!(&config.key, KeyConfig::File(KeyFile::Path(_)));
        config.volume.plain.key(&passphrase, is_key_file)?;
        return Ok(Opens::Plain);
    }
    refuse_blank(disks, "the secret could be obtained")?;
    let locked = luks::read(disks, &config.volume.limits.limits(memory_kib))?;
    let keyslot = |secret: &Passphrase| locked.unlock(disks.header(), secret).map(|unlocked| unlocked.keyslot);
    let keyslot = keyslot(&passphrase)
        .map_err(|error| opening::explained(error, opening::key_file_of(&config.key), &passphrase, keyslot))?;
    Ok(Opens::Keyslot(keyslot))
}

/// Fails if the disk has no volume yet. The error's text contains `known`, which says what is known about the secret.
fn refuse_blank(disks: Disks<'_>, known: &str) -> Result<()> {
    match Look::Ends.at(disks.header())? {
        Content::Blank | Content::Unfinished => {
            bail!("there is no volume to open yet: the disk is blank, and `nbdcrypt up` makes the volume ({known})")
        }
        _ => Ok(()),
    }
}

//! Checks that the configured secret can be obtained, without decrypting it.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{Check, State};
use crate::config::{AwsKeyConfig, Config, KeyConfig, KeyFile};
use crate::keys::{self, About, AwsKey, Finding, KmsToken, Outlook, SecretRequest};
use crate::machine::root::Root;
use crate::machine::{process, selection, trust};
use crate::text;
use crate::volume::array;
use crate::volume::data_disks::DataDisks;

pub(super) fn checks(config: &Config) -> Vec<Check> {
    match &config.key {
        KeyConfig::File(KeyFile::Stdin) => vec![Check::warn(
            "key",
            "the secret comes from standard input, so `up` cannot run unattended",
            "for an unattended boot, use source = \"aws\", or a file",
        )],
        KeyConfig::File(KeyFile::Path(path)) => vec![file(path)],
        KeyConfig::Aws(aws) => of_aws(config, aws),
        KeyConfig::Ephemeral => vec![Check::ok("key", "`up` makes a random key, which exists in memory only")],
    }
}

/// Checks that the key file can be opened and is not empty. Reads nothing of it.
fn file(path: &Path) -> Check {
    let at = text::path(path);
    let cure = "make it, for example: (umask 077; head -c 32 /dev/urandom > FILE)";
    if let Err(why) = trust::file_for_root(path) {
        return Check::fail("key", format!("the key file cannot be used: {why}"), cure);
    }
    match File::open(path).and_then(|file| file.metadata()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !process::is_root() => {
            Check::new("key", State::Unknown, format!("only root can read {at}"))
        }
        Err(error) => Check::fail("key", format!("{at} cannot be read: {error}"), cure),
        Ok(metadata) if metadata.is_file() && metadata.len() == 0 => Check::fail("key", format!("{at} is empty"), cure),
        Ok(_) => Check::ok("key", format!("{at} can be read")),
    }
}

fn of_aws(config: &Config, aws: &AwsKeyConfig) -> Vec<Check> {
    let found = match AwsKey::new(aws.clone()).probe(&tokens(config)) {
        Ok(findings) => findings,
        Err(error) => return vec![Check::fail("AWS", error.to_string(), "see docs/aws.md")],
    };
    found.into_iter().map(check).collect()
}

/// Returns the tokens of the volume with their numbers, if the secret is in the header and the volume exists.
fn tokens(config: &Config) -> Vec<(u32, KmsToken)> {
    let found = || {
        let found = config.volume.devices.find(&Root::of_this_machine(), &selection::use_of).ok()?;
        let disks =
            config.volume.header.as_ref().map_or_else(|| DataDisks::new(found), |path| Some(DataDisks::one(path)))?;
        let header = array::open_to_look(&disks).ok()?;
        keys::request_for(&config.key, &*header).ok()
    };
    match found() {
        Some(SecretRequest::Unwrap { tokens, .. }) => tokens,
        Some(SecretRequest::Configured | SecretRequest::New { .. }) | None => Vec::new(),
    }
}

fn check(finding: Finding) -> Check {
    let Finding { about, outlook, found } = finding;
    let (name, cure) = match about {
        About::Credentials => (
            "credentials",
            "give the instance a role (an instance profile). In a container, the metadata service must answer one hop away: \
             aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2 --instance-id ID",
        ),
        About::S3 => (
            "S3",
            "give the role s3:GetObject on the object (`nbdcrypt policy CONFIG` prints the policy), and check `object` and the \
             endpoint under [key]",
        ),
        About::Kms => (
            "KMS",
            "give the role kms:Decrypt with the key, and kms:Encrypt for a secret in the header of a new volume (`nbdcrypt \
             policy CONFIG` prints the policy), and check `kms-key` and `encryption-context` under [key]",
        ),
        About::Clock => (
            "clock of AWS",
            "set the clock, and let the machine set it at every boot: `timedatectl set-ntp true`, or chronyd",
        ),
    };
    match outlook {
        Outlook::Well => Check::ok(name, found),
        Outlook::Less => Check::warn(name, found, cure),
        Outlook::Ill => Check::fail(name, found, cure),
        Outlook::Unknown => Check::new(name, State::Unknown, found),
    }
}

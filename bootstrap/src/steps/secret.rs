//! The volume's secret, from where the configuration says it is.

use anyhow::{Context, Result};

use super::volume::is_volume;
use super::{Boot, Step, Undo};
use crate::keys::{self, SecretRequest};
use crate::new_volume;

pub(super) struct Secret;

impl Step for Secret {
    fn name(&self) -> &'static str {
        "secret"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        format!("get the secret: {}", boot.outside.keys.describe())
    }

    fn is_done(&self, _boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let request = request(boot)?;
        let keys::Secret { passphrase, token } = boot.outside.keys.secret(request)?;
        (boot.passphrase, boot.token) = (Some(passphrase), token);
        Ok(())
    }

    fn undo(&mut self, boot: &mut Boot<'_>, _why: Undo) -> Result<()> {
        (boot.passphrase, boot.token) = (None, None);
        Ok(())
    }
}

/// What is to be asked for: where the secret is in the header, that is read first; a volume that is yet to be made gets a new
/// one.
fn request(boot: &Boot<'_>) -> Result<SecretRequest> {
    if !keys::is_in_header(&boot.config.key) {
        return Ok(SecretRequest::Configured);
    }
    let disks = boot.disks()?;
    if !is_volume(boot, &disks)? {
        return Ok(SecretRequest::New { volume: new_volume::new_uuid()? });
    }
    let name = || boot.header_path().display().to_string();
    keys::request_for(&boot.config.key, disks.header()).with_context(name)
}

//! The step `secret`: gets the volume's secret from the configured source.

use anyhow::{Context, Result};

use super::volume::{self, is_volume};
use super::{Boot, Foreseen, Step, Undo};
use crate::keys::{self, SecretRequest};
use crate::volume::content::Look;
use crate::volume::ephemeral::Lifetime;
use crate::volume::new_volume;

pub(super) struct Secret;

impl Step for Secret {
    fn name(&self) -> &'static str {
        "secret"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let source = boot.outside.keys.describe();
        match volume::foresee(boot) {
            Ok(Foreseen::New(_)) if keys::is_in_header(&boot.config.key) => {
                "make a secret, and have KMS encrypt it for the token in the LUKS2 header".to_owned()
            }
            _ if boot.config.volume.lifetime == Lifetime::OfServer => format!("make {source}"),
            _ => format!("get the secret: {source}"),
        }
    }

    fn is_done(&self, boot: &Boot<'_>) -> Result<Option<bool>> {
        boot.outside.keys.check()?;
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

/// Returns what to ask the source for. If the secret is in the header, this reads the header. A volume that is yet to be
/// made gets a new secret.
fn request(boot: &Boot<'_>) -> Result<SecretRequest> {
    if !keys::is_in_header(&boot.config.key) {
        return Ok(SecretRequest::Configured);
    }
    let disks = boot.disks()?;
    if !is_volume(boot, &disks, Look::All(&[]))? {
        volume::refuse_unless_meant(boot)?;
        return Ok(SecretRequest::New { volume: new_volume::new_uuid(&mut |bytes| boot.outside.keys.random(bytes))? });
    }
    let name = || boot.header_disk().to_string();
    keys::request_for(&boot.config.key, disks.header()).with_context(name)
}

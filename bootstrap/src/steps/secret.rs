//! The volume's secret, from where the configuration says it is.

use anyhow::Result;

use super::{Boot, Step, Undo};

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
        boot.passphrase = Some(boot.outside.keys.passphrase()?);
        Ok(())
    }

    fn undo(&mut self, boot: &mut Boot<'_>, _why: Undo) -> Result<()> {
        boot.passphrase = None;
        Ok(())
    }
}

//! `nbdcrypt ask-aws`, for nbdcrypt itself: the process that talks to AWS for the process that started it.

use anyhow::{Context, Result};

pub(super) fn run() -> Result<()> {
    crate::machine::process::protect_secrets();
    crate::keys::answer_as_aws_helper().context("the process that asks AWS")
}

//! The step `device`: attaches the volume as a block device of the kernel.

use std::sync::Arc;

use anyhow::Result;

use super::{Boot, Step, Undo, need};
use crate::attach::Method;

pub(super) struct Attach;

impl Step for Attach {
    fn name(&self) -> &'static str {
        "device"
    }

    fn describe(&self, boot: &Boot<'_>) -> String {
        let attach = &boot.config.attach;
        let method = match attach.method {
            Method::Auto if boot.outside.devices.has_nbd() => "by nbd",
            Method::Auto => "by nbd if that driver can be loaded, otherwise by FUSE and a loop device",
            Method::Nbd => "by nbd",
            Method::Fuse => "by FUSE and a loop device",
        };
        match attach.nbd_device {
            Some(number) => format!("attach the volume {method}, as /dev/nbd{number} if by nbd"),
            None => format!("attach the volume {method}, as the first free device"),
        }
    }

    fn is_done(&self, _boot: &Boot<'_>) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    fn run(&mut self, boot: &mut Boot<'_>) -> Result<()> {
        let volume = Arc::clone(need(boot.volume.as_ref(), "the open volume")?);
        boot.attached = Some(boot.outside.devices.attach(volume)?);
        Ok(())
    }

    fn undo(&mut self, boot: &mut Boot<'_>, why: Undo) -> Result<()> {
        let Some(attached) = boot.attached.take() else { return Ok(()) };
        match (attached.detach(), why) {
            (Ok(()), _) => Ok(()),
            // Nobody uses the device yet.
            (Err((attached, error)), Undo::Failed) if !boot.mounted => {
                drop(attached);
                tracing::warn!("the device was detached by force: {error:#}");
                Ok(())
            }
            (Err((attached, error)), _) => {
                boot.attached = Some(attached);
                Err(error)
            }
        }
    }
}

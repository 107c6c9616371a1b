//! Waits for the disks of a volume. At a boot, the kernel and udev may need some seconds for them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::config::VolumeConfig;
use crate::machine::root::Root;
use crate::machine::selection::{self, Late, Outlook, Use};

/// How long to wait for what takes only a moment. It is as long as `machine::disk` waits for a process that was killed.
const MOMENT: Duration = Duration::from_secs(3);
/// The pause between two looks.
pub const PAUSE: Duration = Duration::from_millis(100);

/// Looks for the disks of a volume, and for what may still appear. A file appears only if it is made, so nothing is expected of
/// `devices` with `size`.
pub fn look(volume: &VolumeConfig, root: &Root, use_of: &dyn Fn(&Path) -> Use) -> Outlook {
    let mut outlook = volume.devices.look(root, use_of);
    if volume.size.is_some() {
        outlook.late.clear();
    }
    outlook.late.extend(volume.header.as_deref().and_then(|header| selection::late_name(root, header)));
    outlook
}

/// Returns what `up` would wait for at this moment, and how long. Returns `None` if it would not wait for a disk.
pub fn would_wait(volume: &VolumeConfig, outlook: &Outlook) -> Option<String> {
    let what = disks(&outlook.late).filter(|_| !volume.wait_for.is_zero())?;
    Some(format!("wait up to {} s for {what}", volume.wait_for.as_secs()))
}

/// Looks for the disks until nothing is expected any more, or until `wait_for` has passed. `passed` returns the time since the
/// start. `tell` gets a description of each wait. `pause` waits a moment, and fails if the wait is called off.
///
/// # Errors
/// Fails if a disk is missing at the end, or if `pause` fails.
pub fn wait(
    wait_for: Duration,
    passed: &dyn Fn() -> Duration,
    look: &dyn Fn() -> Outlook,
    tell: &dyn Fn(&str),
    pause: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<PathBuf>> {
    let mut told = None;
    loop {
        let passed = passed();
        let Outlook { found, late } = look();
        let Some(waiting) = waiting(&late, passed, wait_for) else {
            match disks(&late) {
                Some(what) if told.is_some() => tracing::warn!("waited {} s in vain for {what}", passed.as_secs()),
                None if told.is_some() => tracing::info!("waited {:.1} s for the disks", passed.as_secs_f64()),
                _ => {}
            }
            return Ok(found?);
        };
        if told.as_ref() != Some(&waiting) {
            tell(&waiting);
            told = Some(waiting);
        }
        pause()?;
    }
}

/// Describes the wait that is still worthwhile after this time. Returns `None` if there is none.
fn waiting(late: &[Late], passed: Duration, wait_for: Duration) -> Option<String> {
    if let Some(what) = disks(late).filter(|_| passed < wait_for) {
        return Some(format!("waiting up to {} s for {what}", wait_for.as_secs()));
    }
    let moments: Vec<&str> = late
        .iter()
        .filter_map(|late| match late {
            Late::Moment(what) => Some(what.as_str()),
            Late::Disk(_) => None,
        })
        .collect();
    let is_worthwhile = !moments.is_empty() && passed < MOMENT;
    is_worthwhile.then(|| format!("waiting up to {} s for {}", MOMENT.as_secs(), moments.join("; ")))
}

/// Describes the disks that may still appear.
fn disks(late: &[Late]) -> Option<String> {
    let disks = late.iter().filter_map(|late| match late {
        Late::Disk(what) => Some(what.as_str()),
        Late::Moment(_) => None,
    });
    let disks: Vec<&str> = disks.collect();
    (!disks.is_empty()).then(|| disks.join(", "))
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use anyhow::bail;

    use super::*;
    use crate::machine::selection::SelectionError;

    /// Waits on a clock that each pause moves on by a second. The disk is there after `appears` seconds.
    fn waited(wait_for: u64, appears: u64, late: &Late, stop: Option<u64>) -> (Result<Vec<PathBuf>>, u64, Vec<String>) {
        let (clock, told) = (Cell::new(0), RefCell::new(Vec::new()));
        let look = || match clock.get() >= appears {
            true => Outlook { found: Ok(vec!["/dev/x".into()]), late: Vec::new() },
            false => Outlook {
                found: Err(SelectionError::NoInstanceStore { sysfs: "/sys".into() }),
                late: vec![late.clone()],
            },
        };
        let mut pause = || {
            clock.set(clock.get() + 1);
            if stop == Some(clock.get()) { bail!("called off") } else { Ok(()) }
        };
        let found = wait(
            Duration::from_secs(wait_for),
            &|| Duration::from_secs(clock.get()),
            &look,
            &|what| told.borrow_mut().push(what.to_owned()),
            &mut pause,
        );
        (found, clock.get(), told.into_inner())
    }

    #[test]
    fn a_late_disk_is_awaited_within_the_bound() {
        let disk = Late::Disk("a disk".to_owned());
        let told = vec!["waiting up to 30 s for a disk".to_owned()];
        let (found, passed, said) = waited(30, 7, &disk, None);
        assert_eq!((found.unwrap(), passed, said), (vec![PathBuf::from("/dev/x")], 7, told.clone()));
        let (found, passed, said) = waited(30, 31, &disk, None);
        assert!(found.is_err() && passed == 30 && said == told, "{passed} {said:?}");
        let (found, passed, said) = waited(0, 1, &disk, None);
        assert!(found.is_err() && passed == 0 && said.is_empty(), "{passed} {said:?}");
        let (found, passed, said) = waited(30, 0, &disk, None);
        assert!(found.is_ok() && passed == 0 && said.is_empty(), "{passed} {said:?}");
    }

    #[test]
    fn a_wait_is_called_off() {
        let (found, passed, _) = waited(30, 9, &Late::Disk("a disk".to_owned()), Some(4));
        assert_eq!((found.unwrap_err().to_string().as_str(), passed), ("called off", 4));
    }

    /// The process of a server that was killed keeps its disk for a moment, whatever `wait-for` is.
    #[test]
    fn a_process_that_ends_is_awaited_for_a_moment() {
        let moment = Late::Moment("/dev/x, which is in use".to_owned());
        let (found, passed, said) = waited(0, 2, &moment, None);
        assert!(found.is_ok() && passed == 2, "{passed}");
        assert_eq!(said, ["waiting up to 3 s for /dev/x, which is in use"]);
        let (found, passed, _) = waited(30, 9, &moment, None);
        assert!(found.is_err() && passed == 3, "{passed}");
    }
}

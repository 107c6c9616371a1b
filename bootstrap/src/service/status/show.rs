//! The status for people, in the form of `cryptsetup status`.

use std::fmt;

use engine::text::bytes;

use super::activity::age;
use super::{Bind, Condition, Status};
use crate::machine::bare_folder::Writers;
use crate::steps::Made;
use crate::text::path;

impl Status {
    /// Returns the first line: the condition, and what to do about it.
    fn headline(&self) -> String {
        let Self { name, pid, config, mountpoint, mountpoint_writers, .. } = self;
        match self.condition {
            Condition::Up => format!("{name} is up."),
            Condition::Attached => {
                let at = path(self.not_mounted_on().unwrap_or_else(|| "its mountpoint".as_ref()));
                // If only a bind mount is missing, the text says which.
                let which = mountpoint.as_ref().map(|_| format!(" on {at}")).unwrap_or_default();
                let consequence = match mountpoint_writers {
                    Some(Writers::Nobody) => format!("nothing can be written to {at} until it is mounted again"),
                    Some(Writers::Root) => {
                        format!("only root can write to {at} now, and such files are not encrypted")
                    }
                    Some(Writers::AsUsual) | None => {
                        format!("files that are written to {at} now are not encrypted")
                    }
                };
                format!(
                    "{name} is attached but not mounted{which}: {consequence}. `nbdcrypt up {}` mounts it again.",
                    path(config)
                )
            }
            Condition::ComingUp => format!("{name} is coming up."),
            Condition::GoingDown => format!("{name} is going down."),
            Condition::Silent => format!("{} does not answer.", self.server()),
            Condition::Dead => format!(
                "{name} is dead: its server (process {pid}) is gone. `nbdcrypt down {name}` cleans up what it left."
            ),
        }
    }

    /// Returns the lines below the first: a label, and its value.
    fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = Vec::new();
        let mut row = |label, value: Option<String>| rows.extend(value.map(|value| (label, value)));
        let volume = self.volume.as_ref();
        row("now:", self.doing.clone());
        self.problems.iter().for_each(|problem| row("problem:", Some(problem.clone())));
        row("type:", volume.map(|volume| volume.kind.to_string()));
        row("cipher:", volume.map(|volume| volume.cipher.clone()));
        row("keysize:", volume.map(|volume| format!("{} bits ({})", volume.key_bits, volume.algorithm)));
        row("keyslot:", volume.and_then(|volume| volume.keyslot).map(|keyslot| keyslot.to_string()));
        let key = self.key.as_ref();
        row(
            "key:",
            key.map(|key| match key.source.as_str() {
                "ephemeral" => format!("in the server's memory only, for {} (ephemeral)", age(key.age)),
                source => format!("in the server's memory for {}, from {source}", age(key.age)),
            }),
        );
        row("cpu path:", volume.and_then(|volume| volume.cpu_path.clone()));
        row("disk:", (!self.disk.as_os_str().is_empty()).then(|| path(&self.disk)));
        row("header:", volume.and_then(|volume| volume.header.as_ref()).map(path));
        row("sector size:", volume.map(|volume| bytes(volume.sector_size)));
        row("offset:", volume.map(|volume| bytes(volume.offset)));
        row("size:", volume.map(|volume| bytes(volume.size)));
        row("mode:", volume.map(|volume| if volume.read_only { "read-only" } else { "read/write" }.to_owned()));
        row("flags:", (!self.flags.is_empty()).then(|| self.flags.join(" ")));
        let method = self.method.as_deref().unwrap_or("?");
        row("device:", self.device.as_ref().map(|device| format!("{} ({method})", path(device))));
        row("mountpoint:", self.mountpoint.as_ref().map(path));
        for Bind { folder, target, mounted } in &self.binds {
            let missing = if *mounted { "" } else { " (not mounted)" };
            row("bind:", Some(format!("{} on {}{missing}", path(folder), path(target))));
        }
        row(
            "new:",
            self.made.map(|made| match made {
                Made::Volume => "this start made the volume".to_owned(),
                Made::Filesystem => "this start made the filesystem, in a blank volume".to_owned(),
            }),
        );
        row("connections:", self.connections.map(|connections| connections.to_string()));
        row("requests:", self.requests.as_ref().map(ToString::to_string));
        row("throughput:", self.throughput.map(|throughput| throughput.to_string()));
        if let Some(requests) = &self.requests {
            requests.latency.iter().for_each(|latency| row("latency:", Some(latency.to_string())));
            requests.errors.iter().for_each(|errors| row("errors:", Some(errors.to_string())));
        }
        row("warning:", self.warning.clone());
        row("config:", (!self.config.as_os_str().is_empty()).then(|| path(&self.config)));
        row("process:", (self.pid != 0).then(|| self.pid.to_string()));
        row("uptime:", self.uptime.map(age));
        rows
    }
}

impl fmt::Display for Status {
    /// Formats the status like `cryptsetup status`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.headline())?;
        self.rows().iter().try_for_each(|(label, value)| writeln!(f, "  {label:<12} {value}"))
    }
}

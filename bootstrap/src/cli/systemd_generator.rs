//! `nbdcrypt systemd-generator`, for nbdcrypt-generator: writes the units that systemd needs for each volume.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::config::Config;
use crate::service::units;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The folder for the units.
    to: PathBuf,
    /// The folder with the volumes' configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/nbdcrypt")]
    configs: PathBuf,
}

/// Writes the units of every volume. If a configuration has an error, the other volumes still get their units.
pub(super) fn run(args: Args) -> Result<()> {
    let configs = std::path::absolute(&args.configs)?;
    let entries = match fs::read_dir(&configs) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| configs.display().to_string())?,
    };
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    let (mut failed, mut written) = (0, HashMap::new());
    for path in &paths {
        if let Err(error) = generate(path, &args.to, &mut written) {
            tracing::error!("systemd gets no units for {}: {error:#}", path.display());
            failed += 1;
        }
    }
    if failed > 0 {
        bail!("{failed} of {} configurations got no units for systemd", paths.len());
    }
    Ok(())
}

/// Writes the units of one volume. `written` maps each unit of the earlier volumes to its configuration.
fn generate(config_path: &Path, to: &Path, written: &mut HashMap<PathBuf, PathBuf>) -> Result<()> {
    let config = Config::load(config_path)?;
    let files = units::of(&config, config_path).context(
        "the file's name cannot be the name of a service: use 1 to 64 characters of A-Z a-z 0-9 . _ - before `.toml`",
    )?;
    // Only a mount unit can belong to two volumes, because its name comes from the mountpoint.
    if let Some((unit, first)) = files.iter().find_map(|file| written.get_key_value(&file.path)) {
        bail!(
            "{} and {} mount something on the same folder, and systemd can have only one {}: change `mountpoint` or `bind` in \
             one of them, or move one of them to another folder",
            first.display(),
            config_path.display(),
            unit.display()
        );
    }
    for file in files {
        let path = to.join(&file.path);
        let folder = path.parent().unwrap_or(to);
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        fs::write(&path, file.text).with_context(|| path.display().to_string())?;
        written.insert(file.path, config_path.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_volumes_with_one_mountpoint_do_not_share_a_unit() {
        let folder = tempfile::tempdir().unwrap();
        let (configs, to) = (folder.path().join("etc"), folder.path().join("run"));
        fs::create_dir(&configs).unwrap();
        for (name, mountpoint) in [("a", "/mnt/x"), ("b", "/mnt//x"), ("c", "/mnt/y")] {
            let text = format!(
                "[volume]\ndevices = [\"/dev/vdb\"]\n[key]\nsource = \"file\"\npath = \"/etc/x.key\"\n[filesystem]\n\
                 mountpoint = \"{mountpoint}\"\n"
            );
            fs::write(configs.join(name).with_extension("toml"), text).unwrap();
        }
        let mut written = HashMap::new();
        generate(&configs.join("a.toml"), &to, &mut written).unwrap();
        let error = generate(&configs.join("b.toml"), &to, &mut written).unwrap_err().to_string();
        for word in ["a.toml", "b.toml", "mnt-x.mount"] {
            assert!(error.contains(word), "{error}");
        }
        generate(&configs.join("c.toml"), &to, &mut written).unwrap();
        let unit = fs::read_to_string(to.join("mnt-x.mount")).unwrap();
        assert!(unit.contains("nbdcrypt@a.service") && !to.join("nbdcrypt@b.service.d").exists(), "{unit}");
        run(Args { to, configs }).unwrap_err();
    }
}

//! Which CPU path encrypts: the widest that the CPU has, unless `NBDCRYPT_CPU` names another.

use anyhow::{Context, Result};
use engine::key::VolumeKey;
use engine::xts::{CpuPath, Xts};

/// The environment variable that names a path: `vaes512`, `vaes256`, `aesni` or `portable`.
pub const VARIABLE: &str = "NBDCRYPT_CPU";

/// The path to take. The environment is read here, once more each time.
///
/// # Errors
/// When the variable names no path, or one that this CPU does not have.
pub fn path() -> Result<CpuPath> {
    let Some(name) = std::env::var_os(VARIABLE) else { return Ok(CpuPath::best()) };
    let name = name.to_string_lossy();
    let path: CpuPath = name.parse().with_context(|| format!("{VARIABLE}={name}"))?;
    if !path.is_available() {
        let available: Vec<&str> = CpuPath::available().map(CpuPath::name).collect();
        anyhow::bail!("{VARIABLE}={name}: this CPU does not have that path; it has {}", available.join(", "));
    }
    Ok(path)
}

/// The cipher of a volume with this key, on the path to take.
///
/// # Errors
/// As [`path`].
pub fn cipher(key: &VolumeKey) -> Result<Xts> {
    Ok(Xts::with_path(key, path()?)?)
}

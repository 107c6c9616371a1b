//! The CPU's name, and the CPU path of the cipher. A CPU path is an implementation of the cipher for certain instructions.
//! The widest path that the CPU supports is used, unless `NBDCRYPT_CPU` names another.

use anyhow::{Context, Result};
use engine::xts::CpuPath;

/// The environment variable that names a CPU path: `vaes512`, `vaes256`, `aesni` or `portable`.
pub const VARIABLE: &str = "NBDCRYPT_CPU";

/// Returns the CPU path to use. Each call reads the environment.
///
/// # Errors
/// If the variable does not name a path, or names one that this CPU lacks.
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

/// Returns the CPU's name with its family and model, as /proc/cpuinfo gives them.
pub fn name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.split_once(':').map(|(_, value)| value.trim().to_owned()))
    };
    match (field("model name"), field("cpu family"), field("model\t")) {
        (Some(name), Some(family), Some(model)) => format!("{name} (family {family}, model {model})"),
        (Some(name), ..) => name,
        _ => "an unknown CPU".to_owned(),
    }
}

//! The ways to compute AES-XTS, and which of them this CPU supports.

use std::fmt;
use std::str::FromStr;

/// A way to compute AES-XTS. All paths give the same bytes. They differ in speed and in the CPU features they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuPath {
    /// VAES on 512-bit registers: Ice Lake, Zen 4 and later.
    Vaes512,
    /// VAES on 256-bit registers, which needs AVX2 but not AVX-512: Zen 3, Alder Lake.
    Vaes256,
    /// AES-NI: every x86-64 server of the last decade.
    AesNi,
    /// The `aes` crate: everything else, and ARMv8's AES instructions.
    Portable,
}

impl CpuPath {
    /// Returns every path, the widest first.
    pub const fn all() -> [Self; 4] {
        [Self::Vaes512, Self::Vaes256, Self::AesNi, Self::Portable]
    }

    /// Returns the paths that this CPU has, the widest first. The portable path is always among them.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::all().into_iter().filter(|path| path.is_available())
    }

    /// Returns the widest path that this CPU has.
    pub fn best() -> Self {
        Self::available().next().unwrap_or(Self::Portable)
    }

    /// Returns whether the CPU has the path and the operating system allows it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if super::x86_64::Cpu::new(self).is_some() {
            return true;
        }
        self == Self::Portable
    }

    /// Computes the AES rounds that AES-256 needs for about `bytes` bytes, but only on registers: no memory, no tweaks. Returns
    /// the exact number of bytes that the rounds would have encrypted. No XTS on this path can be faster than this.
    ///
    /// Returns `None` for a path that this CPU lacks, and for the portable path, because the `aes` crate chooses its own
    /// registers.
    pub fn aes256_rounds(self, bytes: usize) -> Option<usize> {
        #[cfg(target_arch = "x86_64")]
        return Some(super::x86_64::Cpu::new(self)?.aes256_rounds(bytes));
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = bytes;
            None
        }
    }

    /// Returns the name that [`CpuPath::from_str`] parses: `vaes512`, `vaes256`, `aesni` or `portable`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vaes512 => "vaes512",
            Self::Vaes256 => "vaes256",
            Self::AesNi => "aesni",
            Self::Portable => "portable",
        }
    }
}

impl fmt::Display for CpuPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for CpuPath {
    type Err = UnknownCpuPath;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::all().into_iter().find(|path| path.name() == name).ok_or_else(|| UnknownCpuPath(name.to_owned()))
    }
}

/// The error for a name that no path has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a CPU path; the paths are vaes512, vaes256, aesni and portable")]
pub struct UnknownCpuPath(String);

/// The error for a path that this CPU lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this CPU lacks the path {0}; its best path is {best}", best = CpuPath::best())]
pub struct UnavailableCpuPath(pub CpuPath);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_a_name_that_parses() {
        for path in CpuPath::all() {
            assert_eq!(path.name().parse(), Ok(path));
            assert_eq!(path.to_string(), path.name());
        }
        let error = "avx2".parse::<CpuPath>().unwrap_err();
        assert_eq!(error.to_string(), "\"avx2\" is not a CPU path; the paths are vaes512, vaes256, aesni and portable");
    }

    #[test]
    fn the_best_path_is_the_first_available_one() {
        assert_eq!(CpuPath::available().next(), Some(CpuPath::best()));
        assert_eq!(CpuPath::available().last(), Some(CpuPath::Portable));
    }
}

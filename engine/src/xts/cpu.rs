//! The ways to compute AES-XTS, and which of them this CPU has.

use std::fmt;
use std::str::FromStr;

/// A way to compute AES-XTS. All give the same bytes; they differ in speed and in what they need of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuPath {
    /// VAES on 512-bit registers: Ice Lake, Zen 4 and later.
    Vaes512,
    /// VAES on 256-bit registers, with AVX2 alone: Zen 3, Alder Lake.
    Vaes256,
    /// AES-NI: every x86-64 server of the last decade.
    AesNi,
    /// The `aes` crate: everything else, and ARMv8's AES instructions.
    Portable,
}

impl CpuPath {
    /// Every path there is, widest first.
    pub const fn all() -> [Self; 4] {
        [Self::Vaes512, Self::Vaes256, Self::AesNi, Self::Portable]
    }

    /// The paths that this CPU has, widest first; the portable one always.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::all().into_iter().filter(|path| path.is_available())
    }

    /// The widest path that this CPU has.
    pub fn best() -> Self {
        Self::available().next().unwrap_or(Self::Portable)
    }

    /// Whether this CPU, and what the operating system lets it do, has the path.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if super::x86_64::Cpu::new(self).is_some() {
            return true;
        }
        self == Self::Portable
    }

    /// Does on registers alone, with no memory and no tweaks, as many AES rounds as AES-256 takes for about `bytes` bytes
    /// of data, and returns for how many bytes it did. The time this takes bounds what the path can reach: no XTS is
    /// faster. `None` for the portable path, whose registers are the `aes` crate's own affair, and for a path that this
    /// CPU does not have.
    pub fn aes256_rounds(self, bytes: usize) -> Option<usize> {
        #[cfg(target_arch = "x86_64")]
        return Some(super::x86_64::Cpu::new(self)?.aes256_rounds(bytes));
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = bytes;
            None
        }
    }

    /// The name that [`CpuPath::from_str`] takes: `vaes512`, `vaes256`, `aesni` or `portable`.
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

/// A name that no path has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no CPU path; there are vaes512, vaes256, aesni and portable")]
pub struct UnknownCpuPath(String);

/// A path that needs what this CPU does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this CPU has no {0}; its best path is {best}", best = CpuPath::best())]
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
        assert_eq!(error.to_string(), "\"avx2\" is no CPU path; there are vaes512, vaes256, aesni and portable");
    }

    #[test]
    fn the_best_path_is_the_first_of_those_there_are() {
        assert_eq!(CpuPath::available().next(), Some(CpuPath::best()));
        assert_eq!(CpuPath::available().last(), Some(CpuPath::Portable));
    }
}

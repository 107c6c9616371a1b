//! The hashes that LUKS names in its headers.

use std::fmt;

use sha1::digest::Digest;

/// A hash that PBKDF2, the anti-forensic splitter and plain mode can be asked to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HashAlgorithm {
    /// SHA-1, 20 bytes: cryptsetup's choice before version 1.7.
    Sha1,
    /// SHA-256, 32 bytes: cryptsetup's choice since.
    Sha256,
    /// SHA-512, 64 bytes.
    Sha512,
    /// SHA-224, 28 bytes.
    Sha224,
    /// SHA-384, 48 bytes.
    Sha384,
    /// RIPEMD-160, 20 bytes: plain mode's default before cryptsetup 2.7, and in some old LUKS1 volumes.
    Ripemd160,
}

/// Evaluates an expression with a type name standing for the RustCrypto type of a [`HashAlgorithm`].
macro_rules! with_hash {
    ($algorithm:expr, $hash:ident => $body:expr) => {
        match $algorithm {
            $crate::luks::hash::HashAlgorithm::Sha1 => {
                type $hash = sha1::Sha1;
                $body
            }
            $crate::luks::hash::HashAlgorithm::Sha256 => {
                type $hash = sha2::Sha256;
                $body
            }
            $crate::luks::hash::HashAlgorithm::Sha512 => {
                type $hash = sha2::Sha512;
                $body
            }
            $crate::luks::hash::HashAlgorithm::Sha224 => {
                type $hash = sha2::Sha224;
                $body
            }
            $crate::luks::hash::HashAlgorithm::Sha384 => {
                type $hash = sha2::Sha384;
                $body
            }
            $crate::luks::hash::HashAlgorithm::Ripemd160 => {
                type $hash = ripemd::Ripemd160;
                $body
            }
        }
    };
}
pub(in crate::luks) use with_hash;

impl HashAlgorithm {
    /// Every hash there is.
    pub const ALL: [Self; 6] = [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512, Self::Ripemd160];

    /// Every hash, for an error about another one.
    pub(in crate::luks) const SUPPORTED: &str = "it does sha1, sha224, sha256, sha384, sha512 and ripemd160";

    /// The hash of that name, in either case, as cryptsetup reads it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name().eq_ignore_ascii_case(name))
    }

    /// The name as headers have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Sha224 => "sha224",
            Self::Sha384 => "sha384",
            Self::Ripemd160 => "ripemd160",
        }
    }

    /// Bytes of one digest.
    pub fn output_len(self) -> usize {
        with_hash!(self, H => <H as Digest>::output_size())
    }

    /// Fills `out` with the start of the digest of `parts`, one after the other. `out` is at most one digest long.
    pub(in crate::luks) fn digest_into(self, parts: &[&[u8]], out: &mut [u8]) {
        use zeroize::Zeroize;
        with_hash!(self, H => {
            let mut hasher = H::new();
            parts.iter().for_each(|part| hasher.update(part));
            let mut digest = hasher.finalize();
            out.copy_from_slice(&digest[..out.len()]);
            digest.as_mut_slice().zeroize();
        });
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_either_case() {
        assert_eq!(HashAlgorithm::from_name("SHA256"), Some(HashAlgorithm::Sha256));
        assert_eq!(HashAlgorithm::from_name("md5"), None);
    }

    #[test]
    fn digests_are_those_of_fips_180() {
        let mut digest = [0; 20];
        HashAlgorithm::Sha1.digest_into(&[b"a", b"bc"], &mut digest);
        assert_eq!(digest[..4], [0xa9, 0x99, 0x3e, 0x36]);
        let mut digest = [0; 4];
        HashAlgorithm::Sha512.digest_into(&[b"abc"], &mut digest);
        assert_eq!(digest, [0xdd, 0xaf, 0x35, 0xa1]);
        // The authors' own test vector.
        HashAlgorithm::Ripemd160.digest_into(&[b"abc"], &mut digest);
        assert_eq!(digest, [0x8e, 0xb2, 0x08, 0xf7]);
    }
}

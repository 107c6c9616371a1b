//! A header, printed as `cryptsetup luksDump` prints it.

use std::fmt;

use super::Header;
use crate::luks::hex::Hex;
use crate::luks::keyslot;

impl Header {
    /// The text that `cryptsetup luksDump` prints, and after the key's length one line more: what encryption that is. (A
    /// key of 256 bits is AES-128-XTS, whatever people believe.)
    pub fn display(&self, disk: &str) -> impl fmt::Display {
        Display { header: self.clone(), disk: disk.to_owned() }
    }

    /// What the encryption is called, where nbdcrypt does it.
    pub fn encryption(&self) -> Option<&'static str> {
        keyslot::encryption(&self.cipher(), self.key_bytes)
    }
}

struct Display {
    header: Header,
    disk: String,
}

impl fmt::Display for Display {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { header, disk } = self;
        writeln!(f, "LUKS header information for {disk}\n")?;
        writeln!(f, "Version:       \t1")?;
        writeln!(f, "Cipher name:   \t{}", header.cipher_name)?;
        writeln!(f, "Cipher mode:   \t{}", header.cipher_mode)?;
        writeln!(f, "Hash spec:     \t{}", header.hash_spec)?;
        writeln!(f, "Payload offset:\t{}", header.payload_offset)?;
        writeln!(f, "MK bits:       \t{}", u64::from(header.key_bytes) * 8)?;
        if let Some(encryption) = header.encryption() {
            writeln!(f, "Encryption:    \t{encryption}")?;
        }
        writeln!(f, "MK digest:     \t{}", Hex(&header.digest))?;
        let (first, second) = header.digest_salt.split_at(header.digest_salt.len() / 2);
        writeln!(f, "MK salt:       \t{}\n               \t{}", Hex(first), Hex(second))?;
        writeln!(f, "MK iterations: \t{}", header.digest_iterations)?;
        writeln!(f, "UUID:          \t{}\n", header.uuid.hyphenated())?;
        for (index, slot) in header.keyslots.iter().enumerate() {
            if !slot.enabled {
                writeln!(f, "Key Slot {index}: DISABLED")?;
                continue;
            }
            let (first, second) = slot.salt.split_at(slot.salt.len() / 2);
            writeln!(f, "Key Slot {index}: ENABLED")?;
            writeln!(f, "\tIterations:         \t{}", slot.iterations)?;
            writeln!(f, "\tSalt:               \t{}\n\t                      \t{}", Hex(first), Hex(second))?;
            writeln!(f, "\tKey material offset:\t{}", slot.material_offset)?;
            writeln!(f, "\tAF stripes:            \t{}", slot.stripes)?;
        }
        Ok(())
    }
}

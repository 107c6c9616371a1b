//! Prints a header as `cryptsetup luksDump` does.

use std::fmt;

use super::{Header, KeyslotState};
use crate::luks::hex::Hex;
use crate::luks::keyslot;

impl Header {
    /// Returns the text that `cryptsetup luksDump` prints. An additional line after the key's length names the
    /// encryption, because many people do not expect that a key of 256 bits means AES-128-XTS.
    pub fn display(&self, disk: &str) -> impl fmt::Display {
        Display { header: self.clone(), disk: disk.to_owned() }
    }

    /// Returns the name of the encryption, or `None` if nbdcrypt does not support it.
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
        writeln!(f, "UUID:          \t{}\n", header.uuid)?;
        for (index, slot) in header.keyslots.iter().enumerate() {
            match slot.state {
                KeyslotState::Enabled => {}
                KeyslotState::Disabled => {
                    writeln!(f, "Key Slot {index}: DISABLED")?;
                    continue;
                }
                KeyslotState::Undecided(word) => {
                    writeln!(f, "Key Slot {index}: DISABLED (damaged: its state is {word:#010x})")?;
                    continue;
                }
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

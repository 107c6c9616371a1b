//! Prints a header as `cryptsetup luksDump` does.

use std::fmt;

use super::{Area, Digest, Header, Kdf, Keyslot, Pbkdf2Digest};
use crate::luks::hex::Hex;
use crate::luks::{keyslot, printable};

impl Header {
    /// Returns the text that `cryptsetup luksDump` prints. An additional line after each segment's cipher names the
    /// encryption, because many people do not expect that a key of 256 bits means AES-128-XTS.
    pub fn display(&self) -> impl fmt::Display {
        self
    }

    /// Returns the name of the encryption, or `None` if nbdcrypt does not support it.
    pub fn encryption(&self) -> Option<&'static str> {
        self.metadata.segments.keys().find_map(|segment| self.encryption_of(*segment))
    }

    fn encryption_of(&self, segment: u32) -> Option<&'static str> {
        let (_, digest) = self.metadata.digest_of_segment(segment)?;
        let keyslot = digest.keyslots.iter().find_map(|id| self.metadata.keyslots.get(id))?;
        keyslot::encryption(&self.metadata.segments.get(&segment)?.encryption, keyslot.key_size)
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { binary, metadata } = self;
        let or = |text: String, other: &str| if text.is_empty() { other.to_owned() } else { text };
        writeln!(f, "LUKS header information")?;
        writeln!(f, "Version:       \t2")?;
        writeln!(f, "Epoch:         \t{}", binary.sequence_id)?;
        writeln!(f, "Metadata area: \t{} [bytes]", binary.header_size)?;
        writeln!(f, "Keyslots area: \t{} [bytes]", metadata.config.keyslots_size)?;
        writeln!(f, "UUID:          \t{}", binary.uuid)?;
        writeln!(f, "Label:         \t{}", or(binary.label.to_string(), "(no label)"))?;
        writeln!(f, "Subsystem:     \t{}", or(binary.subsystem.to_string(), "(no subsystem)"))?;
        let words = |words: &[String]| words.iter().map(|word| format!("{} ", printable(word))).collect::<String>();
        writeln!(f, "Flags:       \t{}", or(words(&metadata.config.flags), "(no flags)"))?;
        if !metadata.config.requirements.is_empty() {
            writeln!(f, "Requirements:\t{}", words(&metadata.config.requirements))?;
        }
        writeln!(f, "\nData segments:")?;
        for (id, segment) in &metadata.segments {
            writeln!(f, "  {id}: {}", printable(&segment.kind))?;
            writeln!(f, "\toffset: {} [bytes]", segment.offset)?;
            match segment.size {
                Some(size) => writeln!(f, "\tlength: {size} [bytes]")?,
                None => writeln!(f, "\tlength: (whole device)")?,
            }
            if segment.kind == "crypt" {
                writeln!(f, "\tcipher: {}", printable(&segment.encryption))?;
                if let Some(encryption) = self.encryption_of(*id) {
                    writeln!(f, "\tencryption: {encryption}")?;
                }
                writeln!(f, "\tsector: {} [bytes]", segment.sector_size)?;
            }
            if let Some(integrity) = &segment.integrity {
                writeln!(f, "\tintegrity: {}", printable(integrity))?;
            }
            if !segment.flags.is_empty() {
                writeln!(f, "\tflags : {}", printable(&segment.flags.join(", ")))?;
            }
            writeln!(f)?;
        }
        writeln!(f, "Keyslots:")?;
        for (id, slot) in &metadata.keyslots {
            self.write_keyslot(f, *id, slot)?;
        }
        writeln!(f, "Tokens:")?;
        for (id, token) in &metadata.tokens {
            writeln!(f, "  {id}: {}", printable(&token.kind))?;
            if token.kind == "luks2-keyring" {
                let description = &metadata.json["tokens"][id.to_string()]["key_description"];
                writeln!(f, "\tKey description: {}", printable(description.as_str().unwrap_or_default()))?;
            }
            for keyslot in &token.keyslots {
                writeln!(f, "\tKeyslot:    {keyslot}")?;
            }
        }
        writeln!(f, "Digests:")?;
        metadata.digests.iter().try_for_each(|(id, digest)| write_digest(f, *id, digest))
    }
}

impl Header {
    fn write_keyslot(&self, f: &mut fmt::Formatter<'_>, id: u32, slot: &Keyslot) -> fmt::Result {
        let Area { offset, size, encryption, key_size, .. } = &slot.area;
        let digest = self.metadata.digests.iter().find(|(_, digest)| digest.keyslots.contains(&id));
        writeln!(f, "  {id}: {}{}", printable(&slot.kind), if self.metadata.is_bound(id) { "" } else { " (unbound)" })?;
        writeln!(f, "\tKey:        {} bits", u64::from(slot.key_size) * 8)?;
        writeln!(f, "\tPriority:   {}", slot.priority)?;
        if let Some((kdf, af)) = &slot.opening {
            writeln!(f, "\tCipher:     {}", printable(encryption))?;
            writeln!(f, "\tCipher key: {} bits", u64::from(*key_size) * 8)?;
            writeln!(f, "\tPBKDF:      {}", printable(kdf.name()))?;
            match kdf {
                Kdf::Pbkdf2 { hash, iterations, salt } => {
                    writeln!(f, "\tHash:       {}\n\tIterations: {iterations}", printable(hash))?;
                    write_bytes(f, "Salt:   ", salt)?;
                }
                Kdf::Argon2 { time, memory, cpus, salt, .. } => {
                    writeln!(f, "\tTime cost:  {time}\n\tMemory:     {memory}\n\tThreads:    {cpus}")?;
                    write_bytes(f, "Salt:   ", salt)?;
                }
                Kdf::Other(_) => {}
            }
            writeln!(f, "\tAF stripes: {}\n\tAF hash:    {}", af.stripes, printable(&af.hash))?;
        }
        if let Some(fault) = &slot.fault {
            writeln!(f, "\tdamaged:    {} is {}", printable(&fault.field), printable(&fault.found))?;
        }
        writeln!(f, "\tArea offset:{offset} [bytes]\n\tArea length:{size} [bytes]")?;
        match digest {
            Some((digest, _)) => writeln!(f, "\tDigest ID:  {digest}"),
            None => Ok(()),
        }
    }
}

fn write_digest(f: &mut fmt::Formatter<'_>, id: u32, digest: &Digest) -> fmt::Result {
    writeln!(f, "  {id}: {}", printable(&digest.kind))?;
    match &digest.pbkdf2 {
        None => Ok(()),
        Some(Err(fault)) => writeln!(f, "\tdamaged:    {} is {}", printable(&fault.field), printable(&fault.found)),
        Some(Ok(Pbkdf2Digest { hash, iterations, salt, digest })) => {
            let hash = printable(hash);
            writeln!(f, "\tHash:       {hash}\n\tIterations: {iterations}")?;
            write_bytes(f, "Salt:   ", salt)?;
            write_bytes(f, "Digest: ", digest)
        }
    }
}

/// Writes 16 bytes per line and indents all lines but the first.
fn write_bytes(f: &mut fmt::Formatter<'_>, name: &str, bytes: &[u8]) -> fmt::Result {
    for (index, line) in bytes.chunks(16).enumerate() {
        writeln!(f, "\t{}    {}", if index == 0 { name } else { "        " }, Hex(line))?;
    }
    Ok(())
}

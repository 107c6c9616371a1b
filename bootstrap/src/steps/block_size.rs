//! Filesystems whose blocks are smaller than the volume's sectors. The kernel does not mount them, and says only "wrong fs
//! type" or "Invalid argument".

use std::io;

use engine::store::ReadAt;

/// Returns why the filesystem in the volume cannot be mounted, and what to do, if its blocks are smaller than the volume's
/// sectors. Reads the plaintext itself and not the attached device, which this process may be serving.
pub(super) fn why_not_mountable(plaintext: &dyn ReadAt, sector_size: u64) -> Option<String> {
    let (kind, block) = smallest_block(plaintext).ok().flatten()?;
    (block < sector_size).then(|| {
        format!(
            "the {kind} filesystem in the volume has blocks of {block} bytes, but the kernel cannot read less than \
             the volume's sectors of {sector_size} bytes: copy its files into a volume that is made with `sector-size \
             = 512` under [volume] (or `nbdcrypt format --sector-size 512`)"
        )
    })
}

/// Returns what to do if mkfs refused blocks that are smaller than the volume's sectors.
pub(super) fn why_not_makeable(said: &str, sector_size: u64) -> Option<String> {
    let said = said.to_ascii_lowercase();
    let is_about_size = ["sector size", "sectorsize", "block size", "blocksize", "logical sector"];
    (sector_size > 512 && is_about_size.iter().any(|words| said.contains(words))).then(|| {
        format!(
            "the volume's sectors have {sector_size} bytes, and a filesystem on it cannot have smaller blocks: leave \
             the block size out of `mkfs-options`, or write `sector-size = 512` under [volume] for a new volume"
        )
    })
}

/// Returns the filesystem's type and the smallest unit that it reads, in bytes. Knows only the filesystems in which this
/// unit may be less than 4096 bytes.
fn smallest_block(plaintext: &dyn ReadAt) -> io::Result<Option<(&'static str, u64)>> {
    const LEN: usize = 2048;
    if plaintext.size() < LEN as u64 {
        return Ok(None);
    }
    let mut head = [0; LEN];
    plaintext.read_exactly(&mut head, 0)?;
    let le16 = |at: usize| u64::from(u16::from_le_bytes([head[at], head[at + 1]]));
    let found = if head.starts_with(b"XFSB") {
        // xfs_dsb, sb_sectsize.
        Some(("xfs", u64::from(u16::from_be_bytes([head[102], head[103]]))))
    } else if le16(1024 + 56) == 0xef53 {
        // ext4_super_block, s_log_block_size.
        1024u64.checked_shl(u32::from(head[1024 + 24])).map(|block| ("ext4", block))
    } else if &head[3..11] == b"EXFAT   " {
        1u64.checked_shl(u32::from(head[108])).map(|sector| ("exfat", sector))
    } else if head[510..512] == [0x55, 0xaa] && (&head[54..57] == b"FAT" || &head[82..87] == b"FAT32") {
        Some(("vfat", le16(11)))
    } else {
        None
    };
    Ok(found.filter(|(_, block)| (512..=65536).contains(block)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);

    impl ReadAt for Bytes {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_exactly(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
            let from = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.0[from..from + data.len()]);
            Ok(())
        }
    }

    fn with(marks: &[(usize, &[u8])]) -> Bytes {
        let mut bytes = vec![0; 4096];
        for (at, mark) in marks {
            bytes[*at..at + mark.len()].copy_from_slice(mark);
        }
        Bytes(bytes)
    }

    #[test]
    fn filesystems_with_blocks_smaller_than_the_sectors_are_told_apart() {
        for (marks, kind) in [
            (&[(0, &b"XFSB"[..]), (102, &[2, 0])][..], "xfs filesystem in the volume has blocks of 512"),
            (&[(1080, &[0x53, 0xef]), (1048, &[0])], "ext4 filesystem in the volume has blocks of 1024"),
            (&[(510, &[0x55, 0xaa]), (82, b"FAT32"), (11, &[0, 2])], "vfat filesystem in the volume has blocks of 512"),
            (&[(3, b"EXFAT   "), (108, &[9])], "exfat filesystem in the volume has blocks of 512"),
        ] {
            let why = why_not_mountable(&with(marks), 4096).unwrap_or_default();
            assert!(why.contains(kind) && why.contains("sector-size = 512"), "{why}");
            assert_eq!(why_not_mountable(&with(marks), 512), None);
        }
        for marks in [&[(0, &b"XFSB"[..]), (102, &[16, 0])][..], &[(1080, &[0x53, 0xef]), (1048, &[2])], &[]] {
            assert_eq!(why_not_mountable(&with(marks), 4096), None);
        }
    }

    #[test]
    fn mkfs_that_refuses_small_blocks_is_explained() {
        let xfs = "illegal sector size 512; hw sector is 4096";
        assert!(why_not_makeable(xfs, 4096).unwrap().contains("sector-size = 512"));
        let ext4 = "mkfs.ext4: Invalid argument while setting blocksize; too small for device";
        assert!(why_not_makeable(ext4, 4096).is_some());
        assert_eq!(why_not_makeable(xfs, 512), None);
        assert_eq!(why_not_makeable("no space left", 4096), None);
    }
}

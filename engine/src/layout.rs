//! Where a volume's bytes lie on its disks.

/// A stretch of one disk: the whole volume in one piece, `offset` bytes from the disk's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Bytes from the start of the disk to the volume's first byte.
    pub offset: u64,
    /// The volume's length in bytes.
    pub len: u64,
}

impl Linear {
    /// Where the `len` bytes at `offset` of the volume lie on the disk, or `None` when any of them is past the volume's
    /// end.
    pub fn locate(&self, offset: u64, len: u64) -> Option<u64> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| self.offset + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_past_the_end_has_a_place() {
        let layout = Linear { offset: 4096, len: 1024 };
        assert_eq!(layout.locate(0, 1024), Some(4096));
        assert_eq!(layout.locate(1024, 0), Some(5120));
        assert_eq!(layout.locate(1023, 2), None);
        assert_eq!(layout.locate(u64::MAX, 1), None);
    }
}

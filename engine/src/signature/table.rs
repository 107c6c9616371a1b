//! Signatures that are plain bytes at a fixed offset.

use std::io;

use super::view::View;
use super::{Kind, Signature};
use Kind::{DiskImage, Encryption, Filesystem, PartitionTable, Raid, Swap, VolumeManager};

/// Where the bytes of a signature lie. A signature may have several possible offsets.
enum At {
    /// Offsets in bytes from the start.
    Start(&'static [u64]),
    /// Distances in bytes from the end.
    End(&'static [u64]),
}
use At::{End, Start};

struct Magic(&'static str, Kind, At, &'static [u8]);

/// The last ten bytes of the first page, for each possible page size.
const SWAP: At = Start(&[0xff6, 0x1ff6, 0x3ff6, 0x7ff6, 0xfff6]);
/// The bytes at the start of a LUKS1 header and of the first LUKS2 header.
pub const LUKS_MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// The name of a secondary LUKS2 header.
pub(super) const LUKS2_SECOND: &str = "LUKS2 (secondary header)";

/// Offsets of the secondary LUKS2 header, one for each size of the metadata (LUKS2 specification, section 2.1).
const LUKS2_SECONDARY: At =
    Start(&[0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000]);

const TABLE: &[Magic] = &[
    // Encryption.
    Magic("LUKS1", Encryption, Start(&[0]), b"LUKS\xba\xbe\x00\x01"),
    Magic("LUKS2", Encryption, Start(&[0]), b"LUKS\xba\xbe\x00\x02"),
    Magic(LUKS2_SECOND, Encryption, LUKS2_SECONDARY, b"SKUL\xba\xbe"),
    Magic("BitLocker", Encryption, Start(&[3]), b"-FVE-FS-"),
    Magic("dm-integrity", Encryption, Start(&[0]), b"integrt\0"),
    Magic("dm-verity", Encryption, Start(&[0]), b"verity\0\0"),
    // Volume managers, caches, object stores.
    Magic("LVM1 physical volume", VolumeManager, Start(&[0]), b"HM\x01\0"),
    Magic("LVM1 physical volume", VolumeManager, Start(&[0]), b"HM\x02\0"),
    Magic("LVM2 physical volume", VolumeManager, Start(&[24, 536, 1048, 1560]), b"LVM2 001"),
    Magic("LVM snapshot", VolumeManager, Start(&[0]), b"SnAp"),
    Magic("bcache device", VolumeManager, Start(&[4120]), BCACHE),
    Magic("dm-thin pool metadata", VolumeManager, Start(&[32]), &27_022_010u64.to_le_bytes()),
    Magic("dm-cache metadata", VolumeManager, Start(&[32]), &6_142_003u64.to_le_bytes()),
    Magic("VDO volume", VolumeManager, Start(&[0]), b"dmvdo001"),
    Magic("Stratis pool member", VolumeManager, Start(&[516, 4612]), b"!Stra0tis\x86\xff\x02^\x41rh"),
    Magic("Ceph BlueStore device", VolumeManager, Start(&[0]), b"bluestore block device"),
    Magic("Oracle ASM disk", VolumeManager, Start(&[32]), b"ORCLDISK"),
    Magic("VMFS volume member", VolumeManager, Start(&[0x10_0000]), &0xc001_d00d_u32.to_le_bytes()),
    Magic("DRBD device", Raid, End(&[4096 - 60]), &0x8374_026b_u32.to_be_bytes()),
    Magic("DRBD device", Raid, End(&[4096 - 60]), &0x8374_026c_u32.to_be_bytes()),
    Magic("DRBD device", Raid, End(&[4096 - 60]), &0x8374_026d_u32.to_be_bytes()),
    Magic("DRBD control volume", Raid, Start(&[0]), b"$DRBDmgr=q"),
    Magic("DRBD proxy log", Raid, Start(&[0]), b"DRBDdlh*"),
    // Firmware RAID.
    Magic("Adaptec RAID", Raid, End(&[512]), &0x37fc_4d1e_u32.to_be_bytes()),
    Magic("HighPoint RAID", Raid, Start(&[4640]), b"\xf0\x16\x78\x5a"),
    Magic("HighPoint RAID", Raid, Start(&[4640]), b"\xfd\x16\x78\x5a"),
    Magic("DDF RAID", Raid, End(&[512, 257 * 512]), &0xde11_de11_u32.to_be_bytes()),
    Magic("Intel Matrix RAID", Raid, End(&[1024]), b"Intel Raid ISM Cfg Sig. "),
    Magic("NVIDIA RAID", Raid, End(&[1024]), b"NVIDIA  "),
    Magic("LSI MegaRAID", Raid, End(&[512]), b"$XIDE$"),
    Magic("Promise FastTrack RAID", Raid, PROMISE, b"Promise Technology, Inc."),
    // Filesystems.
    Magic("xfs", Filesystem, Start(&[0]), b"XFSB"),
    Magic("btrfs", Filesystem, Start(&[0x1_0040]), b"_BHRfS_M"),
    Magic("f2fs", Filesystem, Start(&[1024]), &0xf2f5_2010_u32.to_le_bytes()),
    Magic("bcachefs", Filesystem, Start(&[4120, 0x20_0018]), BCACHEFS),
    Magic("exfat", Filesystem, Start(&[3]), b"EXFAT   "),
    Magic("ntfs", Filesystem, Start(&[3]), b"NTFS    "),
    Magic("refs", Filesystem, Start(&[0]), b"\0\0\0ReFS\0"),
    Magic("iso9660", Filesystem, Start(&[0x8001]), b"CD001"),
    Magic("iso9660", Filesystem, Start(&[0x8009]), b"CDROM"),
    Magic("squashfs", Filesystem, Start(&[0]), b"hsqs"),
    Magic("squashfs", Filesystem, Start(&[0]), b"sqsh"),
    Magic("squashfs", Filesystem, Start(&[0]), b"shsq"),
    Magic("squashfs", Filesystem, Start(&[0]), b"qshs"),
    Magic("erofs", Filesystem, Start(&[1024]), &0xe0f5_e1e2_u32.to_le_bytes()),
    Magic("cramfs", Filesystem, Start(&[0]), &0x28cd_3d45_u32.to_le_bytes()),
    Magic("cramfs", Filesystem, Start(&[0]), &0x28cd_3d45_u32.to_be_bytes()),
    Magic("romfs", Filesystem, Start(&[0]), b"-rom1fs-"),
    Magic("reiserfs", Filesystem, Start(&[8192 + 52, 8192 + 20]), b"ReIsErFs"),
    Magic("reiserfs", Filesystem, Start(&[0x1_0034]), b"ReIsErFs"),
    Magic("reiserfs", Filesystem, Start(&[0x1_0034]), b"ReIsEr2Fs"),
    Magic("reiserfs", Filesystem, Start(&[0x1_0034]), b"ReIsEr3Fs"),
    Magic("reiser4", Filesystem, Start(&[0x1_0000]), b"ReIsEr4"),
    Magic("jfs", Filesystem, Start(&[0x8000]), b"JFS1"),
    Magic("ocfs2", Filesystem, Start(&[1024, 2048, 4096, 8192]), b"OCFSV2"),
    Magic("gfs2", Filesystem, Start(&[0x1_0000]), b"\x01\x16\x19\x70"),
    Magic("hpfs", Filesystem, Start(&[8192]), &0xf995_e849_u32.to_le_bytes()),
    Magic("apfs", Filesystem, Start(&[32]), b"NXSB"),
    Magic("vxfs", Filesystem, Start(&[1024]), &0xa501_fcf5_u32.to_le_bytes()),
    Magic("vxfs", Filesystem, Start(&[8192]), &0xa501_fcf5_u32.to_be_bytes()),
    Magic("ocfs", Filesystem, Start(&[8192]), b"OracleCFS"),
    Magic("scoutfs", Filesystem, Start(&[0x1_0004]), b"\x8b\x42\x3c\x10"),
    Magic("exfs", Filesystem, Start(&[0]), b"EXFS"),
    Magic("nss", Filesystem, Start(&[4096]), b"SPB5"),
    Magic("xfs external log", Filesystem, Start(&[0]), &0xfeed_babe_u32.to_be_bytes()),
    Magic("bfs", Filesystem, Start(&[0]), &0x1bad_face_u32.to_le_bytes()),
    Magic("befs", Filesystem, Start(&[32, 544]), b"BFS1"),
    Magic("befs", Filesystem, Start(&[32, 544]), b"1SFB"),
    Magic("ufs", Filesystem, UFS, &0x0001_1954_u32.to_le_bytes()),
    Magic("ufs", Filesystem, UFS, &0x0001_1954_u32.to_be_bytes()),
    Magic("ufs", Filesystem, UFS, &0x1954_0119_u32.to_le_bytes()),
    Magic("ufs", Filesystem, UFS, &0x1954_0119_u32.to_be_bytes()),
    Magic("ubifs", Filesystem, Start(&[0]), &0x0610_1831_u32.to_le_bytes()),
    Magic("zonefs", Filesystem, Start(&[0]), b"SFOZ"),
    Magic("vmfs", Filesystem, Start(&[0x20_0000]), &0x2fab_f15e_u32.to_le_bytes()),
    Magic("UBI", VolumeManager, Start(&[0]), b"UBI#"),
    // Swap.
    Magic("swap", Swap, SWAP, b"SWAPSPACE2"),
    Magic("swap", Swap, SWAP, b"SWAP-SPACE"),
    Magic("swap (hibernated)", Swap, Start(&[0]), b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"),
    Magic("swap (hibernated)", Swap, SWAP, b"S1SUSPEND"),
    Magic("swap (hibernated)", Swap, SWAP, b"S2SUSPEND"),
    Magic("swap (hibernated)", Swap, SWAP, b"ULSUSPEND"),
    Magic("swap (hibernated)", Swap, SWAP, b"LINHIB0001"),
    // Partition tables. The DOS partition table needs more checks; see `boot_sector`.
    Magic("GPT partition table", PartitionTable, Start(&[512, 1024, 2048, 4096]), b"EFI PART"),
    Magic("GPT partition table (backup)", PartitionTable, End(&[512, 1024, 2048, 4096]), b"EFI PART"),
    Magic("Apple partition map", PartitionTable, Start(&[512, 2048]), b"PM\0\0"),
    Magic("BSD disklabel", PartitionTable, Start(&[64, 128, 512]), &0x8256_4557_u32.to_le_bytes()),
    Magic("SGI disk label", PartitionTable, Start(&[0]), &0x0be5_a941_u32.to_be_bytes()),
    Magic("AIX disk label", PartitionTable, Start(&[0]), b"\xc9\xc2\xd4\xc1"),
    Magic("Amiga partition table", PartitionTable, AMIGA, b"RDSK"),
    // Disk images, in case the disk is a file.
    Magic("qcow2", DiskImage, Start(&[0]), b"QFI\xfb"),
    Magic("VMDK", DiskImage, Start(&[0]), b"KDMV"),
    Magic("VDI", DiskImage, Start(&[64]), &0xbeda_107f_u32.to_le_bytes()),
    Magic("VHDX", DiskImage, Start(&[0]), b"vhdxfile"),
    Magic("VHD", DiskImage, Start(&[0]), b"conectix"),
    Magic("VHD", DiskImage, End(&[512]), b"conectix"),
];

const BCACHE: &[u8] = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";
const BCACHEFS: &[u8] = b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef";
/// The magic number at each possible offset of a superblock.
const UFS: At = Start(&[8192 + 1372, 0x1_0000 + 1372, 0x4_0000 + 1372]);
const PROMISE: At = End(&[
    63 * 512,
    255 * 512,
    256 * 512,
    16 * 512,
    399 * 512,
    591 * 512,
    675 * 512,
    735 * 512,
    911 * 512,
    951 * 512,
    974 * 512,
    991 * 512,
    3087 * 512,
]);
const AMIGA: At = Start(&[0, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 4608, 5120, 5632, 6144, 6656, 7168, 7680]);

pub(super) fn probe(view: &View<'_>) -> io::Result<Vec<Signature>> {
    let mut found = Vec::new();
    for Magic(name, kind, place, magic) in TABLE {
        let (offsets, from_end) = match place {
            Start(offsets) => (offsets, false),
            End(offsets) => (offsets, true),
        };
        for offset in offsets.iter() {
            let offset = if from_end { view.len().checked_sub(*offset) } else { Some(*offset) };
            let Some(offset) = offset else { continue };
            if view.has(magic, offset)? {
                found.push(Signature { name, kind: *kind, offset });
            }
        }
    }
    Ok(found)
}

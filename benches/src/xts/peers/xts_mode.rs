//! The crates `aes` and `xts-mode`.

use aes::Aes256;
use cipher::KeyInit;
use engine::sector::{Lba512, SectorSize};
use xts_mode::Xts128;

use super::sectors;
use crate::xts::{Contestant, Op, key_bytes};

pub(super) struct XtsMode(Xts128<Aes256>);

impl XtsMode {
    pub(super) fn new() -> Self {
        let key = key_bytes();
        let (data, tweak) = key.split_at(32);
        #[expect(clippy::unwrap_used, reason = "both halves have 32 bytes")]
        Self(Xts128::new(Aes256::new_from_slice(data).unwrap(), Aes256::new_from_slice(tweak).unwrap()))
    }
}

impl Contestant for XtsMode {
    fn name(&self) -> String {
        "aes + xts-mode".to_owned()
    }

    fn run(&mut self, op: Op, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        for (tweak, sector) in sectors(sector_size, first, data) {
            match op {
                Op::Encrypt => self.0.encrypt_sector(sector, tweak.into()),
                Op::Decrypt => self.0.decrypt_sector(sector, tweak.into()),
            }
        }
    }
}

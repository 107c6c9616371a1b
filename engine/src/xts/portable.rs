//! The path that runs everywhere.

use aes::{Aes128, Aes256, Block};
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

use crate::key::VolumeKey;
use crate::sector::{Lba512, SectorSize};

pub(super) enum Xts {
    Aes256(Box<(Aes256, Aes256)>),
    Aes128(Box<(Aes128, Aes128)>),
}

impl Xts {
    pub(super) fn new(key: &VolumeKey) -> Self {
        let (data, tweak) = key.expose().split_at(key.expose().len() / 2);
        fn cipher<C: KeyInit>(key: &[u8]) -> C {
            C::new_from_slice(key).unwrap_or_else(|_| unreachable!("a VolumeKey has two halves of an AES key's length"))
        }
        if data.len() == 32 {
            Self::Aes256(Box::new((cipher(data), cipher(tweak))))
        } else {
            Self::Aes128(Box::new((cipher(data), cipher(tweak))))
        }
    }

    pub(super) fn encrypt(&self, size: SectorSize, first: Lba512, data: &mut [u8]) {
        match self {
            Self::Aes256(c) => run(&c.1, size, first, data, |block| c.0.encrypt_block(block)),
            Self::Aes128(c) => run(&c.1, size, first, data, |block| c.0.encrypt_block(block)),
        }
    }

    pub(super) fn decrypt(&self, size: SectorSize, first: Lba512, data: &mut [u8]) {
        match self {
            Self::Aes256(c) => run(&c.1, size, first, data, |block| c.0.decrypt_block(block)),
            Self::Aes128(c) => run(&c.1, size, first, data, |block| c.0.decrypt_block(block)),
        }
    }
}

fn run(
    tweak_cipher: &impl BlockCipherEncrypt<BlockSize = cipher::consts::U16>,
    size: SectorSize,
    first: Lba512,
    data: &mut [u8],
    crypt: impl Fn(&mut Block),
) {
    let mut lba = first;
    for sector in data.chunks_exact_mut(size.bytes()) {
        let mut tweak = Block::from(u128::from(lba.0).to_le_bytes());
        tweak_cipher.encrypt_block(&mut tweak);
        let mut mask = u128::from_le_bytes(tweak.into());
        for block in sector.chunks_exact_mut(16) {
            let mut value = [0; 16];
            value.copy_from_slice(block);
            let mut value = Block::from((u128::from_le_bytes(value) ^ mask).to_le_bytes());
            crypt(&mut value);
            block.copy_from_slice(&(u128::from_le_bytes(value.into()) ^ mask).to_le_bytes());
            mask = (mask << 1) ^ (0x87 & (mask >> 127).wrapping_neg());
        }
        lba = lba.advanced_by(size.lba_step());
    }
}

//! A current OpenSSL, built from source, through the `openssl` crate.

use engine::sector::{Lba512, SectorSize};
use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;

use super::sectors;
use crate::xts::{Contestant, Op, key_bytes};

pub(super) struct OpenSsl {
    encrypt: CipherCtx,
    decrypt: CipherCtx,
}

impl OpenSsl {
    #[expect(clippy::unwrap_used, reason = "this fails only if memory runs out")]
    pub(super) fn new() -> Self {
        let context = |op| -> Result<_, ErrorStack> {
            let mut context = CipherCtx::new()?;
            let key = key_bytes();
            match op {
                Op::Encrypt => context.encrypt_init(Some(Cipher::aes_256_xts()), Some(&key), Some(&[0; 16]))?,
                Op::Decrypt => context.decrypt_init(Some(Cipher::aes_256_xts()), Some(&key), Some(&[0; 16]))?,
            }
            Ok(context)
        };
        Self { encrypt: context(Op::Encrypt).unwrap(), decrypt: context(Op::Decrypt).unwrap() }
    }
}

impl Contestant for OpenSsl {
    fn name(&self) -> String {
        let version = openssl::version::version();
        version.split(' ').take(2).collect::<Vec<_>>().join(" ")
    }

    #[expect(clippy::unwrap_used, reason = "the sectors are whole blocks, and the key was accepted")]
    fn run(&mut self, op: Op, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        for (tweak, sector) in sectors(sector_size, first, data) {
            let context = match op {
                Op::Encrypt => {
                    self.encrypt.encrypt_init(None, None, Some(&tweak)).unwrap();
                    &mut self.encrypt
                }
                Op::Decrypt => {
                    self.decrypt.decrypt_init(None, None, Some(&tweak)).unwrap();
                    &mut self.decrypt
                }
            };
            context.cipher_update_inplace(sector, sector.len()).unwrap();
        }
    }
}

//! AWS-LC through its C interface. No safe crate offers its XTS.
#![allow(unsafe_code, reason = "AWS-LC is a C library")]

use std::ffi::c_int;
use std::ptr;

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CipherInit_ex, EVP_CipherUpdate, EVP_aes_256_xts,
};
use engine::sector::{Lba512, SectorSize};

use super::sectors;
use crate::xts::{Contestant, Op, key_bytes};

pub(super) struct AwsLc {
    encrypt: Context,
    decrypt: Context,
}

/// A cipher context. The pointer stays valid as long as this value lives, and nothing else uses it.
struct Context(*mut EVP_CIPHER_CTX, c_int);

impl AwsLc {
    pub(super) fn new() -> Self {
        Self { encrypt: Context::new(1), decrypt: Context::new(0) }
    }
}

impl Context {
    fn new(encrypts: c_int) -> Self {
        let key = key_bytes();
        // SAFETY: the context is checked before use. The cipher reads 64 bytes of key and 16 bytes of tweak, which are
        // there.
        unsafe {
            let context = EVP_CIPHER_CTX_new();
            assert!(!context.is_null(), "out of memory");
            let tweak = [0u8; 16];
            let ok =
                EVP_CipherInit_ex(context, EVP_aes_256_xts(), ptr::null_mut(), key.as_ptr(), tweak.as_ptr(), encrypts);
            assert_eq!(ok, 1, "AWS-LC refused the key");
            Self(context, encrypts)
        }
    }

    fn run(&mut self, tweak: &[u8; 16], sector: &mut [u8]) {
        let Ok(len) = c_int::try_from(sector.len()) else { unreachable!("a sector has 4096 bytes at most") };
        let mut written = 0;
        // SAFETY: the context belongs to `self` and has its key. The cipher reads 16 bytes of tweak, and reads and
        // writes `len` bytes of the sector. The interface allows both to be the same memory.
        unsafe {
            let ok = EVP_CipherInit_ex(self.0, ptr::null(), ptr::null_mut(), ptr::null(), tweak.as_ptr(), self.1);
            assert_eq!(ok, 1, "AWS-LC refused the tweak");
            let ok = EVP_CipherUpdate(self.0, sector.as_mut_ptr(), &raw mut written, sector.as_ptr(), len);
            assert_eq!((ok, written), (1, len), "AWS-LC refused the sector");
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the pointer comes from `EVP_CIPHER_CTX_new` and is freed only once.
        unsafe { EVP_CIPHER_CTX_free(self.0) }
    }
}

impl Contestant for AwsLc {
    fn name(&self) -> String {
        "AWS-LC".to_owned()
    }

    fn run(&mut self, op: Op, sector_size: SectorSize, first: Lba512, data: &mut [u8]) {
        let context = match op {
            Op::Encrypt => &mut self.encrypt,
            Op::Decrypt => &mut self.decrypt,
        };
        for (tweak, sector) in sectors(sector_size, first, data) {
            context.run(&tweak, sector);
        }
    }
}

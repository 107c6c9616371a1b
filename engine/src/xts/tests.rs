//! Tests of every path against the published vectors and against the `xts-mode` crate.

use aes::{Aes128, Aes256};
use cipher::inout::InOutBuf;
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16};
use proptest::prelude::*;
use xts_mode::Xts128;

use super::run::Run;
use super::{CpuPath, Direction, Xts};
use crate::key::VolumeKey;
use crate::sector::{Lba512, SectorSize};

/// Returns the paths that this CPU has, each with the expanded key.
fn paths(key: &[u8]) -> impl Iterator<Item = (CpuPath, Xts)> {
    CpuPath::available().map(|path| (path, Xts::from_bytes(key, path).unwrap()))
}

/// Prints which paths this run tests, even where the test runner captures the output.
#[test]
fn every_path_of_this_cpu_is_tested() {
    use std::io::Write;
    let (have, have_not): (Vec<_>, Vec<_>) = CpuPath::all().into_iter().partition(|path| path.is_available());
    assert_eq!(have, paths(&noise(1, 64)).map(|(path, _)| path).collect::<Vec<_>>());
    for path in &have_not {
        assert!(Xts::from_bytes(&noise(1, 64), *path).is_err());
    }
    // Linux detects the CPU's features in another way.
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    for (name, expected) in [
        ("aesni", has("aes")),
        ("vaes256", has("aes") && has("vaes") && has("avx2")),
        ("vaes512", has("aes") && has("vaes") && has("vpclmulqdq") && has("avx512f") && has("avx512bw")),
    ] {
        let found = have.iter().any(|path| path.name() == name);
        assert!(found == expected || !cfg!(target_arch = "x86_64"), "{name}: {found}, and Linux says {expected}");
    }
    let names = |paths: &[CpuPath]| paths.iter().map(|path| path.name()).collect::<Vec<_>>().join(" ");
    let line = format!("xts paths tested: {}; not on this CPU: [{}]\n", names(&have), names(&have_not));
    std::io::stdout().write_all(line.as_bytes()).unwrap();
}

/// One case of a response file: an operation on one data unit that is a whole number of blocks.
struct Vector {
    name: String,
    direction: Direction,
    key: Vec<u8>,
    number: u128,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// Reads a CAVP response file. IEEE 1619's vectors are kept in the same format.
fn vectors(file: &str, text: &str) -> Vec<Vector> {
    let mut direction = Direction::Encrypt;
    let mut cases = Vec::new();
    for paragraph in text.split("\n\n").map(str::trim) {
        match paragraph {
            "[ENCRYPT]" => direction = Direction::Encrypt,
            "[DECRYPT]" => direction = Direction::Decrypt,
            _ if paragraph.starts_with("COUNT") => {
                let field = |name: &str| {
                    paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = ")).map(str::to_owned)
                };
                let bytes = |name: &str| hex(&field(name).unwrap());
                let number = match field("DataUnitSeqNumber") {
                    Some(decimal) => decimal.parse().unwrap(),
                    None => u128::from_le_bytes(bytes("i").try_into().unwrap()),
                };
                let (input, output) = match direction {
                    Direction::Encrypt => (bytes("PT"), bytes("CT")),
                    Direction::Decrypt => (bytes("CT"), bytes("PT")),
                };
                assert_eq!(input.len() * 8, field("DataUnitLen").unwrap().parse::<usize>().unwrap());
                let name = format!("{file}, {direction:?} {}", field("COUNT").unwrap());
                cases.push(Vector { name, direction, key: bytes("Key"), number, input, output });
            }
            _ => {}
        }
    }
    cases
}

fn hex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

/// Checks a vector on every path. A block's ciphertext depends only on the block's plaintext and position, so a data
/// unit of a few whole blocks is the beginning of a sector. If a sector starts with the vector's input, its result must
/// therefore start with the vector's output, wherever the sector lies in a run.
fn check(case: &Vector) {
    for (path, xts) in paths(&case.key) {
        for sectors_before in [0, 1, 7, 40] {
            let size = SectorSize::B512;
            let mut data = vec![0x5a; size.bytes() * (sectors_before + 3)];
            let place = size.bytes() * sectors_before..size.bytes() * sectors_before + case.input.len();
            data[place.clone()].copy_from_slice(&case.input);
            // The low 64 bits count and wrap; the high 64 bits stay.
            let low = case.number.wrapping_sub(sectors_before as u128) & u128::from(u64::MAX);
            let first = case.number >> 64 << 64 | low;
            xts.run(case.direction, Run::new(size, first, InOutBuf::from(&mut data[..])));
            assert_eq!(data[place], case.output, "{}, path {path}, {sectors_before} sectors before it", case.name);
        }
    }
}

#[test]
fn ieee_1619_vectors_hold() {
    let cases = vectors("IEEE 1619", include_str!("../../../tests/vectors/ieee1619_xts.rsp"));
    assert_eq!(cases.len(), 14);
    cases.iter().for_each(check);
    for case in &cases {
        check(&Vector {
            name: format!("{} backwards", case.name),
            direction: Direction::Decrypt,
            key: case.key.clone(),
            number: case.number,
            input: case.output.clone(),
            output: case.input.clone(),
        });
    }
}

#[test]
fn nist_cavp_vectors_hold() {
    for (file, text) in [
        ("CAVP AES-128 hex tweak", include_str!("../../../tests/vectors/cavp_xts_aes128_hexstr.rsp")),
        ("CAVP AES-128 sequence number", include_str!("../../../tests/vectors/cavp_xts_aes128_seqno.rsp")),
        ("CAVP AES-256 hex tweak", include_str!("../../../tests/vectors/cavp_xts_aes256_hexstr.rsp")),
        ("CAVP AES-256 sequence number", include_str!("../../../tests/vectors/cavp_xts_aes256_seqno.rsp")),
    ] {
        let cases = vectors(file, text);
        assert_eq!(cases.len(), 600);
        cases.iter().for_each(check);
    }
}

/// Encrypts or decrypts a run of sectors with `xts-mode`.
fn oracle(direction: Direction, key: &[u8], size: SectorSize, first: Lba512, data: &mut [u8]) {
    fn run<C>(direction: Direction, key: &[u8], size: SectorSize, first: Lba512, data: &mut [u8])
    where
        C: KeyInit + BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
    {
        let (one, two) = key.split_at(key.len() / 2);
        let xts = Xts128::new(C::new_from_slice(one).unwrap(), C::new_from_slice(two).unwrap());
        let mut lba = first;
        for sector in data.chunks_exact_mut(size.bytes()) {
            let tweak = Array(u128::from(lba.0).to_le_bytes());
            match direction {
                Direction::Encrypt => xts.encrypt_sector(sector, tweak),
                Direction::Decrypt => xts.decrypt_sector(sector, tweak),
            }
            lba = lba.advanced_by(size.lba_step());
        }
    }
    if key.len() == 64 {
        run::<Aes256>(direction, key, size, first, data);
    } else {
        run::<Aes128>(direction, key, size, first, data);
    }
}

/// Returns bytes that do not repeat within a test, from a seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}

fn agrees_with_the_oracle(key: &[u8], size: SectorSize, first: Lba512, sectors: usize, at: usize, seed: u64) {
    let len = size.bytes() * sectors;
    let input = noise(seed, len);
    for direction in [Direction::Encrypt, Direction::Decrypt] {
        let mut expected = input.clone();
        oracle(direction, key, size, first, &mut expected);
        for (path, xts) in paths(key) {
            let what = || format!("{path} {direction:?} {sectors} x {size} at {first:?}, buffer + {at}");
            // Bytes around the run must not change.
            let mut buffer = vec![0xee; at + len + 64];
            buffer[at..at + len].copy_from_slice(&input);
            let data = &mut buffer[at..at + len];
            match direction {
                Direction::Encrypt => xts.encrypt(size, first, data),
                Direction::Decrypt => xts.decrypt(size, first, data),
            }
            assert!(data == expected, "in place: {}", what());
            assert!(buffer[..at].iter().chain(&buffer[at + len..]).all(|&byte| byte == 0xee), "around: {}", what());

            // The other buffer has another alignment.
            let mut from = vec![0; 64 - at];
            from.extend_from_slice(&input);
            let mut buffer = vec![0xee; at + len + 64];
            let to = &mut buffer[at..at + len];
            match direction {
                Direction::Encrypt => xts.encrypt_to(size, first, &from[64 - at..], to),
                Direction::Decrypt => xts.decrypt_to(size, first, &from[64 - at..], to),
            }
            assert!(to == expected, "out of place: {}", what());
            assert!(buffer[..at].iter().chain(&buffer[at + len..]).all(|&byte| byte == 0xee), "around: {}", what());
            assert!(from[64 - at..] == input, "the source: {}", what());
        }
    }
}

/// Every number of sectors up to a few batches, with both key lengths and all sector sizes.
#[test]
fn every_count_equals_the_oracle() {
    for key in [noise(1, 64), noise(2, 32)] {
        for size in SectorSize::ALL {
            for sectors in (0..=140).chain([191, 192, 193, 255, 256, 257, 300]) {
                agrees_with_the_oracle(&key, size, Lba512(0x1234_5678_9abc), sectors, 0, sectors as u64 + 77);
            }
        }
    }
}

/// The IV wraps at 2⁶⁴ at every position within the run.
#[test]
fn the_iv_wraps_as_in_dm_crypt() {
    let key = noise(3, 64);
    for size in SectorSize::ALL {
        for before in 0..=70 {
            let first = Lba512(0u64.wrapping_sub(before * size.lba_step()));
            agrees_with_the_oracle(&key, size, first, 75, 1, before);
        }
    }
    // A 4096-byte sector that does not start on a multiple of eight units.
    agrees_with_the_oracle(&key, SectorSize::B4096, Lba512(u64::MAX - 2), 17, 3, 5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 192 }))]
    #[test]
    fn any_run_equals_the_oracle(
        long in any::<bool>(),
        key_seed in any::<u64>(),
        size in prop::sample::select(&SectorSize::ALL[..]),
        first in prop_oneof![any::<u64>(), (0u64..2000).prop_map(|back| 0u64.wrapping_sub(back)), 0u64..100],
        sectors in 0usize..400,
        at in 0usize..64,
        seed in any::<u64>(),
    ) {
        let key = noise(key_seed, if long { 64 } else { 32 });
        agrees_with_the_oracle(&key, size, Lba512(first), sectors, at, seed);
    }
}

#[test]
#[should_panic(expected = "not a run of whole 4096-byte sectors")]
fn a_run_with_part_of_a_sector_panics() {
    let key = VolumeKey::new(noise(4, 64)).unwrap();
    Xts::new(&key).encrypt(SectorSize::B4096, Lba512(0), &mut [0; 4096 + 512]);
}

#[test]
#[should_panic(expected = "4096 bytes do not fit into 8192")]
fn buffers_of_different_lengths_panic() {
    let key = VolumeKey::new(noise(4, 64)).unwrap();
    Xts::new(&key).encrypt_to(SectorSize::B4096, Lba512(0), &[0; 4096], &mut [0; 8192]);
}

#[test]
fn a_cipher_prints_its_key_length_and_nothing_else() {
    for bytes in [64, 32] {
        let key = VolumeKey::new(noise(4, bytes)).unwrap();
        let xts = Xts::with_path(&key, CpuPath::Portable).unwrap();
        assert_eq!(format!("{xts:?}"), format!("Xts({} bits, portable)", bytes * 8));
    }
}

#[test]
fn large_sectors_count_the_iv_one_by_one() {
    let key = VolumeKey::new((0..64).collect()).unwrap();
    let large = Xts::new(&key).with_large_sectors();
    let small = Xts::new(&key);
    let mut data: Vec<u8> = (0..=255).cycle().take(3 * 4096).collect();
    let mut one_by_one = data.clone();
    large.encrypt(SectorSize::B4096, Lba512(80), &mut data);
    for (number, sector) in (10..).zip(one_by_one.chunks_mut(4096)) {
        small.encrypt(SectorSize::B4096, Lba512(number), sector);
    }
    assert_eq!(data, one_by_one);
}

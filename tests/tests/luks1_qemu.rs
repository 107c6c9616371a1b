//! LUKS1 in both directions with the other programs that read it: QEMU's block driver and nbdkit's filter.

use std::path::Path;

use engine::luks::{HashAlgorithm, LuksError};
use harness::luks::{PASSPHRASE, Workbench, format_luks1, key, noise, open, run, unlock};

const MIB: usize = 1 << 20;

/// Returns noise with a range of zeros in it.
fn data() -> Vec<u8> {
    let mut data = vec![0; 6 * MIB];
    noise(7)(&mut data[..4 * MIB]).unwrap();
    data[MIB..2 * MIB].fill(0);
    data
}

/// Runs `qemu-img` with the passphrase as the secret `s`.
fn qemu_img(bench: &Workbench, command: &str, arguments: &[&str]) {
    let secret = format!("secret,id=s,file={}", bench.key_file().display());
    run("qemu-img", [command, "--object", &secret].iter().chain(arguments));
}

fn plaintext(disk: &Path, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    open(disk).read(0, &mut data).unwrap();
    data
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs qemu-img: run `make test`")]
fn volumes_of_qemu_img_are_readable() {
    let bench = Workbench::new();
    std::fs::write(bench.path("raw"), data()).unwrap();
    let (raw, disk) = (bench.path("raw"), bench.path("disk"));
    // Only a few combinations: QEMU takes seconds each time to measure the machine's speed.
    for (cipher, iv, bits, hash) in [
        ("aes-128", "plain64", 256, "sha1"),
        ("aes-256", "plain64", 512, "sha256"),
        ("aes-256", "plain", 512, "ripemd160"),
    ] {
        let options =
            format!("key-secret=s,cipher-alg={cipher},cipher-mode=xts,ivgen-alg={iv},hash-alg={hash},iter-time=10");
        let places = [raw.to_str().unwrap(), disk.to_str().unwrap()];
        qemu_img(&bench, "convert", &["-f", "raw", "-O", "luks", "-o", &options, places[0], places[1]]);
        assert_eq!(unlock(&disk, PASSPHRASE).unwrap().key.bits(), bits);
        assert!(plaintext(&disk, 6 * MIB) == data(), "{options}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs qemu-img: run `make test`")]
fn unsupported_ciphers_are_refused_by_name() {
    let bench = Workbench::new();
    let disk = bench.path("disk");
    let cases = [
        ("cipher-alg=serpent-256,cipher-mode=xts,ivgen-alg=plain64", "serpent-xts-plain64"),
        ("cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256", "aes-cbc-essiv:sha256"),
    ];
    for (options, name) in cases {
        let options = format!("key-secret=s,{options},iter-time=10");
        qemu_img(&bench, "create", &["-f", "luks", "-o", &options, disk.to_str().unwrap(), "4M"]);
        let error = unlock(&disk, PASSPHRASE).unwrap_err();
        assert!(matches!(error, LuksError::Unsupported(_)) && error.to_string().contains(name), "{error}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs qemu-img, nbdkit, nbdcopy: run `make test`")]
fn qemu_img_and_nbdkit_read_our_volumes() {
    let bench = Workbench::new();
    for (key_len, hash) in [(64, HashAlgorithm::Sha256), (32, HashAlgorithm::Sha1), (64, HashAlgorithm::Sha512)] {
        let disk = bench.disk("disk", 8 * MIB as u64);
        format_luks1(&disk, hash, key(key_len));
        let volume = open(&disk);
        assert_eq!(volume.len(), 6 * MIB as u64);
        volume.write(0, &mut data()).unwrap();
        volume.flush().unwrap();

        let (disk, out) = (disk.to_str().unwrap(), bench.path("out"));
        let image = format!("driver=luks,key-secret=s,file.filename={disk}");
        qemu_img(&bench, "convert", &["--image-opts", &image, "-O", "raw", out.to_str().unwrap()]);
        assert!(std::fs::read(&out).unwrap() == data(), "qemu-img, {key_len} bytes, {hash}");

        std::fs::remove_file(&out).unwrap();
        let passphrase = format!("passphrase=+{}", bench.key_file().display());
        let copy = format!("nbdcopy --no-extents \"$uri\" '{}'", out.display());
        run("nbdkit", ["--exit-with-parent", "-U", "-", "file", disk, "--filter=luks", &passphrase, "--run", &copy]);
        assert!(std::fs::read(&out).unwrap() == data(), "nbdkit, {key_len} bytes, {hash}");
    }
}

//! Headers that cryptsetup makes and dm-crypt opens, but nbdcrypt does not. `dump` shows each of them, and opening is
//! refused with an error that names the unsupported feature.

use std::path::Path;

use engine::luks::{self, Limits, LuksError};
use harness::kernel::Kernel;
use harness::luks::{PASSPHRASE, Workbench, store};
use harness::nbdcrypt::binary;

const MIB: u64 = 1 << 20;

/// Returns the error of an attempt to open the volume. Also checks that `dump` shows the header.
#[track_caller]
fn refusal(disk: &Path) -> String {
    let store = store(disk);
    let shown = luks::dump(store.as_ref()).unwrap().display("disk");
    assert!(shown.contains("Version:"), "{shown}");
    let passphrase = engine::key::Passphrase::new(PASSPHRASE.to_vec());
    let opened = luks::read(store.as_ref(), &Limits::default())
        .and_then(|volume| volume.unlock(store.as_ref(), &passphrase).map(|_| ()));
    match opened.unwrap_err() {
        error @ LuksError::Unsupported(_) => error.to_string(),
        other => panic!("the error does not name the feature: {other}"),
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn an_unsupported_cipher_or_hash_is_named() {
    let bench = Workbench::new();
    let quick = ["luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "key"];
    for (luks_type, options, name) in [
        ("luks2", ["--cipher", "aes-xts-plain64be"], "cipher aes-xts-plain64be"),
        ("luks1", ["--cipher", "aes-cbc-essiv:sha256"], "cipher aes-cbc-essiv:sha256 with a key of 256 bits"),
        ("luks2", ["--cipher", "aes-cbc-essiv:sha256"], "cipher aes-cbc-essiv:sha256"),
        ("luks2", ["--cipher", "aes-xts-essiv:sha256"], "cipher aes-xts-essiv:sha256"),
        ("luks1", ["--hash", "md5-sha1"], "hash md5-sha1"),
        ("luks2", ["--hash", "md5-sha1"], "hash md5-sha1"),
    ] {
        let disk = bench.disk("disk", 20 * MIB);
        bench.run("cryptsetup", [&quick[..], &["--type", luks_type], &options, &["disk"]].concat());
        let said = refusal(&disk);
        assert!(said.contains(name), "{luks_type} {options:?}: {said}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn an_unsupported_keyslot_cipher_is_named() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 20 * MIB);
    let quick = ["luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "key"];
    let slot = ["--keyslot-cipher", "aes-cbc-essiv:sha256", "--keyslot-key-size", "256", "disk"];
    bench.run("cryptsetup", [&quick[..], &["--type", "luks2"], &slot].concat());
    let said = refusal(&disk);
    assert!(said.contains("aes-cbc-essiv:sha256 with a key of 256 bits"), "{said}");
}

/// Headers that cryptsetup makes only with the help of a kernel's ciphers.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs user-mode-linux and cryptsetup: run `make test`")]
fn headers_made_with_kernel_ciphers_are_refused_by_name() {
    let kernel = Kernel::new();
    let steps = r#"
        modprobe -a loop dm-crypt dm-integrity
        printf ThisIs-a-SecretPassword > key; chmod 600 key
        refused() { # words, cryptsetup's arguments
          words=$1; shift
          rm -f disk; truncate -s 24M disk
          cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file key "$@" disk
          $nbdcrypt dump disk > shown
          if $nbdcrypt serve --key-file key --socket socket disk 2> why; then exit 9; fi
          cat why
          grep -F "$words" why
          grep -F "open it with cryptsetup" why
        }
        refused "cipher serpent-xts-plain64" --type luks2 --cipher serpent-xts-plain64
        refused "cipher serpent-xts-plain64" --type luks1 --cipher serpent-xts-plain64
        refused "cipher twofish-xts-plain64" --type luks2 --cipher twofish-xts-plain64
        refused "cipher xchacha12,aes-adiantum-plain64" --type luks2 --cipher xchacha12,aes-adiantum-plain64 --key-size 256
        refused "integrity hmac(sha256)" --type luks2 --integrity hmac-sha256 --integrity-no-wipe
        refused "integrity aead" --type luks2 --cipher aegis128-random --key-size 128 --integrity aead --integrity-no-wipe
        echo refused"#;
    let output = kernel.expect(&format!("nbdcrypt={}\n{steps}\n", binary().display()));
    assert!(output.ends_with("refused\n"), "{output}");
}

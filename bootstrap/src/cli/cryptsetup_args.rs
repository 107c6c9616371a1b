//! Options of `cryptsetup luksFormat` that nbdcrypt does not need, because it always does what their usual values ask for.
//! Those values are accepted silently, so that a familiar command works. For any other value, the error names the option.

/// These options are hidden, since they change nothing.
#[derive(Debug, clap::Args)]
pub(super) struct CryptsetupArgs {
    /// The cipher.
    #[arg(short = 'c', long, hide = true, value_parser = cipher)]
    cipher: Option<()>,
    /// The cipher of the keyslots.
    #[arg(long, hide = true, value_parser = cipher)]
    keyslot_cipher: Option<()>,
    /// The key length of the keyslots' cipher in bits.
    #[arg(long, hide = true, value_parser = keyslot_key_size)]
    keyslot_key_size: Option<()>,
    /// The keyslot of the first key.
    #[arg(short = 'S', long, hide = true, value_parser = key_slot)]
    key_slot: Option<()>,
    /// Ask for the passphrase twice, which nbdcrypt always does.
    #[arg(short = 'y', long, hide = true)]
    verify_passphrase: bool,
    /// Do not ask before overwriting the disk. nbdcrypt never asks: without `--wipe`, it refuses.
    #[arg(short = 'q', long = "batch-mode", alias = "batch", hide = true)]
    batch: bool,
    /// Take the key from the kernel's random number generator, which nbdcrypt always does.
    #[arg(long, hide = true)]
    use_random: bool,
    /// The same as `--use-random`.
    #[arg(long, hide = true)]
    use_urandom: bool,
    /// Do not check the quality of the passphrase, which nbdcrypt never does.
    #[arg(long, hide = true)]
    force_password: bool,
    /// Keep the volume key out of the kernel's keyring, which nbdcrypt never uses.
    #[arg(long, hide = true)]
    disable_keyring: bool,
    /// Where the data begins, in sectors. This is an older name of `--offset`.
    #[arg(long, hide = true, value_parser = align_payload)]
    align_payload: Option<()>,
    /// Integrity protection.
    #[arg(short = 'I', long, hide = true, value_parser = integrity)]
    integrity: Option<()>,
    /// The volume key itself.
    #[arg(long, alias = "master-key-file", hide = true, value_parser = volume_key_file)]
    volume_key_file: Option<()>,
    /// How much of the key file is read.
    #[arg(short = 'l', long, hide = true, value_parser = part_of_key_file)]
    keyfile_size: Option<()>,
    /// Where in the key file the passphrase begins.
    #[arg(long, hide = true, value_parser = keyfile_offset)]
    keyfile_offset: Option<()>,
}

/// Accepts only the cipher of the volumes that nbdcrypt makes.
fn cipher(name: &str) -> Result<(), String> {
    match name {
        "aes-xts-plain64" => Ok(()),
        _ => {
            Err("it is not supported: nbdcrypt always encrypts with aes-xts-plain64, so leave --cipher out".to_owned())
        }
    }
}

fn keyslot_key_size(bits: &str) -> Result<(), String> {
    match bits {
        "512" | "256" => Ok(()),
        _ => Err("it is not supported: keyslots are encrypted with aes-xts-plain64 and a key as long as the volume's, 512 or \
                  256 bits (--key-size)"
            .to_owned()),
    }
}

fn key_slot(number: &str) -> Result<(), String> {
    match number {
        "0" => Ok(()),
        _ => {
            Err("it is not supported: the first key always gets keyslot 0; `nbdcrypt key add --key-slot N` puts a key \
             into another keyslot"
                .to_owned())
        }
    }
}

fn align_payload(_: &str) -> Result<(), String> {
    Err("it is not supported: use --offset SECTORS, which says where the data begins".to_owned())
}

fn integrity(kind: &str) -> Result<(), String> {
    match kind {
        "none" => Ok(()),
        _ => Err(
            "it is not supported: nbdcrypt makes volumes without integrity protection, as cryptsetup does by default"
                .to_owned(),
        ),
    }
}

fn volume_key_file(_: &str) -> Result<(), String> {
    Err("it is not supported: the volume key is always made at random; --key-file is the passphrase for keyslot 0"
        .to_owned())
}

fn part_of_key_file(_: &str) -> Result<(), String> {
    Err("it is not supported: all bytes of a key file are the passphrase; pipe a part of it, as in `head -c 32 FILE | \
         nbdcrypt format --key-file - DEVICE`"
        .to_owned())
}

fn keyfile_offset(offset: &str) -> Result<(), String> {
    match offset {
        "0" => Ok(()),
        _ => part_of_key_file(offset),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::Cli;

    fn parsed(arguments: &[&str]) -> Result<(), String> {
        let all = ["nbdcrypt", "format", "disk"].iter().chain(arguments);
        Cli::try_parse_from(all).map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn options_of_cryptsetup_that_change_nothing_are_accepted() {
        for arguments in [
            &["--cipher", "aes-xts-plain64"][..],
            &["--cipher=aes-xts-plain64"],
            &["-c", "aes-xts-plain64", "-s", "512"],
            &["-c", "aes-xts-plain64", "--key-size", "256"],
            &["--type", "luks"],
            &["--type", "luks2"],
            &["-M", "luks1"],
            &["--type", "LUKS2", "--size", "64m"],
            &["--size", "64MiB", "--luks2-metadata-size", "64k", "--pbkdf", "Argon2id", "--hash", "SHA256"],
            &["--hash", "sha256", "-i", "2000", "--pbkdf", "argon2id", "--use-random"],
            &["--use-urandom", "--verify-passphrase", "--force-password"],
            &["-q", "-y", "-S", "0"],
            &["--batch-mode", "-d", "key", "--disable-keyring"],
            &["--keyslot-cipher", "aes-xts-plain64", "--keyslot-key-size", "512"],
            &["--integrity", "none", "--keyfile-offset", "0"],
        ] {
            assert_eq!(parsed(arguments), Ok(()), "{arguments:?}");
        }
    }

    #[test]
    fn unsupported_values_are_refused_by_name_with_an_alternative() {
        for (arguments, words) in [
            (&["--cipher", "serpent-xts-plain64"][..], &["serpent-xts-plain64", "--cipher", "aes-xts-plain64"][..]),
            (&["-c", "aes-cbc-essiv:sha256"], &["aes-cbc-essiv:sha256", "not supported", "aes-xts-plain64"]),
            (&["--cipher", "aes"], &["not supported"]),
            (&["-s", "384"], &["384", "512 or 256"]),
            (&["--type", "bitlk"], &["bitlk", "luks2", "luks1"]),
            (&["--type", "plain"], &["plain", "luks2", "luks1"]),
            (&["--hash", "md5"], &["md5", "sha256"]),
            (&["--pbkdf", "scrypt"], &["scrypt", "argon2id", "pbkdf2"]),
            (&["-S", "3"], &["key add --key-slot"]),
            (&["--align-payload", "2048"], &["--offset"]),
            (&["--integrity", "hmac-sha256"], &["hmac-sha256", "not supported"]),
            (&["--master-key-file", "key"], &["not supported", "at random"]),
            (&["--keyfile-size", "32"], &["head -c"]),
            (&["--keyfile-offset", "1"], &["not supported"]),
        ] {
            let said = parsed(arguments).unwrap_err();
            for word in words {
                assert!(said.contains(word), "{arguments:?}: {word:?} in {said}");
            }
        }
    }

    /// clap would suggest options with similar letters, and `--wipe` is similar to many.
    #[test]
    fn no_mistyped_option_or_command_is_answered_with_another() {
        for arguments in [
            &["format", "disk", "--cipherr", "x"][..],
            &["format", "disk", "--whipe"],
            &["format", "disk", "--wip"],
            &["provision", "x.toml", "--replac"],
            &["key", "remove", "disk", "--forc"],
            &["key", "remov", "disk"],
            &["header", "restor", "disk"],
            &["dwn"],
            &["formt", "disk"],
            &["key", "priority", "disk", "--key-slot", "1", "ignor"],
        ] {
            let said = Cli::try_parse_from(["nbdcrypt"].iter().chain(arguments)).unwrap_err().to_string();
            assert!(!said.contains("similar") && !said.contains("did you mean"), "{arguments:?}: {said}");
            for word in ["'--wipe'", "'--force'", "'--replace'", "'remove'", "'restore'", "'down'", "'format'"] {
                assert!(!said.contains(word), "{arguments:?}: {said}");
            }
        }
    }
}

//! The configuration of one volume: a TOML file, read once into types that cannot be wrong.
//!
//! `bootstrap/nbdcrypt.example.toml` shows every key there is with its default. Reading goes in two steps, as in
//! ripgrep's `lowargs` and `hiargs`: `raw` knows keys and TOML types and refuses all others; `meaning` knows values,
//! defaults and what goes together. Both name line and column of what they refuse.

mod error;
mod instance_store;
mod meaning;
mod raw;
mod value;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::luks::Limits;
use engine::sector::SectorSize;

use crate::memory;
use crate::new_volume::Strength;
use crate::plain::PlainVolume;

pub use error::{ConfigError, Fault};
pub use instance_store::{DeviceError, SYSFS};
pub use value::{KeyFile, S3Object, SecretPlace, VolumeName, parse_duration, parse_size};

/// One volume: where it lies, what unlocks it, how the kernel comes to see it, and what is mounted where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `name` of `[volume]`; else the file's name without `.toml`.
    pub name: VolumeName,
    /// `[volume]`.
    pub volume: VolumeConfig,
    /// `[key]`.
    pub key: KeyConfig,
    /// `random` of `[key]`: whether its secret can be guessed, which is what a new keyslot's key derivation is there for.
    pub strength: Strength,
    /// `[attach]`.
    pub attach: AttachConfig,
    /// `[filesystem]`; without one the volume is attached and nothing is made or mounted.
    pub filesystem: Option<FilesystemConfig>,
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`ConfigError`], with the line and column of what is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        // Whoever names a key file by mistake does not see it quoted in an error.
        if path.extension().is_none_or(|extension| extension != "toml") {
            return Err(ConfigError::NotToml { path: path.to_owned() });
        }
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Reads the text of a configuration; `path` is where it came from: errors name it, and its stem is the volume's
    /// name where `[volume]` has none.
    ///
    /// # Errors
    /// [`ConfigError`], with the line and column of what is wrong.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let fault = |span, message| ConfigError::At(Box::new(Fault::new(path, text, span, message)));
        let raw: raw::RawConfig =
            toml::from_str(text).map_err(|error| fault(error.span().unwrap_or(0..0), error.message().to_owned()))?;
        let named = raw.volume.name.is_some();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let from_stem = VolumeName::new(&stem);
        if !named && from_stem.is_none() {
            return Err(ConfigError::Name { path: path.to_owned(), stem: stem.into_owned() });
        }
        meaning::config(raw, from_stem).map_err(|wrong| fault(wrong.span, wrong.message))
    }
}

/// Where the volume lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeConfig {
    /// The disk or file.
    pub device: Device,
    /// The length in bytes of the sparse file that is made where `device` names none yet: a multiple of 4096.
    pub size: Option<u64>,
    /// What is made where the device is blank, and what is expected otherwise.
    pub kind: VolumeType,
    /// The encryption unit of a volume that is made.
    pub sector_size: SectorSize,
    /// The disk or file that holds the LUKS header, where that is not the device itself: made where it is missing.
    pub header: Option<PathBuf>,
    /// What no header says of a plain volume.
    pub plain: PlainVolume,
    /// The most that a header may ask for.
    pub limits: LimitsConfig,
}

/// The most work that a header may ask for: what a person may want to raise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitsConfig {
    /// The most memory that a keyslot's Argon2 may take, in KiB.
    pub kdf_memory: Option<u32>,
    /// The most iterations of PBKDF2.
    pub kdf_iterations: Option<NonZeroU32>,
    /// The most passes of Argon2 over the most memory; over less, as many more as take the same time.
    pub kdf_passes: Option<NonZeroU32>,
}

impl LimitsConfig {
    /// These, and `others` where these say nothing.
    pub fn or(self, others: Self) -> Self {
        Self {
            kdf_memory: self.kdf_memory.or(others.kdf_memory),
            kdf_iterations: self.kdf_iterations.or(others.kdf_iterations),
            kdf_passes: self.kdf_passes.or(others.kdf_passes),
        }
    }

    /// The engine's limits with these in their place. Unless it is raised, the memory is never more than there is: a program
    /// that asks for more is ended by the kernel, and says nothing.
    pub fn limits(&self) -> Limits {
        let usual = Limits::default();
        let available = u32::try_from(memory::limit_kib()).unwrap_or(u32::MAX);
        Limits {
            iterations: self.kdf_iterations.unwrap_or(usual.iterations),
            argon2_time: self.kdf_passes.map_or(usual.argon2_time, NonZeroU32::get),
            argon2_memory: self.kdf_memory.unwrap_or(usual.argon2_memory.min(available)),
            ..usual
        }
    }
}

/// A disk or file by name, or the one that the instance has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Device {
    /// An absolute path to a block device or regular file.
    Path(PathBuf),
    /// The EC2 instance-store disk, whatever its name is after this boot: [`Device::resolve`] finds it.
    InstanceStore,
}

/// The format on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeType {
    /// LUKS2: two headers, up to 32 keyslots and tokens; sectors of 512 to 4096 bytes.
    Luks2,
    /// LUKS1: a header with eight keyslots; sectors of 512 bytes.
    Luks1,
    /// Plain dm-crypt: no header, the key is derived from the secret alone.
    Plain,
}

/// What unlocks the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyConfig {
    /// `source = "file"`.
    File(KeyFile),
    /// `source = "aws"`.
    Aws(AwsKeyConfig),
}

/// What KMS made of the secret, and where it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwsKeyConfig {
    /// Where the ciphertext is: an object in S3, or a token in the header.
    pub object: SecretPlace,
    /// Key id, key ARN, alias or alias ARN. `provision` needs it; for decryption, a ciphertext made under another key
    /// is refused where it is given.
    pub kms_key: Option<String>,
    /// The plaintext is the volume key itself, so many bytes, and no text whose newlines do not count.
    pub raw_key: Option<usize>,
    /// What the ciphertext is bound to. It is no secret: it stands in CloudTrail's logs.
    pub encryption_context: BTreeMap<String, String>,
    /// Overrides `AWS_REGION`, the profile's region and the instance's.
    pub region: Option<String>,
    /// Overrides `AWS_PROFILE`.
    pub profile: Option<String>,
    /// Overrides `AWS_ENDPOINT_URL_S3` and the like.
    pub s3_endpoint_url: Option<String>,
    /// Overrides `AWS_ENDPOINT_URL_KMS` and the like.
    pub kms_endpoint_url: Option<String>,
    /// No new attempt begins later than this after the first one.
    pub retry_for: Duration,
}

impl AwsKeyConfig {
    /// `retry-for` where none is configured: the network of an instance that boots is there well before.
    pub const DEFAULT_RETRY_FOR: Duration = Duration::from_secs(120);
}

/// How the kernel comes to see the volume as a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachConfig {
    /// By which driver.
    pub method: AttachMethod,
    /// The number N of the `/dev/nbdN` to take; else the kernel gives the first free one. Without meaning for FUSE.
    pub nbd_device: Option<u32>,
    /// Sockets between the kernel and the server, 1 to 16: each is one hardware queue of up to 128 requests.
    pub connections: u8,
}

impl AttachConfig {
    /// `connections` where none is configured: enough for a few cores at once.
    pub const DEFAULT_CONNECTIONS: u8 = 4;
    /// Each connection has its own thread and may hold a queue of 128 requests in locked memory; past 16 a machine runs
    /// out of these before it gains throughput.
    pub const MAX_CONNECTIONS: u8 = 16;
}

/// A way into the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMethod {
    /// NBD where the kernel has the driver, FUSE elsewhere.
    Auto,
    /// The kernel's NBD client.
    Nbd,
    /// A FUSE file and a loop device on it.
    Fuse,
}

/// What is made on a blank volume, and mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesystemConfig {
    /// The `X` of `mkfs.X` and of `mount -t X`.
    pub kind: String,
    /// An absolute path; made where missing.
    pub mountpoint: PathBuf,
    /// As after `mount -o`, each one option.
    pub options: Vec<String>,
    /// Arguments for mkfs, before the device's.
    pub mkfs_options: Vec<String>,
}

impl FilesystemConfig {
    /// `type` where none is configured.
    pub const DEFAULT_KIND: &'static str = "ext4";
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXAMPLE: &str = include_str!("../../nbdcrypt.example.toml");

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/nbdcrypt/scratch.toml")).map_err(|error| error.to_string())
    }

    /// A configuration that is right but for what is appended to its sections.
    fn with(volume: &str, key: &str, attach: &str, filesystem: &str) -> Result<Config, String> {
        parse(&format!(
            "[volume]\ndevices = [\"/dev/vdb\"]\n{volume}\n[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\n{key}\n\
             [attach]\n{attach}\n[filesystem]\nmountpoint = \"/mnt/x\"\n{filesystem}\n"
        ))
    }

    #[track_caller]
    fn refused(result: Result<Config, String>, place: &str, words: &[&str]) {
        let error = result.unwrap_err();
        assert!(error.starts_with(&format!("/etc/nbdcrypt/scratch.toml:{place}: ")), "{error}");
        for word in words {
            assert!(error.contains(word), "`{word}` in {error}");
        }
    }

    #[test]
    fn the_least_configuration_gets_the_documented_defaults() {
        let config =
            parse("[volume]\ndevices = [\"/dev/vdb\"]\n[key]\nsource = \"file\"\npath = \"/etc/key\"\n").unwrap();
        assert_eq!(
            config,
            Config {
                name: VolumeName::new("scratch").unwrap(),
                volume: VolumeConfig {
                    device: Device::Path("/dev/vdb".into()),
                    size: None,
                    kind: VolumeType::Luks2,
                    sector_size: SectorSize::B4096,
                    header: None,
                    plain: PlainVolume::default(),
                    limits: LimitsConfig::default(),
                },
                key: KeyConfig::File(KeyFile::Path("/etc/key".into())),
                strength: Strength::Guessable,
                attach: AttachConfig { method: AttachMethod::Auto, nbd_device: None, connections: 4 },
                filesystem: None,
            }
        );
    }

    #[test]
    fn the_example_file_parses() {
        let config = parse(EXAMPLE).unwrap();
        let KeyConfig::Aws(key) = config.key else { panic!("{:?}", config.key) };
        assert_eq!(key.object, S3Object::parse("s3://BUCKET/LuksInternalStorageKey").unwrap().into());
        assert_eq!(config.volume.size, Some(2 << 30));
    }

    #[test]
    fn what_the_example_file_shows_commented_out_is_the_default() {
        // "#key = value" is a default; "# text" is a comment; "#! key = value" is an example that differs.
        let uncommented: String = EXAMPLE
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert_ne!(uncommented, EXAMPLE);
        assert_eq!(parse(&uncommented).unwrap(), parse(EXAMPLE).unwrap());
    }

    #[test]
    fn the_example_file_names_every_key() {
        // serde lists the keys of a section when it meets one that is none.
        for section in ["volume", "key", "attach", "filesystem"] {
            let error = parse(&EXAMPLE.replace(&format!("[{section}]\n"), &format!("[{section}]\nnonsense = 1\n")))
                .unwrap_err();
            let keys: Vec<&str> =
                error.lines().next().unwrap().split('`').skip(1).step_by(2).filter(|&key| key != "nonsense").collect();
            assert!(keys.len() >= 3, "{error}");
            for key in keys {
                let shown = EXAMPLE
                    .lines()
                    .any(|line| line.trim_start_matches(['#', '!', ' ']).starts_with(&format!("{key} = ")));
                assert!(shown, "[{section}] {key}");
            }
        }
    }

    #[test]
    fn every_configuration_in_the_documents_parses() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for entry in fs::read_dir(root).unwrap() {
            let document = entry.unwrap().path();
            if document.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            let text = fs::read_to_string(&document).unwrap();
            for block in text.split("```toml\n").skip(1) {
                let block = block.split("```").next().unwrap();
                if block.contains("[volume]") {
                    parse(block).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
                }
            }
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_with_what_is_allowed_there() {
        refused(with("sizee = \"2G\"", "", "", ""), "3:1", &["`sizee`", "`devices`", "`size`", "3 | sizee = \"2G\"\n"]);
        refused(parse("[volum]\n"), "1:2", &["`volum`", "`volume`", "`key`", "`attach`", "`filesystem`"]);
        refused(with("", "obejct = 1", "", ""), "7:1", &["`obejct`", "`object`"]);
    }

    #[test]
    fn a_wrong_type_is_named_with_its_place_and_the_right_one() {
        refused(with("size = true", "", "", ""), "3:8", &["boolean `true`", "expected a size such as \"2G\""]);
        refused(with("size = -5", "", "", ""), "3:8", &["`-5`", "expected a size"]);
        refused(with("", "encryption-context = \"x\"", "", ""), "7:22", &["string", "expected a map"]);
        refused(with("", "encryption-context = { a = 1 }", "", ""), "7:28", &["integer `1`", "expected a string"]);
        refused(with("", "", "connections = \"4\"", ""), "9:15", &["string", "expected u64"]);
    }

    #[test]
    fn what_toml_does_not_allow_is_named_with_its_place() {
        refused(with("name = ", "", "", ""), "3:8", &["expected"]);
        refused(with("devices = []", "", "", ""), "3:1", &["duplicate key"]);
        refused(parse("[key]\nsource = \"file\"\npath = \"/k\"\n"), "1:1", &["missing field `volume`"]);
    }

    #[test]
    fn a_value_out_of_range_is_named_with_its_place_and_the_range() {
        refused(with("size = \"2GB\"", "", "", ""), "3:8", &["`2GB`", "K, M, G, T"]);
        refused(with("size = \"5000\"", "", "", ""), "3:8", &["4096"]);
        refused(with("size = 0", "", "", ""), "3:8", &["4096"]);
        refused(with("name = \"../x\"", "", "", ""), "3:8", &["`../x`"]);
        refused(with("sector-size = 520", "", "", ""), "3:15", &["520", "512, 1024, 2048, 4096"]);
        refused(with("type = \"bitlocker\"", "", "", ""), "3:8", &["bitlocker", "luks2, luks1, plain"]);
        refused(with("header = \"x\"", "", "", ""), "3:10", &["`x`", "absolute"]);
        refused(with("type = \"plain\"\nheader = \"/x\"", "random = true", "", ""), "4:10", &["plain", "no header"]);
        refused(with("max-kdf-memory = \"8T\"", "", "", ""), "3:18", &["`8T`", "4095G"]);
        refused(with("max-kdf-iterations = 0", "", "", ""), "3:22", &["0", "1 to"]);
        refused(with("max-kdf-passes = 0", "", "", ""), "3:18", &["0 passes", "1 to"]);
        refused(with("", "", "connections = 17", ""), "9:15", &["17", "1 to 16"]);
        refused(with("", "", "connections = 0", ""), "9:15", &["1 to 16"]);
        refused(with("", "", "device = \"/dev/sda\"", ""), "9:10", &["/dev/sda", "/dev/nbd0"]);
        refused(with("", "", "method = \"ublk\"", ""), "9:10", &["ublk", "auto"]);
        refused(with("", "", "method = \"magic\"", ""), "9:10", &["magic", "auto, nbd, fuse"]);
        refused(with("", "retry-for = \"90\"", "", ""), "7:13", &["`90`", "\"90s\""]);
        refused(with("", "endpoint-url = \"kms.example\"", "", ""), "7:16", &["https://"]);
        refused(with("", "kms-key = \"\"", "", ""), "7:11", &["alias/"]);
        refused(with("", "", "", "type = \"../evil\""), "12:8", &["../evil", "ext4"]);
        refused(with("", "", "", "options = [\"a,b\"]"), "12:12", &["a,b"]);
    }

    #[test]
    fn sources_are_known_and_take_their_own_keys_only() {
        let key = |lines: &str| parse(&format!("[volume]\ndevices = [\"/dev/vdb\"]\n[key]\n{lines}\n"));
        refused(key("source = \"vault\""), "4:10", &["vault", "aws, file"]);
        refused(key("source = \"ephemeral\""), "4:10", &["ephemeral", "not"]);
        refused(key("source = \"file\""), "4:10", &["path"]);
        refused(key("source = \"aws\""), "4:10", &["object"]);
        refused(key("source = \"aws\"\nobject = \"bucket/key\""), "5:10", &["bucket/key", "s3://BUCKET/KEY"]);
        refused(key("source = \"file\"\npath = \"/k\"\nregion = \"x\""), "6:10", &["region", "file"]);
        refused(key("source = \"aws\"\nobject = \"token\""), "5:10", &["kms-key"]);
        let token = key("source = \"aws\"\nobject = \"token\"\nkms-key = \"alias/x\"").unwrap();
        assert_eq!(token.strength, Strength::Random, "a secret of our own making");
        let luks1 = "[volume]\ndevices = [\"/d\"]\ntype = \"luks1\"\n[key]\nsource = \"aws\"\nobject = \"token\"\nkms-key = \"k\"";
        refused(parse(luks1), "3:8", &["token", "LUKS2"]);
        refused(key("source = \"aws\"\nobject = \"s3://bbb/k\"\npath = \"/k\""), "6:8", &["path", "aws"]);
        refused(key("source = \"file\"\npath = \"key\""), "5:8", &["absolute"]);
        let stdin = key("source = \"file\"\npath = \"-\"").unwrap();
        assert_eq!(stdin.key, KeyConfig::File(KeyFile::Stdin));
    }

    #[test]
    fn devices_are_one_absolute_path_or_the_instance_store() {
        let devices = |list: &str, more: &str| {
            parse(&format!("[volume]\ndevices = {list}\n{more}\n[key]\nsource = \"file\"\npath = \"/k\"\n"))
        };
        assert_eq!(devices("[\"instance-store\"]", "").unwrap().volume.device, Device::InstanceStore);
        refused(devices("[]", ""), "2:11", &["instance-store"]);
        refused(devices("[\"/dev/a\", \"/dev/b\"]", ""), "2:22", &["striping is not there yet"]);
        refused(devices("[\"vdb\"]", ""), "2:12", &["absolute"]);
        refused(devices("[\"instance-store\"]", "size = \"2G\""), "3:8", &["regular file"]);
    }

    #[test]
    fn luks1_has_512_byte_sectors_and_plain_any() {
        refused(with("type = \"luks1\"\nsector-size = 4096", "", "", ""), "4:15", &["LUKS1", "512"]);
        let of_kms = |more: &str| match with(&format!("type = \"plain\"\n{more}"), "", "", "").unwrap().key {
            KeyConfig::Aws(aws) => aws.raw_key,
            KeyConfig::File(_) => None,
        };
        assert_eq!(of_kms(""), Some(64));
        assert_eq!(of_kms("key-size = 256"), Some(32));
        assert_eq!(of_kms("hash = \"sha256\""), None);
        let plain = |more: &str| {
            let text =
                "[volume]\ndevices = [\"/dev/vdb\"]\ntype = \"plain\"\nMORE\n[key]\nsource = \"file\"\npath = \"/k\"\n";
            parse(&text.replace("MORE", more)).unwrap()
        };
        let large = plain("sector-size = 4096");
        assert_eq!(large.volume.sector_size, SectorSize::B4096);
        let placed =
            plain("offset = 2048\nskip = 16\nhash = \"sha256\"\nkey-size = 256\niv-large-sectors = true").volume.plain;
        assert_eq!((placed.place.offset, placed.place.skip.0, placed.key_len), (2048, 16, 32));
        assert!(placed.hash.is_some() && placed.iv_large_sectors);
        let wrong = |more: &str| with(&format!("type = \"plain\"\n{more}"), "", "", "");
        refused(wrong("sector-size = 4096\nskip = 9"), "5:8", &["multiple of 8"]);
        refused(wrong("hash = \"md5\""), "4:8", &["md5", "sha256"]);
        refused(wrong("key-size = 128"), "4:12", &["512", "256"]);
        refused(with("offset = 8", "", "", ""), "3:10", &["type = \"plain\"", "header"]);
        refused(with("type = \"luks1\"\nhash = \"sha1\"", "", "", ""), "4:8", &["plain"]);
        assert_eq!(plain("").volume.sector_size, SectorSize::B512);
    }

    #[test]
    fn each_limit_is_raised_and_lowered_by_itself() {
        let usual = LimitsConfig::default().limits();
        let limits = |more: &str| with(more, "", "", "").unwrap().volume.limits;
        let iterations = limits("max-kdf-iterations = 5000");
        assert_eq!((iterations.limits().iterations.get(), iterations.limits().argon2_time), (5000, usual.argon2_time));
        let passes = limits("max-kdf-passes = 7");
        assert_eq!((passes.limits().iterations, passes.limits().argon2_time), (usual.iterations, 7));
        let both = iterations.or(limits("max-kdf-iterations = 9\nmax-kdf-passes = 8")).limits();
        assert_eq!((both.iterations.get(), both.argon2_time), (5000, 8));
    }

    #[test]
    fn a_device_is_of_no_use_to_fuse() {
        refused(with("", "", "method = \"fuse\"\ndevice = \"/dev/nbd0\"", ""), "10:10", &["fuse"]);
    }

    #[test]
    fn one_endpoint_serves_both_services_unless_one_has_its_own() {
        let config = with("", "endpoint-url = \"https://a\"\nkms-endpoint-url = \"https://b\"", "", "").unwrap();
        let KeyConfig::Aws(key) = config.key else { panic!() };
        assert_eq!(key.s3_endpoint_url.as_deref(), Some("https://a"));
        assert_eq!(key.kms_endpoint_url.as_deref(), Some("https://b"));
        assert_eq!(key.retry_for, Duration::from_secs(120));
    }

    #[test]
    fn the_volume_is_named_after_the_file_unless_it_says_its_name() {
        let text = "[volume]\ndevices = [\"/dev/vdb\"]\n[key]\nsource = \"file\"\npath = \"/k\"\n";
        let error = Config::parse(text, Path::new("/etc/my volume.toml")).unwrap_err();
        assert!(error.to_string().contains("`my volume`"), "{error}");
        let named = text.replace("[volume]\n", "[volume]\nname = \"data\"\n");
        assert_eq!(Config::parse(&named, Path::new("/etc/my volume.toml")).unwrap().name.as_str(), "data");
    }

    #[test]
    fn a_file_that_is_no_toml_by_name_is_not_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume.key");
        fs::write(&path, "ThisIs-a-SecretPassword").unwrap();
        let error = Config::load(&path).unwrap_err().to_string();
        assert!(error.contains("volume.key") && error.contains("NAME.toml"), "{error}");
        assert!(!error.contains("Secret"), "{error}");
        let missing = dir.path().join("none.toml");
        assert!(Config::load(&missing).unwrap_err().to_string().contains("none.toml: No such file"));
    }

    proptest! {
        #[test]
        fn a_bitten_example_is_read_or_refused_with_a_place(at in 0usize..EXAMPLE.len(), with in "\\PC{0,3}") {
            let at = (0..=at).rev().find(|&at| EXAMPLE.is_char_boundary(at)).unwrap();
            let bitten = format!("{}{with}{}", &EXAMPLE[..at], EXAMPLE[at..].chars().skip(1).collect::<String>());
            if let Err(error) = parse(&bitten) {
                prop_assert!(error.starts_with("/etc/nbdcrypt/scratch.toml:"), "{error}");
            }
        }
    }
}

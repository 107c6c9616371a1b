//! The configuration of one volume: a TOML file, read once into types whose values are valid.
//!
//! `bootstrap/nbdcrypt.example.toml` shows every key with its default. Reading takes two steps, like `lowargs` and
//! `hiargs` in ripgrep. `raw` knows the keys and their TOML types, and refuses other keys and types. `meaning` checks
//! values, applies defaults, and knows which keys belong together. Both report the line and column of an error.

mod error;
mod meaning;
mod metrics;
mod raw;
mod value;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::luks::Limits;
use engine::sector::SectorSize;

use crate::attach::Method;
use crate::machine::selection::Selection;
use crate::machine::trust::{self, Distrust};
use crate::text;
use crate::volume::VolumeType;
use crate::volume::ephemeral::Lifetime;
use crate::volume::new_volume::Strength;
use crate::volume::plain::PlainVolume;

pub use error::{ConfigError, Fault};
pub use metrics::{MetricsAddress, MetricsConfig};
pub use value::{
    KeyFile, KmsArn, S3Object, SecretLocation, ServerSideEncryption, StoredAs, VolumeName, parse_duration, parse_size,
};

/// One volume: where its data is, what unlocks it, how the kernel sees it, and what is mounted where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `name` under `[volume]`, or else the file's name without `.toml`.
    pub name: VolumeName,
    /// `[volume]`.
    pub volume: VolumeConfig,
    /// `[key]`.
    pub key: KeyConfig,
    /// Whether the secret can be guessed. `random = true` under `[key]` says that it cannot. This decides how expensive the
    /// key derivation of a new keyslot is.
    pub strength: Strength,
    /// `[attach]`.
    pub attach: AttachConfig,
    /// `[filesystem]`. Without it, the volume is attached, and no filesystem is made or mounted.
    pub filesystem: Option<FilesystemConfig>,
    /// `[metrics]`. Without it, no metrics are served.
    pub metrics: Option<MetricsConfig>,
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`ConfigError`], if the file cannot be read, is not trusted, or contains an error. The error's text names its
    /// line and column.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        // If the user names a key file by mistake, no error may quote it.
        if path.extension().is_none_or(|extension| extension != "toml") {
            return Err(ConfigError::NotToml { path: path.to_owned() });
        }
        // The file is checked and read by its resolved path, so that no symbolic link can change between the check and the
        // read.
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let real = match trust::file_for_root(path) {
            Err(Distrust::Io { source, .. }) => return Err(read(source)),
            Err(why) => {
                return Err(ConfigError::Untrusted { path: path.to_owned(), what: "configuration", why });
            }
            Ok(real) => real,
        };
        let config = Self::parse(&fs::read_to_string(real).map_err(read)?, path)?;
        if let KeyConfig::File(KeyFile::Path(key)) = &config.key {
            match trust::file_for_root(key) {
                // The key file is checked again when it is read. Until then it may be missing.
                Ok(_) | Err(Distrust::Io { .. }) => {}
                Err(why) => return Err(ConfigError::Untrusted { path: key.clone(), what: "key file", why }),
            }
        }
        Ok(config)
    }

    /// Parses the text of a configuration. `path` is the file that contains it: errors name it, and its stem is the
    /// volume's name if `[volume]` has none.
    ///
    /// # Errors
    /// [`ConfigError`], if the text contains an error. The error's text names its line and column.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let fault = |span, message| ConfigError::At(Box::new(Fault::new(path, text, span, message)));
        let raw: raw::RawConfig = toml::from_str(text).map_err(|error| {
            fault(
                error.span().unwrap_or(0..0),
                suggestion(error.message()).unwrap_or_else(|| error.message().to_owned()),
            )
        })?;
        let named = raw.volume.name.is_some();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let from_stem = VolumeName::new(&stem);
        if !named && from_stem.is_none() {
            return Err(ConfigError::Name { path: path.to_owned(), stem: stem.into_owned() });
        }
        meaning::config(raw, from_stem).map_err(|wrong| fault(wrong.span, wrong.message))
    }
}

/// Returns serde's message about an unknown key, with the key that was probably meant.
fn suggestion(message: &str) -> Option<String> {
    // "unknown field `sizee`, expected one of `name`, `devices`, …"
    let list = message.strip_prefix("unknown field ")?;
    let mut names = list.split('`').skip(1).step_by(2);
    let typed = names.next()?;
    let meant = text::nearest(typed, names)?;
    Some(message.replacen(", expected", &format!(" (did you mean `{meant}`?), expected"), 1))
}

/// Where the volume's data is, and what kind of volume it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeConfig {
    /// The disks or files.
    pub devices: Selection,
    /// How long to wait for a disk that is not there yet.
    pub wait_for: Duration,
    /// The length in bytes of the sparse file that is made if the file in `devices` does not exist. It is a multiple of 4096.
    pub size: Option<u64>,
    /// The format that is made on a blank device, and expected on any other device.
    pub kind: VolumeType,
    /// The encryption unit for a new LUKS volume, if one is configured.
    pub sector_size: Option<SectorSize>,
    /// The disk or file with the LUKS header, if the header is not in `devices`. A missing file is made.
    pub header: Option<PathBuf>,
    /// The chunk in bytes of an array that is made on several blank disks.
    pub chunk_size: u64,
    /// How long the volume must be kept: `ephemeral`, and `source` under `[key]`.
    pub lifetime: Lifetime,
    /// The parameters of a plain volume, which has no header to store them.
    pub plain: PlainVolume,
    /// The maximum work that a header may ask for.
    pub limits: LimitsConfig,
}

impl VolumeConfig {
    /// The default of `wait-for`. The kernel and udev need a few seconds for the disks of a booting instance.
    pub const DEFAULT_WAIT_FOR: Duration = Duration::from_secs(30);
    /// The maximum of `wait-for`.
    pub const LONGEST_WAIT_FOR: Duration = Duration::from_secs(24 * 3600);
}

/// The limits on the work that a header may ask for, if the user sets them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitsConfig {
    /// The maximum memory that Argon2 may use for a keyslot, in KiB.
    pub kdf_memory: Option<u32>,
    /// The maximum number of iterations of PBKDF2.
    pub kdf_iterations: Option<NonZeroU32>,
    /// The maximum number of passes of Argon2 over the maximum memory. A keyslot that uses less memory may use more passes
    /// in proportion: half of the memory allows twice as many passes.
    pub kdf_passes: Option<NonZeroU32>,
}

impl LimitsConfig {
    /// Returns these limits. If a limit is not set, the one in `others` is used.
    pub fn or(self, others: Self) -> Self {
        Self {
            kdf_memory: self.kdf_memory.or(others.kdf_memory),
            kdf_iterations: self.kdf_iterations.or(others.kdf_iterations),
            kdf_passes: self.kdf_passes.or(others.kdf_passes),
        }
    }

    /// Returns the engine's default limits, overridden by these limits. If `kdf_memory` is not set, the limit on memory
    /// is at most `memory_kib`, the memory of the machine or control group. The kernel kills a program that uses more,
    /// without any message.
    pub fn limits(&self, memory_kib: u64) -> Limits {
        let usual = Limits::default();
        let available = u32::try_from(memory_kib).unwrap_or(u32::MAX);
        Limits {
            iterations: self.kdf_iterations.unwrap_or(usual.iterations),
            argon2_time: self.kdf_passes.map_or(usual.argon2_time, NonZeroU32::get),
            argon2_memory: self.kdf_memory.unwrap_or(usual.argon2_memory.min(available)),
            ..usual
        }
    }
}

/// What unlocks the volume.
#[expect(clippy::large_enum_variant, reason = "a process has only one, and seldom moves it")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyConfig {
    /// `source = "file"`.
    File(KeyFile),
    /// `source = "aws"`.
    Aws(AwsKeyConfig),
    /// `source = "ephemeral"`: a random key, which only the server has.
    Ephemeral,
}

/// A secret encrypted by KMS, and where its ciphertext is stored.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AwsKeyConfig {
    /// Where the ciphertext is stored: an object in S3, or a token in the header.
    pub object: SecretLocation,
    /// The KMS keys: each an id, an ARN, an alias or an alias ARN. The first key makes new ciphertexts, and `provision`
    /// requires one. A secret is decrypted with the first key that works. If the list is not empty, a ciphertext made under
    /// any other key is refused.
    pub kms_keys: Vec<String>,
    /// If set, the plaintext is the volume key itself, with this many bytes. Otherwise it is a text whose trailing
    /// newlines are ignored.
    pub raw_key: Option<usize>,
    /// The encryption context of the ciphertext. It is not secret: CloudTrail logs it.
    pub encryption_context: BTreeMap<String, String>,
    /// How `provision` and `key rewrap` store the object in S3.
    pub stored_as: StoredAs,
    /// Overrides `AWS_REGION`, the profile's region and the instance's.
    pub region: Option<String>,
    /// Overrides the bucket's region that S3 reports.
    pub s3_region: Option<String>,
    /// Overrides the region in the KMS key's ARN. Does not differ from an ARN's region if there are several keys.
    pub kms_region: Option<String>,
    /// Overrides `AWS_PROFILE`.
    pub profile: Option<String>,
    /// Overrides `AWS_ENDPOINT_URL_S3` and the like.
    pub s3_endpoint_url: Option<String>,
    /// Overrides `AWS_ENDPOINT_URL_KMS` and the like.
    pub kms_endpoint_url: Option<String>,
    /// How long to retry, counted from the first attempt. No new attempt starts after this time.
    pub retry_for: Duration,
}

impl AwsKeyConfig {
    /// The default of `retry-for`. The network of a booting instance needs much less time.
    pub const DEFAULT_RETRY_FOR: Duration = Duration::from_secs(120);
    /// The maximum number of KMS keys. Each is asked at least once, also after `retry-for`, so the number bounds that time.
    pub const MAX_KMS_KEYS: usize = 8;
}

/// How the kernel sees the volume as a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachConfig {
    /// The driver.
    pub method: Method,
    /// The number N of the `/dev/nbdN` to use. If `None`, the kernel chooses the first free one. Has no meaning for FUSE.
    pub nbd_device: Option<u32>,
    /// The number of sockets between the kernel and the server, 1 to 16. Each is one hardware queue of up to 128 requests.
    pub connections: u8,
    /// How long the kernel waits for the reply to a request before it gives up the connection and sends the request again on
    /// another connection. `None` waits forever, as dm-crypt does. Has no meaning for FUSE, which always waits.
    pub request_timeout: Option<Duration>,
}

impl AttachConfig {
    /// The default of `connections`: enough to keep a few cores busy.
    pub const DEFAULT_CONNECTIONS: u8 = 4;
    /// The maximum of `connections`. Each connection has its own thread and may hold a queue of 128 requests in locked
    /// memory. With more than 16 connections, a machine runs out of threads or locked memory before it gains throughput.
    pub const MAX_CONNECTIONS: u8 = 16;
    /// The maximum of `request-timeout`. The kernel's driver miscounts longer times.
    pub const LONGEST_REQUEST_TIMEOUT: Duration = Duration::from_secs(24 * 24 * 3600);
}

/// The filesystem that is made on a blank volume, and mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilesystemConfig {
    /// The filesystem type: the `X` of `mkfs.X` and of `mount -t X`.
    pub kind: String,
    /// The mountpoint, an absolute path. It is made if it is missing.
    pub mountpoint: PathBuf,
    /// Mount options as for `mount -o`, one per element.
    pub options: Vec<String>,
    /// Arguments for mkfs. They come before the device.
    pub mkfs_options: Vec<String>,
    /// Whether to protect the empty mountpoint, and the empty targets of `binds`, from writes while the volume is not up.
    pub protect_mountpoint: bool,
    /// The folders of the filesystem that are mounted elsewhere as well. No two of their targets, and no target and the
    /// mountpoint, lie within each other.
    pub binds: Vec<BindConfig>,
}

/// A folder of the filesystem that is mounted elsewhere as well (a bind mount).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BindConfig {
    /// The folder, as a path inside the filesystem: relative, and without `.` and `..`. It is made if it is missing.
    pub folder: PathBuf,
    /// Where the folder is mounted, an absolute path without `.` and `..`. It is made if it is missing.
    pub target: PathBuf,
}

impl FilesystemConfig {
    /// The default of `type`.
    pub const DEFAULT_KIND: &'static str = "ext4";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::process;
    use proptest::prelude::*;

    const EXAMPLE: &str = include_str!("../../nbdcrypt.example.toml");

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/nbdcrypt/scratch.toml")).map_err(|error| error.to_string())
    }

    /// Parses a valid configuration with lines appended to its sections.
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
                    devices: Selection::Paths(vec!["/dev/vdb".into()]),
                    wait_for: Duration::from_secs(30),
                    size: None,
                    kind: VolumeType::Luks2,
                    sector_size: None,
                    header: None,
                    chunk_size: engine::raid::DEFAULT_CHUNK,
                    lifetime: Lifetime::Lasting,
                    plain: PlainVolume::default(),
                    limits: LimitsConfig::default(),
                },
                key: KeyConfig::File(KeyFile::Path("/etc/key".into())),
                strength: Strength::Guessable,
                attach: AttachConfig { method: Method::Auto, nbd_device: None, connections: 4, request_timeout: None },
                filesystem: None,
                metrics: None,
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
    fn commented_out_keys_of_the_example_are_defaults() {
        // "#key = value" is a default, "# text" is a comment, "#! key = value" is an example that is not the default.
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
        // serde lists the keys of a section if it finds an unknown one.
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
    fn an_unknown_key_is_reported_with_position_and_known_keys() {
        refused(with("sizee = \"2G\"", "", "", ""), "3:1", &["`sizee`", "`devices`", "`size`", "3 | sizee = \"2G\"\n"]);
        refused(parse("[volum]\n"), "1:2", &["`volum`", "`volume`", "`key`", "`attach`", "`filesystem`"]);
        refused(with("", "obejct = 1", "", ""), "7:1", &["`obejct`", "did you mean `object`?"]);
        refused(with("", "", "methode = 1", ""), "9:1", &["did you mean `method`?"]);
        refused(parse("[volumes]\n"), "1:2", &["did you mean `volume`?"]);
        let far = with("colour = 1", "", "", "").unwrap_err();
        assert!(!far.contains("did you mean"), "{far}");
    }

    #[test]
    fn a_wrong_type_is_reported_with_its_position() {
        refused(with("size = true", "", "", ""), "3:8", &["boolean `true`", "expected a size such as \"2G\""]);
        refused(with("size = -5", "", "", ""), "3:8", &["`-5`", "expected a size"]);
        refused(with("", "encryption-context = \"x\"", "", ""), "7:22", &["string", "expected a map"]);
        refused(with("", "encryption-context = { a = 1 }", "", ""), "7:28", &["integer `1`", "expected a string"]);
        refused(with("", "", "connections = \"4\"", ""), "9:15", &["string", "expected u64"]);
    }

    #[test]
    fn a_toml_error_is_reported_with_its_position() {
        refused(with("name = ", "", "", ""), "3:8", &["expected"]);
        refused(with("devices = []", "", "", ""), "3:1", &["duplicate key"]);
        refused(parse("[key]\nsource = \"file\"\npath = \"/k\"\n"), "1:1", &["missing field `volume`"]);
    }

    #[test]
    fn a_value_out_of_range_is_reported_with_its_position() {
        refused(with("size = \"2GB\"", "", "", ""), "3:8", &["`2GB`", "K, M, G, T"]);
        refused(with("size = \"5000\"", "", "", ""), "3:8", &["4096"]);
        refused(with("size = 0", "", "", ""), "3:8", &["4096"]);
        refused(with("name = \"../x\"", "", "", ""), "3:8", &["`../x`"]);
        refused(with("sector-size = 520", "", "", ""), "3:15", &["520", "512, 1024, 2048, 4096"]);
        refused(with("type = \"bitlocker\"", "", "", ""), "3:8", &["bitlocker", "luks2, luks1, plain"]);
        assert_eq!(with("type = \"LUKS1\"\nsize = \"64MiB\"", "", "", "").unwrap().volume.kind, VolumeType::Luks1);
        refused(with("header = \"x\"", "", "", ""), "3:10", &["`x`", "absolute"]);
        refused(with("header = \"/dev/vdb\"", "", "", ""), "3:10", &["the disk itself", "leave it out"]);
        refused(with("type = \"plain\"\nheader = \"/x\"", "random = true", "", ""), "4:10", &["plain", "no header"]);
        refused(with("max-kdf-memory = \"8T\"", "", "", ""), "3:18", &["`8T`", "4095G"]);
        refused(with("max-kdf-iterations = 0", "", "", ""), "3:22", &["0", "1 to"]);
        refused(with("max-kdf-passes = 0", "", "", ""), "3:18", &["0 passes", "1 to"]);
        refused(with("", "", "connections = 17", ""), "9:15", &["17", "1 to 16"]);
        refused(with("", "", "connections = 0", ""), "9:15", &["1 to 16"]);
        for wrong in ["0s", "30", "never", "600h"] {
            refused(with("", "", &format!("request-timeout = \"{wrong}\""), ""), "9:19", &[wrong, "none", "576h"]);
        }
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
    fn data_is_given_up_only_if_the_file_says_so() {
        let with =
            |volume: &str, key: &str| parse(&format!("[volume]\ndevices = [\"/dev/vdb\"]\n{volume}\n[key]\n{key}\n"));
        let (ephemeral, file) = ("source = \"ephemeral\"", "source = \"file\"\npath = \"/k\"");
        let lifetime = |volume, key| with(volume, key).unwrap().volume.lifetime;
        assert_eq!(lifetime("ephemeral = true", ephemeral), Lifetime::OfServer);
        assert_eq!(lifetime("ephemeral = true", file), Lifetime::OfDisks);
        assert_eq!(lifetime("ephemeral = true\ntype = \"luks1\"", file), Lifetime::OfDisks);
        assert_eq!(lifetime("ephemeral = false", file), Lifetime::Lasting);
        assert_eq!(with("ephemeral = true", ephemeral).unwrap().strength, Strength::Random);
        for volume in ["", "ephemeral = false"] {
            refused(with(volume, ephemeral), "5:10", &["`ephemeral = true` under [volume]", "whenever it comes up"]);
        }
        refused(with("ephemeral = true\ntype = \"plain\"", file), "3:13", &["plain", "no header"]);
        refused(with("ephemeral = true\ntype = \"luks1\"", ephemeral), "4:8", &["LUKS2", "leave `type` out"]);
        refused(
            with("ephemeral = true", "source = \"ephemeral\"\nrandom = true"),
            "5:10",
            &["`random`", "leave it out"],
        );
        refused(with("ephemeral = true", "source = \"ephemeral\"\npath = \"/k\""), "6:8", &["path", "ephemeral"]);
        refused(with("ephemeral = true", "source = \"ephemeral\"\nkms-key = \"k\""), "6:11", &["kms-key", "ephemeral"]);
        refused(with("ephemeral = true\nmax-kdf-passes = 9", ephemeral), "4:18", &["no keyslot"]);
    }

    #[test]
    fn each_source_accepts_only_its_own_keys() {
        let key = |lines: &str| parse(&format!("[volume]\ndevices = [\"/dev/vdb\"]\n[key]\n{lines}\n"));
        refused(key("source = \"vault\""), "4:10", &["vault", "aws, file, ephemeral"]);
        refused(key("source = \"file\""), "4:10", &["path"]);
        refused(key("source = \"aws\""), "4:10", &["object"]);
        refused(key("source = \"aws\"\nobject = \"bucket/key\""), "5:10", &["bucket/key", "s3://BUCKET/KEY"]);
        refused(key("source = \"file\"\npath = \"/k\"\nregion = \"x\""), "6:10", &["region", "file"]);
        refused(key("source = \"aws\"\nobject = \"token\""), "5:10", &["kms-key"]);
        let token = key("source = \"aws\"\nobject = \"token\"\nkms-key = \"alias/x\"").unwrap();
        assert_eq!(token.strength, Strength::Random, "nbdcrypt makes this secret");
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
        assert_eq!(devices("[\"instance-store\"]", "").unwrap().volume.devices, Selection::InstanceStore);
        refused(devices("[\"instance-store\", \"/dev/a\"]", ""), "2:30", &["every instance-store disk"]);
        refused(devices("[]", ""), "2:11", &["instance-store"]);
        let both = devices("[\"/dev/a\", \"/dev/b\"]", "chunk-size = \"64K\"").unwrap().volume;
        assert_eq!(both.devices, Selection::Paths(vec!["/dev/a".into(), "/dev/b".into()]));
        assert_eq!(both.chunk_size, 64 << 10);
        refused(devices("[\"/dev/a\", \"/dev/a\"]", ""), "2:22", &["`/dev/a` twice"]);
        refused(devices("[\"/a\", \"/b\"]", "size = \"2G\""), "3:8", &["a single file"]);
        refused(devices("[\"/dev/a\"]", "chunk-size = \"64K\""), "3:14", &["a single disk"]);
        for wrong in ["2K", "48K", "2G"] {
            let chunk = format!("chunk-size = \"{wrong}\"");
            refused(devices("[\"instance-store\"]", &chunk), "3:14", &["powers of two"]);
        }
        refused(devices("[\"vdb\"]", ""), "2:12", &["absolute"]);
        refused(devices("[\"instance-store\"]", "size = \"2G\""), "3:8", &["regular file"]);
    }

    #[test]
    fn a_serial_number_selects_the_disk() {
        let volume = |lines: &str| parse(&format!("[volume]\n{lines}\n[key]\nsource = \"file\"\npath = \"/k\"\n"));
        let selected = |lines: &str| volume(lines).unwrap().volume.devices;
        let serials = |serials: &[&str], instance_store: bool| {
            let serials = serials.iter().map(|serial| (*serial).to_owned()).collect();
            Selection::Serials { serials, instance_store }
        };
        assert_eq!(selected("serial = \"AWS1\""), serials(&["AWS1"], false));
        assert_eq!(selected("serial = [\"B\", \"A\"]"), serials(&["B", "A"], false));
        assert_eq!(selected("devices = [\"/dev/nvme1n1\"]\nserial = \"AWS1\""), serials(&["AWS1"], false));
        assert_eq!(selected("devices = [\"instance-store\"]\nserial = [\"AWS1\"]"), serials(&["AWS1"], true));
        refused(volume(""), "1:1", &["`devices`", "`serial`"]);
        refused(volume("serial = 7"), "2:10", &["integer `7`", "a serial number such as"]);
        refused(volume("serial = []"), "2:10", &["names no disk"]);
        refused(volume("serial = \"\""), "2:10", &["not a serial number"]);
        refused(volume("serial = \"a\\nb\""), "2:10", &["not a serial number"]);
        refused(volume("serial = [\"A\", \"A\"]"), "2:10", &["`A` twice"]);
        refused(volume("serial = \"A\"\nsize = \"2G\""), "3:8", &["regular file"]);
        refused(volume("devices = [\"/secretfs\"]\nserial = \"A\""), "3:10", &["/secretfs", "not in /dev"]);
        refused(volume("devices = [\"/dev/a\"]\nserial = [\"A\", \"B\"]"), "3:10", &["2 serial numbers", "1 device"]);
        for part in ["/dev/nvme1n1p1", "/dev/sda1", "/dev/disk/by-id/nvme-X-part1", "/dev/disk/by-partuuid/1"] {
            refused(volume(&format!("devices = [\"{part}\"]\nserial = \"A\"")), "3:10", &[part, "partition"]);
        }
        for disk in ["/dev/nvme1n1", "/dev/sda", "/dev/vdb", "/dev/disk/by-id/nvme-X", "/dev/xvda", "/dev/mmcblk0"] {
            volume(&format!("devices = [\"{disk}\"]\nserial = \"A\"")).unwrap();
        }
    }

    #[test]
    fn the_wait_for_a_disk_is_a_duration() {
        let waits = |text: &str| with(&format!("wait-for = \"{text}\""), "", "", "");
        assert_eq!(waits("0s").unwrap().volume.wait_for, Duration::ZERO);
        assert_eq!(waits("5m").unwrap().volume.wait_for, Duration::from_secs(300));
        for wrong in ["5", "forever", "25h"] {
            refused(waits(wrong), "3:12", &[wrong, "\"30s\""]);
        }
    }

    #[test]
    fn luks1_has_only_512_byte_sectors_and_plain_has_any() {
        refused(with("type = \"luks1\"\nsector-size = 4096", "", "", ""), "4:15", &["LUKS1", "512"]);
        let of_kms = |more: &str| match with(&format!("type = \"plain\"\n{more}"), "", "", "").unwrap().key {
            KeyConfig::Aws(aws) => aws.raw_key,
            KeyConfig::File(_) | KeyConfig::Ephemeral => None,
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
        assert_eq!(large.volume.plain.data.sector_size, SectorSize::B4096);
        let placed =
            plain("offset = 2048\nskip = 16\nhash = \"sha256\"\nkey-size = 256\niv-large-sectors = true").volume.plain;
        assert_eq!((placed.data.offset, placed.data.skip.0, placed.key_len), (2048, 16, 32));
        assert!(placed.hash.is_some() && placed.iv_large_sectors);
        let wrong = |more: &str| with(&format!("type = \"plain\"\n{more}"), "", "", "");
        refused(wrong("sector-size = 4096\nskip = 9"), "5:8", &["multiple of 8"]);
        refused(wrong("hash = \"md5\""), "4:8", &["md5", "sha256"]);
        refused(wrong("key-size = 128"), "4:12", &["512", "256"]);
        refused(with("offset = 8", "", "", ""), "3:10", &["type = \"plain\"", "header"]);
        refused(with("type = \"luks1\"\nhash = \"sha1\"", "", "", ""), "4:8", &["plain"]);
        assert_eq!(plain("").volume.plain.data.sector_size, SectorSize::B512);
        let hashed = plain("hash = \"sha256\"\nhash-key-file = true\nkeyfile-size = 20").volume.plain;
        assert_eq!((hashed.hash_key_file, hashed.keyfile_size), (true, Some(20)));
        assert!(!plain("hash = \"sha256\"").volume.plain.hash_key_file);
        refused(wrong("hash-key-file = true"), "4:17", &["hash"]);
        refused(wrong("keyfile-size = 0"), "4:16", &["bytes"]);
        refused(with("keyfile-size = 64", "", "", ""), "3:16", &["type = \"plain\""]);
    }

    #[test]
    fn each_limit_is_set_by_itself() {
        const AMPLE: u64 = 1 << 30;
        let usual = LimitsConfig::default().limits(AMPLE);
        let limits = |more: &str| with(more, "", "", "").unwrap().volume.limits;
        let iterations = limits("max-kdf-iterations = 5000");
        assert_eq!(
            (iterations.limits(AMPLE).iterations.get(), iterations.limits(AMPLE).argon2_time),
            (5000, usual.argon2_time)
        );
        let passes = limits("max-kdf-passes = 7");
        assert_eq!((passes.limits(AMPLE).iterations, passes.limits(AMPLE).argon2_time), (usual.iterations, 7));
        let both = iterations.or(limits("max-kdf-iterations = 9\nmax-kdf-passes = 8")).limits(AMPLE);
        assert_eq!((both.iterations.get(), both.argon2_time), (5000, 8));
    }

    #[test]
    fn binds_are_folders_of_the_volume_on_places_apart() {
        let binds = |text: &str| with("", "", "", &format!("bind = {{ {text} }}"));
        let bind = |folder: &str, target: &str| BindConfig { folder: folder.into(), target: target.into() };
        let two = binds("kubelet = \"/var/lib/kubelet/\", \"a/b\" = \"/srv/./b\"").unwrap().filesystem.unwrap().binds;
        assert_eq!(two, [bind("a/b", "/srv/b"), bind("kubelet", "/var/lib/kubelet")]);
        assert_eq!(with("", "", "", "").unwrap().filesystem.unwrap().binds, []);
        let table = with("", "", "", "[filesystem.bind]\ncontainerd = \"/var/lib/containerd\"").unwrap();
        assert_eq!(table.filesystem.unwrap().binds, [bind("containerd", "/var/lib/containerd")]);
        for folder in ["", "/etc", "..", "a/../../b", ".", "./a", "a//../b", "a\\u0000b"] {
            refused(binds(&format!("\"{folder}\" = \"/srv/a\"")), "12:10", &["inside the volume", "containerd"]);
        }
        refused(binds("a = \"srv/a\""), "12:14", &["absolute"]);
        refused(binds("a = \"/srv/../a\""), "12:14", &["`..`"]);
        // One mount would hide the other.
        for (target, other) in [("/", "/mnt/x"), ("/mnt", "/mnt/x"), ("/mnt/x", "/mnt/x"), ("/mnt/x/a", "/mnt/x")] {
            refused(binds(&format!("a = \"{target}\"")), "12:14", &[target, other, "hide"]);
        }
        for (first, second) in [("/srv/a", "/srv/a"), ("/srv/a", "/srv/a/b"), ("/srv/b/c", "/srv/b/")] {
            let column = 22 + first.len();
            refused(binds(&format!("a = \"{first}\", b = \"{second}\"")), &format!("12:{column}"), &[first, "hide"]);
        }
    }

    #[test]
    fn a_request_waits_forever_unless_a_timeout_is_set() {
        let timeout = |attach: &str| with("", "", attach, "").unwrap().attach.request_timeout;
        assert_eq!(timeout(""), None);
        assert_eq!(timeout("request-timeout = \"none\""), None);
        assert_eq!(timeout("request-timeout = \"5m\""), Some(Duration::from_secs(300)));
    }

    #[test]
    fn a_device_is_refused_for_fuse() {
        refused(with("", "", "method = \"fuse\"\ndevice = \"/dev/nbd0\"", ""), "10:10", &["fuse"]);
    }

    #[test]
    fn a_kms_key_is_one_text_or_a_list() {
        let keys = |line: &str| match with("", line, "", "").unwrap().key {
            KeyConfig::Aws(aws) => aws.kms_keys,
            KeyConfig::File(_) | KeyConfig::Ephemeral => panic!(),
        };
        assert_eq!(keys(""), [""; 0]);
        assert_eq!(keys("kms-key = \"alias/x\""), ["alias/x"]);
        let list = "kms-key = [\"arn:aws:kms:eu-west-1:1:key/mrk-1\", \"arn:aws:kms:us-east-1:1:key/mrk-1\"]";
        assert_eq!(keys(list), ["arn:aws:kms:eu-west-1:1:key/mrk-1", "arn:aws:kms:us-east-1:1:key/mrk-1"]);
        refused(with("", "kms-key = []", "", ""), "7:11", &["0 KMS keys", "1 to 8"]);
        refused(with("", "kms-key = [\"a\", \"\"]", "", ""), "7:17", &["alias/NAME"]);
        refused(with("", "kms-key = [\"a\", \"a\"]", "", ""), "7:17", &["`a`", "twice"]);
        refused(with("", "kms-key = [\"a\", 1]", "", ""), "7:17", &["integer `1`"]);
        refused(with("", "kms-key = 1", "", ""), "7:11", &["a KMS key such as"]);
        // One region for keys in several regions.
        refused(with("", &format!("kms-region = \"eu-west-1\"\n{list}"), "", ""), "7:14", &["us-east-1", "kms-region"]);
        let single = with("", "kms-region = \"a-1\"\nkms-key = \"arn:aws:kms:b-1:1:key/2\"", "", "");
        assert!(single.is_ok());
    }

    #[test]
    fn an_object_may_be_encrypted_and_tagged() {
        let stored_as = |lines: &str| match with("", lines, "", "").unwrap().key {
            KeyConfig::Aws(aws) => aws.stored_as,
            KeyConfig::File(_) | KeyConfig::Ephemeral => panic!(),
        };
        assert_eq!(stored_as(""), StoredAs::default());
        assert_eq!(stored_as("sse = \"AES256\"").encryption, Some(ServerSideEncryption::Aes256));
        assert_eq!(stored_as("sse = \"aws:kms\"").encryption, Some(ServerSideEncryption::Kms(None)));
        let dsse = stored_as("sse = \"aws:kms:dsse\"\nsse-kms-key-id = \"1234\"\ntags = { team = \"a b\" }");
        assert_eq!(dsse.encryption, Some(ServerSideEncryption::KmsDsse(Some("1234".to_owned()))));
        assert_eq!(dsse.tags, [("team".to_owned(), "a b".to_owned())].into());
        refused(with("", "sse = \"aes256\"", "", ""), "7:7", &["`aes256`", "AES256, aws:kms, aws:kms:dsse"]);
        refused(with("", "sse-kms-key-id = \"1\"", "", ""), "7:18", &["sse = \"aws:kms\""]);
        refused(with("", "sse = \"AES256\"\nsse-kms-key-id = \"1\"", "", ""), "8:18", &["sse = \"aws:kms\""]);
        for alias in ["alias/x", "arn:aws:kms:eu-west-1:1:alias/x"] {
            let lines = format!("sse = \"aws:kms\"\nsse-kms-key-id = \"{alias}\"");
            refused(with("", &lines, "", ""), "8:18", &[alias, "an alias", "ARN"]);
        }
        refused(with("", "sse = \"aws:kms\"\nsse-kms-key-id = \"\"", "", ""), "8:18", &["ARN"]);
        refused(with("", "tags = { \"aws:x\" = \"1\" }", "", ""), "7:10", &["aws:x", "aws:"]);
        refused(with("", "tags = { a = \"x;y\" }", "", ""), "7:14", &["x;y", "letters"]);
        refused(with("", &format!("tags = {{ a = \"{}\" }}", "x".repeat(257)), "", ""), "7:14", &["256"]);
        refused(with("", &format!("tags = {{ {} = \"\" }}", "x".repeat(129)), "", ""), "7:10", &["128"]);
        let eleven: Vec<String> = (0..11).map(|number| format!("t{number} = \"\"")).collect();
        refused(with("", &format!("tags = {{ {} }}", eleven.join(", ")), "", ""), "7:8", &["11", "10"]);
        let token = |line: &str| {
            parse(&format!(
                "[volume]\ndevices = [\"/d\"]\n[key]\nsource = \"aws\"\nobject = \"token\"\nkms-key = \"k\"\n{line}\n"
            ))
        };
        refused(token("sse = \"AES256\""), "7:7", &["sse", "object in S3"]);
        refused(token("tags = { a = \"b\" }"), "7:8", &["tags", "object in S3"]);
    }

    #[test]
    fn an_endpoint_is_for_both_services_unless_overridden() {
        let config = with("", "endpoint-url = \"https://a\"\nkms-endpoint-url = \"https://b\"", "", "").unwrap();
        let KeyConfig::Aws(key) = config.key else { panic!() };
        assert_eq!(key.s3_endpoint_url.as_deref(), Some("https://a"));
        assert_eq!(key.kms_endpoint_url.as_deref(), Some("https://b"));
        assert_eq!(key.retry_for, Duration::from_secs(120));
    }

    #[test]
    fn a_volume_is_named_after_its_file_by_default() {
        let text = "[volume]\ndevices = [\"/dev/vdb\"]\n[key]\nsource = \"file\"\npath = \"/k\"\n";
        let error = Config::parse(text, Path::new("/etc/my volume.toml")).unwrap_err();
        assert!(error.to_string().contains("`my volume`"), "{error}");
        let named = text.replace("[volume]\n", "[volume]\nname = \"data\"\n");
        assert_eq!(Config::parse(&named, Path::new("/etc/my volume.toml")).unwrap().name.as_str(), "data");
    }

    #[test]
    fn a_file_without_a_toml_name_is_not_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume.key");
        fs::write(&path, "ThisIs-a-SecretPassword").unwrap();
        let error = Config::load(&path).unwrap_err().to_string();
        assert!(error.contains("volume.key") && error.contains("NAME.toml"), "{error}");
        assert!(!error.contains("Secret"), "{error}");
        let missing = dir.path().join("none.toml");
        assert!(Config::load(&missing).unwrap_err().to_string().contains("none.toml: No such file"));
    }

    /// nbdcrypt refuses such a file only if it runs as root. Other users may trust the files that they like.
    #[test]
    fn a_file_that_others_may_change_is_refused_for_root() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (path, key) = (dir.path().join("scratch.toml"), dir.path().join("key"));
        let text =
            format!("[volume]\ndevices = [\"/dev/vdb\"]\n[key]\nsource = \"file\"\npath = \"{}\"\n", key.display());
        fs::write(&path, text).unwrap();
        let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        chmod(&path, 0o644);
        // A missing key file is accepted.
        Config::load(&path).unwrap();
        fs::write(&key, "secret").unwrap();
        for (file, what) in [(&path, "configuration"), (&key, "key file")] {
            chmod(file, 0o646);
            match Config::load(&path) {
                Ok(_) => assert!(!process::is_root()),
                Err(error) => {
                    let error = error.to_string();
                    let words = [what, file.to_str().unwrap(), "chmod go-w"];
                    assert!(process::is_root() && words.iter().all(|word| error.contains(word)), "{error}");
                }
            }
            chmod(file, 0o600);
        }
        chmod(dir.path(), 0o777);
        assert_eq!(Config::load(&path).is_err(), process::is_root());
        chmod(dir.path(), 0o1777);
        Config::load(&path).unwrap();
    }

    proptest! {
        #[test]
        fn a_damaged_example_is_read_or_refused_with_a_position(at in 0usize..EXAMPLE.len(), with in "\\PC{0,3}") {
            let at = (0..=at).rev().find(|&at| EXAMPLE.is_char_boundary(at)).unwrap();
            let damaged = format!("{}{with}{}", &EXAMPLE[..at], EXAMPLE[at..].chars().skip(1).collect::<String>());
            if let Err(error) = parse(&damaged) {
                prop_assert!(error.starts_with("/etc/nbdcrypt/scratch.toml:"), "{error}");
            }
        }
    }
}

//! Parses values inside the configuration's strings: sizes, durations, names, S3 objects.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The name of a volume. Runtime files, the NBD export and `nbdcrypt down NAME` use it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

impl VolumeName {
    /// The longest name in bytes. With folder and suffix, it must fit into the path of a unix socket, which has at most
    /// 107 bytes.
    pub const MAX_LEN: usize = 64;

    /// Returns the name if it is valid: 1 to 64 characters of `A-Z a-z 0-9 . _ -`, and the first character is neither
    /// `.` nor `-`. As a file name, it is neither hidden nor mistaken for an option.
    pub fn new(name: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let valid = (1..=Self::MAX_LEN).contains(&name.len())
            && name.chars().all(allowed)
            && !name.starts_with('.')
            && !name.starts_with('-');
        valid.then(|| Self(name.to_owned()))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An object in S3: `s3://bucket/key`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct S3Object {
    /// The bucket's name or access point alias.
    pub bucket: String,
    /// The object's key, without a leading slash.
    pub key: String,
}

impl S3Object {
    /// Parses `s3://bucket/key` as `aws s3 cp` does: the bucket ends at the first slash.
    pub fn parse(uri: &str) -> Option<Self> {
        let (bucket, key) = uri.strip_prefix("s3://")?.split_once('/')?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        // S3 keys have 1 to 1024 bytes. A key that ends in a slash is a folder in S3's console, so it is not a secret.
        let valid = (3..=255).contains(&bucket.len())
            && bucket.chars().all(allowed)
            && (1..=1024).contains(&key.len())
            && !key.ends_with('/');
        valid.then(|| Self { bucket: bucket.to_owned(), key: key.to_owned() })
    }
}

impl fmt::Display for S3Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

/// The ARN of a KMS key or alias: `arn:PARTITION:kms:REGION:ACCOUNT:RESOURCE` (Service Authorization Reference, "Resource
/// types defined by AWS Key Management Service").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KmsArn<'a> {
    /// The partition, such as `aws` or `aws-cn`.
    pub partition: &'a str,
    /// The region. The ARN of a multi-Region key's replica contains the replica's own region.
    pub region: &'a str,
    /// The number of the account.
    pub account: &'a str,
    /// `key/ID` or `alias/NAME`.
    pub resource: &'a str,
}

impl<'a> KmsArn<'a> {
    /// Splits an ARN into its parts. Returns `None` for a text that is not an ARN of KMS.
    pub fn parse(text: &'a str) -> Option<Self> {
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        match parts[..] {
            ["arn", partition, "kms", region, account, resource] => Some(Self { partition, region, account, resource }),
            _ => None,
        }
    }
}

/// How S3 encrypts an object at rest (S3 API Reference, `PutObject`, `x-amz-server-side-encryption`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerSideEncryption {
    /// `AES256`: with S3's own key.
    Aes256,
    /// `aws:kms`: with this KMS key, or else with the account's key for S3.
    Kms(Option<String>),
    /// `aws:kms:dsse`: twice, with this KMS key, or else with the account's key for S3.
    KmsDsse(Option<String>),
}

impl ServerSideEncryption {
    /// Returns the KMS key, if one is named.
    pub fn kms_key(&self) -> Option<&str> {
        match self {
            Self::Aes256 => None,
            Self::Kms(key) | Self::KmsDsse(key) => key.as_deref(),
        }
    }
}

/// How the object with a ciphertext is stored in S3.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredAs {
    /// The encryption at rest. `None` leaves it to the bucket.
    pub encryption: Option<ServerSideEncryption>,
    /// The object's tags.
    pub tags: BTreeMap<String, String>,
}

/// Where the ciphertext of a secret is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecretLocation {
    /// An object in S3.
    Object(S3Object),
    /// A token in the volume's own LUKS2 header.
    Token,
}

impl fmt::Display for SecretLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(object) => object.fmt(f),
            Self::Token => f.write_str("the token in the LUKS2 header"),
        }
    }
}

impl From<S3Object> for SecretLocation {
    fn from(object: S3Object) -> Self {
        Self::Object(object)
    }
}

/// Where key bytes come from: a file, or standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyFile {
    /// Standard input, written as `-`.
    Stdin,
    /// A file, by its absolute path.
    Path(PathBuf),
}

impl fmt::Display for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Parses a size in bytes: `2G`, `512M`, `64K`, `1T` (powers of 1024, also as `2GiB` and in lower case), or digits only.
/// Returns `None` if the text is not a size, or the size does not fit into 64 bits. `2GB` is not a size, since for some
/// programs it is a power of 1000.
pub fn parse_size(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let units = [("", 0), ("k", 10), ("m", 20), ("g", 30), ("t", 40)];
    let digits = lower.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let unit = &lower[digits.len()..];
    let prefix = unit.strip_suffix("ib").filter(|prefix| !prefix.is_empty()).unwrap_or(unit);
    let (_, shift) = units.into_iter().find(|(name, _)| *name == prefix)?;
    parse_digits(digits)?.checked_mul(1 << shift)
}

/// Parses a duration such as `90s`, `2m` or `1h`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (at, unit) = text.char_indices().last()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return None,
    };
    parse_digits(&text[..at])?.checked_mul(seconds).map(Duration::from_secs)
}

/// Returns the number of an NBD device: 7 for `/dev/nbd7`.
pub(super) fn parse_nbd_device(path: &str) -> Option<u32> {
    parse_digits(path.strip_prefix("/dev/nbd")?).and_then(|index| u32::try_from(index).ok())
}

/// Parses decimal digits only. `u64::from_str` would accept a leading `+`.
fn parse_digits(digits: &str) -> Option<u64> {
    if digits.chars().all(|c| c.is_ascii_digit()) { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_binary() {
        assert_eq!(parse_size("2G"), Some(2 << 30));
        assert_eq!(parse_size("1T"), Some(1 << 40));
        assert_eq!(parse_size("64K"), Some(65536));
        assert_eq!(parse_size("1048576"), Some(1 << 20));
        for same in ["64M", "64m", "64MiB", "64mib", "65536K", "67108864"] {
            assert_eq!(parse_size(same), Some(64 << 20), "{same}");
        }
        for wrong in
            ["", "G", "GiB", "2 G", "2GB", "2ib", "2iB", "2B", "2.5G", "-1G", "+1G", "16777216T", "2Gi", "2\u{212a}"]
        {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("90s"), Some(Duration::from_secs(90)));
        assert_eq!(parse_duration("2m"), Some(Duration::from_secs(120)));
        assert_eq!(parse_duration("1h"), Some(Duration::from_secs(3600)));
        for wrong in ["", "s", "90", "1d", "-1s", "1.5s", "18446744073709551615h"] {
            assert_eq!(parse_duration(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_volume_name_is_a_plain_file_name() {
        for name in ["scratch", "a", "Data.2024_x-1"] {
            assert_eq!(VolumeName::new(name).unwrap().as_str(), name);
        }
        for name in ["", ".", "..", ".hidden", "-o", "a/b", "a b", "ä", "a\0b", &"x".repeat(65)] {
            assert_eq!(VolumeName::new(name), None, "{name:?}");
        }
    }

    #[test]
    fn an_object_is_a_bucket_and_a_key() {
        let object = S3Object::parse("s3://my-bucket/secrets/Luks Key").unwrap();
        assert_eq!((object.bucket.as_str(), object.key.as_str()), ("my-bucket", "secrets/Luks Key"));
        for wrong in
            ["my-bucket/key", "s3://my-bucket", "s3://my-bucket/", "s3:///key", "S3://my-bucket/key", "s3://b/k/"]
        {
            assert_eq!(S3Object::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn partitions_and_other_devices_are_not_nbd_devices() {
        assert_eq!(parse_nbd_device("/dev/nbd0"), Some(0));
        assert_eq!(parse_nbd_device("/dev/nbd15"), Some(15));
        for wrong in ["/dev/nbd", "/dev/nbd0p1", "nbd0", "/dev/sda", "/dev/nbd4294967296"] {
            assert_eq!(parse_nbd_device(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,24}") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
            let _ = parse_nbd_device(&text);
            if let Some(object) = S3Object::parse(&text) {
                prop_assert_eq!(object.to_string(), text.clone());
            }
            if let Some(name) = VolumeName::new(&text) {
                let path = std::path::Path::new("/x").join(name.as_str());
                prop_assert_eq!(path.file_name().unwrap(), text.as_str());
            }
        }

        #[test]
        fn every_byte_count_reads_as_itself(bytes: u64) {
            prop_assert_eq!(parse_size(&bytes.to_string()), Some(bytes));
        }
    }
}

//! The configuration as it is written: every key with its TOML type. The module `meaning` interprets the values and checks
//! which keys belong together.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use toml::Spanned;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    pub(super) volume: RawVolume,
    pub(super) key: RawKey,
    #[serde(default)]
    pub(super) attach: RawAttach,
    pub(super) filesystem: Option<RawFilesystem>,
    pub(super) metrics: Option<RawMetrics>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct RawVolume {
    pub(super) name: Option<Spanned<String>>,
    pub(super) devices: Option<Spanned<Vec<Spanned<String>>>>,
    pub(super) serial: Option<Spanned<RawSerials>>,
    pub(super) wait_for: Option<Spanned<String>>,
    pub(super) size: Option<Spanned<RawSize>>,
    #[serde(rename = "type")]
    pub(super) kind: Option<Spanned<String>>,
    pub(super) sector_size: Option<Spanned<u64>>,
    pub(super) header: Option<Spanned<String>>,
    pub(super) chunk_size: Option<Spanned<RawSize>>,
    pub(super) ephemeral: Option<Spanned<bool>>,
    pub(super) offset: Option<Spanned<u64>>,
    pub(super) skip: Option<Spanned<u64>>,
    pub(super) key_size: Option<Spanned<u64>>,
    pub(super) keyfile_size: Option<Spanned<u64>>,
    pub(super) hash: Option<Spanned<String>>,
    pub(super) hash_key_file: Option<Spanned<bool>>,
    pub(super) iv_large_sectors: Option<Spanned<bool>>,
    pub(super) cipher: Option<Spanned<String>>,
    pub(super) max_kdf_memory: Option<Spanned<RawSize>>,
    pub(super) max_kdf_iterations: Option<Spanned<u64>>,
    pub(super) max_kdf_passes: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct RawKey {
    pub(super) source: Spanned<String>,
    pub(super) random: Option<bool>,
    pub(super) path: Option<Spanned<String>>,
    pub(super) object: Option<Spanned<String>>,
    pub(super) kms_key: Option<Spanned<RawKmsKeys>>,
    pub(super) encryption_context: Option<Spanned<BTreeMap<String, String>>>,
    pub(super) sse: Option<Spanned<String>>,
    pub(super) sse_kms_key_id: Option<Spanned<String>>,
    pub(super) tags: Option<Spanned<BTreeMap<Spanned<String>, Spanned<String>>>>,
    pub(super) region: Option<Spanned<String>>,
    pub(super) s3_region: Option<Spanned<String>>,
    pub(super) kms_region: Option<Spanned<String>>,
    pub(super) profile: Option<Spanned<String>>,
    pub(super) endpoint_url: Option<Spanned<String>>,
    pub(super) s3_endpoint_url: Option<Spanned<String>>,
    pub(super) kms_endpoint_url: Option<Spanned<String>>,
    pub(super) retry_for: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct RawAttach {
    pub(super) method: Option<Spanned<String>>,
    pub(super) device: Option<Spanned<String>>,
    pub(super) connections: Option<Spanned<u64>>,
    pub(super) request_timeout: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct RawFilesystem {
    #[serde(rename = "type")]
    pub(super) kind: Option<Spanned<String>>,
    pub(super) mountpoint: Spanned<String>,
    pub(super) options: Option<Vec<Spanned<String>>>,
    pub(super) mkfs_options: Option<Vec<String>>,
    pub(super) protect_mountpoint: Option<bool>,
    pub(super) bind: Option<BTreeMap<Spanned<String>, Spanned<String>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct RawMetrics {
    pub(super) listen: Spanned<String>,
    pub(super) group: Option<Spanned<String>>,
}

/// The KMS keys in the file: one, or a list.
pub(super) enum RawKmsKeys {
    One(String),
    List(Vec<Spanned<String>>),
}

impl<'de> Deserialize<'de> for RawKmsKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeysVisitor;

        impl<'de> Visitor<'de> for KeysVisitor {
            type Value = RawKmsKeys;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a KMS key such as \"alias/NAME\", or a list of KMS keys")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<RawKmsKeys, E> {
                Ok(RawKmsKeys::One(key.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RawKmsKeys, A::Error> {
                let mut keys = Vec::new();
                while let Some(key) = list.next_element()? {
                    keys.push(key);
                }
                Ok(RawKmsKeys::List(keys))
            }
        }

        deserializer.deserialize_any(KeysVisitor)
    }
}

/// A serial number in the file, or a list of serial numbers.
pub(super) struct RawSerials(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for RawSerials {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SerialsVisitor;

        impl<'de> Visitor<'de> for SerialsVisitor {
            type Value = RawSerials;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a serial number such as \"AWS22C1F2A3B4C5D6E7F\", or a list of them")
            }

            fn visit_str<E: Error>(self, serial: &str) -> Result<RawSerials, E> {
                Ok(RawSerials(vec![serial.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RawSerials, A::Error> {
                let mut serials = Vec::new();
                while let Some(serial) = list.next_element()? {
                    serials.push(serial);
                }
                Ok(RawSerials(serials))
            }
        }

        deserializer.deserialize_any(SerialsVisitor)
    }
}

/// A size in the file: `"2G"`, or a number of bytes.
pub(super) enum RawSize {
    Bytes(u64),
    Text(String),
}

impl<'de> Deserialize<'de> for RawSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = RawSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"2G\", or a number of bytes")
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<RawSize, E> {
                u64::try_from(bytes)
                    .map(RawSize::Bytes)
                    .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(bytes), &self))
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<RawSize, E> {
                Ok(RawSize::Bytes(bytes))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RawSize, E> {
                Ok(RawSize::Text(text.to_owned()))
            }
        }

        // With `untagged`, the error would be "data did not match any variant".
        deserializer.deserialize_any(SizeVisitor)
    }
}

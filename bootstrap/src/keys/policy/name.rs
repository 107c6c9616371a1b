//! Names of KMS keys, and how names that users chose are escaped in policies.

use crate::config::{AwsKeyConfig, KmsArn};
use crate::keys::aws;

/// What an entry of `kms-key` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KeyName {
    /// `alias/NAME`, or the ARN of an alias.
    Alias(String),
    /// `key/ID`: the end of the key's ARN.
    Key(String),
    /// Nothing: any key that KMS lets the machine use.
    Any,
}

/// A KMS key: its name, and where it is, as far as the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KmsKey {
    pub(super) name: KeyName,
    /// The key as it is configured. Empty if none is.
    pub(super) configured: String,
    /// The partition, such as `aws`. It follows from the region.
    pub(super) partition: &'static str,
    pub(super) region: Option<String>,
    pub(super) account: Option<String>,
}

impl KmsKey {
    /// Returns the keys that the configuration names, in their order. If it names none, returns any key.
    pub(super) fn all(config: &AwsKeyConfig) -> Vec<Self> {
        match &config.kms_keys[..] {
            [] => vec![Self::of(config, "")],
            keys => keys.iter().map(|key| Self::of(config, key)).collect(),
        }
    }

    /// Returns the key with which S3 encrypts the object. It is in the bucket's region.
    pub(super) fn of_s3(config: &AwsKeyConfig, configured: &str) -> Self {
        let in_bucket_region = AwsKeyConfig {
            kms_region: None,
            region: config.s3_region.clone().or(config.region.clone()),
            ..config.clone()
        };
        Self::of(&in_bucket_region, configured)
    }

    fn of(config: &AwsKeyConfig, configured: &str) -> Self {
        let (region, account, name) = match KmsArn::parse(configured) {
            Some(arn) => (Some(arn.region.to_owned()), Some(arn.account.to_owned()), arn.resource),
            None => (None, None, configured),
        };
        let region = config.kms_region.clone().or(region).or_else(|| config.region.clone());
        let name = match name {
            "" => KeyName::Any,
            alias if alias.starts_with("alias/") => KeyName::Alias(alias.to_owned()),
            key if key.starts_with("key/") => KeyName::Key(key.to_owned()),
            id => KeyName::Key(format!("key/{id}")),
        };
        let partition = aws::partition(region.as_deref().unwrap_or_default());
        Self { name, configured: configured.to_owned(), partition, region, account }
    }
}

/// Escapes a text that a user chose for the element `Resource`, in which `*`, `?` and `${` are special (IAM User Guide,
/// "IAM policy elements: Variables and tags", "Using wildcards and special characters").
pub(super) fn in_resource(text: &str) -> String {
    text.chars().fold(String::new(), |mut spelled, letter| {
        match letter {
            '*' | '?' | '$' => spelled.extend(['$', '{', letter, '}']),
            letter => spelled.push(letter),
        }
        spelled
    })
}

/// Escapes a text that a user chose for the value of `StringEquals`, in which only `${` is special.
pub(super) fn in_value(text: &str) -> String {
    text.replace('$', "${$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, KeyConfig};
    use std::path::Path;

    fn key(more: &str) -> KmsKey {
        let text =
            format!("[volume]\ndevices = [\"/x\"]\n[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\n{more}\n");
        let KeyConfig::Aws(aws) = Config::parse(&text, Path::new("/etc/x.toml")).unwrap().key else { panic!() };
        KmsKey::all(&aws).remove(0)
    }

    #[test]
    fn a_key_is_named_by_alias_id_or_arn() {
        let name = |more: &str| key(more).name;
        assert_eq!(name(""), KeyName::Any);
        assert_eq!(name("kms-key = \"alias/x\""), KeyName::Alias("alias/x".to_owned()));
        assert_eq!(name("kms-key = \"1234\""), KeyName::Key("key/1234".to_owned()));
        let by_arn = key("kms-key = \"arn:aws-cn:kms:cn-north-1:123456789012:key/mrk-1\"");
        assert_eq!(by_arn.name, KeyName::Key("key/mrk-1".to_owned()));
        assert_eq!((by_arn.partition, by_arn.region.as_deref()), ("aws-cn", Some("cn-north-1")));
        assert_eq!(by_arn.account.as_deref(), Some("123456789012"));
        let alias = key("kms-key = \"arn:aws:kms:eu-west-1:1:alias/x\"\nkms-region = \"eu-west-2\"");
        assert_eq!(alias.name, KeyName::Alias("alias/x".to_owned()));
        // KMS is asked in this region, so a policy for another one would help nobody.
        assert_eq!(alias.region.as_deref(), Some("eu-west-2"));
    }

    #[test]
    fn special_characters_of_policies_are_spelled_out() {
        assert_eq!(in_resource("a*b?c${d}"), "a${*}b${?}c${$}{d}");
        assert_eq!(in_value("a*b?c${d}"), "a*b?c${$}{d}");
    }
}

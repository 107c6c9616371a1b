//! Chooses the regions. KMS and S3 may be in different regions.

use aws_config::imds;
use aws_config::meta::region::ProvideRegion;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;

use super::error::AwsError;
use crate::config::{AwsKeyConfig, KmsArn, SecretLocation};

/// The region in which each service is asked first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Regions {
    /// For each KMS key: `kms-region`, or the region in the key's ARN, or the general region. One region if no key is
    /// configured.
    pub(super) kms: Vec<String>,
    /// `s3-region`, or the general region, or the region of KMS. S3 says which region the bucket is in.
    pub(super) s3: String,
    /// The general region, or the region of KMS.
    pub(super) sts: String,
    /// Whether `s3-region` is configured. It then overrides what S3 says.
    pub(super) s3_is_fixed: bool,
}

/// Finds the regions. The instance's metadata service is asked only if no other source names a region for KMS.
///
/// # Errors
/// [`AwsError::NoRegion`], if no source names a region.
pub(super) async fn find(
    config: &AwsKeyConfig,
    provider: &ProviderConfig,
    on_instance: bool,
) -> Result<Regions, AwsError> {
    let mut usual = config.region.clone();
    if usual.is_none() {
        usual = from_environment(&|name| std::env::var(name).ok());
    }
    // The profile is always asked: this makes the provider read the profile, whose endpoint for STS matters as well.
    let profile = ProfileFileRegionProvider::builder().configure(provider).build();
    let of_profile = profile.region().await.map(|region| region.to_string());
    usual = usual.or(of_profile);
    if usual.is_none() && named_for_kms(config).contains(&None) {
        let instance = imds::region::ImdsRegionProvider::builder().configure(provider).build();
        usual = instance.region().await.map(|region| region.to_string());
    }
    choose(config, usual.filter(|region| !region.is_empty())).ok_or(AwsError::NoRegion { transient: on_instance })
}

fn from_environment(variable: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().find_map(|name| variable(name).filter(|region| !region.is_empty()))
}

fn choose(config: &AwsKeyConfig, usual: Option<String>) -> Option<Regions> {
    let kms: Vec<String> =
        named_for_kms(config).into_iter().map(|named| named.or_else(|| usual.clone())).collect::<Option<_>>()?;
    let first = kms.first()?;
    let sts = usual.clone().unwrap_or_else(|| first.clone());
    let s3 = config.s3_region.clone().or(usual).unwrap_or_else(|| first.clone());
    let s3_is_fixed = config.s3_region.is_some() && config.object != SecretLocation::Token;
    Some(Regions { kms, s3, sts, s3_is_fixed })
}

/// Returns the region that the configuration names for each KMS key, if it names one.
fn named_for_kms(config: &AwsKeyConfig) -> Vec<Option<String>> {
    let named = |key: Option<&str>| config.kms_region.clone().or_else(|| key.and_then(of_arn).map(ToOwned::to_owned));
    match &config.kms_keys[..] {
        [] => vec![named(None)],
        keys => keys.iter().map(|key| named(Some(key))).collect(),
    }
}

/// Returns the region in the ARN of a key or an alias, in any partition.
fn of_arn(key: &str) -> Option<&str> {
    let arn = KmsArn::parse(key).filter(|arn| arn.partition.starts_with("aws") && is_region(arn.region))?;
    Some(arn.region)
}

/// Returns whether a text can be the name of a region. It becomes part of a host name, so it must not contain anything
/// else.
pub(super) fn is_region(text: &str) -> bool {
    (1..=32).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// Returns the partition, which is the first part of an ARN after `arn:` (AWS General Reference, "Amazon Resource Names").
pub(in crate::keys) fn partition(region: &str) -> &'static str {
    match region {
        _ if region.starts_with("cn-") => "aws-cn",
        _ if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, KeyConfig};
    use std::path::Path;

    fn chosen(more: &str, usual: Option<&str>) -> Option<(Vec<String>, String, bool)> {
        let text =
            format!("[volume]\ndevices = [\"/x\"]\n[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\n{more}\n");
        let KeyConfig::Aws(aws) = Config::parse(&text, Path::new("/etc/x.toml")).unwrap().key else { panic!() };
        let regions = choose(&aws, usual.map(ToOwned::to_owned))?;
        Some((regions.kms, regions.s3, regions.s3_is_fixed))
    }

    #[test]
    fn each_service_has_the_most_specific_region() {
        let arn = "kms-key = \"arn:aws-us-gov:kms:us-gov-west-1:1:key/mrk-2\"";
        for (more, usual, kms, s3, fixed) in [
            ("", Some("eu-west-1"), "eu-west-1", "eu-west-1", false),
            ("kms-key = \"alias/x\"", Some("eu-west-1"), "eu-west-1", "eu-west-1", false),
            (arn, Some("us-gov-east-1"), "us-gov-west-1", "us-gov-east-1", false),
            (arn, None, "us-gov-west-1", "us-gov-west-1", false),
            ("kms-key = \"arn:aws-cn:kms:cn-north-1:1:alias/x\"", None, "cn-north-1", "cn-north-1", false),
            ("kms-region = \"a-1\"\ns3-region = \"b-2\"", None, "a-1", "b-2", true),
            ("kms-key = \"arn:aws:kms:x-1:1:key/2\"\nkms-region = \"a-1\"", Some("u-1"), "a-1", "u-1", false),
        ] {
            assert_eq!(chosen(more, usual), Some((vec![kms.to_owned()], s3.to_owned(), fixed)), "{more}");
        }
        assert_eq!(chosen("", None), None);
        // Each key of a list has its own region.
        let list = "kms-key = [\"arn:aws:kms:x-1:1:key/mrk-2\", \"arn:aws:kms:y-1:1:key/mrk-2\", \"alias/z\"]";
        let each = |regions: [&str; 3]| regions.map(ToOwned::to_owned).to_vec();
        assert_eq!(chosen(list, Some("u-1")), Some((each(["x-1", "y-1", "u-1"]), "u-1".to_owned(), false)));
        assert_eq!(chosen(list, None), None);
        assert_eq!(chosen("s3-region = \"b-2\"", None), None);
    }

    #[test]
    fn only_an_arn_of_kms_has_a_region() {
        for key in
            ["alias/x", "1234abcd", "arn:aws:s3:eu-west-1:1:key/2", "arn:aws:kms::1:key/2", "arn:aws:kms:e/u:1:k", ""]
        {
            assert_eq!(of_arn(key), None, "{key}");
        }
        assert_eq!(of_arn("arn:aws:kms:eu-west-1:1:key/a:b"), Some("eu-west-1"));
    }

    #[test]
    fn either_variable_of_the_environment_names_a_region() {
        let of = |set: &[(&str, &str)]| {
            from_environment(&|name| set.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("AWS_REGION", ""), ("AWS_DEFAULT_REGION", "b")]), Some("b".to_owned()));
        assert_eq!(of(&[("AWS_REGION", "a"), ("AWS_DEFAULT_REGION", "b")]), Some("a".to_owned()));
    }

    #[test]
    fn arns_name_the_partition_of_the_region() {
        assert_eq!(partition("eu-central-1"), "aws");
        assert_eq!(partition("cn-north-1"), "aws-cn");
        assert_eq!(partition("us-gov-west-1"), "aws-us-gov");
    }
}

//! Compares the KMS key that an answer names with the key that was asked for.

use crate::config::KmsArn;

/// Returns whether `answered`, the `KeyId` in an answer of KMS, is the key that `configured` names. `region` is the region
/// that was asked.
///
/// KMS answers with the ARN of the key that it used (KMS API Reference, `Decrypt`, `KeyId`):
/// - For a key's id or ARN, the ids must be equal. The replicas of a multi-Region key have the same id and the same key
///   material, so any of them may answer (KMS Developer Guide, "How multi-Region keys work").
/// - KMS does not say which alias it was asked for. The key must be in the alias's region and account.
pub(super) fn is_the_key(configured: &str, answered: &str, region: &str) -> bool {
    let Some(answered) = KmsArn::parse(answered) else { return false };
    let Some(id) = answered.resource.strip_prefix("key/") else { return false };
    let (is_in_account, name) = match KmsArn::parse(configured) {
        Some(arn) => (arn.partition == answered.partition && arn.account == answered.account, arn.resource),
        None => (true, configured),
    };
    let is_in_region = answered.region == region;
    is_in_account
        && match name.strip_prefix("alias/") {
            Some(_) => is_in_region,
            None => id == name.strip_prefix("key/").unwrap_or(name) && (is_in_region || id.starts_with("mrk-")),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_the_key_that_was_asked_for() {
        let key = "arn:aws:kms:eu-west-1:123456789012:key/1234";
        let replica = "arn:aws:kms:eu-west-1:123456789012:key/mrk-1234";
        for (configured, answered, expected) in [
            (key, key, true),
            ("1234", key, true),
            ("alias/x", key, true),
            ("arn:aws:kms:eu-west-1:123456789012:alias/x", key, true),
            (key, "arn:aws:kms:eu-west-1:123456789012:key/5678", false),
            (key, "arn:aws:kms:eu-west-1:999999999999:key/1234", false),
            (key, "arn:aws-cn:kms:eu-west-1:123456789012:key/1234", false),
            (key, "arn:aws:kms:us-east-1:123456789012:key/1234", false),
            ("1234", "arn:aws:kms:eu-west-1:123456789012:key/5678", false),
            ("1234", "arn:aws:kms:us-east-1:123456789012:key/1234", false),
            ("arn:aws:kms:eu-west-1:123456789012:alias/x", "arn:aws:kms:eu-west-1:999999999999:key/1234", false),
            ("alias/x", "arn:aws:kms:us-east-1:123456789012:key/1234", false),
            // The answer names the replica that decrypted.
            (replica, replica, true),
            (replica, "arn:aws:kms:us-east-1:123456789012:key/mrk-1234", true),
            ("mrk-1234", "arn:aws:kms:us-east-1:123456789012:key/mrk-1234", true),
            (replica, "arn:aws:kms:us-east-1:123456789012:key/mrk-5678", false),
            (replica, "arn:aws:kms:us-east-1:999999999999:key/mrk-1234", false),
            (key, "1234", false),
            (key, "", false),
            ("alias/x", "alias/x", false),
            ("alias/x", "arn:aws:kms:eu-west-1:123456789012:alias/x", false),
        ] {
            assert_eq!(is_the_key(configured, answered, "eu-west-1"), expected, "{configured} {answered}");
        }
    }
}

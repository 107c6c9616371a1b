//! The policies as a CloudFormation template, for a role and a bucket that exist.
//!
//! CloudFormation sets a key's policy only together with the key. So if the configuration names the key by an alias,
//! the template makes the key. Otherwise the template shows the key's policy under `Metadata`. There it also shows the policies
//! of all keys after the first.

use serde_json::{Value, json};

use super::name::{KeyName, KmsKey};
use super::{NamedKey, Names, NotAws, Who, aws, numbered};
use crate::config::{Config, SecretLocation};

/// Returns a CloudFormation template with the policies, in JSON.
///
/// # Errors
/// [`NotAws`], if the secret is not in AWS.
pub fn cloudformation(config: &Config, who: &Who) -> Result<Value, NotAws> {
    let aws = aws(config)?;
    let keys = KmsKey::all(aws);
    let of_key = |(number, key): (usize, &KmsKey)| {
        let account = who.account.as_deref().unwrap_or("${AWS::AccountId}");
        let named = NamedKey::new(key, "${AWS::Partition}", "${AWS::Region}", account, "key/${KmsKeyId}");
        match number {
            // The administrators of the first key are those of the stack.
            0 => {
                let account = "${AWS::AccountId}".to_owned();
                match named.alias {
                    Some(_) => NamedKey { arn: "${Key.Arn}".to_owned(), alias: None, account },
                    None => NamedKey { account, ..named },
                }
            }
            _ => named,
        }
    };
    let names = Names {
        partition: "${AWS::Partition}".to_owned(),
        keys: keys.iter().enumerate().map(of_key).collect(),
        sse_key: None,
        s3: "s3.${AWS::Region}.${AWS::URLSuffix}".to_owned(),
        role: "arn:${AWS::Partition}:iam::${AWS::AccountId}:role/${Role}".to_owned(),
        provisioner: "arn:${AWS::Partition}:iam::${AWS::AccountId}:role/${Provisioner}".to_owned(),
        literal: |text| text.replace("${", "${!"),
    };
    let names = names.with_sse_key(aws, &keys, |key| {
        let account = who.account.as_deref().unwrap_or("${AWS::AccountId}");
        NamedKey::new(key, "${AWS::Partition}", "${AWS::Region}", account, "key/KEY-ID")
    });
    let policies = names.policies(config, aws);
    let mut template = json!({
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": format!("Policies of the nbdcrypt volume {}", config.name),
        "Metadata": { "Notes": policies.notes },
        "Parameters": { "Role": parameter("The name of the instance's role.", who.role.as_deref()) },
        "Resources": {},
    });
    let name = format!("nbdcrypt-{}", config.name);
    let of_role = |role: &str, policy: &Value| {
        json!({
            "Type": "AWS::IAM::Policy",
            "Properties": { "PolicyName": name, "Roles": [{ "Ref": role }], "PolicyDocument": substituted(policy) }
        })
    };
    template["Resources"]["InstancePolicy"] = of_role("Role", &policies.instance);
    if let Some(policy) = &policies.provisioner {
        let about = "The name of the role that runs `nbdcrypt provision`.";
        template["Parameters"]["Provisioner"] = parameter(about, who.provisioner.as_deref());
        template["Resources"]["ProvisionerPolicy"] = of_role("Provisioner", policy);
    }
    if let (Some(policy), SecretLocation::Object(object)) = (&policies.bucket, &aws.object) {
        template["Resources"]["BucketPolicy"] = json!({
            "Type": "AWS::S3::BucketPolicy",
            "Properties": { "Bucket": object.bucket, "PolicyDocument": substituted(policy) }
        });
    }
    let mut of_keys = keys.iter().zip(&policies.keys).map(|(key, policy)| (&key.name, substituted(policy)));
    let Some((name, policy)) = of_keys.next() else { return Ok(template) };
    match name {
        KeyName::Alias(alias) => {
            template["Resources"]["Key"] = json!({
                "Type": "AWS::KMS::Key",
                // Without the key, the volumes are lost.
                "DeletionPolicy": "Retain",
                "UpdateReplacePolicy": "Retain",
                "Properties": {
                    "Description": format!("Encrypts the secret of the nbdcrypt volume {}", config.name),
                    "EnableKeyRotation": true,
                    "KeyPolicy": policy
                }
            });
            if keys.len() > 1 {
                // Only the replicas of a multi-Region key decrypt what it encrypted.
                template["Resources"]["Key"]["Properties"]["MultiRegion"] = true.into();
            }
            template["Resources"]["Alias"] = json!({
                "Type": "AWS::KMS::Alias",
                "Properties": { "AliasName": alias, "TargetKeyId": { "Ref": "Key" } }
            });
        }
        KeyName::Key(_) => template["Metadata"]["KeyPolicy"] = policy,
        KeyName::Any => {
            template["Parameters"]["KmsKeyId"] = parameter("The id of the KMS key.", None);
            template["Metadata"]["KeyPolicy"] = policy;
        }
    }
    // The other keys are in other regions, where this stack makes nothing.
    for (number, (_, policy)) in of_keys.enumerate() {
        template["Metadata"][numbered("KeyPolicy", number + 1)] = policy;
    }
    if let Some(policy) = &policies.sse_key {
        template["Metadata"]["SseKmsKeyPolicy"] = substituted(policy);
    }
    Ok(template)
}

fn parameter(about: &str, default: Option<&str>) -> Value {
    let mut parameter = json!({ "Type": "String", "Description": about });
    if let Some(default) = default {
        parameter["Default"] = default.into();
    }
    parameter
}

/// Marks each text with variables, so that CloudFormation fills them in. `${!` is not a variable: in `Fn::Sub`, it
/// stands for `${`.
fn substituted(value: &Value) -> Value {
    match value {
        Value::String(text) if text.split("${").skip(1).any(|rest| !rest.starts_with('!')) => {
            json!({ "Fn::Sub": text })
        }
        Value::String(text) => text.replace("${!", "${").into(),
        Value::Array(values) => values.iter().map(substituted).collect(),
        Value::Object(members) => {
            Value::Object(members.iter().map(|(name, value)| (name.clone(), substituted(value))).collect())
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;

    #[test]
    fn a_template_makes_the_key_only_for_an_alias() {
        let object = "object = \"s3://my-bucket/a${b}*\"";
        let with = |key: &str| cloudformation(&config("", &format!("{object}\n{key}")), &Who::default()).unwrap();
        let alias = with("kms-key = \"alias/x\"");
        assert_eq!(alias["Resources"]["Alias"]["Properties"]["AliasName"], "alias/x");
        let statements = &alias["Resources"]["InstancePolicy"]["Properties"]["PolicyDocument"]["Statement"];
        assert_eq!(
            statements[0]["Resource"],
            json!({ "Fn::Sub": "arn:${AWS::Partition}:s3:::my-bucket/a${!$}{b}${!*}" })
        );
        assert_eq!(statements[1]["Resource"], json!({ "Fn::Sub": "${Key.Arn}" }));
        let marked = substituted(&json!(["a${!$}{b}", "${Key}${!a}"]));
        assert_eq!(marked, json!(["a${$}{b}", { "Fn::Sub": "${Key}${!a}" }]));
        let arn = with("kms-key = \"arn:aws:kms:eu-west-1:123456789012:key/1\"");
        assert!(arn["Resources"].get("Key").is_none() && arn["Metadata"]["KeyPolicy"].is_object());
        let list = with("kms-key = [\"alias/x\", \"arn:aws:kms:us-east-1:123456789012:key/mrk-1\"]");
        let statements = &list["Resources"]["InstancePolicy"]["Properties"]["PolicyDocument"]["Statement"];
        assert_eq!(statements[1]["Resource"], json!({ "Fn::Sub": "${Key.Arn}" }));
        let other = "arn:${AWS::Partition}:kms:us-east-1:123456789012:key/mrk-1";
        assert_eq!(statements[2]["Resource"], json!({ "Fn::Sub": other }));
        assert_eq!(list["Resources"]["Key"]["Properties"]["MultiRegion"], true);
        assert!(alias["Resources"]["Key"]["Properties"].get("MultiRegion").is_none());
        assert_eq!(list["Metadata"]["KeyPolicy2"]["Statement"][1]["Sid"], "UnlockVolume");
        for template in [alias, arn] {
            let notes = template["Metadata"]["Notes"].to_string();
            assert!(notes.contains("A KMS key has only") && notes.contains("A bucket has only"), "{notes}");
        }
    }
}

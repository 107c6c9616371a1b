//! The policies as Terraform resources, for a role, a key and a bucket that exist.

use serde_json::Value;

use super::name::{KeyName, KmsKey};
use super::{NamedKey, Names, NotAws, Who, aws};
use crate::config::{Config, SecretLocation};

/// Returns a Terraform file with the policies.
///
/// # Errors
/// [`NotAws`], if the secret is not in AWS.
pub fn terraform(config: &Config, who: &Who) -> Result<String, NotAws> {
    let aws = aws(config)?;
    let keys = KmsKey::all(aws);
    let account = who.account.as_deref().map(literal);
    let account = account.unwrap_or_else(|| "${data.aws_caller_identity.current.account_id}".to_owned());
    let of_key = |(number, key): (usize, &KmsKey)| NamedKey {
        // Terraform looks an alias up, so the policy names exactly one key.
        arn: format!("${{data.aws_kms_key.{}.arn}}", data_name(number)),
        alias: None,
        account: match (&key.account, number) {
            (Some(account), 1..) => literal(account),
            _ => account.clone(),
        },
    };
    let names = Names {
        partition: "${data.aws_partition.current.partition}".to_owned(),
        keys: keys.iter().enumerate().map(of_key).collect(),
        sse_key: None,
        s3: "s3.${data.aws_region.current.id}.amazonaws.com".to_owned(),
        role: "${data.aws_iam_role.instance.arn}".to_owned(),
        provisioner: "${data.aws_iam_role.provisioner.arn}".to_owned(),
        literal,
    };
    let partition = "${data.aws_partition.current.partition}";
    let names = names.with_sse_key(aws, &keys, |key| {
        NamedKey::new(key, partition, "${data.aws_region.current.id}", &account, "key/KEY-ID")
    });
    let mut policies = names.policies(config, aws);
    if keys.len() > 1 {
        policies
            .notes
            .push("The argument `region` needs version 6 of Terraform's AWS provider, or a newer one.".to_owned());
    }
    let mut blocks = vec![
        // One paragraph is one line: no note contains a line break.
        policies.notes.iter().map(|note| format!("# {note}\n")).collect::<Vec<_>>().join("#\n"),
        variable("role", "The name of the instance's role.", who.role.as_deref()),
        "data \"aws_partition\" \"current\" {}\n".to_owned(),
        "data \"aws_caller_identity\" \"current\" {}\n".to_owned(),
        "data \"aws_iam_role\" \"instance\" {\n  name = var.role\n}\n".to_owned(),
    ];
    if policies.instance.to_string().contains("data.aws_region.current") {
        blocks.push("data \"aws_region\" \"current\" {}\n".to_owned());
    }
    // Several keys are in several regions.
    let region = |key: &KmsKey| key.region.as_deref().filter(|_| keys.len() > 1).map(|region| quoted(&literal(region)));
    for (number, key) in keys.iter().enumerate() {
        let id = match key.name {
            KeyName::Any => {
                blocks.push(variable("kms_key", "The KMS key: its id, its ARN, or alias/NAME.", None));
                "var.kms_key".to_owned()
            }
            KeyName::Alias(_) | KeyName::Key(_) => quoted(&literal(&key.configured)),
        };
        blocks.push(data_key(&data_name(number), &id, region(key)));
    }
    let name = quoted(&format!("nbdcrypt-{}", config.name));
    if let Some(policy) = &policies.provisioner {
        let about = "The name of the role that runs `nbdcrypt provision`.";
        blocks.push(variable("provisioner", about, who.provisioner.as_deref()));
        blocks.push("data \"aws_iam_role\" \"provisioner\" {\n  name = var.provisioner\n}\n".to_owned());
        let places = [("name", name.clone()), ("role", "data.aws_iam_role.provisioner.id".to_owned())];
        blocks.push(resource("aws_iam_role_policy", "provisioner", &places, policy));
    }
    let places = [("name", name), ("role", "data.aws_iam_role.instance.id".to_owned())];
    blocks.push(resource("aws_iam_role_policy", "instance", &places, &policies.instance));
    for (number, (key, policy)) in keys.iter().zip(&policies.keys).enumerate() {
        let name = data_name(number);
        let id = ("key_id", format!("data.aws_kms_key.{name}.id"));
        let places: Vec<_> = [id].into_iter().chain(region(key).map(|region| ("region", region))).collect();
        blocks.push(resource("aws_kms_key_policy", &name, &places, policy));
    }
    if let (Some(policy), SecretLocation::Object(object)) = (&policies.bucket, &aws.object) {
        let places = [("bucket", quoted(&literal(&object.bucket)))];
        blocks.push(resource("aws_s3_bucket_policy", "secret", &places, policy));
    }
    Ok(blocks.join("\n"))
}

/// Escapes a text, so that Terraform finds no variable or directive in it.
fn literal(text: &str) -> String {
    text.replace("${", "$${").replace("%{", "%%{")
}

fn variable(name: &str, about: &str, default: Option<&str>) -> String {
    let default = default.map(|value| format!("  default     = {}\n", quoted(&literal(value)))).unwrap_or_default();
    format!("variable \"{name}\" {{\n  type        = string\n  description = {}\n{default}}}\n", quoted(about))
}

/// Returns the name of the block about the KMS key with this number.
fn data_name(number: usize) -> String {
    match number {
        0 => "volume".to_owned(),
        number => format!("volume_{}", number + 1),
    }
}

fn data_key(name: &str, id: &str, region: Option<String>) -> String {
    let region = region.map(|region| format!("  region = {region}\n")).unwrap_or_default();
    format!("data \"aws_kms_key\" \"{name}\" {{\n  key_id = {id}\n{region}}}\n")
}

fn resource(kind: &str, name: &str, places: &[(&str, String)], policy: &Value) -> String {
    let width = places.iter().map(|(key, _)| key.len()).max().unwrap_or_default();
    let places: String = places.iter().map(|(key, value)| format!("  {key:width$} = {value}\n")).collect();
    format!("resource \"{kind}\" \"{name}\" {{\n{places}  policy = jsonencode({})\n}}\n", hcl(policy, 1))
}

/// Writes a value as an expression of HCL. Variables in its texts stay variables.
fn hcl(value: &Value, depth: usize) -> String {
    let (inner, outer) = ("  ".repeat(depth + 1), "  ".repeat(depth));
    match value {
        Value::String(text) => quoted(text),
        Value::Array(values) => {
            let lines: String = values.iter().map(|value| format!("{inner}{},\n", hcl(value, depth + 1))).collect();
            format!("[\n{lines}{outer}]")
        }
        Value::Object(members) => {
            let lines: String = members
                .iter()
                .map(|(name, value)| {
                    // A name contains no variables of ours.
                    let name = quoted(&literal(name));
                    format!("{inner}{name} : {},\n", hcl(value, depth + 1))
                })
                .collect();
            format!("{{\n{lines}{outer}}}")
        }
        other => other.to_string(),
    }
}

/// Writes a text in quotation marks (HCL Native Syntax Specification, "Template Expressions").
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if engine::text::is_unseen(letter) => {
                quoted.push_str(&format!("\\U{:08x}", u32::from(letter)));
            }
            letter => quoted.push(letter),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;

    #[test]
    fn only_our_own_variables_are_variables() {
        let text = terraform(
            &config("", "object = \"s3://my-bucket/a${b}\\u0007\"\nkms-key = \"alias/x\""),
            &Who { role: Some("web".to_owned()), provisioner: Some("a${b}%{c}".to_owned()), ..Who::default() },
        )
        .unwrap();
        assert!(text.contains("default     = \"a$${b}%%{c}\""), "{text}");
        assert!(text.contains(":s3:::my-bucket/a$${$}{b}\\U00000007\""), "{text}");
        assert!(text.contains("key_id = \"alias/x\"") && text.contains("default     = \"web\""), "{text}");
        assert!(text.contains("\"${data.aws_kms_key.volume.arn}\""), "{text}");
    }

    #[test]
    fn each_key_is_looked_up_in_its_region() {
        let list = "object = \"s3://my-bucket/a\"\nkms-key = [\"arn:aws:kms:eu-west-1:123456789012:key/mrk-1\", \
                    \"arn:aws:kms:us-east-1:123456789012:key/mrk-1\"]";
        let text = terraform(&config("", list), &Who::default()).unwrap();
        for block in [
            "data \"aws_kms_key\" \"volume\" {\n  key_id = \"arn:aws:kms:eu-west-1:123456789012:key/mrk-1\"\n  region = \
             \"eu-west-1\"\n}",
            "data \"aws_kms_key\" \"volume_2\" {\n  key_id = \"arn:aws:kms:us-east-1:123456789012:key/mrk-1\"\n  region = \
             \"us-east-1\"\n}",
            "resource \"aws_kms_key_policy\" \"volume_2\" {\n  key_id = data.aws_kms_key.volume_2.id\n  region = \
             \"us-east-1\"\n",
            "\"Resource\" : \"${data.aws_kms_key.volume_2.arn}\"",
            "version 6",
        ] {
            assert!(text.contains(block), "{block}\n{text}");
        }
        let single = terraform(&config("", "object = \"s3://my-bucket/a\"\nkms-key = \"alias/x\""), &Who::default());
        assert!(!single.unwrap().contains("region"));
        // S3 is in the provider's region if the configuration names none.
        let sse = "object = \"s3://my-bucket/a\"\nkms-key = \"alias/x\"\nsse = \"aws:kms\"\nsse-kms-key-id = \"1234\"";
        let sse = terraform(&config("", sse), &Who::default()).unwrap();
        for part in ["data \"aws_region\" \"current\" {}", "\"s3.${data.aws_region.current.id}.amazonaws.com\""] {
            assert!(sse.contains(part), "{part}\n{sse}");
        }
    }

    /// `terraform apply` replaces the policies of a key and a bucket that others may use.
    #[test]
    fn the_notes_stand_above_the_first_block() {
        let text = terraform(&config("", "object = \"s3://my-bucket/a\""), &Who::default()).unwrap();
        let (notes, _) = text.split_once("\nvariable ").unwrap();
        assert!(notes.lines().all(|line| line.is_empty() || line.starts_with('#')), "{notes}");
        for note in ["# A KMS key has only one policy.", "# A bucket has only one policy."] {
            assert!(notes.contains(note), "{notes}");
        }
    }
}

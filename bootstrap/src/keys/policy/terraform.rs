//! The policies as Terraform resources, for a role, a key and a bucket that exist.

use serde_json::Value;

use super::{Names, NotAws, Who, aws};
use crate::config::{Config, SecretLocation};

/// Returns a Terraform file with the policies.
///
/// # Errors
/// [`NotAws`], if the secret is not in AWS.
pub fn terraform(config: &Config, who: &Who) -> Result<String, NotAws> {
    let aws = aws(config)?;
    let names = Names {
        partition: "${data.aws_partition.current.partition}".to_owned(),
        account: who
            .account
            .as_deref()
            .map(literal)
            .unwrap_or_else(|| "${data.aws_caller_identity.current.account_id}".to_owned()),
        // Terraform looks the alias up, so the policy names exactly one key.
        key: "${data.aws_kms_key.volume.arn}".to_owned(),
        alias: None,
        role: "${data.aws_iam_role.instance.arn}".to_owned(),
        provisioner: "${data.aws_iam_role.provisioner.arn}".to_owned(),
        literal,
    };
    let policies = names.policies(config, aws);
    let mut blocks = vec![
        // One paragraph is one line: no note contains a line break.
        policies.notes.iter().map(|note| format!("# {note}\n")).collect::<Vec<_>>().join("#\n"),
        variable("role", "The name of the instance's role.", who.role.as_deref()),
        "data \"aws_partition\" \"current\" {}\n".to_owned(),
        "data \"aws_caller_identity\" \"current\" {}\n".to_owned(),
        "data \"aws_iam_role\" \"instance\" {\n  name = var.role\n}\n".to_owned(),
    ];
    match &aws.kms_key {
        Some(key) => blocks.push(data_key(&quoted(&literal(key)))),
        None => {
            blocks.push(variable("kms_key", "The KMS key: its id, its ARN, or alias/NAME.", None));
            blocks.push(data_key("var.kms_key"));
        }
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
    let places = [("key_id", "data.aws_kms_key.volume.id".to_owned())];
    blocks.push(resource("aws_kms_key_policy", "volume", &places, &policies.key));
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

fn data_key(id: &str) -> String {
    format!("data \"aws_kms_key\" \"volume\" {{\n  key_id = {id}\n}}\n")
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

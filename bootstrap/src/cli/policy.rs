//! `nbdcrypt policy`: prints the least policies that a volume needs in AWS.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{tell, tell_json};
use crate::config::{Config, KeyConfig};
use crate::keys::policy::{self, Job, Policies, Who};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The volume's configuration. Its key source must be `aws`.
    config: PathBuf,
    /// The account's number. [default: the one in the ARN in `kms-key`, or else a placeholder]
    #[arg(long, value_name = "NUMBER")]
    account: Option<String>,
    /// The name of the instance's role.
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// The name of the role that runs `nbdcrypt provision`.
    #[arg(long, value_name = "NAME")]
    provisioner: Option<String>,
    /// Print Terraform resources for an existing role, key and bucket.
    #[arg(long, group = "form")]
    terraform: bool,
    /// Print a CloudFormation template for an existing role and bucket.
    #[arg(long, group = "form")]
    cloudformation: bool,
    /// Print JSON: the policies, and which actions each command calls.
    #[arg(long, group = "form")]
    json: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    let config = Config::load(&args.config)?;
    let who = Who { account: args.account, role: args.role, provisioner: args.provisioner };
    if args.terraform {
        return tell(policy::terraform(&config, &who)?);
    }
    if args.cloudformation {
        return tell_json(serde_json::to_string_pretty(&policy::cloudformation(&config, &who)?)?);
    }
    let policies = policy::policies(&config, &who)?;
    if args.json {
        return tell_json(serde_json::to_string_pretty(&as_json(&config, &policies))?);
    }
    for (_, title, policy) in documents(&config, &policies) {
        tell(format_args!("# {title}\n"))?;
        tell_json(serde_json::to_string_pretty(policy)?)?;
        tell("\n")?;
    }
    for note in &policies.notes {
        tell(format_args!("# {note}\n"))?;
    }
    Ok(())
}

/// Returns the policies that are not `None`, each with its name in JSON and its title.
fn documents<'p>(config: &Config, policies: &'p Policies) -> Vec<(String, String, &'p Value)> {
    let names = match &config.key {
        KeyConfig::Aws(aws) if aws.kms_keys.len() > 1 => &aws.kms_keys[..],
        _ => &[],
    };
    let of_key = |(number, policy): (usize, &'p Value)| {
        let name = if number == 0 { "kms-key".to_owned() } else { format!("kms-key-{}", number + 1) };
        let which = names.get(number).map(|key| format!(" {key}")).unwrap_or_default();
        (name, format!("The policy of the KMS key{which}"), policy)
    };
    let one = |name: &str, title: &str, policy: &'p Value| (name.to_owned(), title.to_owned(), policy);
    let mut all = vec![one("instance-role", "The policy of the instance's role", &policies.instance)];
    let provisioner = "The policy of the role that runs `nbdcrypt provision`";
    all.extend(policies.provisioner.as_ref().map(|policy| one("provisioner", provisioner, policy)));
    all.extend(policies.keys.iter().enumerate().map(of_key));
    let of_sse_key = "Statements for the policy of the KMS key in `sse-kms-key-id`";
    all.extend(policies.sse_key.as_ref().map(|policy| one("sse-kms-key", of_sse_key, policy)));
    all.extend(policies.bucket.as_ref().map(|policy| one("bucket", "The policy of the bucket", policy)));
    all
}

fn as_json(config: &Config, policies: &Policies) -> Value {
    let calls: Map<_, _> =
        Job::ALL.into_iter().map(|job| (job.name().to_owned(), policy::calls(config, job).into())).collect();
    let documents: Map<_, _> =
        documents(config, policies).into_iter().map(|(name, _, policy)| (name, policy.clone())).collect();
    json!({ "calls": calls, "policies": documents, "notes": policies.notes })
}

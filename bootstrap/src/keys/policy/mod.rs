//! The least policies that a volume needs in AWS, computed from its configuration. AWS is not asked.
//!
//! [`calls`] is the table of what each command asks AWS for. The policies follow from this table: for the instance's
//! role, for the user who makes the secret, for the KMS key and for the bucket. A test runs each command with these
//! policies, and again without each of the actions.

mod cloudformation;
mod name;
mod terraform;

use serde_json::{Map, Value, json};

use crate::config::{AwsKeyConfig, Config, KeyConfig, SecretLocation};
use crate::machine::selection::Selection;
use crate::volume::VolumeType;
use name::{KeyName, KmsKey, in_resource, in_value};

pub use cloudformation::cloudformation;
pub use terraform::terraform;

/// A command that asks AWS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// `nbdcrypt up` of a volume that exists.
    Up,
    /// `nbdcrypt up` on a blank disk.
    FirstUp,
    /// `nbdcrypt provision`.
    Provision,
    /// `nbdcrypt provision --replace`.
    Replace,
    /// `nbdcrypt key rewrap`, if the old and the new KMS key are the same.
    Rewrap,
}

impl Job {
    /// All commands that ask AWS.
    pub const ALL: [Self; 5] = [Self::Up, Self::FirstUp, Self::Provision, Self::Replace, Self::Rewrap];

    /// Returns the command as a user types it, with the situation where that matters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::FirstUp => "up on a blank disk",
            Self::Provision => "provision",
            Self::Replace => "provision --replace",
            Self::Rewrap => "key rewrap",
        }
    }
}

const GET: &str = "s3:GetObject";
const PUT: &str = "s3:PutObject";
const TAG: &str = "s3:PutObjectTagging";
/// The action with which S3 encrypts an object for the caller, under the KMS key in `sse-kms-key-id` (S3 User Guide, "Using
/// server-side encryption with AWS KMS keys", "Permissions").
const DATA_KEY: &str = "kms:GenerateDataKey";
const DECRYPT: &str = "kms:Decrypt";
const ENCRYPT: &str = "kms:Encrypt";
const NEW_KEY: &str = "kms:GenerateDataKeyWithoutPlaintext";

/// The actions of the KMS key's administrators. AWS's console gives a key's administrators the same actions. It also lets
/// them make grants, with which they could allow themselves to decrypt (KMS Developer Guide, "Default key policy", "Allows
/// key administrators to administer the KMS key").
const ADMINISTRATION: [&str; 16] = [
    "kms:CreateAlias",
    "kms:Describe*",
    "kms:Enable*",
    "kms:List*",
    "kms:Put*",
    "kms:Update*",
    "kms:Revoke*",
    "kms:Disable*",
    "kms:Get*",
    "kms:Delete*",
    "kms:TagResource",
    "kms:UntagResource",
    "kms:ScheduleKeyDeletion",
    "kms:CancelKeyDeletion",
    "kms:RotateKeyOnDemand",
    "kms:ImportKeyMaterial",
];

/// Returns the actions without which the command fails. An empty list means that the command has nothing to do with AWS,
/// or is refused for this configuration.
pub fn calls(config: &Config, job: Job) -> Vec<&'static str> {
    let KeyConfig::Aws(aws) = &config.key else { return Vec::new() };
    let mut all = usual_calls(config, aws, job).to_vec();
    if all.contains(&PUT) {
        let is_by_kms = sse_key(aws).is_some();
        all.extend(
            [(TAG, !aws.stored_as.tags.is_empty()), (DATA_KEY, is_by_kms)].iter().filter(|one| one.1).map(|one| one.0),
        );
    }
    all
}

/// Returns the KMS key with which S3 encrypts the object for the caller. S3's own keys need no permission.
fn sse_key(aws: &AwsKeyConfig) -> Option<&str> {
    aws.stored_as.encryption.as_ref()?.kms_key()
}

/// Returns the actions that do not depend on how the object is stored.
fn usual_calls(config: &Config, aws: &AwsKeyConfig, job: Job) -> &'static [&'static str] {
    let is_plain = config.volume.kind == VolumeType::Plain;
    match (job, &aws.object) {
        (Job::Up | Job::FirstUp, SecretLocation::Object(_)) => &[GET, DECRYPT],
        (Job::Provision, SecretLocation::Object(_)) if aws.raw_key.is_some() => &[NEW_KEY, PUT],
        (Job::Provision, SecretLocation::Object(_)) => &[ENCRYPT, PUT],
        // The new ciphertext is decrypted before it replaces the old one.
        (Job::Replace, SecretLocation::Object(_)) if aws.raw_key.is_some() => &[NEW_KEY, DECRYPT, PUT],
        (Job::Replace, SecretLocation::Object(_)) => &[ENCRYPT, DECRYPT, PUT],
        (Job::Rewrap, SecretLocation::Object(_)) if is_plain => &[],
        (Job::Rewrap, SecretLocation::Object(_)) => &[GET, DECRYPT, ENCRYPT, PUT],
        (Job::Up, SecretLocation::Token) => &[DECRYPT],
        // What was encrypted is decrypted at once, so that no volume is made that cannot be opened.
        (Job::FirstUp | Job::Rewrap, SecretLocation::Token) => &[ENCRYPT, DECRYPT],
        (Job::Provision | Job::Replace, SecretLocation::Token) => &[],
    }
}

/// Who the policies are for. The user may leave each of these out.
#[derive(Clone, Debug, Default)]
pub struct Who {
    /// The account's number.
    pub account: Option<String>,
    /// The name of the instance's role.
    pub role: Option<String>,
    /// The name of the role that makes the secret.
    pub provisioner: Option<String>,
}

/// The configuration describes no secret in AWS.
#[derive(Debug, thiserror::Error)]
#[error("no policy is needed: the configuration takes the secret from {0}, not from AWS")]
pub struct NotAws(String);

/// The policies of a volume. Each is a policy document of AWS in JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policies {
    /// For the instance's role.
    pub instance: Value,
    /// For the user who runs `nbdcrypt provision`. `None` if `up` makes the secret.
    pub provisioner: Option<Value>,
    /// For each KMS key, in the order of the configuration.
    pub keys: Vec<Value>,
    /// What the policy of the key in `sse-kms-key-id` must contain, if that is none of `keys`.
    pub sse_key: Option<Value>,
    /// For the bucket. `None` if there is no bucket.
    pub bucket: Option<Value>,
    /// Advice about the policies. Each text is a paragraph.
    pub notes: Vec<String>,
}

/// Returns the policies as AWS takes them. A name that is not known is a placeholder in capital letters.
///
/// # Errors
/// [`NotAws`], if the secret is not in AWS.
pub fn policies(config: &Config, who: &Who) -> Result<Policies, NotAws> {
    let aws = aws(config)?;
    let keys = KmsKey::all(aws);
    let partition = keys.first().map(|key| key.partition).unwrap_or_default();
    let of_key = keys.iter().find_map(|key| key.account.clone());
    let account = who.account.clone().or(of_key).unwrap_or_else(|| "ACCOUNT-ID".to_owned());
    let role = |name: &Option<String>, other: &str| {
        format!("arn:{partition}:iam::{account}:role/{}", name.as_deref().unwrap_or(other))
    };
    let names = Names {
        partition: partition.to_owned(),
        keys: keys.iter().map(|key| NamedKey::new(key, key.partition, "REGION", &account, "key/KEY-ID")).collect(),
        sse_key: None,
        s3: "s3.REGION.amazonaws.com".to_owned(),
        role: role(&who.role, "ROLE"),
        provisioner: role(&who.provisioner, "PROVISIONER"),
        literal: str::to_owned,
    };
    let names = names.with_sse_key(aws, &keys, |key| NamedKey::new(key, partition, "REGION", &account, "key/KEY-ID"));
    let mut policies = names.policies(config, aws);
    policies.notes.splice(0..0, keys.iter().filter_map(note_on_key));
    Ok(policies)
}

fn aws(config: &Config) -> Result<&AwsKeyConfig, NotAws> {
    match &config.key {
        KeyConfig::Aws(aws) => Ok(aws),
        KeyConfig::File(file) => Err(NotAws(file.to_string())),
        KeyConfig::Ephemeral => Err(NotAws("memory".to_owned())),
    }
}

/// A KMS key in the policies, written for the output format.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NamedKey {
    /// The key's ARN, or a pattern that matches it.
    arn: String,
    /// The alias by which requests name the key, if `arn` is only a pattern.
    alias: Option<String>,
    /// The number of the key's account.
    account: String,
}

impl NamedKey {
    /// Makes the names of a key from what the configuration says. `region`, `account` and `any` (the end of an ARN) stand for
    /// what it does not say.
    fn new(key: &KmsKey, partition: &str, region: &str, account: &str, any: &str) -> Self {
        let region = key.region.as_deref().unwrap_or(region);
        let account = key.account.as_deref().unwrap_or(account);
        let (end, alias) = match &key.name {
            // A policy cannot name a key by its alias (see `note_on_key`).
            KeyName::Alias(alias) => ("key/*", Some(alias.clone())),
            KeyName::Key(end) => (end.as_str(), None),
            KeyName::Any => (any, None),
        };
        Self { arn: format!("arn:{partition}:kms:{region}:{account}:{end}"), alias, account: account.to_owned() }
    }
}

/// The names in the policies, written for the output format.
struct Names {
    partition: String,
    /// The KMS keys, in the order of the configuration. The first one makes new ciphertexts.
    keys: Vec<NamedKey>,
    /// The KMS key with which S3 encrypts the object for the caller.
    sse_key: Option<NamedKey>,
    /// The host name of S3, if the configuration does not name the region of that key.
    s3: String,
    /// The ARN of the instance's role.
    role: String,
    /// The ARN of the role that makes the secret.
    provisioner: String,
    /// Escapes a text, so that the output format finds no variable in it.
    literal: fn(&str) -> String,
}

impl Names {
    /// Adds the KMS key with which S3 encrypts the object, and S3's host name in that key's region. `keys` are the other keys.
    /// `name` makes the names of a key that is none of them.
    fn with_sse_key(mut self, aws: &AwsKeyConfig, keys: &[KmsKey], name: impl Fn(&KmsKey) -> NamedKey) -> Self {
        let Some(configured) = sse_key(aws) else { return self };
        let key = KmsKey::of_s3(aws, configured);
        let same = keys.iter().position(|key| key.configured == configured);
        self.sse_key = Some(same.and_then(|number| self.keys.get(number).cloned()).unwrap_or_else(|| name(&key)));
        if let Some(region) = &key.region {
            let suffix = if key.partition == "aws-cn" { "amazonaws.com.cn" } else { "amazonaws.com" };
            self.s3 = format!("s3.{region}.{suffix}");
        }
        self
    }

    /// Returns a statement about the key with which S3 encrypts the object: only S3 may use it for the caller. `principal` is
    /// the caller in a policy of the key.
    fn through_s3(&self, action: &str, resource: &str, principal: Option<&str>) -> Value {
        let sid = if action == DECRYPT { "ReadEncryptedObject" } else { "StoreEncryptedObject" };
        let mut statement = json!({ "Sid": sid, "Effect": "Allow" });
        if let Some(principal) = principal {
            statement["Principal"] = json!({ "AWS": principal });
        }
        (statement["Action"], statement["Resource"]) = (action.into(), resource.into());
        statement["Condition"] = json!({ "StringEquals": { "kms:ViaService": self.s3 } });
        statement
    }

    /// Returns the policies, with the notes that apply to every output format.
    fn policies(&self, config: &Config, aws: &AwsKeyConfig) -> Policies {
        let object = match &aws.object {
            SecretLocation::Object(object) => Some((
                format!("arn:{}:s3:::{}", self.partition, self.literally(&in_resource(&object.bucket))),
                self.literally(&in_resource(&object.key)),
            )),
            SecretLocation::Token => None,
        };
        let object_arn = object.as_ref().map(|(bucket, key)| format!("{bucket}/{key}"));
        // A statement for each action that the commands call.
        let uses = |jobs: &[Job]| {
            let mut all: Vec<&str> = Vec::new();
            for action in jobs.iter().flat_map(|job| calls(config, *job)) {
                if !all.contains(&action) {
                    all.push(action);
                }
            }
            all
        };
        let (instance, provisioner) = (uses(&[Job::Up, Job::FirstUp]), uses(&[Job::Provision]));
        let of_role = |actions: &[&str]| {
            let statements = actions.iter().flat_map(|action| match (action.starts_with("kms:"), &object_arn) {
                (false, Some(object)) => vec![json!({
                    "Sid": sid(action), "Effect": "Allow", "Action": action, "Resource": object
                })],
                _ => {
                    let of_one = |(number, key): (usize, &NamedKey)| {
                        let statement = json!({
                            "Sid": numbered(sid(action), number), "Effect": "Allow", "Action": action, "Resource": key.arn
                        });
                        with_condition(statement, self.condition(aws, key.alias.as_deref()))
                    };
                    self.keys.iter().enumerate().filter(|(number, _)| is_used(action, *number)).map(of_one).collect()
                }
            });
            statements.collect::<Vec<_>>()
        };
        let with_sse = |mut statements: Vec<Value>, action: &str| {
            statements.extend(self.sse_key.iter().map(|key| self.through_s3(action, &key.arn, None)));
            document(statements)
        };
        let of_sse_key = || {
            vec![
                self.through_s3(DECRYPT, "*", Some(&self.role)),
                self.through_s3(DATA_KEY, "*", Some(&self.provisioner)),
            ]
        };
        let is_sse_key = |key: &NamedKey| self.sse_key.as_ref() == Some(key);
        let of_key = |principal: &str, action: &str| {
            with_condition(
                json!({
                    "Sid": sid(action), "Effect": "Allow", "Principal": { "AWS": principal }, "Action": action,
                    "Resource": "*"
                }),
                self.condition(aws, None),
            )
        };
        let policy_of_key = |(number, key): (usize, &NamedKey)| {
            let root = format!("arn:{}:iam::{}:root", self.partition, key.account);
            let mut statements = vec![json!({
                "Sid": "AdministerKey", "Effect": "Allow", "Principal": { "AWS": root }, "Action": ADMINISTRATION,
                "Resource": "*"
            })];
            let is_here = |action: &&&str| action.starts_with("kms:") && is_used(action, number);
            statements.extend(instance.iter().filter(is_here).map(|action| of_key(&self.role, action)));
            statements.extend(provisioner.iter().filter(is_here).map(|action| of_key(&self.provisioner, action)));
            statements.extend(is_sse_key(key).then(of_sse_key).into_iter().flatten());
            document(statements)
        };
        let bucket = object.as_ref().zip(object_arn.as_ref()).map(|((bucket, _), object)| {
            let allow = |principal: &str, action: &str| {
                json!({
                    "Sid": sid(action), "Effect": "Allow", "Principal": { "AWS": principal }, "Action": action,
                    "Resource": object
                })
            };
            let mut statements = vec![
                json!({
                    "Sid": "DenyWithoutTls", "Effect": "Deny", "Principal": "*", "Action": "s3:*",
                    "Resource": [bucket, format!("{bucket}/*")],
                    "Condition": { "Bool": { "aws:SecureTransport": "false" } }
                }),
                allow(&self.role, GET),
            ];
            let writes = provisioner.iter().filter(|action| action.starts_with("s3:"));
            statements.extend(writes.map(|action| allow(&self.provisioner, action)));
            document(statements)
        });
        Policies {
            instance: with_sse(of_role(&instance), DECRYPT),
            provisioner: (!provisioner.is_empty()).then(|| with_sse(of_role(&provisioner), DATA_KEY)),
            sse_key: match &self.sse_key {
                Some(key) if !self.keys.contains(key) => Some(document(of_sse_key())),
                _ => None,
            },
            keys: self.keys.iter().enumerate().map(policy_of_key).collect(),
            bucket,
            notes: notes(config, aws),
        }
    }

    fn literally(&self, text: &str) -> String {
        (self.literal)(text)
    }

    /// Returns the condition of a statement about KMS: the encryption context, and the alias that requests name, if there is
    /// one.
    fn condition(&self, aws: &AwsKeyConfig, alias: Option<&str>) -> Map<String, Value> {
        let mut equal = Map::new();
        if let Some(alias) = alias {
            equal.insert("kms:RequestAlias".to_owned(), self.literally(&in_value(alias)).into());
        }
        for (name, value) in &aws.encryption_context {
            equal.insert(format!("kms:EncryptionContext:{name}"), self.literally(&in_value(value)).into());
        }
        let mut condition = Map::new();
        if !equal.is_empty() {
            condition.insert("StringEquals".to_owned(), equal.into());
        }
        if aws.object == SecretLocation::Token {
            // The UUID of a volume that does not exist yet is not known.
            let uuid = format!("kms:EncryptionContext:{}", super::token::UUID);
            condition.insert("Null".to_owned(), json!({ uuid: "false" }));
        }
        condition
    }
}

fn document(statements: Vec<Value>) -> Value {
    json!({ "Version": "2012-10-17", "Statement": statements })
}

fn with_condition(mut statement: Value, condition: Map<String, Value>) -> Value {
    if !condition.is_empty() {
        statement["Condition"] = condition.into();
    }
    statement
}

/// Returns whether the commands call this action of KMS with the key that has this number. Only the first key makes new
/// ciphertexts.
fn is_used(action: &str, number: usize) -> bool {
    action != DATA_KEY && (number == 0 || action == DECRYPT)
}

/// Returns a name for the key with this number: the name itself for the first key. A policy's statements have different names.
fn numbered(name: &str, number: usize) -> String {
    match number {
        0 => name.to_owned(),
        number => format!("{name}{}", number + 1),
    }
}

/// Returns the name of the statement that allows an action.
fn sid(action: &str) -> &'static str {
    match action {
        GET => "ReadCiphertext",
        PUT => "StoreCiphertext",
        TAG => "TagCiphertext",
        DECRYPT => "UnlockVolume",
        ENCRYPT => "EncryptSecret",
        _ => "MakeVolumeKey",
    }
}

/// Returns the advice about how the policies name the key. Terraform and CloudFormation look the key up themselves.
fn note_on_key(key: &KmsKey) -> Option<String> {
    match &key.name {
        KeyName::Alias(alias) => Some(format!(
            "An alias is not a key: a statement whose resource is {alias} would allow actions on the alias itself, and \
             nothing with the key. So the resource is every key of the account and region, and kms:RequestAlias limits \
             the statement to requests that name {alias}, as those of nbdcrypt do. Anyone who may move the alias \
             (kms:UpdateAlias) chooses the key. To name one key and no other, write its ARN as `kms-key`. \
             (kms:ResourceAliases would be for requests that name the key by its id.)"
        )),
        KeyName::Key(_) => None,
        KeyName::Any => Some(
            "The configuration has no `kms-key`, so the role could decrypt with any key that it has access to. Write the key's ARN \
             as `kms-key` under [key], and in these policies in place of KEY-ID."
                .to_owned(),
        ),
    }
}

/// Returns the advice about the policies.
fn notes(config: &Config, aws: &AwsKeyConfig) -> Vec<String> {
    let mut notes = vec![
        "A KMS key has only one policy. The printed policy replaces all of it. If anyone else uses the key, first add their \
         statements, which `aws kms get-key-policy --key-id KEY` shows. Otherwise they lose their access."
            .to_owned(),
    ];
    if aws.kms_keys.len() > 1 {
        notes.push(
            "Each KMS key has its own policy, also each replica of a multi-Region key. The first key in `kms-key` makes new \
             ciphertexts, and each of the keys may decrypt them."
                .to_owned(),
        );
    }
    if matches!(aws.object, SecretLocation::Object(_)) {
        notes.push(
            "A bucket has only one policy. The printed policy replaces all of it. If anyone else uses the bucket, first add \
             the statements that `aws s3api get-bucket-policy --bucket BUCKET` shows. Otherwise these statements, also those \
             that forbid something, are lost."
                .to_owned(),
        );
    }
    match (&aws.object, &config.volume.devices) {
        (SecretLocation::Token, Selection::InstanceStore | Selection::Serials { instance_store: true, .. }) => notes.push(
            "An instance store is blank after each stop, so `up` makes the volume and its secret again, and the role \
             always needs kms:Encrypt."
                .to_owned(),
        ),
        (SecretLocation::Token, Selection::Paths(_) | Selection::Serials { .. }) => notes.push(
            "Only `up` on a blank disk and `key rewrap` need kms:Encrypt (EncryptSecret). On a disk that keeps its data, \
             remove it from the role and from the key's policy after the first `up`. An instance store is blank after \
             each stop, so there it must stay."
                .to_owned(),
        ),
        (SecretLocation::Object(_), _) => {
            if aws.encryption_context.is_empty() {
                notes.push(
                    "Without `encryption-context` under [key], these policies cannot tell this secret from the other \
                     secrets that the same KMS key encrypts. Before `nbdcrypt provision`, write one such as \
                     `encryption-context = { volume = \"scratch\" }`."
                        .to_owned(),
                );
            }
            notes.push(
                "`provision` reads the secret back if it may (kms:Decrypt, s3:GetObject). `provision --replace` needs \
                 kms:Decrypt, and `key rewrap` needs the four actions that read and write. Whoever runs them needs these \
                 in a policy of their own and in the key's policy."
                    .to_owned(),
            );
            notes.push(match sse_key(aws) {
                Some(_) => {
                    "S3 encrypts and decrypts the object for the caller, with the key in `sse-kms-key-id`. So the roles need \
                     kms:GenerateDataKey and kms:Decrypt with that key, and its own policy must allow this, or leave it to the IAM \
                     policies, as a key's default policy does. If that key is none of those in `kms-key`, add the printed \
                     statements to its policy."
                        .to_owned()
                }
                None => "If the bucket encrypts its objects with a KMS key (SSE-KMS), S3 uses that key for the caller: reading \
                 then needs kms:Decrypt with it, and writing kms:GenerateDataKey. Name it as `sse-kms-key-id` under [key], and \
                 these policies contain both. S3's own encryption (SSE-S3) needs nothing."
                    .to_owned(),
            });
        }
    }
    notes.push(
        "The key's policy lets the account's administrators manage the key, but not use it: only the roles that it names \
         encrypt and decrypt, whatever their IAM policies allow. (An administrator may change this policy. CloudTrail \
         then shows PutKeyPolicy.) KMS refuses it if a role that it names does not \
         exist yet."
            .to_owned(),
    );
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    pub(super) fn config(volume: &str, key: &str) -> Config {
        let text = format!("[volume]\ndevices = [\"/dev/vdb\"]\n{volume}\n[key]\nsource = \"aws\"\n{key}\n");
        Config::parse(&text, Path::new("/etc/nbdcrypt/scratch.toml")).unwrap()
    }

    const ALIAS: &str = "object = \"s3://my-bucket/a*key\"\nkms-key = \"alias/x\"\nregion = \"eu-central-1\"\n\
                         encryption-context = { volume = \"scratch\" }";
    const TOKEN: &str = "object = \"token\"\nkms-key = \"arn:aws:kms:eu-central-1:123456789012:key/1\"";

    #[test]
    fn an_alias_becomes_a_condition_and_not_a_resource() {
        let who = Who { account: Some("123456789012".to_owned()), ..Who::default() };
        let policies = policies(&config("", ALIAS), &who).unwrap();
        assert_eq!(
            policies.instance["Statement"],
            json!([
                { "Sid": "ReadCiphertext", "Effect": "Allow", "Action": "s3:GetObject",
                  "Resource": "arn:aws:s3:::my-bucket/a${*}key" },
                { "Sid": "UnlockVolume", "Effect": "Allow", "Action": "kms:Decrypt",
                  "Resource": "arn:aws:kms:eu-central-1:123456789012:key/*",
                  "Condition": { "StringEquals": { "kms:RequestAlias": "alias/x",
                                                   "kms:EncryptionContext:volume": "scratch" } } },
            ])
        );
        // The key's policy is about one key only.
        assert_eq!(
            policies.keys[0]["Statement"][1],
            json!({ "Sid": "UnlockVolume", "Effect": "Allow",
                    "Principal": { "AWS": "arn:aws:iam::123456789012:role/ROLE" }, "Action": "kms:Decrypt",
                    "Resource": "*",
                    "Condition": { "StringEquals": { "kms:EncryptionContext:volume": "scratch" } } })
        );
        assert!(policies.notes[0].contains("kms:RequestAlias"), "{:?}", policies.notes);
        for replaced in ["A KMS key has only one policy", "A bucket has only one policy"] {
            assert!(policies.notes.iter().any(|note| note.starts_with(replaced)), "{:?}", policies.notes);
        }
    }

    #[test]
    fn a_token_needs_a_context_but_no_bucket() {
        let policies = policies(&config("", TOKEN), &Who::default()).unwrap();
        assert!(policies.bucket.is_none() && policies.provisioner.is_none());
        assert!(!policies.notes.iter().any(|note| note.contains("bucket")), "{:?}", policies.notes);
        let statements = policies.instance["Statement"].as_array().unwrap();
        let actions: Vec<_> = statements.iter().map(|statement| &statement["Action"]).collect();
        assert_eq!(actions, ["kms:Decrypt", "kms:Encrypt"]);
        for statement in statements {
            assert_eq!(statement["Resource"], "arn:aws:kms:eu-central-1:123456789012:key/1");
            assert_eq!(statement["Condition"], json!({ "Null": { "kms:EncryptionContext:luks-uuid": "false" } }));
        }
    }

    /// The first key encrypts, and every key decrypts.
    #[test]
    fn every_key_of_a_list_has_its_policies() {
        let list = "object = \"s3://my-bucket/key\"\nkms-key = [\"arn:aws:kms:eu-west-1:123456789012:key/mrk-1\", \
                    \"arn:aws:kms:us-east-1:999999999999:key/mrk-1\", \"arn:aws:kms:us-west-2:123456789012:alias/x\"]";
        let policies = policies(&config("", list), &Who::default()).unwrap();
        let allowed = |policy: &Value| -> Vec<(Value, Value, Value)> {
            let statements = policy["Statement"].as_array().unwrap().iter();
            statements.map(|one| (one["Sid"].clone(), one["Action"].clone(), one["Resource"].clone())).collect()
        };
        let row = |sid: &str, action: &str, resource: &str| (json!(sid), json!(action), json!(resource));
        assert_eq!(
            allowed(&policies.instance)[1..],
            [
                row("UnlockVolume", DECRYPT, "arn:aws:kms:eu-west-1:123456789012:key/mrk-1"),
                row("UnlockVolume2", DECRYPT, "arn:aws:kms:us-east-1:999999999999:key/mrk-1"),
                row("UnlockVolume3", DECRYPT, "arn:aws:kms:us-west-2:123456789012:key/*"),
            ]
        );
        assert_eq!(
            policies.instance["Statement"][3]["Condition"],
            json!({ "StringEquals": { "kms:RequestAlias": "alias/x" } })
        );
        let provisioner = allowed(policies.provisioner.as_ref().unwrap());
        assert_eq!(provisioner[0], row("EncryptSecret", ENCRYPT, "arn:aws:kms:eu-west-1:123456789012:key/mrk-1"));
        assert_eq!(provisioner.len(), 2);
        let of_keys: Vec<Vec<Value>> = policies
            .keys
            .iter()
            .map(|policy| allowed(policy).into_iter().skip(1).map(|(sid, ..)| sid).collect())
            .collect();
        assert_eq!(of_keys, [vec!["UnlockVolume", "EncryptSecret"], vec!["UnlockVolume"], vec!["UnlockVolume"]]);
        assert_eq!(policies.keys[1]["Statement"][0]["Principal"]["AWS"], "arn:aws:iam::999999999999:root");
        assert!(policies.notes.iter().any(|note| note.starts_with("Each KMS key has its own policy")));
    }

    /// S3 uses its key for the caller, and only S3 may do so.
    #[test]
    fn encryption_at_rest_and_tags_are_in_the_policies() {
        let arn = "arn:aws:kms:eu-west-1:123456789012:key/2";
        let with = |more: &str| {
            policies(
                &config("", &format!("object = \"s3://my-bucket/key\"\nkms-key = \"{arn}\"\n{more}")),
                &Who::default(),
            )
            .unwrap()
        };
        let actions = |policy: &Value| -> Vec<Value> {
            policy["Statement"].as_array().unwrap().iter().map(|statement| statement["Action"].clone()).collect()
        };
        let sse = with(
            "tags = { team = \"x\" }\nsse = \"aws:kms\"\nsse-kms-key-id = \"arn:aws:kms:eu-west-1:123456789012:key/9\"",
        );
        assert_eq!(actions(&sse.instance), [GET, DECRYPT, DECRYPT]);
        assert_eq!(
            sse.instance["Statement"][2],
            json!({ "Sid": "ReadEncryptedObject", "Effect": "Allow", "Action": "kms:Decrypt",
                    "Resource": "arn:aws:kms:eu-west-1:123456789012:key/9",
                    "Condition": { "StringEquals": { "kms:ViaService": "s3.eu-west-1.amazonaws.com" } } })
        );
        assert_eq!(actions(sse.provisioner.as_ref().unwrap()), [ENCRYPT, PUT, TAG, DATA_KEY]);
        assert_eq!(actions(sse.bucket.as_ref().unwrap())[1..], [GET, PUT, TAG]);
        assert_eq!(actions(sse.sse_key.as_ref().unwrap()), [DECRYPT, DATA_KEY]);
        assert_eq!(actions(&sse.keys[0])[1..], [DECRYPT, ENCRYPT]);
        // The same key for both: it has only one policy.
        let same = with(&format!("sse = \"aws:kms:dsse\"\nsse-kms-key-id = \"{arn}\""));
        assert_eq!(actions(&same.keys[0])[1..], [DECRYPT, ENCRYPT, DECRYPT, DATA_KEY]);
        assert!(same.sse_key.is_none());
        // S3's own keys need no permission.
        for own in ["sse = \"AES256\"", "sse = \"aws:kms\"", ""] {
            assert_eq!(actions(with(own).provisioner.as_ref().unwrap()), [ENCRYPT, PUT], "{own}");
        }
    }

    #[test]
    fn kms_makes_a_plain_key_only_without_a_hash() {
        let calls = |volume: &str, job| calls(&config(volume, ALIAS), job);
        assert_eq!(calls("type = \"plain\"", Job::Provision), [NEW_KEY, PUT]);
        assert_eq!(calls("type = \"plain\"\nhash = \"sha256\"", Job::Provision), [ENCRYPT, PUT]);
        assert!(calls("type = \"plain\"\nhash = \"sha256\"", Job::Rewrap).is_empty());
    }

    /// Only the named roles may use the key. Its administrators may not.
    #[test]
    fn administrators_of_the_key_cannot_decrypt() {
        for key in [ALIAS, TOKEN] {
            let policy = policies(&config("", key), &Who::default()).unwrap().keys.remove(0);
            let root = &policy["Statement"][0];
            assert!(root["Principal"]["AWS"].as_str().unwrap().ends_with(":root"));
            for action in root["Action"].as_array().unwrap() {
                let prefix = action.as_str().unwrap().trim_end_matches('*');
                assert!(
                    ![DECRYPT, ENCRYPT, NEW_KEY, "kms:ReEncryptFrom", "kms:CreateGrant"]
                        .iter()
                        .any(|use_| use_.starts_with(prefix))
                );
            }
        }
    }

    #[test]
    fn a_key_file_needs_no_policy() {
        let text = "[volume]\ndevices = [\"/x\"]\n[key]\nsource = \"file\"\npath = \"/etc/x.key\"\n";
        let config = Config::parse(text, Path::new("/etc/x.toml")).unwrap();
        let error = policies(&config, &Who::default()).unwrap_err().to_string();
        assert!(error.contains("/etc/x.key") && error.contains("no policy"), "{error}");
        assert!(Job::ALL.iter().all(|job| calls(&config, *job).is_empty()));
    }
}

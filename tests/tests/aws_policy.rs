//! `nbdcrypt policy` prints exact policies: with them, every command works. If any part of them is missing, a command
//! fails. moto checks the requests of roles against the printed policies.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use harness::moto::{ACCOUNT, Client, Moto, REGION};
use harness::nbdcrypt::{binary, told};
use serde_json::{Value, json};

/// An account with a bucket, a key, and two roles: `machine` runs volumes, and `maker` makes secrets.
struct Account {
    moto: Moto,
    key: String,
    /// The key with which S3 encrypts the object, if the configuration says so.
    sse_key: String,
    machine: Client,
    maker: Client,
}

impl Account {
    /// `volume` and `key` are lines of the configuration.
    fn new(volume: &str, key: &str) -> Self {
        let moto = Moto::start();
        moto.make_bucket("secrets");
        let id = moto.make_key("alias/volumes");
        let sse_key = moto.make_key("alias/s3");
        let [machine, maker] = ["machine", "maker"].map(|role| {
            moto.make_role(role);
            moto.assume_role(role)
        });
        let account = Self { moto, key: id, sse_key, machine, maker };
        account.configure(volume, key);
        account
    }

    fn configure(&self, volume: &str, key: &str) {
        let dir = self.machine.dir().display();
        let text = format!(
            "[volume]\ndevices = [\"{dir}/disk\"]\nsize = \"32M\"\n{volume}\n[key]\nsource = \"aws\"\n{key}\n\
             region = \"{REGION}\"\nretry-for = \"0s\"\n\
             [filesystem]\ntype = \"ext4\"\nmountpoint = \"{dir}/mnt\"\n"
        );
        self.machine.file("scratch.toml", text);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.machine.dir().join(name)
    }

    /// Runs a command with the role's credentials.
    fn run(&self, role: &Client, arguments: &[&str]) -> Output {
        let mut command = role.command(binary());
        command.arg("--run-dir").arg(self.path("run")).args(arguments).current_dir(self.machine.dir());
        command.output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, role: &Client, arguments: &[&str]) -> String {
        let output = self.run(role, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail because AWS denies it one of these actions.
    #[track_caller]
    fn is_denied(&self, role: &Client, arguments: &[&str], action: &str) {
        let output = self.run(role, arguments);
        let said = told(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?} without {action}: {said}");
        assert!(said.contains(action) && said.contains("den"), "{arguments:?} without {action}: {said}");
    }

    fn printed(&self) -> Value {
        let who = ["--account", ACCOUNT, "--role", "machine", "--provisioner", "maker"];
        let told = self.succeeds(&self.machine, &[&["policy", "--json", "scratch.toml"][..], &who].concat());
        serde_json::from_str(&told).unwrap()
    }

    /// Sets those policies of the roles, the key and the bucket that are given. Requests are then checked.
    fn apply(&self, policies: &[(&str, Value)]) {
        self.moto.enforce_policies(false);
        for (of, policy) in policies {
            match *of {
                "instance-role" => self.moto.set_role_policy("machine", policy),
                "provisioner" => self.moto.set_role_policy("maker", policy),
                "kms-key" => self.moto.set_key_policy(&self.key, policy),
                "sse-kms-key" => self.moto.set_key_policy(&self.sse_key, policy),
                _ => self.moto.set_bucket_policy("secrets", policy),
            }
        }
        self.moto.enforce_policies(true);
    }

    /// Runs a command that is listed in `nbdcrypt policy --json` with its actions. The command must fail without any one of
    /// these actions, and succeed with exactly these actions.
    #[track_caller]
    fn needs_exactly(&self, job: &str, arguments: &[&str]) {
        let calls = self.printed()["calls"][job].clone();
        let calls: Vec<&str> = calls.as_array().unwrap().iter().map(|action| action.as_str().unwrap()).collect();
        assert!(calls.len() < 5 && !calls.is_empty(), "{job}: {calls:?}");
        for missing in &calls {
            let others: Vec<_> = calls.iter().copied().filter(|action| action != missing).collect();
            self.apply(&[("instance-role", allowing(&others))]);
            self.is_denied(&self.machine, arguments, missing);
        }
        self.apply(&[("instance-role", allowing(&calls))]);
        self.succeeds(&self.machine, arguments);
    }

    /// Makes the disk blank and removes the secret.
    fn start_over(&self) {
        self.moto.enforce_policies(false);
        self.moto.delete_object("secrets", "key");
        let _ = fs::remove_file(self.path("disk"));
    }

    /// Makes a secret, if this configuration's secret is made by `provision`, and brings a new volume up. This must work
    /// with these policies, and must fail without any one of their statements.
    #[track_caller]
    fn are_exact(&self, policies: &[(&str, Value)]) {
        let jobs: [(&Client, &[&str]); 2] =
            [(&self.maker, &["provision", "scratch.toml"]), (&self.machine, &["up", "scratch.toml"])];
        let is_made = !self.printed()["calls"]["provision"].as_array().unwrap().is_empty();
        let jobs = &jobs[usize::from(!is_made)..];
        let mut tried = 0;
        for (at, (of, policy)) in policies.iter().enumerate() {
            for (number, statement) in policy["Statement"].as_array().unwrap().iter().enumerate() {
                let action = &statement["Action"];
                // Statements that allow everything or that deny are not part of the least privileges.
                let Some(action) = action.as_str().filter(|_| statement["Effect"] == "Allow") else { continue };
                if action == "kms:*" {
                    continue;
                }
                let mut lacking = policies.to_vec();
                match lacking[at].1["Statement"].as_array_mut().unwrap() {
                    one if one.len() == 1 => lacking[at].1 = nothing(of),
                    more => drop(more.remove(number)),
                }
                self.start_over();
                self.apply(&lacking);
                let failed = jobs.iter().map(|(role, job)| self.run(role, job)).find(|output| !output.status.success());
                let said = told(&failed.unwrap_or_else(|| panic!("{of} without {action}: all works")));
                assert!(said.contains(action) && said.contains("denies access"), "{of} without {action}: {said}");
                tried += 1;
            }
        }
        assert!(tried >= 2, "{tried}: {policies:?}");
        self.start_over();
        self.apply(policies);
        for (role, job) in jobs {
            self.succeeds(role, job);
        }
        self.succeeds(&self.machine, &["down", "scratch.toml"]);
    }

    /// First checks the policies of the roles. The key's policy then leaves everything to IAM. After that, checks the
    /// policies of the key and of the bucket. The roles then have no policies of their own.
    #[track_caller]
    fn each_printed_policy_is_exact(&self) {
        let printed = self.printed()["policies"].clone();
        let of = |name: &str| printed.get(name).cloned().unwrap_or_else(|| nothing(name));
        let default = json!({ "Version": "2012-10-17", "Statement": [{
            "Effect": "Allow", "Principal": { "AWS": format!("arn:aws:iam::{ACCOUNT}:root") }, "Action": "kms:*",
            "Resource": "*"
        }] });
        self.are_exact(&[
            ("instance-role", of("instance-role")),
            ("provisioner", of("provisioner")),
            ("kms-key", default.clone()),
            ("sse-kms-key", default),
            ("bucket", nothing("bucket")),
        ]);
        self.are_exact(&[
            ("instance-role", nothing("instance-role")),
            ("provisioner", nothing("provisioner")),
            ("kms-key", of("kms-key")),
            ("sse-kms-key", of("sse-kms-key")),
            ("bucket", of("bucket")),
        ]);
        // All policies together, as they are meant to be used.
        self.start_over();
        let names = ["instance-role", "provisioner", "kms-key", "sse-kms-key", "bucket"];
        let all = names.map(|name| (name, of(name)));
        self.apply(&all);
        if printed.get("provisioner").is_some() {
            self.succeeds(&self.maker, &["provision", "scratch.toml"]);
        }
        self.succeeds(&self.machine, &["up", "scratch.toml"]);
        self.succeeds(&self.machine, &["down", "scratch.toml"]);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if self.path("run/scratch").exists() {
            self.run(&self.machine, &["down", "scratch"]);
        }
    }
}

/// Returns a policy of the role or the bucket that allows nothing. AWS does not accept a policy without statements.
fn nothing(of: &str) -> Value {
    let mut policy = json!({ "Version": "2012-10-17", "Statement": [{
        "Effect": "Deny", "Action": "s3:DeleteBucket", "Resource": "arn:aws:s3:::secrets"
    }] });
    if ["bucket", "sse-kms-key"].contains(&of) {
        policy["Statement"][0]["Principal"] = "*".into();
    }
    policy
}

fn allowing(actions: &[&str]) -> Value {
    if actions.is_empty() {
        return nothing("instance-role");
    }
    json!({ "Version": "2012-10-17", "Statement": [{ "Effect": "Allow", "Action": actions, "Resource": "*" }] })
}

const OBJECT: &str = "object = \"s3://secrets/key\"\nkms-key = \"alias/volumes\"\nrandom = true\n\
                      encryption-context = { volume = \"scratch\" }";
const TOKEN: &str = "object = \"token\"\nkms-key = \"alias/volumes\"\nencryption-context = { volume = \"scratch\" }";
const PLAIN: &str = "object = \"s3://secrets/key\"\nkms-key = \"alias/volumes\"";

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn policies_for_an_object_are_exact() {
    let account = Account::new("", OBJECT);
    account.each_printed_policy_is_exact();

    // The same key and bucket, but the secret of another volume.
    account.configure("", &OBJECT.replace("scratch", "other"));
    account.is_denied(&account.machine, &["up", "scratch.toml"], "kms:Decrypt");
    // The same key, named by its id. The key's policy still allows this. The role's policy does not, because it names
    // the key by its alias.
    let by_id = OBJECT.replace("alias/volumes", &account.key);
    account.configure("", &by_id);
    account.succeeds(&account.machine, &["up", "scratch.toml"]);
    account.succeeds(&account.machine, &["down", "scratch.toml"]);
    let default = json!({ "Version": "2012-10-17", "Statement": [{
        "Effect": "Allow", "Principal": { "AWS": format!("arn:aws:iam::{ACCOUNT}:root") }, "Action": "kms:*", "Resource": "*"
    }] });
    account.apply(&[("kms-key", default)]);
    account.is_denied(&account.machine, &["up", "scratch.toml"], "kms:Decrypt");
    // With its own policies, a configuration that names the key by its id works.
    account.each_printed_policy_is_exact();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn policies_for_a_token_are_exact() {
    let account = Account::new("", TOKEN);
    account.each_printed_policy_is_exact();
    // Once the volume exists, the role needs no kms:Encrypt.
    let mut printed = account.printed()["policies"].clone();
    for policy in ["instance-role", "kms-key"] {
        let statements = printed[policy]["Statement"].as_array_mut().unwrap();
        statements.retain(|statement| statement["Sid"] != "EncryptSecret");
        account.apply(&[(policy, printed[policy].clone())]);
    }
    account.succeeds(&account.machine, &["up", "scratch.toml"]);
    account.succeeds(&account.machine, &["down", "scratch.toml"]);
    account.start_over();
    account.moto.enforce_policies(true);
    account.is_denied(&account.machine, &["up", "scratch.toml"], "kms:Encrypt");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn policies_for_a_plain_volume_are_exact() {
    Account::new("type = \"plain\"", PLAIN).each_printed_policy_is_exact();
}

/// S3 encrypts the object with another KMS key, and the object has tags.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn policies_for_encryption_at_rest_and_tags_are_exact() {
    let account = Account::new("", OBJECT);
    let sse_key = format!("arn:aws:kms:{REGION}:{ACCOUNT}:key/{}", account.sse_key);
    let stored =
        format!("{OBJECT}\nsse = \"aws:kms\"\nsse-kms-key-id = \"{sse_key}\"\ntags = {{ team = \"storage\" }}");
    account.configure("", &stored);
    account.needs_exactly("provision", &["provision", "scratch.toml"]);
    account.each_printed_policy_is_exact();
}

/// With a list of keys, the policies allow to decrypt with each key, and to encrypt with the first one only.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn policies_cover_every_key_of_a_list() {
    const OTHER: &str = "us-east-1";
    let account = Account::new("", OBJECT);
    let (id, [first, second]) = account.moto.make_multi_region_key(OTHER);
    let list = OBJECT.replace("\"alias/volumes\"", &format!("[\"{first}\", \"{second}\"]"));
    account.configure("", &list);
    let printed = account.printed()["policies"].clone();
    let set = |role: &Value, keys: [&Value; 2]| {
        account.moto.enforce_policies(false);
        account.moto.set_role_policy("machine", role);
        account.moto.set_key_policy(&id, keys[0]);
        account.moto.set_key_policy_in(OTHER, &id, keys[1]);
        account.moto.enforce_policies(true);
    };
    let comes_up = || {
        account.succeeds(&account.machine, &["up", "scratch.toml"]);
        account.succeeds(&account.machine, &["down", "scratch.toml"]);
    };
    let is_denied = || account.is_denied(&account.machine, &["up", "scratch.toml"], &second);
    let without = |policy: &Value, sid: &str| {
        let mut policy = policy.clone();
        let statements = policy["Statement"].as_array_mut().unwrap();
        let before = statements.len();
        statements.retain(|statement| statement["Sid"] != sid);
        assert_eq!(statements.len(), before - 1, "{sid}: {policy}");
        policy
    };
    let (role, keys) = (&printed["instance-role"], [&printed["kms-key"], &printed["kms-key-2"]]);
    account.apply(&[("provisioner", printed["provisioner"].clone()), ("bucket", printed["bucket"].clone())]);
    set(role, keys);
    account.succeeds(&account.maker, &["provision", "scratch.toml"]);
    comes_up();

    // Without the first key, everything depends on the second one.
    account.moto.enforce_policies(false);
    account.moto.kms("DisableKey", &json!({ "KeyId": id }));
    account.moto.enforce_policies(true);
    comes_up();
    // Only the role's policy counts.
    let default = json!({ "Version": "2012-10-17", "Statement": [{
        "Effect": "Allow", "Principal": { "AWS": format!("arn:aws:iam::{ACCOUNT}:root") }, "Action": "kms:*", "Resource": "*"
    }] });
    set(role, [&default; 2]);
    comes_up();
    set(&without(role, "UnlockVolume2"), [&default; 2]);
    is_denied();
    // Only the key's policy counts. The bucket's policy lets the role read.
    set(&nothing("instance-role"), keys);
    comes_up();
    set(&nothing("instance-role"), [keys[0], &without(keys[1], "UnlockVolume")]);
    is_denied();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn each_command_needs_exactly_its_actions() {
    let up = &["up", "scratch.toml"][..];
    let rewrap = &["key", "rewrap", "--config", "scratch.toml", "disk"][..];
    for (volume, key) in [("", OBJECT), ("", TOKEN), ("type = \"plain\"", PLAIN)] {
        let account = Account::new(volume, key);
        let down = || drop(account.succeeds(&account.machine, &["down", "scratch.toml"]));
        if key != TOKEN {
            account.needs_exactly("provision", &["provision", "scratch.toml"]);
            account.needs_exactly("provision --replace", &["provision", "--replace", "scratch.toml"]);
        }
        account.needs_exactly("up on a blank disk", up);
        down();
        account.needs_exactly("up", up);
        down();
        if key != PLAIN {
            account.needs_exactly("key rewrap", rewrap);
        }
    }
}

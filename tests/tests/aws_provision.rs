//! `nbdcrypt provision` with moto's S3 and KMS: the original shell commands open what it makes.

use std::path::PathBuf;
use std::process::Output;
use std::sync::LazyLock;

use harness::moto::{ACCOUNT, Client, Moto, REGION};
use harness::nbdcrypt::{binary, told};
use serde_json::{Value, json};

static MOTO: LazyLock<Moto> = LazyLock::new(Moto::start);

fn account(name: &str) -> (Client, PathBuf) {
    account_on(&MOTO, name)
}

fn account_on(moto: &Moto, name: &str) -> (Client, PathBuf) {
    let client = moto.client();
    moto.make_key(&format!("alias/{name}"));
    moto.make_bucket(&format!("test-{name}"));
    let config = client.file(
        "test.toml",
        format!(
            "[volume]\ndevices = [\"/dev/null\"]\n[key]\nsource = \"aws\"\nobject = \"s3://test-{name}/key\"\n\
             kms-key = \"alias/{name}\"\nencryption-context = {{ volume = \"scratch\" }}\nretry-for = \"2s\"\n"
        ),
    );
    (client, config)
}

fn run(client: &Client, arguments: &[&str], config: &PathBuf) -> Output {
    let (command, more) = arguments.split_first().unwrap();
    client.command(env!("CARGO_BIN_EXE_aws-key")).arg(command).arg(config).args(more).output().unwrap()
}

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` in: {error}");
    }
}

/// The steps of the original boot script.
fn by_shell(client: &Client, name: &str) -> String {
    client.shell(&format!(
        "aws s3 cp s3://test-{name}/key LuksInternalStorageKey > /dev/null\n\
         password=$(aws kms decrypt --ciphertext-blob fileb://LuksInternalStorageKey \
         --encryption-context volume=scratch --query Plaintext --output text | base64 --decode)\n\
         printf %s \"$password\""
    ))
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn the_shell_commands_open_what_provision_makes() {
    let (client, config) = account("shell");
    let made = run(&client, &["provision"], &config);
    let said = String::from_utf8_lossy(&made.stdout).into_owned();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(said.starts_with("s3://test-shell/key arn:aws:kms:") && said.contains("read back"), "{said}");
    let secret = by_shell(&client, "shell");
    assert_eq!(secret.len(), 64);
    assert_eq!(run(&client, &["passphrase"], &config).stdout, secret.as_bytes());
    assert!(!said.contains(&secret), "the secret is never printed");
    // The encryption context is needed for decryption.
    let without = client.try_shell("aws kms decrypt --ciphertext-blob fileb://LuksInternalStorageKey");
    assert!(!without.status.success());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn an_existing_object_is_replaced_only_on_request() {
    let (client, config) = account("exists");
    client.shell("printf precious > precious; aws s3 cp precious s3://test-exists/key");
    refused(&run(&client, &["provision"], &config), &["s3://test-exists/key exists", "--replace"]);
    assert_eq!(client.shell("aws s3 cp s3://test-exists/key -"), "precious");
    let replaced = client.command(binary()).args(["provision", "--replace"]).arg(&config).output().unwrap();
    let said = told(&replaced);
    assert!(replaced.status.success() && said.contains("does not open with the new secret"), "{said}");
    let first = by_shell(&client, "exists");
    assert!(run(&client, &["provision", "--replace"], &config).status.success());
    assert_ne!(by_shell(&client, "exists"), first, "each secret is new");
}

/// S3 keeps the object as the configuration says, also after a replacement. A new object without tags and encryption of its own
/// would otherwise take the place of one that has them.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn the_object_is_encrypted_and_tagged_as_configured() {
    let (client, config) = account("stored");
    let key = format!("arn:aws:kms:{REGION}:{ACCOUNT}:key/{}", MOTO.make_key("alias/of-s3"));
    let text = std::fs::read_to_string(&config).unwrap();
    let object = || -> (Value, Value) {
        let json = |command: &str| serde_json::from_str(&client.shell(command)).unwrap();
        (
            json("aws s3api head-object --bucket test-stored --key key --checksum-mode ENABLED"),
            json("aws s3api get-object-tagging --bucket test-stored --key key --query TagSet"),
        )
    };
    let stored = format!(
        "sse = \"aws:kms\"\nsse-kms-key-id = \"{key}\"\ntags = {{ \"cost center\" = \"1+1 = 2\", team = \"x\" }}\n"
    );
    let config = client.file("stored.toml", format!("{text}{stored}"));
    for arguments in [&["provision"][..], &["provision", "--replace"]] {
        let made = run(&client, arguments, &config);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let (head, tags) = object();
        assert_eq!((&head["ServerSideEncryption"], &head["SSEKMSKeyId"]), (&json!("aws:kms"), &json!(key)), "{head}");
        assert!(head["ChecksumCRC32"].is_string(), "{head}");
        let expected = [json!({ "Key": "cost center", "Value": "1+1 = 2" }), json!({ "Key": "team", "Value": "x" })];
        assert!(expected.iter().all(|tag| tags.as_array().unwrap().contains(tag)), "{tags}");
    }
    let config = client.file("stored.toml", format!("{text}sse = \"AES256\"\n"));
    assert!(run(&client, &["provision", "--replace"], &config).status.success());
    let (head, tags) = object();
    assert_eq!((&head["ServerSideEncryption"], &tags), (&json!("AES256"), &json!([])), "{head}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn only_one_of_several_concurrent_provisions_succeeds() {
    let (client, config) = account("race");
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..6).map(|_| scope.spawn(|| run(&client, &["provision"], &config))).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert_eq!(outputs.iter().filter(|output| output.status.success()).count(), 1);
    for output in outputs.iter().filter(|output| !output.status.success()) {
        refused(output, &["s3://test-race/key exists"]);
    }
    assert_eq!(by_shell(&client, "race").len(), 64);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn a_missing_key_or_bucket_is_reported_with_a_remedy() {
    let (client, config) = account("lacking");
    let text = std::fs::read_to_string(&config).unwrap();
    let no_key = client.file("no-key.toml", text.replace("alias/lacking", "alias/nobody"));
    refused(&run(&client, &["provision"], &no_key), &["no key alias/nobody", "aws kms create-key"]);
    assert_eq!(client.shell("aws s3 ls s3://test-lacking"), "");
    let no_bucket = client.file("no-bucket.toml", text.replace("test-lacking", "test-nowhere"));
    refused(&run(&client, &["provision"], &no_bucket), &["no bucket `test-nowhere`", "aws s3 mb s3://test-nowhere"]);
    client.shell(
        "aws kms disable-key --key-id $(aws kms describe-key --key-id alias/lacking --query KeyMetadata.KeyId --output text)",
    );
    refused(&run(&client, &["provision"], &config), &["alias/lacking is disabled"]);
    assert_eq!(client.shell("aws s3 ls s3://test-lacking"), "");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn provisioning_works_with_only_write_permission() {
    let moto = Moto::start();
    let (_administrator, config) = account_on(&moto, "writer");
    let writer = moto.make_user();
    moto.permit_only(&json!(["kms:Encrypt"]));
    refused(
        &run(&writer, &["provision"], &config),
        &["S3 denies access", "s3:PutObject on arn:aws:s3:::test-writer/key"],
    );
    moto.permit_only(&json!(["s3:PutObject"]));
    refused(&run(&writer, &["provision"], &config), &["KMS denies access", "kms:Encrypt on alias/writer"]);
    moto.permit_only(&json!(["kms:Encrypt", "s3:PutObject"]));
    let made = run(&writer, &["provision"], &config);
    let said = String::from_utf8_lossy(&made.stdout).into_owned();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(said.contains("not read back: S3 denies access"), "{said}");
    refused(&run(&writer, &["provision"], &config), &["exists"]);
    // An object may be replaced only by a secret that can be decrypted again.
    refused(&run(&writer, &["provision", "--replace"], &config), &["is left as it is", "kms:Decrypt on alias/writer"]);
    moto.permit_only(&json!(["s3:GetObject", "kms:Decrypt"]));
    assert_eq!(run(&writer, &["passphrase"], &config).stdout.len(), 64);
}

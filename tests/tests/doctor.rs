//! `nbdcrypt doctor` on the machine of the test, with moto's S3 and KMS. Unit tests in `service::doctor::machine` simulate
//! machines that lack something.

use std::net::TcpListener;
use std::process::Output;

use harness::http_double::HttpDouble;
use harness::moto::{Client, Moto};
use harness::nbdcrypt::{binary, told};
use serde_json::{Value, json};

/// Runs `doctor --json` with the configuration, and returns how it ended and its checks.
fn doctor(client: &Client) -> (Option<i32>, Vec<Value>) {
    let output = run(client, &["doctor", "--json", "test.toml"]);
    let checks: Result<Value, _> = serde_json::from_slice(&output.stdout);
    let checks = checks.unwrap_or_else(|error| panic!("{error}: {}", told(&output)));
    (output.status.code(), checks.as_array().unwrap().clone())
}

fn run(client: &Client, arguments: &[&str]) -> Output {
    let mut command = client.command(binary());
    command.args(["--run-dir", "run"]).args(arguments).output().unwrap()
}

/// Returns the state of the check with this name, and all its texts.
#[track_caller]
fn one(checks: &[Value], name: &str) -> (String, String) {
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.unwrap_or_else(|| panic!("no check {name}: {checks:?}"));
    (check["state"].as_str().unwrap().to_owned(), check.to_string())
}

#[track_caller]
fn is(checks: &[Value], name: &str, state: &str, words: &[&str]) {
    let (found, said) = one(checks, name);
    assert_eq!(found, state, "{said}");
    for word in words {
        assert!(said.contains(word), "`{word}` is missing: {said}");
    }
}

fn configure(client: &Client, key: &str) {
    let dir = client.dir().display();
    client.file(
        "test.toml",
        format!(
            "[volume]\ndevices = [\"{dir}/disk\"]\nsize = \"32M\"\n[key]\n{key}\n[filesystem]\nmountpoint = \"{dir}/mnt\"\n"
        ),
    );
}

const OBJECT: &str = "source = \"aws\"\nobject = \"s3://secrets/key\"\nkms-key = \"alias/mine\"";

/// This machine brings volumes up in other tests, so it lacks nothing.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root, FUSE and e2fsprogs: run `make test`")]
fn a_configuration_that_lacks_a_key_file_is_told_so() {
    let client = Client::new();
    let dir = client.dir().display().to_string();
    configure(&client, &format!("source = \"file\"\npath = \"{dir}/key\""));
    let (code, checks) = doctor(&client);
    assert_eq!(code, Some(1));
    is(&checks, "key", "fail", &["/key", "umask 077"]);
    client.file("key", "");
    client.shell("chmod 600 key");
    is(&doctor(&client).1, "key", "fail", &["is empty"]);
    client.file("key", "a secret");
    let (code, checks) = doctor(&client);
    assert_eq!(code, Some(0), "{checks:?}");
    for name in ["root", "mkfs", "programs", "run folder", "clock", "mountpoint", "disk", "volume", "key"] {
        is(&checks, name, "ok", &[]);
    }
    // Nothing was made.
    assert_eq!(client.shell("ls").trim(), "key\ntest.toml");
    client.shell("head -c 1M /dev/urandom > disk; truncate -s 32M disk");
    let (code, checks) = doctor(&client);
    assert_eq!(code, Some(1));
    is(&checks, "volume", "fail", &["disk is not blank", "nbdcrypt devices"]);
    let said = run(&client, &["doctor", "test.toml"]);
    let said = told(&said);
    assert!(said.contains("\nFAIL  volume") && said.contains("cure: ") && said.contains("checks failed"), "{said}");
}

#[test]
fn a_broken_configuration_is_one_of_the_checks() {
    let client = Client::new();
    client.file("test.toml", "[volume]\ndevice = [\"/x\"]\n");
    let (code, checks) = doctor(&client);
    assert_eq!(code, Some(1));
    is(&checks, "configuration", "fail", &["device", "nbdcrypt.toml.example shows every key"]);
    one(&checks, "clock");
    let missing = run(&client, &["doctor", "--json", "missing.toml"]);
    let checks: Vec<Value> = serde_json::from_slice(&missing.stdout).unwrap();
    is(&checks, "configuration", "fail", &["missing.toml", "name the configuration of a volume"]);
    assert_eq!(run(&client, &["doctor", "a.toml", "b.toml"]).status.code(), Some(2));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto: run `make test`")]
fn s3_and_kms_are_asked_without_unlocking_anything() {
    let moto = Moto::start();
    moto.make_bucket("secrets");
    let client = moto.client();
    configure(&client, OBJECT);
    // Neither the object nor the key exists yet.
    let (code, checks) = doctor(&client);
    assert_eq!(code, Some(1));
    is(&checks, "credentials", "ok", &["the environment"]);
    is(&checks, "S3", "fail", &["no object s3://secrets/key", "s3:GetObject"]);
    is(&checks, "KMS", "unknown", &["no ciphertext"]);
    let key = moto.make_key("alias/mine");
    assert!(run(&client, &["provision", "test.toml"]).status.success());
    let (_, checks) = doctor(&client);
    is(&checks, "S3", "ok", &["s3://secrets/key can be read"]);
    is(&checks, "KMS", "ok", &["would decrypt the secret with alias/mine"]);
    is(&checks, "clock of AWS", "ok", &[]);
    moto.kms("DisableKey", &json!({ "KeyId": key }));
    let (code, checks) = doctor(&client);
    assert_eq!(code, Some(1));
    is(&checks, "KMS", "fail", &["disabled", "kms:Decrypt"]);
}

/// The secret of a new volume is made at the first `up`, which needs different permissions from later starts.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn a_token_is_checked_before_and_after_first_up() {
    let moto = Moto::start();
    moto.make_key("alias/mine");
    let client = moto.client();
    configure(&client, "source = \"aws\"\nobject = \"token\"\nkms-key = \"alias/mine\"");
    is(&doctor(&client).1, "KMS", "ok", &["would encrypt a new secret"]);
    let up = run(&client, &["up", "test.toml"]);
    let checks = doctor(&client).1;
    let down = run(&client, &["down", "test.toml"]);
    assert!(up.status.success() && down.status.success(), "{}\n{}", told(&up), told(&down));
    is(&checks, "volume", "ok", &["has a server"]);
    is(&checks, "KMS", "ok", &["would decrypt the secret"]);
}

/// moto knows no dry runs. This is what KMS answers.
#[test]
fn a_dry_run_that_would_succeed_is_well() {
    let kms = HttpDouble::start(|_| {
        let body = json!({ "__type": "DryRunOperationException", "message": "The request would have succeeded." });
        ("400 Bad Request", vec!["Content-Type: application/x-amz-json-1.1".to_owned()], body.to_string())
    });
    let s3 = HttpDouble::start(|_| ("200 OK", Vec::new(), "ciphertext".to_owned()));
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE");
    client.set("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY");
    client.set("AWS_REGION", "eu-central-1");
    let (kms_url, s3_url) = (kms.endpoint(), s3.endpoint());
    configure(&client, &format!("{OBJECT}\nkms-endpoint-url = \"{kms_url}\"\ns3-endpoint-url = \"{s3_url}\""));
    let checks = doctor(&client).1;
    is(&checks, "S3", "ok", &[]);
    is(&checks, "KMS", "ok", &["a dry run"]);
    assert_eq!(kms.requests().len(), 1, "nothing is asked twice");
}

#[test]
fn a_service_that_gives_no_answer_is_not_waited_for() {
    // The kernel accepts connections to this port, but no program reads from them or answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE");
    client.set("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY");
    client.set("AWS_REGION", "eu-central-1");
    let url = format!("http://{}", silent.local_addr().unwrap());
    configure(&client, &format!("{OBJECT}\nretry-for = \"1h\"\nendpoint-url = \"{url}\""));
    let (code, checks) = doctor(&client);
    assert_eq!(code, Some(1));
    is(&checks, "S3", "fail", &["did not answer within 8 s"]);
    client.unset("AWS_ACCESS_KEY_ID");
    client.unset("AWS_SECRET_ACCESS_KEY");
    is(&doctor(&client).1, "credentials", "fail", &["no AWS credentials were found", "hop-limit"]);
}

//! `nbdcrypt key verify` says whether the key that a configuration names opens its volume.

use std::fs;
use std::process::Output;

use harness::moto::{Client, Moto};
use harness::nbdcrypt::{binary, told};
use serde_json::{Value, json};

const QUICK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

fn run(client: &Client, arguments: &[&str]) -> Output {
    let mut command = client.command(binary());
    command.args(["--run-dir", "run"]).args(arguments).output().unwrap()
}

#[track_caller]
fn done(client: &Client, arguments: &[&str]) -> String {
    let output = run(client, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Checks that `key verify` fails, and that its error has these words.
#[track_caller]
fn fails(client: &Client, words: &[&str]) {
    let output = run(client, &["key", "verify", "test.toml"]);
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    for word in words {
        assert!(told(&output).contains(word), "`{word}` is missing: {}", told(&output));
    }
}

fn configure(client: &Client, volume: &str, key: &str) {
    let dir = client.dir().display();
    client.file("test.toml", format!("[volume]\ndevices = [\"{dir}/disk\"]\n{volume}\n[key]\n{key}\n"));
}

#[test]
fn the_key_file_of_a_configuration_is_verified() {
    let client = Client::new();
    let dir = client.dir().display().to_string();
    client.file("key", "a secret");
    client.shell("chmod 600 key");
    let file = format!("source = \"file\"\npath = \"{dir}/key\"");
    configure(&client, "size = \"32M\"", &file);
    fails(&client, &["disk does not exist"]);
    client.shell("truncate -s 32M disk");
    fails(&client, &["disk is blank", "the secret could be obtained"]);
    client.file("other", "another secret");
    done(&client, &[&["format", "disk", "--key-file", "other"][..], &QUICK].concat());
    fails(&client, &["disk: the key in", "no keyslot opens with this passphrase"]);
    done(&client, &[&["key", "add", "disk", "--key-file", "other", "--new-key-file", "key"][..], &QUICK].concat());
    let before = fs::read(client.dir().join("disk")).unwrap();
    assert_eq!(
        done(&client, &["key", "verify", "test.toml"]),
        format!("{dir}/disk: keyslot 1 opens with the key in {dir}/key\n")
    );
    let rows: Value = serde_json::from_str(&done(&client, &["key", "verify", "--json", "test.toml"])).unwrap();
    let row = json!({
        "device": format!("{dir}/disk"), "source": format!("the key in {dir}/key"), "opens": true, "keyslot": 1,
        "error": null,
    });
    assert_eq!(rows, json!([row]));
    assert!(fs::read(client.dir().join("disk")).unwrap() == before, "the disk was changed");
    client.file("key", "a secret\n");
    fails(&client, &["without the newline at its end would open keyslot 1"]);
    let output = run(&client, &["key", "verify", "--json", "test.toml"]);
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &rows[0]["opens"], &rows[0]["keyslot"]), (Some(1), &json!(false), &Value::Null));
    assert!(rows[0]["error"].as_str().unwrap().contains("newline"), "{rows}");
}

#[test]
fn a_plain_volume_and_a_detached_header_are_verified() {
    let client = Client::new();
    let dir = client.dir().display().to_string();
    client.shell("truncate -s 32M disk; head -c 64 /dev/urandom > key; chmod 600 key");
    let file = format!("source = \"file\"\npath = \"{dir}/key\"");
    configure(&client, "type = \"plain\"", &file);
    assert!(done(&client, &["key", "verify", "test.toml"]).contains("the secret has the form of a key"));
    client.file("key", "too short");
    fails(&client, &["the key in"]);
    configure(&client, &format!("header = \"{dir}/header\""), &file);
    fails(&client, &["header does not exist"]);
    done(&client, &[&["format", "disk", "--header", "header", "--key-file", "key"][..], &QUICK].concat());
    let said = done(&client, &["key", "verify", "test.toml"]);
    assert_eq!(said, format!("{dir}/header: keyslot 0 opens with the key in {dir}/key\n"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto: run `make test`")]
fn a_secret_in_s3_is_verified_with_kms() {
    let moto = Moto::start();
    moto.make_bucket("secrets");
    let key = moto.make_key("alias/mine");
    let client = moto.client();
    let source = "source = \"aws\"\nobject = \"s3://secrets/key\"\nkms-key = \"alias/mine\"\nretry-for = \"2s\"";
    configure(&client, "size = \"32M\"", source);
    done(&client, &["provision", "test.toml"]);
    client.file("other", "another secret");
    done(&client, &[&["format", "disk", "--size", "32M", "--key-file", "other"][..], &QUICK].concat());
    fails(&client, &["the password in s3://secrets/key", "no keyslot opens with this passphrase"]);
    client.shell(
        "aws s3 cp s3://secrets/key blob > /dev/null\n\
         aws kms decrypt --ciphertext-blob fileb://blob --query Plaintext --output text | base64 --decode > secret",
    );
    done(&client, &[&["key", "add", "disk", "--key-file", "other", "--new-key-file", "secret"][..], &QUICK].concat());
    let said = done(&client, &["key", "verify", "test.toml"]);
    assert!(said.ends_with("keyslot 1 opens with the password in s3://secrets/key, decrypted by KMS\n"), "{said}");
    moto.kms("DisableKey", &json!({ "KeyId": key }));
    fails(&client, &["the password in s3://secrets/key", "disabled"]);
}

/// `up` uses only the first token, but every other token opens the volume, too.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, cryptsetup, root and FUSE: run `make test`")]
fn each_token_in_the_header_is_verified() {
    let moto = Moto::start();
    moto.make_key("alias/volumes");
    let client = moto.client();
    let source = "source = \"aws\"\nobject = \"token\"\nkms-key = \"alias/volumes\"\nretry-for = \"2s\"";
    configure(&client, "size = \"32M\"", source);
    done(&client, &["up", "test.toml"]);
    // The volume is up at the same time.
    let said = run(&client, &["key", "verify", "test.toml"]);
    done(&client, &["down", "test.toml"]);
    assert!(told(&said).contains("keyslot 0 opens with the password in token 0, decrypted by KMS"), "{}", told(&said));
    client.shell(
        "cryptsetup token export --token-id 0 disk > token\n\
         sed 's/\"ciphertext\": *\"..../&A/' token > broken\n\
         cryptsetup token import --token-id 1 --json-file token disk\n\
         cryptsetup token import --token-id 2 --json-file broken disk",
    );
    let output = run(&client, &["key", "verify", "test.toml"]);
    let said = told(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in ["keyslot 0 opens with the password in token 0,", "keyslot 0 opens with the password in token 1,"] {
        assert!(said.contains(word), "`{word}` is missing: {said}");
    }
    assert!(
        said.contains("nothing opens with the password in token 2, decrypted by KMS: ")
            && said.contains("1 of 3 ways in"),
        "{said}"
    );
    client.shell("for id in 0 1 2; do cryptsetup token remove --token-id $id disk; done");
    fails(&client, &["no token `aws-kms`"]);
    client.shell("rm disk; truncate -s 32M disk");
    fails(&client, &["disk is blank", "is made together with it"]);
}

//! A volume with its own secret, encrypted by KMS, in a token of its LUKS2 header. No S3 is needed.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use harness::moto::{Client, Moto};
use harness::nbdcrypt::{binary, told};
use serde_json::{Value, json};

struct Instance(Client);

impl Instance {
    fn new(moto: &Moto, more: &str) -> Self {
        let client = moto.client();
        let dir = client.dir().display();
        client.file(
            "scratch.toml",
            format!(
                "[volume]\ndevices = [\"{dir}/disk\"]\nsize = \"32M\"\n[key]\nsource = \"aws\"\nobject = \"token\"\n\
                 kms-key = \"alias/volumes\"\nretry-for = \"5s\"\n{more}\n\
                 [filesystem]\ntype = \"ext4\"\nmountpoint = \"{dir}/mnt\"\n"
            ),
        );
        Self(client)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.dir().join(name)
    }

    fn run(&self, verb: &str) -> Output {
        let mut command = self.0.command(binary());
        command.arg("--run-dir").arg(self.path("run")).arg(verb).arg(self.path("scratch.toml")).output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, verb: &str) -> String {
        let output = self.run(verb);
        assert!(output.status.success(), "{verb}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, verb: &str, words: &[&str]) {
        let output = self.run(verb);
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        for word in words {
            assert!(told(&output).contains(word), "`{word}` is missing: {}", told(&output));
        }
        assert!(!self.path("run/scratch/state.json").exists());
    }

    fn token(&self) -> Value {
        serde_json::from_str(&self.0.shell("cryptsetup token export --token-id 0 disk")).unwrap()
    }

    /// Replaces the volume's own token, as anyone who can write to the disk could.
    fn replace_token(&self, token: &Value) {
        self.0.file("token.json", token.to_string());
        self.0.shell("cryptsetup token remove --token-id 0 disk 2> removed || true; cryptsetup token import --token-id 0 --json-file token.json disk");
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.path("run/scratch").exists() {
            self.run("down");
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, cryptsetup, root and FUSE: run `make test`")]
fn a_volume_holds_its_secret_and_a_recovery_passphrase() {
    let moto = Moto::start();
    let key = moto.make_key("alias/volumes");
    let instance = Instance::new(&moto, "encryption-context = { volume = \"scratch\" }");
    // There is no bucket.
    instance.refused("provision", &["nothing to provision", "nbdcrypt up"]);
    assert!(instance.succeeds("plan").contains("the token in the LUKS2 header"));
    assert!(instance.succeeds("up").contains("LUKS2, AES-256-XTS"));
    fs::write(instance.path("mnt/file"), "kept").unwrap();
    instance.succeeds("down");

    let uuid = instance.0.shell("cryptsetup luksUUID disk").trim().to_owned();
    let token = instance.token();
    assert_eq!(token["type"], "aws-kms");
    assert_eq!(token["encryption-context"], json!({ "volume": "scratch", "luks-uuid": uuid }));
    assert!(token["kms-key"].as_str().unwrap().ends_with(&key), "{token}");
    let dump = instance.0.shell("cryptsetup luksDump disk");
    assert!(dump.contains("0: aws-kms\n\tKeyslot:    0\n") && dump.contains("PBKDF:      pbkdf2"), "{dump}");

    // A recovery passphrase in a keyslot of its own. cryptsetup opens the volume with it, without KMS.
    let wrapped = token["ciphertext"].as_str().unwrap();
    let asked = json!({ "CiphertextBlob": wrapped, "EncryptionContext": token["encryption-context"] });
    let secret: Value = serde_json::from_str(&moto.kms("Decrypt", &asked)).unwrap();
    instance.0.file("secret.base64", secret["Plaintext"].as_str().unwrap());
    instance.0.file("recovery", "written on paper");
    instance.0.shell(
        "base64 -d secret.base64 > secret; chmod 600 secret recovery\n\
         cryptsetup luksAddKey -q --pbkdf-memory 1024 --pbkdf-force-iterations 4 --key-file secret disk recovery\n\
         cryptsetup open --test-passphrase --key-file recovery disk",
    );
    instance.succeeds("up");
    assert_eq!(fs::read_to_string(instance.path("mnt/file")).unwrap(), "kept");
    instance.succeeds("down");
    // The token names the keyslot. Once its KMS key is disabled, the token opens nothing.
    moto.kms("DisableKey", &json!({ "KeyId": key }));
    instance.refused("up", &["disabled"]);
    instance.0.shell("cryptsetup open --test-passphrase --key-file recovery disk");
}

/// A recovery passphrase can be added with the secret that KMS keeps.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, cryptsetup, root and FUSE: run `make test`")]
fn rewrap_moves_the_token_to_another_kms_key() {
    let moto = Moto::start();
    let old = moto.make_key("alias/volumes");
    let new = moto.make_key("alias/new");
    let instance = Instance::new(&moto, "encryption-context = { volume = \"scratch\" }");
    instance.succeeds("up");
    fs::write(instance.path("mnt/file"), "kept").unwrap();
    instance.succeeds("down");
    let key = |arguments: &[&str]| {
        let mut command = instance.0.command(binary());
        command.arg("key").args(arguments).current_dir(instance.0.dir()).output().unwrap()
    };
    let done = |arguments: &[&str]| {
        let output = key(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    instance.0.file("recovery", "written on paper");
    let add = ["add", "disk", "--config", "scratch.toml", "--new-key-file", "recovery"];
    assert_eq!(done(&[&add[..], &quick].concat()), "disk: key in keyslot 1\n");
    instance.0.shell("cryptsetup open --test-passphrase --key-slot 1 --key-file recovery disk");

    // Encrypting again with the same key changes only the ciphertext.
    let before = instance.token();
    let said = done(&["rewrap", "disk", "--config", "scratch.toml"]);
    assert!(said.contains("token 0: the secret is now encrypted under arn:") && said.contains(&old), "{said}");
    let mut after = instance.token();
    assert_ne!(after["ciphertext"], before["ciphertext"]);
    after["ciphertext"] = before["ciphertext"].clone();
    assert_eq!(after, before);
    instance.succeeds("up");
    instance.succeeds("down");

    // The secret moves to another key. The configuration must name this key from then on.
    let said = done(&["rewrap", "disk", "--config", "scratch.toml", "--new-kms-key", "alias/new"]);
    assert!(said.contains(&new) && said.contains("write `kms-key = \"alias/new\"`"), "{said}");
    assert!(instance.token()["kms-key"].as_str().unwrap().ends_with(&new));
    moto.kms("DisableKey", &json!({ "KeyId": old }));
    instance.refused("up", &[]);
    let config = fs::read_to_string(instance.path("scratch.toml")).unwrap().replace("alias/volumes", "alias/new");
    instance.0.file("scratch.toml", config);
    instance.succeeds("up");
    assert_eq!(fs::read_to_string(instance.path("mnt/file")).unwrap(), "kept");
    instance.succeeds("down");
    assert!(instance.0.shell("cryptsetup luksDump disk").contains("0: aws-kms\n\tKeyslot:    0\n"));

    // If the key may not encrypt, the token is not changed.
    let before = instance.token();
    let output = key(&["rewrap", "disk", "--config", "scratch.toml", "--new-kms-key", "alias/volumes"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("disabled"), "{}", told(&output));
    assert_eq!(instance.token(), before);
}

/// The object is replaced only if its secret opens the volume and the new key can decrypt it.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, cryptsetup and the AWS CLI: run `make test`")]
fn rewrap_moves_an_s3_secret_to_another_kms_key() {
    let moto = Moto::start();
    moto.make_bucket("secrets");
    moto.make_key("alias/old");
    let new = moto.make_key("alias/new");
    let client = moto.client();
    let dir = client.dir().display().to_string();
    client.file(
        "scratch.toml",
        format!(
            "[volume]\ndevices = [\"{dir}/disk\"]\n[key]\nsource = \"aws\"\nobject = \"s3://secrets/key\"\n\
             kms-key = \"alias/old\"\nretry-for = \"5s\"\n"
        ),
    );
    let nbdcrypt =
        |arguments: &[&str]| client.command(binary()).args(arguments).current_dir(client.dir()).output().unwrap();
    let done = |arguments: &[&str]| {
        let output = nbdcrypt(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    done(&["provision", "scratch.toml"]);
    let decrypt = "aws s3 cp s3://secrets/key blob > /dev/null; \
                   aws kms decrypt --ciphertext-blob fileb://blob --query Plaintext --output text | base64 --decode";
    client.file("secret", client.shell(decrypt));
    client.file("other", "another passphrase");
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let format = |key| [&["format", "disk", "--size", "24M", "--key-file", key][..], &quick].concat();
    let rewrap = ["key", "rewrap", "disk", "--config", "scratch.toml", "--new-kms-key", "alias/new"];

    // A volume that the secret does not open: the object may be the wrong one.
    done(&format("other"));
    let before = client.shell("aws s3 cp s3://secrets/key - | sha256sum");
    let output = nbdcrypt(&rewrap);
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("does not open the volume"), "{}", told(&output));
    assert_eq!(client.shell("aws s3 cp s3://secrets/key - | sha256sum"), before);

    client.shell("rm disk");
    done(&format("secret"));

    // A key that encrypts but does not decrypt would lock the volume.
    let one_way = moto.make_key("alias/one-way");
    moto.deny(&one_way, "kms:Decrypt");
    let output = nbdcrypt(&["key", "rewrap", "disk", "--config", "scratch.toml", "--new-kms-key", "alias/one-way"]);
    assert_eq!(output.status.code(), Some(1));
    let said = told(&output);
    assert!(
        said.contains("s3://secrets/key is left as it is") && said.contains("kms:Decrypt on alias/one-way"),
        "{said}"
    );
    assert_eq!(client.shell("aws s3 cp s3://secrets/key - | sha256sum"), before);
    assert_eq!(client.shell(decrypt).as_bytes(), fs::read(client.dir().join("secret")).unwrap());

    let said = done(&rewrap);
    assert!(
        said.starts_with("s3://secrets/key: the secret is now encrypted under arn:") && said.contains(&new),
        "{said}"
    );
    let key = client.shell("aws s3 cp s3://secrets/key blob > /dev/null; aws kms decrypt --ciphertext-blob fileb://blob --query KeyId --output text");
    assert!(key.trim().ends_with(&new), "{key}");
    assert_eq!(client.shell(decrypt).as_bytes(), fs::read(client.dir().join("secret")).unwrap());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, cryptsetup, root and FUSE: run `make test`")]
fn another_volumes_token_is_refused_with_the_reason() {
    let moto = Moto::start();
    moto.make_key("alias/volumes");
    let instance = Instance::new(&moto, "");
    let other = Instance::new(&moto, "");
    for instance in [&instance, &other] {
        instance.succeeds("up");
        instance.succeeds("down");
    }
    let (own, others) = (instance.token(), other.token());

    // The token of another volume. nbdcrypt refuses it because of the UUID in it. If the UUID is forged, KMS refuses
    // it.
    instance.replace_token(&others);
    let made_for = others["encryption-context"]["luks-uuid"].as_str().unwrap();
    instance.refused("up", &["made for", made_for, "this is volume"]);
    let mut lying = others.clone();
    lying["encryption-context"] = own["encryption-context"].clone();
    instance.replace_token(&lying);
    instance.refused("up", &["KMS cannot decrypt the token in the LUKS2 header"]);
    let mut broken = own.clone();
    broken["ciphertext"] = json!("?");
    instance.replace_token(&broken);
    instance.refused("up", &["ciphertext", "base64"]);
    instance.0.shell("cryptsetup token remove --token-id 0 disk");
    instance.refused("up", &["no token `aws-kms`", "object"]);
    instance.replace_token(&own);
    instance.succeeds("up");
    instance.succeeds("down");
}

/// Two tokens hold the secret, each encrypted under another key. If one key cannot be used, the other one can.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, cryptsetup, root and FUSE: run `make test`")]
fn the_next_token_is_tried_if_the_first_cannot_be_used() {
    let moto = Moto::start();
    let [first, second] = ["alias/volumes", "alias/second"].map(|alias| moto.make_key(alias));
    let instance = Instance::new(&moto, "");
    instance.succeeds("up");
    fs::write(instance.path("mnt/file"), "kept").unwrap();
    instance.succeeds("down");
    let config = fs::read_to_string(instance.path("scratch.toml")).unwrap();
    instance.0.file("scratch.toml", config.replace("\"alias/volumes\"", "[\"alias/volumes\", \"alias/second\"]"));

    let own = instance.token();
    let context = &own["encryption-context"];
    let asked = json!({ "CiphertextBlob": own["ciphertext"], "EncryptionContext": context });
    let secret: Value = serde_json::from_str(&moto.kms("Decrypt", &asked)).unwrap();
    let asked = json!({ "KeyId": second, "Plaintext": secret["Plaintext"], "EncryptionContext": context });
    let encrypted: Value = serde_json::from_str(&moto.kms("Encrypt", &asked)).unwrap();
    let mut other = own.clone();
    (other["ciphertext"], other["kms-key"]) = (encrypted["CiphertextBlob"].clone(), encrypted["KeyId"].clone());
    instance.0.file("other.json", other.to_string());
    instance.0.shell("cryptsetup token import --token-id 1 --json-file other.json disk");

    let comes_up = || {
        instance.succeeds("up");
        assert_eq!(fs::read_to_string(instance.path("mnt/file")).unwrap(), "kept");
        instance.succeeds("down");
    };
    comes_up();
    moto.kms("DisableKey", &json!({ "KeyId": first }));
    comes_up();
    moto.kms("DisableKey", &json!({ "KeyId": second }));
    let words = [
        "token 0 with alias/volumes: alias/volumes is disabled",
        "token 1 with alias/second: alias/second is disabled",
    ];
    instance.refused("up", &words);
    moto.kms("EnableKey", &json!({ "KeyId": second }));

    // A token that is malformed, or of another volume, is left out.
    let mut broken = own.clone();
    broken["ciphertext"] = json!("?");
    instance.replace_token(&broken);
    comes_up();
    let mut of_another = own.clone();
    of_another["encryption-context"]["luks-uuid"] = json!("00000000-0000-0000-0000-000000000000");
    instance.replace_token(&of_another);
    comes_up();
    // A token without a keyslot opens nothing, although KMS decrypts it.
    moto.kms("EnableKey", &json!({ "KeyId": first }));
    let context = &own["encryption-context"];
    let asked = json!({ "KeyId": first, "Plaintext": "b2xk", "EncryptionContext": context });
    let encrypted: Value = serde_json::from_str(&moto.kms("Encrypt", &asked)).unwrap();
    let mut old = own.clone();
    (old["ciphertext"], old["keyslots"]) = (encrypted["CiphertextBlob"].clone(), json!([]));
    instance.replace_token(&old);
    comes_up();
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn a_refusal_by_kms_leaves_no_volume_behind() {
    let moto = Moto::start();
    let instance = Instance::new(&moto, "");
    instance.refused("up", &["alias/volumes"]);
    assert!(!instance.path("disk").exists() && !instance.path("mnt").exists());
}

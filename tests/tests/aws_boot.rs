//! The main job, whole: the administrator's shell commands as they stand, then `nbdcrypt up` on the object they made.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use harness::moto::{Client, Moto};
use harness::nbdcrypt::{binary, told};
use serde_json::json;

/// What an administrator runs (with AWS CLI 1; version 2 needs `--cli-binary-format raw-in-base64-out`).
const ADMINISTRATOR: &str = r#"
aws kms encrypt --key-id alias/EncFSForEC2InternalStorageKey --plaintext "ThisIs-a-SecretPassword" \
    --query CiphertextBlob --output text | base64 --decode > LuksInternalStorageKey
aws s3 cp LuksInternalStorageKey s3://BUCKET/LuksInternalStorageKey
"#;

/// An instance with the configuration of the README, but for the places of disk and mount.
struct Instance {
    client: Client,
}

impl Instance {
    fn new(client: Client) -> Self {
        let instance = Self { client };
        instance.configure("s3://BUCKET/LuksInternalStorageKey", "");
        instance
    }

    fn path(&self, name: &str) -> PathBuf {
        self.client.dir().join(name)
    }

    fn configure(&self, object: &str, more: &str) {
        let dir = self.client.dir().display();
        let text = format!(
            "[volume]\ndevices = [\"{dir}/secretfs\"]\nsize = \"32M\"\n[key]\nsource = \"aws\"\nobject = \"{object}\"\n\
             kms-key = \"alias/EncFSForEC2InternalStorageKey\"\nretry-for = \"5s\"\n{more}\n\
             [filesystem]\ntype = \"ext4\"\nmountpoint = \"{dir}/mnt\"\n"
        );
        self.client.file("scratch.toml", text);
    }

    fn run(&self, verb: &str) -> Output {
        let mut command = self.client.command(binary());
        command.arg("--run-dir").arg(self.path("run")).arg(verb).arg(self.path("scratch.toml")).output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, verb: &str) -> String {
        let output = self.run(verb);
        assert!(output.status.success(), "{verb}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `up` must fail, say these words and nothing of the secret, and leave nothing.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let output = self.run("up");
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        let said = told(&output);
        for word in words {
            assert!(said.contains(word), "`{word}` is missing: {said}");
        }
        assert!(!said.contains("Secret"), "{said}");
        assert!(!self.path("secretfs").exists() && !self.path("mnt").exists() && !self.path("run/scratch").exists());
        let here = self.client.dir().to_str().unwrap().to_owned();
        assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(&here));
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
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, the AWS CLI, root and FUSE: run `make test`")]
fn the_administrators_object_unlocks_a_filesystem_that_comes_and_goes() {
    let moto = Moto::start();
    moto.make_bucket("BUCKET");
    moto.make_key("alias/EncFSForEC2InternalStorageKey");
    let administrator = moto.client();
    administrator.shell(ADMINISTRATOR);

    let instance = Instance::new(moto.client());
    assert!(instance.succeeds("plan").contains("s3://BUCKET/LuksInternalStorageKey"));
    assert!(instance.succeeds("up").contains("LUKS2, AES-256-XTS"));
    fs::write(instance.path("mnt/file"), "kept").unwrap();
    instance.succeeds("down");
    instance.succeeds("up");
    assert_eq!(fs::read_to_string(instance.path("mnt/file")).unwrap(), "kept");
    instance.succeeds("down");

    // What the old boot script would do with the same object: the password, by shell and cryptsetup.
    administrator.file("disk", "");
    let opened = administrator.shell(&format!(
        "aws s3 cp s3://BUCKET/LuksInternalStorageKey fetched > /dev/null\n\
         password=$(aws kms decrypt --ciphertext-blob fileb://fetched --query Plaintext --output text | base64 --decode)\n\
         printf %s \"$password\" | cryptsetup open --test-passphrase --key-file - {} && echo opened",
        instance.path("secretfs").display()
    ));
    assert_eq!(opened.trim(), "opened");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, the AWS CLI, cryptsetup, root and FUSE: run `make test`")]
fn the_old_boot_scripts_volume_comes_up_with_the_same_object() {
    let moto = Moto::start();
    moto.make_bucket("BUCKET");
    moto.make_key("alias/EncFSForEC2InternalStorageKey");
    let administrator = moto.client();
    administrator.shell(ADMINISTRATOR);
    let instance = Instance::new(moto.client());
    administrator.shell(&format!(
        "disk={}\n\
         dd of=$disk bs=1M count=0 seek=16 2> /dev/null\nchmod 600 $disk\n\
         password=$(aws kms decrypt --ciphertext-blob fileb://LuksInternalStorageKey --query Plaintext --output text \
             | base64 --decode)\n\
         echo $password | cryptsetup -y luksFormat --batch-mode --type luks1 --cipher aes-xts-plain64 --key-size 256 \
             --pbkdf-force-iterations 1000 $disk",
        instance.path("secretfs").display()
    ));
    assert!(instance.succeeds("up").contains("LUKS1, AES-128-XTS"));
    assert!(instance.succeeds("status").contains("256 bits (AES-128-XTS)"));
    instance.succeeds("down");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, the AWS CLI, root and FUSE: run `make test`")]
fn what_kms_and_s3_refuse_leaves_nothing_behind() {
    let moto = Moto::start();
    moto.make_bucket("BUCKET");
    let key = moto.make_key("alias/EncFSForEC2InternalStorageKey");
    moto.client().shell(ADMINISTRATOR);
    let instance = Instance::new(moto.client());

    instance.configure("s3://BUCKET/LuksInternalStorageKey", "encryption-context = { volume = \"another\" }");
    instance.refused(&["encryption context", "another"]);
    instance.configure("s3://BUCKET/none", "");
    instance.refused(&["s3://BUCKET/none"]);
    instance.configure("s3://no-such-bucket/key", "");
    instance.refused(&["no-such-bucket"]);
    instance.configure("s3://BUCKET/LuksInternalStorageKey", "endpoint-url = \"http://127.0.0.1:1\"");
    instance.refused(&["127.0.0.1:1"]);
    instance.configure("s3://BUCKET/LuksInternalStorageKey", "random = true");
    moto.kms("DisableKey", &json!({ "KeyId": key }));
    instance.refused(&["disabled"]);
    moto.kms("EnableKey", &json!({ "KeyId": key }));
    instance.succeeds("up");
    instance.succeeds("down");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn a_provisioned_secret_unlocks_and_is_never_replaced_unasked() {
    let moto = Moto::start();
    moto.make_bucket("BUCKET");
    moto.make_key("alias/EncFSForEC2InternalStorageKey");
    let instance = Instance::new(moto.client());
    instance.configure("s3://BUCKET/new", "random = true\nencryption-context = { volume = \"scratch\" }");
    assert!(instance.succeeds("provision").contains("s3://BUCKET/new"));
    instance.succeeds("up");
    instance.succeeds("down");
    let again = instance.run("provision");
    assert_eq!(again.status.code(), Some(1));
    assert!(told(&again).contains("--replace"), "{}", told(&again));
    instance.succeeds("up");
    instance.succeeds("down");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, the AWS CLI, libnbd, root and FUSE: run `make test`")]
fn the_key_of_a_plain_volume_is_made_by_kms_and_lies_on_the_disk_where_it_is_said_to() {
    let moto = Moto::start();
    moto.make_bucket("BUCKET");
    moto.make_key("alias/volumes");
    let instance = Instance::new(moto.client());
    let dir = instance.client.dir().display();
    let config = |skip: u32| {
        instance.client.file(
            "scratch.toml",
            format!(
                "[volume]\ndevices = [\"{dir}/secretfs\"]\nsize = \"32M\"\ntype = \"plain\"\nsector-size = 4096\n\
                 offset = 2048\nskip = {skip}\n[key]\nsource = \"aws\"\nobject = \"s3://BUCKET/key\"\n\
                 kms-key = \"alias/volumes\"\nencryption-context = {{ volume = \"scratch\" }}\nretry-for = \"5s\"\n\
                 [filesystem]\ntype = \"ext4\"\nmountpoint = \"{dir}/mnt\"\n"
            ),
        );
    };
    config(16);
    let provision =
        || instance.client.command(binary()).arg("provision").arg(instance.path("scratch.toml")).output().unwrap();
    let made = provision();
    assert!(made.status.success(), "{}", told(&made));
    assert!(told(&provision()).contains("s3://BUCKET/key"), "what is there stays");
    instance.succeeds("up");
    fs::write(instance.path("mnt/file"), "kept").unwrap();
    instance.succeeds("down");
    instance.succeeds("up");
    assert_eq!(fs::read_to_string(instance.path("mnt/file")).unwrap(), "kept");
    instance.succeeds("down");

    // What no header tells from a wrong key is not replaced; the text says what is to be done instead, and that works.
    moto.make_key("alias/new");
    let rewrap = || {
        let arguments = ["key", "rewrap", "secretfs", "--config", "scratch.toml", "--new-kms-key", "alias/new"];
        let output = instance.client.command(binary()).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        told(&output)
    };
    let before = instance.client.shell("aws s3 cp s3://BUCKET/key - | sha256sum");
    let said = rewrap();
    assert!(said.contains("describes a plain volume") && said.contains("aws kms re-encrypt"), "{said}");
    let plain = fs::read_to_string(instance.path("scratch.toml")).unwrap();
    instance.client.file("scratch.toml", plain.replace("type = \"plain\"", "type = \"plain\"\nhash = \"sha512\""));
    let said = rewrap();
    assert!(said.contains("no LUKS header") && said.contains("aws kms re-encrypt"), "{said}");
    assert_eq!(instance.client.shell("aws s3 cp s3://BUCKET/key - | sha256sum"), before);
    instance.client.shell(
        "aws s3 cp s3://BUCKET/key blob > /dev/null\n\
         aws kms re-encrypt --ciphertext-blob fileb://blob --source-encryption-context volume=scratch \
         --destination-encryption-context volume=scratch --destination-key-id alias/new --query CiphertextBlob \
         --output text | base64 --decode > new; aws s3 cp new s3://BUCKET/new > /dev/null",
    );
    let moved = plain.replace("BUCKET/key", "BUCKET/new").replace("alias/volumes", "alias/new");
    instance.client.file("scratch.toml", moved);
    instance.succeeds("up");
    assert_eq!(fs::read_to_string(instance.path("mnt/file")).unwrap(), "kept");
    instance.succeeds("down");

    // With the key in hand, and the same words on the command line, it is the same volume.
    instance.client.shell(
        "aws s3 cp s3://BUCKET/key blob > /dev/null\n\
         aws kms decrypt --ciphertext-blob fileb://blob --encryption-context volume=scratch --query Plaintext \
         --output text | base64 --decode > raw; chmod 600 raw",
    );
    assert_eq!(fs::metadata(instance.path("raw")).unwrap().len(), 64);
    let filesystem = |skip: &str| {
        let binary = binary().display();
        instance.client.shell(&format!(
            "rm -f socket image\n\
             {binary} serve --type plain --key-file raw --offset 2048 --skip {skip} --sector-size 4096 --read-only \
             --socket socket secretfs > address & server=$!\n\
             for try in $(seq 200); do [ -s address ] && break; sleep 0.05; done\n\
             nbdcopy \"$(cat address)\" image; kill $server; wait $server || true; rm address\n\
             blkid -o value -s TYPE image || true"
        ))
    };
    assert_eq!(filesystem("16").trim(), "ext4");
    assert_eq!(filesystem("24").trim(), "", "another IV is another volume");
    assert!(fs::read(instance.path("secretfs")).unwrap()[..1 << 20].iter().all(|byte| *byte == 0), "before the offset");
    // Nothing says that the key or its place is wrong but that there is no filesystem; what is there is not touched.
    let before = instance.client.shell("sha256sum secretfs");
    config(24);
    assert_eq!(instance.run("up").status.code(), Some(1));
    assert_eq!(instance.client.shell("sha256sum secretfs"), before);
}

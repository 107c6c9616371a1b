//! The main job from start to end: the administrator's shell commands unchanged, then `nbdcrypt up` with the object that
//! they made.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use harness::moto::{Client, Moto};
use harness::nbdcrypt::{binary, told};
use serde_json::json;

/// The administrator's commands, for AWS CLI 1. Version 2 needs `--cli-binary-format raw-in-base64-out`.
const ADMINISTRATOR: &str = r#"
aws kms encrypt --key-id alias/EncFSForEC2InternalStorageKey --plaintext "ThisIs-a-SecretPassword" \
    --query CiphertextBlob --output text | base64 --decode > LuksInternalStorageKey
aws s3 cp LuksInternalStorageKey s3://BUCKET/LuksInternalStorageKey
"#;

/// An instance with the README's configuration, except for the paths of the disk and the mountpoint.
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

    /// Runs `up`, which must fail with an error that contains these words and not the secret, and must leave nothing
    /// behind.
    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let output = self.run("up");
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        let said = told(&output);
        for word in words {
            assert!(said.contains(word), "`{word}` is missing: {said}");
        }
        assert!(!said.contains("Secret"), "{said}");
        assert!(
            !self.path("secretfs").exists()
                && !self.path("mnt").exists()
                && !self.path("run/scratch/state.json").exists()
        );
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
fn the_administrators_object_unlocks_the_filesystem() {
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

    // The old boot script does this with the same object: it gets the password with shell commands and runs cryptsetup.
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
fn an_old_boot_script_volume_opens_with_the_same_object() {
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
fn a_refusal_by_kms_or_s3_leaves_nothing_behind() {
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
    instance.configure("s3://BUCKET/LuksInternalStorageKey", "");
    moto.kms("DisableKey", &json!({ "KeyId": key }));
    instance.refused(&["disabled"]);
    moto.kms("EnableKey", &json!({ "KeyId": key }));
    instance.succeeds("up");
    instance.succeeds("down");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn a_provisioned_secret_unlocks_and_is_never_overwritten() {
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

/// The data lies on the disk at the configured offset, encrypted with the configured IV.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, the AWS CLI, libnbd, root and FUSE: run `make test`")]
fn kms_makes_the_key_of_a_plain_volume() {
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
    assert!(told(&provision()).contains("s3://BUCKET/key"), "an existing object stays");
    instance.succeeds("up");
    fs::write(instance.path("mnt/file"), "kept").unwrap();
    instance.succeeds("down");
    instance.succeeds("up");
    assert_eq!(fs::read_to_string(instance.path("mnt/file")).unwrap(), "kept");
    instance.succeeds("down");

    // A header would show that a key is wrong, but this volume has none. So the key is not replaced. The error gives a
    // command that works instead.
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

    // With the key and the same parameters on the command line, the server opens the same volume.
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
    assert_eq!(filesystem("24").trim(), "", "with another IV there is no filesystem");
    assert!(
        fs::read(instance.path("secretfs")).unwrap()[..1 << 20].iter().all(|byte| *byte == 0),
        "nothing is written before the offset"
    );
    // Only the missing filesystem shows that the key or the offset is wrong. The disk is not changed.
    let before = instance.client.shell("sha256sum secretfs");
    config(24);
    assert_eq!(instance.run("up").status.code(), Some(1));
    assert_eq!(instance.client.shell("sha256sum secretfs"), before);
}

/// Writes all readable memory of a process into a file.
fn dump_memory(pid: u32, to: &std::path::Path) {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut dump = fs::File::create(to).unwrap();
    for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|address| u64::from_str_radix(address, 16).unwrap());
        let mut block = vec![0; 1 << 20];
        for at in (start..end).step_by(1 << 20).take_while(|_| rest.starts_with('r')) {
            let len = usize::try_from((end - at).min(1 << 20)).unwrap();
            // Memory that cannot be read, such as [vvar], holds none of the server's data.
            if let Ok(read) = memory.read_at(&mut block[..len], at) {
                dump.write_all(&block[..read]).unwrap();
            }
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, the AWS CLI, root and FUSE: run `make test`")]
fn a_running_server_has_no_secret_in_memory() {
    let moto = Moto::start();
    moto.make_bucket("BUCKET");
    moto.make_key("alias/EncFSForEC2InternalStorageKey");
    moto.client().shell(ADMINISTRATOR);
    let mut client = moto.client();
    // The credentials come from a file, because a process's environment stays in its memory for as long as it lives.
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
        client.unset(name);
    }
    let secret_key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
    fs::create_dir(client.dir().join(".aws")).unwrap();
    client.file(
        ".aws/credentials",
        format!("[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {secret_key}\n"),
    );
    // The path is relative, and the background server must still find the file.
    client.set("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials");
    let instance = Instance::new(client);
    let check = |when: &str| {
        let status: serde_json::Value = {
            let mut command = instance.client.command(binary());
            command.arg("--run-dir").arg(instance.path("run")).args(["status", "--json"]);
            serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
        };
        let pid = status.as_array().map_or(&status, |all| &all[0])["pid"].as_u64().unwrap();
        let dump = instance.path("dump");
        dump_memory(u32::try_from(pid).unwrap(), &dump);
        let holds = |what: &str| {
            let grep = std::process::Command::new("grep").args(["-qaF", "-e", what]).arg(&dump).status().unwrap();
            grep.success()
        };
        assert!(holds("LuksInternalStorageKey"), "the search finds text that is in memory");
        let base64 = "VGhpc0lzLWEtU2VjcmV0UGFzc3dvcmQ=";
        for (name, what) in [("passphrase", "ThisIs-a-SecretPassword"), ("base64", base64), ("secret key", secret_key)]
        {
            assert!(!holds(what), "{when}: the {name} is in the server's memory");
        }
        fs::remove_file(&dump).unwrap();
    };
    instance.succeeds("up");
    check("made");
    instance.succeeds("down");
    instance.succeeds("up");
    check("unlocked");
    instance.succeeds("down");
}

/// The helper process that asks AWS ends when its parent ends. If the helper dies first, the parent reports this.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root: run `make test`")]
fn the_aws_helper_process_ends_with_its_parent() {
    use std::time::{Duration, Instant};
    let mut client = Client::new();
    for (name, value) in [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "eu-central-1")] {
        client.set(name, value);
    }
    let instance = Instance::new(client);
    instance.configure("s3://BUCKET/key", "endpoint-url = \"http://127.0.0.1:1\"");
    let text = fs::read_to_string(instance.path("scratch.toml")).unwrap().replace("\"5s\"", "\"1h\"");
    instance.client.file("scratch.toml", text);
    let helper_of = |parent: u32| {
        let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
        let children = |task: String| fs::read_to_string(format!("{task}/children")).unwrap_or_default();
        let tasks = fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
        let all: String = tasks.map(|task| children(task.path().display().to_string()) + " ").collect();
        (list + " " + &all).split_whitespace().next().map(|pid| pid.parse::<i32>().unwrap())
    };
    let eventually = |what: &str, is: &mut dyn FnMut() -> bool| {
        let begun = Instant::now();
        while !is() {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let start = || {
        let mut command = instance.client.command(binary());
        command.arg("provision").arg(instance.path("scratch.toml"));
        let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
        let mut helper = None;
        eventually("the helper starts", &mut || {
            helper = helper_of(child.id());
            assert!(child.try_wait().unwrap().is_none(), "it waits for AWS");
            helper.is_some()
        });
        (child, helper.unwrap())
    };
    let (mut parent, helper) = start();
    parent.kill().unwrap();
    parent.wait().unwrap();
    eventually("the helper ends with its parent", &mut || {
        fs::read_to_string(format!("/proc/{helper}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
    let (parent, helper) = start();
    let pid = rustix::process::Pid::from_raw(helper).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let output = parent.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(told(&output).contains("asks AWS for the secret ended without an answer (signal: 9"), "{}", told(&output));
}

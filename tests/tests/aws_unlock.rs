//! The key source `aws` against S3 and KMS as moto plays them, with objects that the AWS CLI made.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Output;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use harness::http_double::HttpDouble;
use harness::moto::{Client, Moto, REGION};
use serde_json::json;

/// What the issue's administrator runs.
const ADMINISTRATOR: &str = r#"
aws kms encrypt --key-id alias/EncFSForEC2InternalStorageKey --plaintext "ThisIs-a-SecretPassword" \
    --query CiphertextBlob --output text | base64 --decode > LuksInternalStorageKey
aws s3 cp LuksInternalStorageKey s3://BUCKET/LuksInternalStorageKey
"#;
const PASSWORD: &str = "ThisIs-a-SecretPassword";

/// One server for all tests that bring a bucket and a key of their own.
static MOTO: LazyLock<Moto> = LazyLock::new(Moto::start);

/// A bucket and a key with an alias, named after the test.
struct Account {
    client: Client,
    bucket: String,
    alias: String,
    key_id: String,
}

impl Account {
    fn new(name: &str) -> Self {
        Self::on(&MOTO, name)
    }

    fn on(moto: &Moto, name: &str) -> Self {
        let (bucket, alias) = (format!("test-{name}"), format!("alias/{name}"));
        moto.make_bucket(&bucket);
        let key_id = moto.make_key(&alias);
        Self { client: moto.client(), bucket, alias, key_id }
    }

    /// Puts what KMS makes of a plaintext into the object; `more` are more arguments for `aws kms encrypt`.
    fn put_secret(&self, moto: &Moto, plaintext: &str, more: &str) {
        self.client.file("plaintext", plaintext);
        self.client.shell(&format!(
            "aws kms encrypt --key-id {} --plaintext fileb://plaintext {more} \
             --query CiphertextBlob --output text | base64 --decode > object",
            self.alias
        ));
        moto.put_object(&self.bucket, "key", &std::fs::read(self.client.dir().join("object")).unwrap());
    }

    fn config(&self, more: &str) -> PathBuf {
        config(&self.client, &format!("s3://{}/key", self.bucket), more)
    }
}

fn config(client: &Client, object: &str, more: &str) -> PathBuf {
    let text = format!(
        "[volume]\ndevices = [\"/dev/null\"]\n[key]\nsource = \"aws\"\nobject = \"{object}\"\nretry-for = \"2s\"\n{more}\n"
    );
    client.file("test.toml", text)
}

fn unlock(client: &Client, config: &PathBuf) -> Output {
    client.command(env!("CARGO_BIN_EXE_aws-key")).arg("passphrase").arg(config).output().unwrap()
}

#[track_caller]
fn unlocked(client: &Client, config: &PathBuf) -> String {
    let output = unlock(client, config);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn refused(client: &Client, config: &PathBuf, words: &[&str]) -> String {
    let output = unlock(client, config);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(output.stdout.is_empty());
    for word in words {
        assert!(error.contains(word), "`{word}` in: {error}");
    }
    assert!(!error.contains("Secret"), "{error}");
    error
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn the_object_that_the_issues_commands_make_gives_the_password() {
    let moto = Moto::start();
    let mut client = moto.client();
    client.shell(
        "id=$(aws kms create-key --query KeyMetadata.KeyId --output text)\n\
         aws kms create-alias --alias-name alias/EncFSForEC2InternalStorageKey --target-key-id $id\n\
         aws s3 mb s3://my-bucket",
    );
    client.shell(&ADMINISTRATOR.replace("BUCKET", "my-bucket"));
    let config = config(&client, "s3://my-bucket/LuksInternalStorageKey", "");
    assert_eq!(unlocked(&client, &config), PASSWORD);
    // The same, by the names of a profile and the configuration instead of the environment.
    for name in ["AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"] {
        client.unset(name);
    }
    std::fs::create_dir(client.dir().join(".aws")).unwrap();
    client.file(
        ".aws/config",
        format!(
            "[profile storage]\nregion = {REGION}\nservices = mine\n[services mine]\nkms =\n  endpoint_url = {}\n",
            moto.endpoint()
        ),
    );
    client.file(".aws/credentials", "[storage]\naws_access_key_id = a\naws_secret_access_key = b\n");
    let more = format!("profile = \"storage\"\ns3-endpoint-url = \"{}\"", moto.endpoint());
    let config = self::config(&client, "s3://my-bucket/LuksInternalStorageKey", &more);
    assert_eq!(unlocked(&client, &config), PASSWORD);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn newlines_at_the_end_go_as_in_the_shell() {
    let account = Account::new("newlines");
    account.put_secret(&MOTO, "two words\nand a line \n\n\n", "");
    let by_shell = account.client.shell(
        "password=$(aws kms decrypt --ciphertext-blob fileb://object --query Plaintext --output text | base64 --decode)\n\
         printf %s \"$password\"",
    );
    assert_eq!(unlocked(&account.client, &account.config("")), by_shell);
    assert_eq!(by_shell, "two words\nand a line ");
    account.put_secret(&MOTO, "\n\n", "");
    refused(&account.client, &account.config(""), &["empty password", "s3://test-newlines/key"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn the_encryption_context_must_be_the_one_it_was_encrypted_with() {
    let account = Account::new("context");
    account.put_secret(&MOTO, PASSWORD, "--encryption-context volume=scratch,host=a");
    let right = account.config("encryption-context = { host = \"a\", volume = \"scratch\" }");
    assert_eq!(unlocked(&account.client, &right), PASSWORD);
    let wrong = account.config("encryption-context = { volume = \"other\" }");
    refused(
        &account.client,
        &wrong,
        &["{ \"volume\" = \"other\" }", "another encryption context", "encryption-context"],
    );
    refused(&account.client, &account.config(""), &["another encryption context", "{} (none)"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn a_key_that_is_disabled_or_pending_deletion_is_named() {
    let account = Account::new("disabled");
    account.put_secret(&MOTO, PASSWORD, "");
    let named = account.config("kms-key = \"alias/disabled\"");
    assert_eq!(unlocked(&account.client, &named), PASSWORD);
    let key = json!({ "KeyId": account.key_id });
    MOTO.kms("DisableKey", &key);
    refused(&account.client, &named, &["alias/disabled is disabled", "arn:aws:kms:", "aws kms enable-key"]);
    refused(&account.client, &account.config(""), &["s3://test-disabled/key was made under is disabled"]);
    let named = account.config("kms-key = \"alias/disabled\"");
    MOTO.kms("EnableKey", &key);
    assert_eq!(unlocked(&account.client, &named), PASSWORD);
    MOTO.kms("ScheduleKeyDeletion", &key);
    refused(&account.client, &named, &["alias/disabled", "pending deletion", "cancel-key-deletion"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn a_ciphertext_of_another_key_is_refused_where_the_key_is_named() {
    let account = Account::new("otherkey");
    account.put_secret(&MOTO, PASSWORD, "");
    MOTO.make_key("alias/second");
    assert_eq!(unlocked(&account.client, &account.config("kms-key = \"alias/otherkey\"")), PASSWORD);
    refused(
        &account.client,
        &account.config("kms-key = \"alias/second\""),
        &["another key than alias/second", "kms-key"],
    );
    refused(
        &account.client,
        &account.config("kms-key = \"alias/none\""),
        &["no key alias/none in eu-central-1", "create-alias"],
    );
    // A key of another region is none that this region knows.
    let elsewhere = account.config("region = \"us-west-2\"");
    refused(&account.client, &elsewhere, &["KMS denies access", "us-west-2", "another account or region"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn what_is_no_ciphertext_is_refused() {
    let account = Account::new("broken");
    account.put_secret(&MOTO, PASSWORD, "");
    let whole = std::fs::read(account.client.dir().join("object")).unwrap();
    for len in [1, whole.len() / 2, whole.len() - 1] {
        MOTO.put_object("test-broken", "key", &whole[..len]);
        refused(&account.client, &account.config(""), &["s3://test-broken/key", "truncated"]);
    }
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    MOTO.put_object("test-broken", "key", &flipped);
    refused(&account.client, &account.config(""), &["damaged"]);
    MOTO.put_object("test-broken", "key", b"");
    refused(&account.client, &account.config(""), &["s3://test-broken/key is empty"]);
    MOTO.put_object("test-broken", "key", &vec![7; 6144]);
    refused(&account.client, &account.config(""), &["no ciphertext"]);
    MOTO.put_object("test-broken", "key", &vec![7; 6145]);
    refused(&account.client, &account.config(""), &["s3://test-broken/key", "larger than 6144 bytes"]);
    MOTO.put_object("test-broken", "key", &vec![7; 3 << 20]);
    refused(&account.client, &account.config(""), &["larger than 6144 bytes"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn a_missing_bucket_or_object_is_named() {
    let account = Account::new("missing");
    refused(&account.client, &account.config(""), &["no object s3://test-missing/key", "nbdcrypt provision"]);
    let config = config(&account.client, "s3://test-nowhere/key", "");
    refused(&account.client, &config, &["no bucket `test-nowhere`", "aws s3 mb s3://test-nowhere"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn denied_access_names_the_service_the_action_and_the_resource() {
    let moto = Moto::start();
    let account = Account::on(&moto, "denied");
    account.put_secret(&moto, PASSWORD, "");
    let mut machine = moto.make_user();
    let config = account.config("kms-key = \"alias/denied\"");
    moto.permit_only(&json!(["s3:ListBucket"]));
    let words = ["S3 denies access to s3://test-denied/key", "s3:GetObject on arn:aws:s3:::test-denied/key"];
    refused(&machine, &config, &words);
    moto.permit_only(&json!(["s3:GetObject"]));
    refused(&machine, &config, &["KMS denies access", "kms:Decrypt on alias/denied"]);
    moto.permit_only(&json!(["s3:GetObject", "kms:Decrypt"]));
    assert_eq!(unlocked(&machine, &config), PASSWORD);
    machine.set("AWS_SECRET_ACCESS_KEY", "wrong");
    refused(&machine, &config, &["refuses the credentials", "SignatureDoesNotMatch"]);
    machine.set("AWS_ACCESS_KEY_ID", "AKIANOBODY");
    refused(&machine, &config, &["refuses the credentials", "InvalidAccessKeyId"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn nothing_of_the_secret_is_logged_at_any_level() {
    let mut account = Account::new("logged");
    account.put_secret(&MOTO, PASSWORD, "");
    account.client.set("TRACE", "1");
    // What makes the SDK log secrets too.
    account.client.set("LOG_SENSITIVE_BODIES", "true");
    let output = unlock(&account.client, &account.config(""));
    assert_eq!(output.stdout, PASSWORD.as_bytes());
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("TRACE") && log.contains("GetObject"), "the log is there at all");
    let base64 = account.client.shell("base64 -w0 plaintext");
    let hex = account.client.shell("od -An -tx1 -v plaintext | tr -d ' \\n'");
    let decimals = PASSWORD.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    for form in [PASSWORD, base64.trim(), hex.trim(), &decimals, &base64.trim()[..12]] {
        assert!(!log.contains(form), "{form}");
    }
}

#[test]
fn a_network_that_is_down_is_tried_for_the_configured_time_and_named() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    let endpoint = format!("http://{closed}");
    let config = config(&client, "s3://bucket/key", &format!("region = \"{REGION}\"\nendpoint-url = \"{endpoint}\""));
    let begun = Instant::now();
    let error = refused(&client, &config, &[&endpoint, "S3", "Connection refused", "is the network up"]);
    let took = begun.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(6)).contains(&took), "{took:?}");
    let attempts: u32 = error.split_once("(tried ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    assert!((3..=8).contains(&attempts), "{error}");
}

#[test]
fn a_service_that_recovers_meanwhile_is_used() {
    let begun = Instant::now();
    let service = HttpDouble::start(move |request| {
        if begun.elapsed() < Duration::from_secs(1) {
            return ("503 Slow Down", vec![], "<Error><Code>SlowDown</Code><Message>m</Message></Error>".to_owned());
        }
        match request.method.as_str() {
            "GET" => ("200 OK", vec![], "ciphertext".to_owned()),
            _ => ("200 OK", vec![], r#"{"KeyId": "k", "Plaintext": "c2VzYW1l"}"#.to_owned()),
        }
    });
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    client.set("AWS_REGION", REGION);
    let config = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{}\"\n", service.endpoint()));
    let text = std::fs::read_to_string(&config).unwrap().replace("\"2s\"", "\"20s\"");
    std::fs::write(&config, text).unwrap();
    assert_eq!(unlocked(&client, &config), "sesame");
    assert!(service.requests().len() >= 4, "one SlowDown at least");
}

#[test]
fn a_bucket_in_another_region_names_the_right_one() {
    // As S3 answers: S3 User Guide, "Making requests over REST", "Request redirection".
    let s3 = HttpDouble::start(|_| {
        let body = "<?xml version=\"1.0\"?><Error><Code>PermanentRedirect</Code><Message>The bucket you are attempting \
                    to access must be addressed using the specified endpoint.</Message></Error>";
        ("301 Moved Permanently", vec!["x-amz-bucket-region: ap-south-1".to_owned()], body.to_owned())
    });
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    client.set("AWS_REGION", REGION);
    let config = config(&client, "s3://bucket/key", &format!("s3-endpoint-url = \"{}\"", s3.endpoint()));
    refused(&client, &config, &["not in eu-central-1 but in ap-south-1", "region = \"ap-south-1\""]);
    assert_eq!(s3.requests().len(), 1, "asked once: no retry mends a region");
}

#[test]
fn an_endpoint_that_does_not_speak_tls_is_no_network_that_is_down() {
    let plain = HttpDouble::start(|_| ("200 OK", vec![], String::new()));
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    client.set("AWS_REGION", REGION);
    let endpoint = plain.endpoint().replace("http://", "https://");
    let config = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{endpoint}\""));
    let error = refused(&client, &config, &[&endpoint, "TLS"]);
    assert!(!error.contains("tried"), "{error}");
}

#[test]
fn an_object_that_lies_about_its_length_is_still_bounded() {
    let s3 = HttpDouble::start(|_| {
        // No Content-Length: chunks without an end to them.
        let chunk = format!("2000\r\n{}\r\n", "x".repeat(0x2000));
        ("200 OK", vec!["Transfer-Encoding: chunked".to_owned()], chunk.repeat(64))
    });
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    client.set("AWS_REGION", REGION);
    let config = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{}\"", s3.endpoint()));
    refused(&client, &config, &["larger than 6144 bytes"]);
    assert_eq!(s3.requests().len(), 1);
}

#[test]
fn credentials_that_are_nowhere_are_an_error_at_once() {
    let mut client = Client::new();
    let config = config(&client, "s3://bucket/key", "endpoint-url = \"http://127.0.0.1:9\"");
    let begun = Instant::now();
    refused(&client, &config, &["no AWS credentials were found", "instance profile", "AWS_PROFILE"]);
    assert!(begun.elapsed() < Duration::from_secs(2));
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    refused(&client, &config, &["no AWS region", "region = \"...\"", "AWS_REGION"]);
    client.unset("AWS_ACCESS_KEY_ID");
    client.set("AWS_PROFILE", "nobody");
    refused(&client, &config, &["no AWS credentials were found, nor has a profile `nobody` any"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn region_and_credentials_of_an_instance_come_by_imds_version_2() {
    let account = Account::new("imds");
    account.put_secret(&MOTO, PASSWORD, "");
    // EC2 User Guide, "Retrieve security credentials from instance metadata"; nothing without a token, as IMDSv2 wants it.
    let metadata = HttpDouble::start(|request| {
        let has_token = request.headers.iter().any(|header| header == "x-aws-ec2-metadata-token: token");
        let role = "/latest/meta-data/iam/security-credentials/";
        match (request.method.as_str(), request.path.as_str()) {
            ("PUT", "/latest/api/token") => {
                ("200 OK", vec!["x-aws-ec2-metadata-token-ttl-seconds: 21600".to_owned()], "token".to_owned())
            }
            _ if !has_token => ("401 Unauthorized", vec![], String::new()),
            ("GET", "/latest/meta-data/placement/region") => ("200 OK", vec![], REGION.to_owned()),
            ("GET", path) if path == role => ("200 OK", vec![], "the-role".to_owned()),
            ("GET", path) if path == format!("{role}the-role") => (
                "200 OK",
                vec![],
                r#"{"Code": "Success", "LastUpdated": "2020-01-01T00:00:00Z", "Type": "AWS-HMAC",
                    "AccessKeyId": "ASIAROLE", "SecretAccessKey": "s", "Token": "session",
                    "Expiration": "2100-01-01T00:00:00Z"}"#
                    .to_owned(),
            ),
            _ => ("404 Not Found", vec![], String::new()),
        }
    });
    let mut instance = Client::new();
    instance.unset("AWS_EC2_METADATA_DISABLED");
    instance.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint());
    let config = account.config(&format!("endpoint-url = \"{}\"", MOTO.endpoint()));
    assert_eq!(unlocked(&instance, &config), PASSWORD);
    let asked = metadata.requests();
    assert!(asked.iter().any(|request| request.path.ends_with("the-role")), "{asked:?}");
    assert!(asked.iter().any(|request| request.path.ends_with("placement/region")), "{asked:?}");
}

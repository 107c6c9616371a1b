//! The key source `aws` with moto's S3 and KMS, and with objects that the AWS CLI made.

use std::path::PathBuf;
use std::process::Output;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use harness::http_double::{Answer, HttpDouble, ProxyDouble, RefusingPort, Request, TlsFront};
use harness::moto::{Client, Moto, REGION};
use serde_json::json;

/// The administrator's commands.
const ADMINISTRATOR: &str = r#"
aws kms encrypt --key-id alias/EncFSForEC2InternalStorageKey --plaintext "ThisIs-a-SecretPassword" \
    --query CiphertextBlob --output text | base64 --decode > LuksInternalStorageKey
aws s3 cp LuksInternalStorageKey s3://BUCKET/LuksInternalStorageKey
"#;
const PASSWORD: &str = "ThisIs-a-SecretPassword";

/// One server for all tests that make a bucket and a key of their own.
static MOTO: LazyLock<Moto> = LazyLock::new(Moto::start);

/// A bucket and a key with an alias. All are named after the test.
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

    /// Encrypts a plaintext with KMS and puts the result into the object. `more` are further arguments of `aws kms
    /// encrypt`.
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
fn the_object_of_the_issues_commands_gives_the_password() {
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
    // The same with a profile and the configuration instead of the environment.
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
fn trailing_newlines_are_removed_as_in_the_shell() {
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
fn the_encryption_context_must_match() {
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
fn a_ciphertext_of_another_key_is_refused() {
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
    // This region does not know a key of another region.
    let elsewhere = account.config("region = \"us-west-2\"");
    refused(&account.client, &elsewhere, &["KMS denies access", "us-west-2", "another account or region"]);
}

/// A ciphertext of one region is decrypted with the replica in another one, if the first key cannot be used.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn a_replica_decrypts_if_the_first_key_is_disabled() {
    let mut account = Account::new("replica");
    let (id, [first, second]) = MOTO.make_multi_region_key("us-east-1");
    account.alias = first.clone();
    account.put_secret(&MOTO, PASSWORD, "");
    let config = account.config(&format!("kms-key = [\"{first}\", \"{second}\"]"));
    assert_eq!(unlocked(&account.client, &config), PASSWORD);
    MOTO.kms("DisableKey", &json!({ "KeyId": id }));
    assert_eq!(unlocked(&account.client, &config), PASSWORD);
    let by_id = account.config(&format!("kms-key = \"{id}\"\nkms-region = \"us-east-1\""));
    assert_eq!(unlocked(&account.client, &by_id), PASSWORD);
    MOTO.kms_in("us-east-1", "DisableKey", &json!({ "KeyId": id }));
    let config = account.config(&format!("kms-key = [\"{first}\", \"{second}\"]"));
    refused(&account.client, &config, &["2 ways", &format!("{first} is disabled"), &format!("{second} is disabled")]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn data_that_is_not_a_ciphertext_is_refused() {
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
    refused(&account.client, &account.config(""), &["not a ciphertext"]);
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
fn no_part_of_the_secret_is_logged_at_any_level() {
    let mut account = Account::new("logged");
    account.put_secret(&MOTO, PASSWORD, "");
    account.client.set("TRACE", "1");
    // This variable makes the SDK log secrets.
    account.client.set("LOG_SENSITIVE_BODIES", "true");
    let output = unlock(&account.client, &account.config(""));
    assert_eq!(output.stdout, PASSWORD.as_bytes());
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("TRACE"), "the log contains trace messages");
    let base64 = account.client.shell("base64 -w0 plaintext");
    let hex = account.client.shell("od -An -tx1 -v plaintext | tr -d ' \\n'");
    let decimals = PASSWORD.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    for form in [PASSWORD, base64.trim(), hex.trim(), &decimals, &base64.trim()[..12]] {
        assert!(!log.contains(form), "{form}");
    }
}

#[test]
fn an_unreachable_network_is_retried_for_the_configured_time() {
    let port = RefusingPort::take();
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    let endpoint = port.endpoint();
    let config = config(&client, "s3://bucket/key", &format!("region = \"{REGION}\"\nendpoint-url = \"{endpoint}\""));
    let begun = Instant::now();
    let error = refused(&client, &config, &[&endpoint, "S3", "Connection refused", "is the network up"]);
    let took = begun.elapsed();
    // It takes at least the configured time. How much longer it takes depends on the machine's load.
    assert!((Duration::from_secs(2)..Duration::from_secs(60)).contains(&took), "{took:?}");
    let attempts: u32 = error.split_once("(tried ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    assert!((2..=8).contains(&attempts), "{error}");
}

#[test]
fn a_service_that_recovers_is_used() {
    let asked = AtomicUsize::new(0);
    let service = HttpDouble::start(move |request| {
        if asked.fetch_add(1, Ordering::Relaxed) < 2 {
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
    let text = std::fs::read_to_string(&config).unwrap().replace("\"2s\"", "\"60s\"");
    std::fs::write(&config, text).unwrap();
    assert_eq!(unlocked(&client, &config), "sesame");
    assert_eq!(service.requests().len(), 4, "two refused, then the object and the key");
}

/// Returns S3's answer for a bucket in another region. See the S3 User Guide, "Making requests over REST", "Request
/// redirection".
fn permanent_redirect(region: &str) -> Answer {
    let body = "<?xml version=\"1.0\"?><Error><Code>PermanentRedirect</Code><Message>The bucket you are attempting \
                to access must be addressed using the specified endpoint.</Message></Error>";
    ("301 Moved Permanently", vec![format!("x-amz-bucket-region: {region}")], body.to_owned())
}

/// Makes a client with a user's access keys and no region.
fn user() -> Client {
    let mut client = Client::new();
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    client
}

/// Starts S3 with the bucket in `region`. A request signed for another region gets the answer `elsewhere`.
fn s3_in(region: &'static str, elsewhere: fn(&Request) -> Answer) -> HttpDouble {
    HttpDouble::start(move |request| match request.signed_by() {
        Some((_, signed)) if signed == region => ("200 OK", vec![], "ciphertext".to_owned()),
        _ => elsewhere(request),
    })
}

/// Returns the answer of KMS that it decrypted the secret `sesame` with this key.
fn decrypted(key: &str) -> Answer {
    ("200 OK", vec![], json!({ "KeyId": key, "Plaintext": "c2VzYW1l" }).to_string())
}

/// Starts KMS in one region.
fn kms_in(region: &'static str) -> HttpDouble {
    HttpDouble::start(move |request| match request.signed_by() {
        Some((_, signed)) if signed == region => decrypted(&format!("arn:aws:kms:{region}:111122223333:key/mrk-1")),
        _ => ("400 Bad Request", vec![], r#"{"__type": "AccessDeniedException", "message": "not here"}"#.to_owned()),
    })
}

#[test]
fn bucket_and_key_may_be_in_two_regions() {
    let malformed = |_: &Request| {
        let body = "<Error><Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed; the \
                    region is wrong; expecting 'ap-south-1'</Message><Region>ap-south-1</Region></Error>";
        ("400 Bad Request", vec![], body.to_owned())
    };
    let denied = |_: &Request| {
        let body = "<Error><Code>AccessDenied</Code><Message>m</Message></Error>".to_owned();
        ("403 Forbidden", vec!["x-amz-bucket-region: ap-south-1".to_owned()], body)
    };
    let redirected: [fn(&Request) -> Answer; 3] = [|_| permanent_redirect("ap-south-1"), malformed, denied];
    let kms = kms_in("us-west-2");
    let by_arn = "kms-key = \"arn:aws:kms:us-west-2:111122223333:key/mrk-1\"";
    for (usual, more) in [
        (Some(REGION), by_arn.to_owned()),
        (None, by_arn.to_owned()),
        (Some(REGION), "kms-key = \"arn:aws:kms:us-west-2:111122223333:alias/x\"".to_owned()),
        (Some("us-west-2"), String::new()),
        (Some(REGION), "kms-key = \"alias/x\"\nkms-region = \"us-west-2\"".to_owned()),
        (
            Some(REGION),
            "kms-key = \"arn:aws:kms:eu-west-1:111122223333:key/mrk-1\"\nkms-region = \"us-west-2\"".to_owned(),
        ),
        (None, "kms-region = \"us-west-2\"".to_owned()),
    ] {
        for elsewhere in redirected {
            let s3 = s3_in("ap-south-1", elsewhere);
            let mut client = user();
            if let Some(region) = usual {
                client.set("AWS_REGION", region);
            }
            let endpoints =
                format!("s3-endpoint-url = \"{}\"\nkms-endpoint-url = \"{}\"", s3.endpoint(), kms.endpoint());
            assert_eq!(
                unlocked(&client, &config(&client, "s3://bucket/key", &format!("{more}\n{endpoints}"))),
                "sesame"
            );
            let asked = s3.requests();
            let regions: Vec<&str> = asked.iter().filter_map(Request::signed_by).map(|(_, region)| region).collect();
            assert_eq!(regions, [usual.unwrap_or("us-west-2"), "ap-south-1"], "{more}");
        }
    }
    // If both regions are configured, no request is sent twice.
    let s3 = s3_in("ap-south-1", |_| permanent_redirect("ap-south-1"));
    let client = user();
    let more = format!(
        "s3-region = \"ap-south-1\"\nkms-region = \"us-west-2\"\ns3-endpoint-url = \"{}\"\nkms-endpoint-url = \"{}\"",
        s3.endpoint(),
        kms.endpoint()
    );
    assert_eq!(unlocked(&client, &config(&client, "s3://bucket/key", &more)), "sesame");
    assert_eq!(s3.requests().len(), 1);
}

/// The replicas of a multi-Region key, in two regions, as a list in the configuration.
const REPLICAS: &str = "kms-key = [\"arn:aws:kms:eu-west-1:111122223333:key/mrk-1\", \
                        \"arn:aws:kms:us-east-1:111122223333:key/mrk-1\"]";

/// Starts S3, and KMS in all regions. `answer` gets the region that a request to KMS is signed for.
fn kms_with(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> HttpDouble {
    HttpDouble::start(move |request| match (request.method.as_str(), request.signed_by()) {
        ("POST", Some((_, region))) => answer(region),
        _ => ("200 OK", vec![], "ciphertext".to_owned()),
    })
}

/// Returns the regions in which KMS was asked, in order.
fn kms_regions(service: &HttpDouble) -> Vec<String> {
    let asked = service.requests();
    let of_kms = asked.iter().filter(|request| request.method == "POST");
    of_kms.map(|request| request.signed_by().unwrap().1.to_owned()).collect()
}

fn replica(region: &str) -> Answer {
    decrypted(&format!("arn:aws:kms:{region}:111122223333:key/mrk-1"))
}

fn refusal(code: &str) -> Answer {
    ("400 Bad Request", vec![], json!({ "__type": code, "message": "m" }).to_string())
}

#[test]
fn the_next_key_is_tried_in_its_own_region() {
    let cut: Answer = ("200 OK", vec!["Content-Length: 1000".to_owned()], "{\"KeyId\"".to_owned());
    for first in [
        cut,
        ("503 Service Unavailable", vec![], String::new()),
        refusal("ThrottlingException"),
        refusal("KMSInternalException"),
        refusal("DisabledException"),
        refusal("KMSInvalidStateException"),
        refusal("NotFoundException"),
        refusal("AccessDeniedException"),
        // The region is not enabled for this account.
        refusal("UnrecognizedClientException"),
        decrypted("arn:aws:kms:eu-west-1:999999999999:key/mrk-1"),
    ] {
        let what = format!("{first:?}");
        let kms = kms_with(move |region| if region == "eu-west-1" { first.clone() } else { replica(region) });
        let mut client = user();
        client.set("AWS_REGION", REGION);
        let more = format!("{REPLICAS}\nendpoint-url = \"{}\"", kms.endpoint());
        assert_eq!(unlocked(&client, &config(&client, "s3://bucket/key", &more)), "sesame", "{what}");
        // The first key is not asked again before the second one.
        assert_eq!(kms_regions(&kms), ["eu-west-1", "us-east-1"], "{what}");
        // Each request names the key of its region.
        let asked = kms.requests();
        for request in asked.iter().filter(|request| request.method == "POST") {
            let region = request.signed_by().unwrap().1;
            assert!(request.body.contains(&format!("arn:aws:kms:{region}:111122223333:key/mrk-1")), "{}", request.body);
        }
    }
    // The first key is enough.
    let kms = kms_with(replica);
    let mut client = user();
    client.set("AWS_REGION", REGION);
    let more = format!("{REPLICAS}\nendpoint-url = \"{}\"", kms.endpoint());
    assert_eq!(unlocked(&client, &config(&client, "s3://bucket/key", &more)), "sesame");
    assert_eq!(kms_regions(&kms), ["eu-west-1"]);
}

/// The first region does not use up the time: both are asked again until one answers.
#[test]
fn keys_take_turns_until_one_answers() {
    let count = AtomicUsize::new(0);
    let kms = kms_with(move |region| match (region, count.fetch_add(1, Ordering::Relaxed)) {
        ("us-east-1", 5..) => replica(region),
        _ => refusal("ThrottlingException"),
    });
    let mut client = user();
    client.set("AWS_REGION", REGION);
    let more = format!("{REPLICAS}\nendpoint-url = \"{}\"", kms.endpoint());
    let config = config(&client, "s3://bucket/key", &more);
    let text = std::fs::read_to_string(&config).unwrap().replace("\"2s\"", "\"300s\"");
    std::fs::write(&config, text).unwrap();
    assert_eq!(unlocked(&client, &config), "sesame");
    let both = ["eu-west-1", "us-east-1"];
    assert_eq!(kms_regions(&kms), [both, both, both].concat());
}

/// S3 and KMS share `retry-for`. Here S3 uses it up, and each key is then asked only once.
#[test]
fn one_deadline_is_for_s3_and_all_keys_together() {
    let service = HttpDouble::start(|request| match request.method.as_str() {
        "GET" => {
            std::thread::sleep(Duration::from_millis(1500));
            ("200 OK", vec![], "ciphertext".to_owned())
        }
        _ => refusal("ThrottlingException"),
    });
    let mut client = user();
    client.set("AWS_REGION", REGION);
    let config = config(&client, "s3://bucket/key", &format!("{REPLICAS}\nendpoint-url = \"{}\"", service.endpoint()));
    let text = std::fs::read_to_string(&config).unwrap().replace("\"2s\"", "\"1s\"");
    std::fs::write(&config, text).unwrap();
    let error = refused(&client, &config, &[]);
    // On a very slow machine, even S3's answer is late.
    let asked = kms_regions(&service);
    assert!(asked == ["eu-west-1", "us-east-1"] || asked.is_empty(), "{asked:?}: {error}");
}

#[test]
fn a_refusal_by_every_key_is_one_error() {
    let kms = kms_with(|region| match region {
        "eu-west-1" => refusal("InvalidCiphertextException"),
        _ => refusal("AccessDeniedException"),
    });
    let mut client = user();
    client.set("AWS_REGION", REGION);
    let more = format!("{REPLICAS}\nendpoint-url = \"{}\"", kms.endpoint());
    let words = [
        "2 ways to the secret",
        "(1) arn:aws:kms:eu-west-1:111122223333:key/mrk-1: KMS cannot decrypt s3://bucket/key",
        "(2) arn:aws:kms:us-east-1:111122223333:key/mrk-1: KMS denies access",
    ];
    let error = refused(&client, &config(&client, "s3://bucket/key", &more), &words);
    assert_eq!(kms_regions(&kms).len(), 2, "{error}");
    assert!(!error.contains("times in"), "{error}");
}

#[test]
fn an_answer_for_another_key_is_refused() {
    let key = "arn:aws:kms:eu-central-1:111122223333:key/1";
    for (configured, answered, is_right) in [
        (key, key, true),
        (key, "arn:aws:kms:eu-central-1:111122223333:key/2", false),
        (key, "arn:aws:kms:eu-central-1:999999999999:key/1", false),
        (key, "", false),
        ("1", key, true),
        ("1", "arn:aws:kms:eu-central-1:111122223333:key/2", false),
        ("alias/x", key, true),
        ("alias/x", "arn:aws:kms:us-east-1:111122223333:key/1", false),
        ("arn:aws:kms:eu-central-1:111122223333:alias/x", key, true),
        ("arn:aws:kms:eu-central-1:111122223333:alias/x", "arn:aws:kms:eu-central-1:999999999999:key/1", false),
    ] {
        let kms = kms_with(move |_| decrypted(answered));
        let mut client = user();
        client.set("AWS_REGION", REGION);
        let more = format!("kms-key = \"{configured}\"\nendpoint-url = \"{}\"", kms.endpoint());
        let config = config(&client, "s3://bucket/key", &more);
        match is_right {
            true => assert_eq!(unlocked(&client, &config), "sesame", "{configured} {answered}"),
            false => {
                refused(&client, &config, &[answered, configured, "answer is not used", "kms-endpoint-url"]);
                assert_eq!(kms_regions(&kms).len(), 1);
            }
        }
    }
}

/// S3 sends the checksum that it stores. The object is damaged on its way, once.
#[test]
fn an_object_with_a_wrong_checksum_is_read_again() {
    // The CRC-32 of "ciphertext", in base64.
    let right = "x-amz-checksum-crc32: /HcmdQ==";
    let count = AtomicUsize::new(0);
    let service = HttpDouble::start(move |request| match request.method.as_str() {
        "GET" if count.fetch_add(1, Ordering::Relaxed) == 0 => {
            ("200 OK", vec![right.to_owned()], "cipherTEXT".to_owned())
        }
        "GET" => ("200 OK", vec![right.to_owned()], "ciphertext".to_owned()),
        _ => decrypted("k"),
    });
    let mut client = user();
    client.set("AWS_REGION", REGION);
    // The usual settings of AWS tools can turn the check off.
    client.set("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required");
    let config = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{}\"", service.endpoint()));
    let text = std::fs::read_to_string(&config).unwrap().replace("\"2s\"", "\"300s\"");
    std::fs::write(&config, text).unwrap();
    let output = unlock(&client, &config);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.stdout, b"sesame", "{said}");
    assert!(said.contains("s3://bucket/key was damaged on its way from S3"), "{said}");
    assert!(service.requests()[0].headers.contains(&"x-amz-checksum-mode: enabled".to_owned()));
}

#[test]
fn a_wrong_region_is_reported_with_the_setting() {
    let kms = kms_in("us-west-2");
    let run = |s3: &HttpDouble, more: &str, words: &[&str]| {
        let mut client = user();
        client.set("AWS_REGION", REGION);
        let more =
            format!("{more}\ns3-endpoint-url = \"{}\"\nkms-endpoint-url = \"{}\"", s3.endpoint(), kms.endpoint());
        refused(&client, &config(&client, "s3://bucket/key", &more), words);
        s3.requests().len()
    };
    // A region in the configuration overrides what S3 says.
    let s3 = s3_in("ap-south-1", |_| permanent_redirect("ap-south-1"));
    let words = ["not in eu-west-3 but in ap-south-1", "s3-region = \"ap-south-1\""];
    assert_eq!(run(&s3, "s3-region = \"eu-west-3\"", &words), 1, "a wrong region is not retried");
    // If S3 redirects again and again, only the first redirection is followed.
    let s3 = s3_in("nowhere", |request| {
        let (_, region) = request.signed_by().unwrap();
        permanent_redirect(if region == "ap-south-1" { "us-east-1" } else { "ap-south-1" })
    });
    assert_eq!(run(&s3, "", &["not in ap-south-1 but in us-east-1"]), 2);
    // An invalid region name never becomes part of a host name.
    let s3 = s3_in("nowhere", |_| permanent_redirect("evil.example/x"));
    assert_eq!(run(&s3, "", &["not in eu-central-1"]), 1);
    let s3 = s3_in(REGION, |_| permanent_redirect(REGION));
    run(&s3, "kms-key = \"alias/x\"", &["KMS denies access", "asked in eu-central-1", "kms-region"]);
    let s3 = HttpDouble::start(|_| {
        ("404 Not Found", vec![], "<Error><Code>NoSuchKey</Code><Message>m</Message></Error>".to_owned())
    });
    run(&s3, "", &["no object s3://bucket/key (asked in eu-central-1)"]);
}

/// Each answer comes twice, then the service works.
#[test]
fn temporary_errors_are_retried() {
    let json = |status, code: &str, message: &str| {
        (status, vec![], format!(r#"{{"__type": "{code}", "message": "{message}"}}"#))
    };
    let xml = |status, code: &str| (status, vec![], format!("<Error><Code>{code}</Code><Message>m</Message></Error>"));
    let cut = |body: &str| ("200 OK", vec!["Content-Length: 1000".to_owned()], body.to_owned());
    let skewed = "Signature expired: 20260101T000000Z is now earlier than 20260101T001000Z";
    let bad = "400 Bad Request";
    // The request's method says whether S3 (`GET`) or KMS (`POST`) gives the answer.
    let table: Vec<(&str, Answer)> = vec![
        ("POST", cut(r#"{"KeyId": "k", "Plaintext": "c2VzYW"#)),
        ("POST", ("200 OK", vec![], r#"{"KeyId": "k", "Plaintext": "c2VzYW"#.to_owned())),
        ("POST", ("200 OK", vec![], String::new())),
        ("POST", ("200 OK", vec!["Transfer-Encoding: chunked".to_owned()], "100\r\n{\"KeyId\"".to_owned())),
        ("GET", cut("ciphe")),
        ("GET", ("200 OK", vec!["Transfer-Encoding: chunked".to_owned()], "100\r\ncip".to_owned())),
        ("POST", json(bad, "InvalidSignatureException", skewed)),
        ("POST", json(bad, "InvalidSignatureException", "Signature not yet current: 20260101T001000Z is later")),
        ("POST", json("403 Forbidden", "RequestTimeTooSkewed", "m")),
        ("GET", xml("403 Forbidden", "RequestTimeTooSkewed")),
        ("POST", json(bad, "ThrottlingException", "Rate exceeded")),
        ("POST", json("500 Oops", "KMSInternalException", "m")),
        ("POST", json("500 Oops", "DependencyTimeoutException", "m")),
        ("POST", json(bad, "ExpiredTokenException", "m")),
        ("GET", xml(bad, "ExpiredToken")),
        ("GET", xml("503 Slow Down", "SlowDown")),
        ("GET", xml("500 Oops", "InternalError")),
        ("GET", ("502 Bad Gateway", vec![], "<html>a proxy's page</html>".to_owned())),
    ];
    std::thread::scope(|scope| {
        for (number, (method, answer)) in table.into_iter().enumerate() {
            scope.spawn(move || {
                let count = AtomicUsize::new(0);
                let service = HttpDouble::start(move |request| match request.method.as_str() {
                    asked if asked == method && count.fetch_add(1, Ordering::Relaxed) < 2 => answer.clone(),
                    "GET" => ("200 OK", vec![], "ciphertext".to_owned()),
                    _ => ("200 OK", vec![], r#"{"KeyId": "k", "Plaintext": "c2VzYW1l"}"#.to_owned()),
                });
                let mut client = user();
                client.set("AWS_REGION", REGION);
                let config = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{}\"", service.endpoint()));
                let text = std::fs::read_to_string(&config).unwrap().replace("\"2s\"", "\"60s\"");
                std::fs::write(&config, text).unwrap();
                let output = unlock(&client, &config);
                let said = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.stdout, b"sesame", "{number}: {said}");
                assert!(said.matches("trying again").count() == 2 && !said.contains("c2VzYW"), "{number}: {said}");
            });
        }
    });
}

#[test]
fn permanent_errors_are_not_retried() {
    let json = |code: &str| ("400 Bad Request", vec![], format!(r#"{{"__type": "{code}", "message": "m"}}"#));
    let table: Vec<Answer> = vec![
        json("InvalidCiphertextException"),
        json("DisabledException"),
        json("IncorrectKeyException"),
        json("NotFoundException"),
        json("KMSInvalidStateException"),
        // This error is permanent for a user's access keys, but not for a role's credentials.
        json("AccessDeniedException"),
        json("UnrecognizedClientException"),
        json("InvalidSignatureException"),
        ("200 OK", vec![], "<html>another program</html>".to_owned()),
    ];
    for answer in table {
        let what = answer.2.clone();
        let service = HttpDouble::start(move |request| match request.method.as_str() {
            "GET" => ("200 OK", vec![], "ciphertext".to_owned()),
            _ => answer.clone(),
        });
        let mut client = user();
        client.set("AWS_REGION", REGION);
        let config = config(
            &client,
            "s3://bucket/key",
            &format!("kms-key = \"alias/k\"\nendpoint-url = \"{}\"", service.endpoint()),
        );
        let error = refused(&client, &config, &[]);
        assert_eq!(service.requests().len(), 2, "{what}: {error}");
        assert!(!error.contains("again"), "{what}: {error}");
    }
}

/// The machine's clock is wrong by hours. The SDK signs with AWS's time, which each answer contains.
#[test]
fn a_wrong_clock_is_corrected_from_the_services_time() {
    let long_ago = "date: Thu, 01 Jan 2026 12:00:00 GMT";
    let service = HttpDouble::start(move |request| {
        let date = vec![long_ago.to_owned()];
        match request.headers.iter().any(|header| header.starts_with("x-amz-date: 20260101t1")) {
            false => {
                let message = "Signature not yet current: 20260101T120000Z is earlier";
                let body = match request.method.as_str() {
                    "GET" => format!("<Error><Code>RequestTimeTooSkewed</Code><Message>{message}</Message></Error>"),
                    _ => format!(r#"{{"__type": "InvalidSignatureException", "message": "{message}"}}"#),
                };
                ("403 Forbidden", date, body)
            }
            true if request.method == "GET" => ("200 OK", date, "ciphertext".to_owned()),
            true => ("200 OK", date, r#"{"KeyId": "k", "Plaintext": "c2VzYW1l"}"#.to_owned()),
        }
    });
    let mut client = user();
    client.set("AWS_REGION", REGION);
    let config = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{}\"", service.endpoint()));
    let text = std::fs::read_to_string(&config).unwrap().replace("\"2s\"", "\"60s\"");
    std::fs::write(&config, text).unwrap();
    assert_eq!(unlocked(&client, &config), "sesame");
}

/// The services' real names, through a proxy, with a certificate of an authority that only the bundle contains.
#[test]
fn the_aws_clis_proxy_and_certificate_settings_are_used() {
    let service = HttpDouble::start(|request| match request.method.as_str() {
        "GET" => ("200 OK", vec![], "ciphertext".to_owned()),
        _ => decrypted("arn:aws:kms:us-west-2:111122223333:key/1"),
    });
    let mut client = user();
    let hosts = ["bucket.s3.eu-central-1.amazonaws.com", "kms.us-west-2.amazonaws.com"];
    let tls = TlsFront::start(client.dir(), &hosts, service.address());
    let proxy = ProxyDouble::start(tls.address());
    client.set("AWS_REGION", REGION);
    client.set("HTTPS_PROXY", &proxy.url());
    let more = "kms-key = \"arn:aws:kms:us-west-2:111122223333:key/1\"";
    let plain = config(&client, "s3://bucket/key", more);
    // The system does not know this authority.
    refused(&client, &plain, &["S3 at https://bucket.s3.eu-central-1.amazonaws.com", "trusted", "AWS_CA_BUNDLE"]);
    let bundle = client.dir().join("ca.pem").display().to_string();
    client.set("AWS_CA_BUNDLE", &bundle);
    assert_eq!(unlocked(&client, &plain), "sesame");
    let asked = proxy.asked();
    for host in hosts {
        assert!(asked.contains(&format!("CONNECT {host}:443")), "{asked:?}");
    }
    // A profile names the bundle. The bundle has several certificates with text between them.
    let certificate = std::fs::read_to_string(&bundle).unwrap();
    let bundle = client.file("bundle.pem", format!("# an authority\n{certificate}\n# again\n{certificate}"));
    client.unset("AWS_CA_BUNDLE");
    std::fs::create_dir(client.dir().join(".aws")).unwrap();
    client.file(".aws/config", format!("[default]\nca_bundle = {}\n", bundle.display()));
    assert_eq!(unlocked(&client, &plain), "sesame");
    // An invalid bundle is named, and no other certificates are trusted in its place.
    let broken = client.file("broken.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    for path in ["/nonexistent.pem", broken.to_str().unwrap()] {
        client.set("AWS_CA_BUNDLE", path);
        refused(&client, &plain, &[path, "certificate authorities", "AWS_CA_BUNDLE"]);
    }
    client.unset("AWS_CA_BUNDLE");
    // The error names an unreachable proxy by its variable, because its address may contain a password.
    client.set("HTTPS_PROXY", "http://user:hunter2@127.0.0.1:9");
    let error = refused(&client, &plain, &["S3 at https://bucket.s3.eu-central-1.amazonaws.com", "HTTPS_PROXY"]);
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn the_proxy_is_not_used_for_exceptions_and_local_addresses() {
    let service = HttpDouble::start(|request| match (request.method.as_str(), request.path.as_str()) {
        ("PUT", "/latest/api/token") => {
            ("200 OK", vec!["x-aws-ec2-metadata-token-ttl-seconds: 21600".to_owned()], "token".to_owned())
        }
        (_, path) if path.contains("placement/region") => ("200 OK", vec![], REGION.to_owned()),
        (_, path) if path.ends_with("security-credentials/") => ("200 OK", vec![], "r".to_owned()),
        (_, path) if path.ends_with("/r") || path.ends_with("/container") => {
            let role = r#"{"Code": "Success", "AccessKeyId": "ASIA", "SecretAccessKey": "s", "Token": "t",
                           "Expiration": "2100-01-01T00:00:00Z"}"#;
            ("200 OK", vec![], role.to_owned())
        }
        ("GET", _) => ("200 OK", vec![], "ciphertext".to_owned()),
        _ => ("200 OK", vec![], r#"{"KeyId": "k", "Plaintext": "c2VzYW1l"}"#.to_owned()),
    });
    let proxy = ProxyDouble::start(service.address());
    // Two ports on one machine. The instance's services are behind one of them.
    let (local, aws) = (&service, "http://127.0.0.1:1");
    let mut client = Client::new();
    client.set("http_proxy", &proxy.url());
    client.unset("AWS_EC2_METADATA_DISABLED");
    client.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &local.endpoint());
    let plain = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{aws}\""));
    assert_eq!(unlocked(&client, &plain), "sesame");
    let asked = proxy.asked();
    assert!(asked.iter().any(|line| line.starts_with("GET http://127.0.0.1:1/bucket/key")), "{asked:?}");
    assert!(!asked.iter().any(|line| line.contains("latest")), "{asked:?}");

    client.set("AWS_EC2_METADATA_DISABLED", "true");
    client.set("AWS_REGION", REGION);
    client.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{}/container", local.endpoint()));
    assert_eq!(unlocked(&client, &plain), "sesame");
    assert!(!proxy.asked().iter().any(|line| line.contains("container")), "{:?}", proxy.asked());

    let before = proxy.asked().len();
    client.set("NO_PROXY", "example.com,127.0.0.0/8");
    let direct = config(&client, "s3://bucket/key", &format!("endpoint-url = \"{}\"", service.endpoint()));
    assert_eq!(unlocked(&client, &direct), "sesame");
    assert_eq!(proxy.asked().len(), before);
}

#[test]
fn an_endpoint_without_tls_is_not_a_network_failure() {
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
fn an_object_with_a_false_length_is_bounded() {
    let s3 = HttpDouble::start(|_| {
        // There is no Content-Length, and the chunks never end.
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
fn missing_credentials_are_an_error_at_once() {
    let mut client = Client::new();
    let config = config(&client, "s3://bucket/key", "endpoint-url = \"http://127.0.0.1:9\"");
    let begun = Instant::now();
    refused(&client, &config, &["no AWS credentials were found", "instance profile", "AWS_PROFILE"]);
    // Nothing was tried again, which would have taken two minutes.
    assert!(begun.elapsed() < Duration::from_secs(60));
    client.set("AWS_ACCESS_KEY_ID", "a");
    client.set("AWS_SECRET_ACCESS_KEY", "b");
    refused(&client, &config, &["no AWS region", "region = \"...\"", "AWS_REGION"]);
    client.unset("AWS_ACCESS_KEY_ID");
    client.set("AWS_PROFILE", "nobody");
    refused(&client, &config, &["no profile `nobody`", "profile` under [key]", "aws configure --profile nobody"]);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto and the AWS CLI: run `make test`")]
fn an_instances_region_and_credentials_come_from_imdsv2() {
    let account = Account::new("imds");
    account.put_secret(&MOTO, PASSWORD, "");
    // EC2 User Guide, "Retrieve security credentials from instance metadata". Without a token there is no answer, as IMDSv2
    // requires.
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

//! Where credentials come from, which failures of their sources are temporary, and that no part of them is ever printed.

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::sync::atomic::{AtomicUsize, Ordering};

use harness::http_double::{Answer, HttpDouble, Request};
use harness::moto::{Client, REGION};
use harness::nbdcrypt::{binary, told};

/// A marker that must never be printed.
const MARKER: &str = "MarkerOfASecret";

/// Starts S3 and KMS, which unlock for every caller.
fn services() -> HttpDouble {
    HttpDouble::start(|request| match request.method.as_str() {
        "GET" => ok("ciphertext"),
        _ => decrypted(request),
    })
}

/// Returns the answer of KMS in the region that the request is signed for.
fn decrypted(request: &Request) -> Answer {
    let (_, region) = request.signed_by().unwrap();
    ok(&format!(r#"{{"KeyId": "arn:aws:kms:{region}:111122223333:key/1", "Plaintext": "c2VzYW1l"}}"#))
}

fn ok(body: &str) -> Answer {
    ("200 OK", vec![], body.to_owned())
}

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// Starts an instance metadata service. `answer` overrides its answers.
fn metadata(answer: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> HttpDouble {
    HttpDouble::start(move |request| {
        if let Some(answer) = answer(request) {
            return answer;
        }
        match request.path.as_str() {
            "/latest/api/token" => {
                ("200 OK", vec!["x-aws-ec2-metadata-token-ttl-seconds: 21600".to_owned()], "token".to_owned())
            }
            "/latest/meta-data/placement/region" => ok(REGION),
            ROLES => ok("the-role"),
            path if path.starts_with(ROLES) => ok(&role("ASIAROLE")),
            _ => ("404 Not Found", vec![], String::new()),
        }
    })
}

fn role(key: &str) -> String {
    format!(
        r#"{{"Code": "Success", "LastUpdated": "2020-01-01T00:00:00Z", "Type": "AWS-HMAC", "AccessKeyId": "{key}",
            "SecretAccessKey": "s", "Token": "t", "Expiration": "2100-01-01T00:00:00Z"}}"#
    )
}

fn instance(metadata: &HttpDouble) -> Client {
    let mut client = Client::new();
    client.unset("AWS_EC2_METADATA_DISABLED");
    client.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.endpoint());
    fs::create_dir(client.dir().join(".aws")).unwrap();
    client
}

fn config(client: &Client, services: &HttpDouble, more: &str) -> PathBuf {
    let text = format!(
        "[volume]\ndevices = [\"/dev/null\"]\n[key]\nsource = \"aws\"\nobject = \"s3://bucket/key\"\n\
         kms-key = \"alias/k\"\nendpoint-url = \"{}\"\n{more}\n",
        services.endpoint()
    );
    client.file("test.toml", text)
}

fn unlock(client: &Client, config: &PathBuf) -> Output {
    client.command(env!("CARGO_BIN_EXE_aws-key")).arg("passphrase").arg(config).output().unwrap()
}

/// A client's broken files and environment, and the words that the error must contain.
struct Broken {
    config: &'static str,
    credentials: &'static str,
    environment: &'static [(&'static str, &'static str)],
    profile: &'static str,
    words: &'static [&'static str],
}

const BROKEN: Broken = Broken { config: "", credentials: "", environment: &[], profile: "", words: &[] };

#[test]
fn a_broken_profile_is_an_error_even_with_a_role() {
    let keys = &[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_PROFILE", "nobody")][..];
    let table = [
        Broken { profile: "nobody", words: &["no profile `nobody`", ".aws/config", ".aws/credentials"], ..BROKEN },
        Broken { environment: &[("AWS_PROFILE", "nobody")], words: &["no profile `nobody`"], ..BROKEN },
        Broken { environment: &[("AWS_DEFAULT_PROFILE", "nobody")], words: &["no profile `nobody`"], ..BROKEN },
        Broken { environment: &[("AWS_PROFILE", "default")], words: &["no profile `default`"], ..BROKEN },
        // As in the AWS CLI: the profile is used, not the access keys in the environment.
        Broken { environment: keys, words: &["no profile `nobody`"], ..BROKEN },
        // Where the prefix `profile` is needed, and where it is not.
        Broken { config: "[p]\nregion = x\n", profile: "p", words: &["no profile `p`"], ..BROKEN },
        Broken {
            config: "[profile a]\nrole_arn = r\nsource_profile = b\n[profile b]\nrole_arn = r\nsource_profile = a\n",
            profile: "a",
            words: &["circle", "a -> b -> a"],
            ..BROKEN
        },
        Broken {
            config: "[profile a]\nsource_profile = b\n[profile b]\nsource_profile = c\n[profile c]\nsource_profile = b\n",
            profile: "a",
            words: &["circle", "a -> b -> c -> b"],
            ..BROKEN
        },
        Broken {
            config: "[default]\nrole_arn = r\nsource_profile = b\n[profile b]\nrole_arn = r\nsource_profile = default\n",
            words: &["circle", "default -> b -> default"],
            ..BROKEN
        },
        Broken {
            config: "[default]\nrole_arn = r\nsource_profile = gone\n",
            words: &["`default` has `source_profile = gone`", "no profile `gone`"],
            ..BROKEN
        },
        Broken {
            config: "[default]\nsource_profile = gone\n",
            words: &["`default` has `source_profile = gone`"],
            ..BROKEN
        },
        Broken { config: "[default]\nrole_arn = r\n", words: &["neither `source_profile` nor"], ..BROKEN },
        Broken {
            config: "[default]\nrole_arn = r\nsource_profile = default\ncredential_source = Environment\n",
            words: &["both `source_profile` and `credential_source`"],
            ..BROKEN
        },
        Broken {
            config: "[default]\nrole_arn = r\ncredential_source = Magic\n",
            words: &["credential_source = Magic", "Ec2InstanceMetadata"],
            ..BROKEN
        },
        Broken {
            config: "[profile a]\nrole_arn = r\nsource_profile = b\n[profile b]\nregion = x\n",
            profile: "a",
            words: &["profile `a` gives no AWS credentials", "source profile"],
            ..BROKEN
        },
        Broken {
            credentials: "[default]\naws_access_key_id = a\n",
            words: &["profile `default`", "aws_secret_access_key"],
            ..BROKEN
        },
        Broken {
            config: "[default]\nsso_start_url = https://x\n",
            words: &["profile `default`", "sso_region"],
            ..BROKEN
        },
        Broken {
            config: "[default]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n",
            words: &["profile `default`", "`s`"],
            ..BROKEN
        },
        Broken { config: "[default]\nregion\n", words: &["cannot be parsed", ".aws/config", "2"], ..BROKEN },
        Broken { config: "[default\nregion = x\n", words: &["cannot be parsed", ".aws/config"], ..BROKEN },
        Broken {
            environment: &[("AWS_ACCESS_KEY_ID", "a")],
            words: &["AWS_ACCESS_KEY_ID is set", "AWS_SECRET_ACCESS_KEY is not"],
            ..BROKEN
        },
        Broken { environment: &[("AWS_WEB_IDENTITY_TOKEN_FILE", "/t")], words: &["AWS_ROLE_ARN is not"], ..BROKEN },
    ];
    let services = services();
    std::thread::scope(|scope| {
        for case in &table {
            scope.spawn(|| {
                let metadata = metadata(|_| None);
                let mut client = instance(&metadata);
                client.file(".aws/config", case.config);
                client.file(".aws/credentials", case.credentials);
                for (name, value) in case.environment {
                    client.set(name, value);
                }
                let profile = format!("profile = \"{}\"", case.profile);
                let profile = if case.profile.is_empty() { "" } else { &profile };
                refused_without_the_role(&client, &config(&client, &services, profile), &metadata, case.words);
            });
        }
    });
    assert!(services.requests().is_empty());
}

#[track_caller]
fn refused_without_the_role(client: &Client, config: &PathBuf, metadata: &HttpDouble, words: &[&str]) {
    let output = unlock(client, config);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {}", told(&output));
    for word in words {
        assert!(told(&output).contains(word), "`{word}` in: {}", told(&output));
    }
    let asked = metadata.requests();
    assert!(!asked.iter().any(|request| request.path.starts_with(ROLES)), "{words:?}: {asked:?}");
}

#[test]
fn an_unreadable_file_is_an_error_even_with_a_role() {
    let services = services();
    for (variable, name) in [("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")] {
        let metadata = metadata(|_| None);
        let mut client = instance(&metadata);
        let config = config(&client, &services, "");
        // Even root cannot read a folder as a file.
        let path = client.dir().join(".aws").join(name);
        fs::create_dir(&path).unwrap();
        refused_without_the_role(&client, &config, &metadata, &[path.to_str().unwrap(), "cannot be read", variable]);
        fs::remove_dir(&path).unwrap();
        fs::write(&path, b"[default]\nregion = \xff\n").unwrap();
        refused_without_the_role(&client, &config, &metadata, &[path.to_str().unwrap(), "not UTF-8"]);
        fs::remove_file(&path).unwrap();
        // A path below a file cannot be read either. An environment variable names this path.
        client.set(variable, "~/test.toml/x");
        refused_without_the_role(&client, &config, &metadata, &["test.toml/x cannot be read", variable]);
        // As in the AWS CLI, a file that does not exist counts as empty. The log says so.
        client.set(variable, "~/gone");
        let output = unlock(&client, &config);
        assert_eq!(output.stdout, b"sesame", "{}", told(&output));
    }
}

#[test]
fn a_profile_without_credentials_uses_the_role() {
    let services = services();
    let metadata = metadata(|_| None);
    let client = instance(&metadata);
    client.file(".aws/config", "[profile p]\nregion = eu-north-1\n");
    let output = unlock(&client, &config(&client, &services, "profile = \"p\""));
    assert_eq!(output.stdout, b"sesame", "{}", told(&output));
    assert_eq!(services.requests()[0].signed_by(), Some(("asiarole", "eu-north-1")));
}

#[test]
fn the_configured_profile_overrides_the_environment() {
    let services = services();
    let mut client = Client::new();
    client.set("AWS_REGION", REGION);
    fs::create_dir(client.dir().join(".aws")).unwrap();
    let keys = "aws_secret_access_key = s\n";
    client.file(
        ".aws/credentials",
        format!("[p]\naws_access_key_id = AKIAP\n{keys}[q]\naws_access_key_id = AKIAQ\n{keys}"),
    );
    let signed_with = |client: &Client, more: &str| {
        let before = services.requests().len();
        let output = unlock(client, &config(client, &services, more));
        assert_eq!(output.stdout, b"sesame", "{}", told(&output));
        services.requests()[before].signed_by().unwrap().0.to_owned()
    };
    client.set("AWS_PROFILE", "q");
    assert_eq!(signed_with(&client, ""), "akiaq");
    assert_eq!(signed_with(&client, "profile = \"p\""), "akiap");
    client.set("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT");
    client.set("AWS_SECRET_ACCESS_KEY", "s");
    assert_eq!(signed_with(&client, ""), "akiaenvironment");
    assert_eq!(signed_with(&client, "profile = \"p\""), "akiap");
    // Environment variables name other files, as in the AWS CLI.
    let elsewhere = client.file("elsewhere", format!("[p]\naws_access_key_id = AKIAELSEWHERE\n{keys}"));
    client.set("AWS_SHARED_CREDENTIALS_FILE", elsewhere.to_str().unwrap());
    assert_eq!(signed_with(&client, "profile = \"p\""), "akiaelsewhere");
}

/// A systemd system service has no HOME.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and unshare: run `make test`")]
fn without_home_the_password_file_is_used() {
    let services = services();
    let metadata = metadata(|_| None);
    let mut client = instance(&metadata);
    client.unset("HOME");
    let config = config(&client, &services, "profile = \"p\"");
    let script = format!(
        "mount -t tmpfs tmpfs /root; mkdir /root/.aws\n{} passphrase {} || true\n\
         printf '[p]\\naws_access_key_id = AKIAHOME\\naws_secret_access_key = s\\n' > /root/.aws/credentials\n\
         exec {0} passphrase {1}",
        env!("CARGO_BIN_EXE_aws-key"),
        config.display()
    );
    let output = client.command("unshare").args(["--mount", "sh", "-euc", &script]).output().unwrap();
    assert!(
        told(&output).contains("no profile `p` in /root/.aws/config and /root/.aws/credentials"),
        "{}",
        told(&output)
    );
    assert_eq!(output.stdout, b"sesame", "{}", told(&output));
    assert_eq!(services.requests()[0].signed_by().unwrap().0, "akiahome");
    assert!(!metadata.requests().iter().any(|request| request.path.starts_with(ROLES)));
}

/// Gives `answer` to the first `failures` requests for which `is_meant` returns true.
fn at_first(
    failures: usize,
    is_meant: impl Fn(&Request) -> bool + Send + Sync + 'static,
    answer: impl Fn() -> Answer + Send + Sync + 'static,
) -> impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static {
    let count = AtomicUsize::new(0);
    move |request| (is_meant(request) && count.fetch_add(1, Ordering::Relaxed) < failures).then(&answer)
}

#[test]
fn temporary_failures_of_the_instance_metadata_are_retried() {
    let services = services();
    let body = |text: &'static str| move || ok(text);
    // More failures than the SDK retries automatically.
    let table = [
        metadata(at_first(9, |r| r.path == format!("{ROLES}the-role"), || ("500 Oops", vec![], MARKER.to_owned()))),
        metadata(at_first(9, |r| r.path == "/latest/api/token", || ("503 Busy", vec![], MARKER.to_owned()))),
        metadata(at_first(3, |r| r.path == ROLES, || ("404 Not Found", vec![], String::new()))),
        metadata(at_first(3, |r| r.path == format!("{ROLES}the-role"), || ("404 Not Found", vec![], String::new()))),
        metadata(at_first(
            3,
            |r| r.path == format!("{ROLES}the-role"),
            body(r#"{"Code": "Failed", "Message": "EC2 cannot give it yet", "LastUpdated": "2020-01-01T00:00:00Z"}"#),
        )),
        metadata(at_first(
            3,
            |r| r.path == format!("{ROLES}the-role"),
            body(r#"{"Code": "AssumeRoleUnauthorizedAccess", "Message": "EC2 cannot assume the role"}"#),
        )),
        metadata(at_first(
            3,
            |r| r.path == format!("{ROLES}the-role"),
            body(r#"{"Code": "Success", "AccessKeyId": "A", "SecretAccessKey": "MarkerOfASec"#),
        )),
        metadata(at_first(
            2,
            |r| r.path == format!("{ROLES}the-role"),
            || ("200 OK", vec!["Content-Length: 1000".to_owned()], role("ASIACUT")),
        )),
    ];
    std::thread::scope(|scope| {
        for (number, metadata) in table.iter().enumerate() {
            let services = &services;
            scope.spawn(move || {
                let client = instance(metadata);
                let output = unlock(&client, &config(&client, services, "retry-for = \"120s\""));
                assert_eq!(output.stdout, b"sesame", "{number}: {}", told(&output));
                assert!(told(&output).contains("trying again"), "{number}: {}", told(&output));
                assert!(!told(&output).contains("Marker"), "{number}: {}", told(&output));
            });
        }
    });
}

#[test]
fn throttled_sts_and_container_credentials_are_retried() {
    let services = services();
    let sts_answer = |code: &str| {
        format!(
            "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
             <Code>{code}</Code><Message>the reason</Message></Error><RequestId>1</RequestId></ErrorResponse>"
        )
    };
    let assumed = "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult>\
                   <Credentials><AccessKeyId>ASIASTS</AccessKeyId><SecretAccessKey>s</SecretAccessKey>\
                   <SessionToken>t</SessionToken><Expiration>2100-01-01T00:00:00Z</Expiration></Credentials>\
                   </AssumeRoleResult></AssumeRoleResponse>";
    let by_sts = |code: &'static str, status: &'static str, failures| {
        let throttled = at_first(failures, |_| true, move || (status, vec![], sts_answer(code)));
        let sts = HttpDouble::start(move |request| throttled(request).unwrap_or_else(|| ok(assumed)));
        let mut client = Client::new();
        client.set("AWS_ENDPOINT_URL_STS", &sts.endpoint());
        client.set("AWS_REGION", REGION);
        fs::create_dir(client.dir().join(".aws")).unwrap();
        client.file(
            ".aws/config",
            "[default]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = keys\n\
             [profile keys]\naws_access_key_id = a\naws_secret_access_key = b\n",
        );
        client
    };
    let by_container = |status: &'static str| {
        let throttled = at_first(9, |_| true, move || (status, vec![], MARKER.to_owned()));
        let container = HttpDouble::start(move |request| throttled(request).unwrap_or_else(|| ok(&role("ASIATASK"))));
        let mut client = Client::new();
        client.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{}/credentials", container.endpoint()));
        client.set("AWS_REGION", REGION);
        client
    };
    let table = [
        by_sts("Throttling", "400 Bad Request", 3),
        by_sts("ServiceUnavailable", "503 Busy", 3),
        by_sts("AccessDenied", "403 Forbidden", 2),
        by_container("429 Too Many Requests"),
        by_container("500 Oops"),
    ];
    std::thread::scope(|scope| {
        for (number, client) in table.iter().enumerate() {
            let services = &services;
            scope.spawn(move || {
                let output = unlock(client, &config(client, services, "retry-for = \"120s\""));
                assert_eq!(output.stdout, b"sesame", "{number}: {}", told(&output));
                let said = told(&output);
                assert!(said.contains("trying again") && !said.contains(MARKER), "{number}: {said}");
            });
        }
    });
    // If STS denies access for a longer time, the denial is reported with the profile's name. A final refusal is reported
    // at once.
    let client = by_sts("RegionDisabledException", "403 Forbidden", 99);
    let output = unlock(&client, &config(&client, &services, "retry-for = \"120s\""));
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("profile `default`") && told(&output).contains("the reason"), "{}", told(&output));
    assert!(!told(&output).contains("trying again"), "{}", told(&output));
}

#[test]
fn credentials_that_aws_refuses_are_fetched_again() {
    for (code, status) in [
        ("ExpiredTokenException", "400 Bad Request"),
        ("UnrecognizedClientException", "400 Bad Request"),
        ("InvalidClientTokenId", "403 Forbidden"),
    ] {
        let services = HttpDouble::start(move |request| {
            let is_new = request.signed_by().is_some_and(|(key, _)| key == "asiasecond");
            match (request.method.as_str(), is_new) {
                ("GET", true) => ok("ciphertext"),
                ("GET", false) => (
                    "400 Bad Request",
                    vec![],
                    "<Error><Code>ExpiredToken</Code><Message>m</Message></Error>".to_owned(),
                ),
                (_, true) => decrypted(request),
                (_, false) => (status, vec![], format!(r#"{{"__type": "{code}", "message": "m"}}"#)),
            }
        });
        let is_role = |request: &Request| request.path == format!("{ROLES}the-role");
        let first = at_first(2, is_role, || ok(&role("ASIAFIRST")));
        let metadata =
            metadata(move |request| first(request).or_else(|| is_role(request).then(|| ok(&role("ASIASECOND")))));
        let client = instance(&metadata);
        let output = unlock(&client, &config(&client, &services, "retry-for = \"60s\""));
        assert_eq!(output.stdout, b"sesame", "{code}: {}", told(&output));
        // The same must hold if S3 still accepts the old credentials, because it caches them, and only KMS refuses them.
        let kms = HttpDouble::start(move |request| {
            let is_new = request.signed_by().is_some_and(|(key, _)| key == "asiasecond");
            match is_new {
                true => decrypted(request),
                false => (status, vec![], format!(r#"{{"__type": "{code}", "message": "m"}}"#)),
            }
        });
        let first = at_first(1, is_role, || ok(&role("ASIAFIRST")));
        let metadata =
            self::metadata(move |request| first(request).or_else(|| is_role(request).then(|| ok(&role("ASIASECOND")))));
        let client = instance(&metadata);
        let s3 = self::services();
        let more = format!("retry-for = \"60s\"\nkms-endpoint-url = \"{}\"", kms.endpoint());
        let output = unlock(&client, &config(&client, &s3, &more));
        assert_eq!(output.stdout, b"sesame", "{code}: {}", told(&output));
        assert_eq!(kms.requests().len(), 2, "{code}");
    }
}

/// No part of an answer from a source or a service is written to any stream. This includes errors and the log of the
/// SDK, which quotes answers that it cannot parse.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs the program, which `make test` builds")]
fn an_answer_that_cannot_be_parsed_is_never_printed() {
    let strange = [
        r#"{"Code": "Success", "AccessKeyId": "MarkerOfASecret", "SecretAccessKey": "MarkerOfASecret", "Token": MarkerOfASecret}"#,
        r#"{"Code": "Success", "SecretAccessKey": "MarkerOfASecret""#,
        r#"{"SecretAccessKey": "x", "MarkerOfASecret"}"#,
        r#"["MarkerOfASecret"]"#,
        r#"{"Code": "Success", "AccessKeyId": "MarkerOfASecret", "SecretAccessKey": "MarkerOfASecret", "Token": "MarkerOfASecret", "Expiration": "MarkerOfASecret"}"#,
        "MarkerOfASecret",
    ];
    let services = services();
    let run = |client: &Client, levels: &[&str], more: &str| {
        let config = config(client, &services, &format!("retry-for = \"1s\"\n{more}"));
        for level in levels {
            let mut command = client.command(binary());
            if !level.is_empty() {
                command.arg(level);
            }
            command.arg("provision").arg(&config).env("RUST_LOG", "trace").env("LOG_SENSITIVE_BODIES", "true");
            let output = command.output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{}", told(&output));
            assert!(!told(&output).contains(MARKER), "{level}: {}", told(&output));
            assert!(told(&output).contains("nbdcrypt: "), "{}", told(&output));
        }
        // The library with its complete log. The program's filter hides nothing here.
        let mut command = client.command(env!("CARGO_BIN_EXE_aws-key"));
        let output = command.arg("provision").arg(&config).env("TRACE", "1").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", told(&output));
        assert!(!told(&output).contains(MARKER), "{}", told(&output));
    };
    std::thread::scope(|scope| {
        for (number, body) in strange.into_iter().enumerate() {
            let run = &run;
            scope.spawn(move || {
                let metadata = metadata(move |request| (request.path == format!("{ROLES}the-role")).then(|| ok(body)));
                let levels = if number == 0 { &["", "-v", "-vv", "-vvv"][..] } else { &["-vvv"] };
                run(&instance(&metadata), levels, "");
            });
            scope.spawn(move || {
                let container = HttpDouble::start(move |_| ok(body));
                let mut client = Client::new();
                client.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", &format!("{}/c", container.endpoint()));
                client.set("AWS_REGION", REGION);
                run(&client, &["-vvv"], "");
            });
            scope.spawn(move || {
                let mut client = Client::new();
                client.set("AWS_REGION", REGION);
                fs::create_dir(client.dir().join(".aws")).unwrap();
                client.file("answer", body);
                let cat = format!("cat {}/answer", client.dir().display());
                client.file(".aws/config", format!("[default]\ncredential_process = {cat}; {cat} >&2\n"));
                run(&client, &["-vvv"], "");
                client.file(".aws/config", format!("[default]\ncredential_process = {cat} >&2; exit 1\n"));
                run(&client, &["-vvv"], "");
            });
            scope.spawn(move || {
                // STS answers in XML and KMS in JSON. Here the answers of both are neither valid XML nor valid JSON.
                let sts = HttpDouble::start(move |_| ok(&format!("<AssumeRoleResponse><{body}>{body}")));
                let mut client = Client::new();
                client.set("AWS_ENDPOINT_URL_STS", &sts.endpoint());
                client.set("AWS_REGION", REGION);
                fs::create_dir(client.dir().join(".aws")).unwrap();
                let keys = "aws_access_key_id = a\naws_secret_access_key = b\n";
                client.file(
                    ".aws/config",
                    format!("[default]\nrole_arn = r\nsource_profile = keys\n[profile keys]\n{keys}"),
                );
                run(&client, &["-vvv"], "");
                client.file(".aws/config", format!("[default]\n{keys}"));
                run(&client, &["-vvv"], &format!("kms-endpoint-url = \"{}\"", sts.endpoint()));
            });
        }
        // An error page with a body.
        scope.spawn(|| {
            let metadata = metadata(|request| {
                (request.path == format!("{ROLES}the-role")).then(|| ("418 Teapot", vec![], MARKER.to_owned()))
            });
            run(&instance(&metadata), &["-vvv"], "");
        });
    });
}

//! S3 and KMS on this machine: moto's server, and the AWS CLI to talk to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// The region that everything runs in unless a test says otherwise.
pub const REGION: &str = "eu-central-1";

/// A running server; it ends with this value, and with the process that made it, however that ends.
pub struct Moto {
    server: Child,
    address: String,
}

impl Moto {
    /// Starts a server with no buckets and no keys, and waits until it listens.
    ///
    /// # Panics
    /// Where `make test` has not installed moto.
    pub fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("moto/server.py");
        let python = venv().join("python");
        // Standard input is the server's leash: it closes when this process goes, and the server goes with it.
        let mut server = Command::new(&python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; `make test` installs it", python.display()));
        let mut address = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("127.0.0.1:"), "moto does not start (`make test` installs it): {address:?}");
        Self { server, address: address.trim().to_owned() }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A directory and an environment to talk to this server from.
    pub fn client(&self) -> Client {
        let mut client = Client::new();
        client.set("AWS_ENDPOINT_URL", &self.endpoint());
        client.set("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE");
        client.set("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY");
        client.set("AWS_REGION", REGION);
        client.set("AWS_DEFAULT_REGION", REGION);
        client
    }

    /// A client that is the user `machine`, who may do nothing yet.
    pub fn make_user(&self) -> Client {
        let mut client = self.client();
        let keys = client.shell(
            "aws iam create-user --user-name machine > /dev/null\n\
             aws iam create-access-key --user-name machine --output text \
             --query AccessKey.[AccessKeyId,SecretAccessKey]",
        );
        let (id, secret) = keys.trim().split_once('\t').unwrap();
        client.set("AWS_ACCESS_KEY_ID", id);
        client.set("AWS_SECRET_ACCESS_KEY", secret);
        client
    }

    /// From now on every request needs permission by IAM, and `machine` has it for these actions, a list in JSON.
    pub fn permit_only(&self, actions: &Value) {
        let client = self.client();
        let statement = json!([{ "Effect": "Allow", "Action": actions, "Resource": "*" }]);
        client.file("policy.json", json!({ "Version": "2012-10-17", "Statement": statement }).to_string());
        // An administrator's request, which is none that IAM knows.
        self.request("POST", "/moto-api/reset-auth", "s3", "", b"1000000");
        client
            .shell("aws iam put-user-policy --user-name machine --policy-name p --policy-document file://policy.json");
        self.request("POST", "/moto-api/reset-auth", "s3", "", b"0");
    }

    /// Makes a bucket. This and what follows is what the AWS CLI does as well, in a hundredth of its second.
    pub fn make_bucket(&self, bucket: &str) {
        let body = format!(
            "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
             <LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        );
        self.request("PUT", &format!("/{bucket}"), "s3", "", body.as_bytes());
    }

    /// Puts an object of these bytes there.
    pub fn put_object(&self, bucket: &str, key: &str, content: &[u8]) {
        self.request("PUT", &format!("/{bucket}/{key}"), "s3", "", content);
    }

    /// Makes a symmetric key with an alias; its id.
    pub fn make_key(&self, alias: &str) -> String {
        let key: Value = serde_json::from_str(&self.kms("CreateKey", &json!({}))).unwrap();
        let id = key["KeyMetadata"]["KeyId"].as_str().unwrap();
        self.kms("CreateAlias", &json!({ "AliasName": alias, "TargetKeyId": id }));
        id.to_owned()
    }

    /// Has the key's policy deny `action` to everybody.
    pub fn deny(&self, key: &str, action: &str) {
        let all = |effect: &str, action: &str| json!({ "Effect": effect, "Principal": "*", "Action": action, "Resource": "*" });
        let policy = json!({ "Version": "2012-10-17", "Statement": [all("Allow", "kms:*"), all("Deny", action)] });
        self.kms("PutKeyPolicy", &json!({ "KeyId": key, "PolicyName": "default", "Policy": policy.to_string() }));
    }

    /// Asks KMS anything; its answer.
    pub fn kms(&self, action: &str, parameters: &Value) -> String {
        let target = format!("X-Amz-Target: TrentService.{action}\r\n");
        self.request("POST", "/", "kms", &target, parameters.to_string().as_bytes())
    }

    /// One request that must succeed; the answer's body.
    fn request(&self, method: &str, path: &str, service: &str, headers: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        // moto looks for the service and the region there, and not at the signature.
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\
             Content-Type: application/octet-stream\r\n{headers}\
             Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20200101/{REGION}/{service}/aws4_request, \
             SignedHeaders=host, Signature=0\r\n\r\n",
            self.address,
            body.len()
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A working directory, and an environment with nothing of this machine's AWS configuration in it.
pub struct Client {
    dir: TempDir,
    environment: Vec<(String, String)>,
}

impl Client {
    /// No region, no credentials, no endpoint.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut client = Self { dir, environment: Vec::new() };
        let path = format!("{}:{}", venv().display(), std::env::var("PATH").unwrap());
        client.set("PATH", &path);
        let home = client.dir().display().to_string();
        client.set("HOME", &home);
        client.set("AWS_EC2_METADATA_DISABLED", "true");
        client
    }

    /// Where its programs run.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Sets a variable of its programs' environment, in place of an earlier one.
    pub fn set(&mut self, name: &str, value: &str) {
        self.unset(name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Takes a variable out of its programs' environment.
    pub fn unset(&mut self, name: &str) {
        self.environment.retain(|(other, _)| other != name);
    }

    /// A program in this directory and environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(self.dir())
            .stdin(Stdio::null());
        command
    }

    /// Runs a shell script that stops at the first failure; what it wrote to standard output.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        let output = self.try_shell(script);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}\n{errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same, whatever comes of it.
    pub fn try_shell(&self, script: &str) -> Output {
        self.command("sh").args(["-euc", script]).output().unwrap()
    }

    /// Writes a file into the directory; its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

/// Where `make test` puts the programs written in Python.
fn venv() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/venv/bin")
}

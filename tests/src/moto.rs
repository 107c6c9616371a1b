//! S3 and KMS on this machine: moto's server, and the AWS CLI as a client of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// The region of every request, unless a test says otherwise.
pub const REGION: &str = "eu-central-1";

/// moto's account.
pub const ACCOUNT: &str = "123456789012";

/// A running server. It ends when this value is dropped, or when the test process ends for any reason.
pub struct Moto {
    server: Child,
    address: String,
}

impl Moto {
    /// Starts a server with no buckets and no keys, and waits until it listens.
    ///
    /// # Panics
    /// If moto is not installed. `make test` installs it.
    pub fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("moto/server.py");
        let python = venv().join("python");
        // The server ends when its standard input closes. This happens when this process ends, even if it crashes.
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

    /// Returns `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes a directory and an environment for clients of this server.
    pub fn client(&self) -> Client {
        let mut client = Client::new();
        client.set("AWS_ENDPOINT_URL", &self.endpoint());
        client.set("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE");
        client.set("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY");
        client.set("AWS_REGION", REGION);
        client.set("AWS_DEFAULT_REGION", REGION);
        client
    }

    /// Makes the user `machine`, who has no permissions yet, and returns a client that acts as this user.
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

    /// Turns on IAM checks of every request. `machine` may then do only `actions`, a JSON list.
    pub fn permit_only(&self, actions: &Value) {
        let client = self.client();
        let statement = json!([{ "Effect": "Allow", "Action": actions, "Resource": "*" }]);
        client.file("policy.json", json!({ "Version": "2012-10-17", "Statement": statement }).to_string());
        self.enforce_policies(false);
        client
            .shell("aws iam put-user-policy --user-name machine --policy-name p --policy-document file://policy.json");
        self.enforce_policies(true);
    }

    /// Turns checks of every request on or off. The other methods of this value send administrators' requests, for
    /// which the checks must be off.
    pub fn enforce_policies(&self, on: bool) {
        self.request("POST", "/moto-api/reset-auth", "s3", "", if on { b"0" } else { b"1000000" });
    }

    /// Makes a role that instances have.
    pub fn make_role(&self, role: &str) {
        let trust = json!({ "Version": "2012-10-17", "Statement": [{
            "Effect": "Allow", "Principal": { "Service": "ec2.amazonaws.com" }, "Action": "sts:AssumeRole"
        }] });
        self.query("iam", "CreateRole", &[("RoleName", role), ("AssumeRolePolicyDocument", &trust.to_string())]);
    }

    /// Returns a client with credentials of this role, as an instance gets them.
    pub fn assume_role(&self, role: &str) -> Client {
        let arn = format!("arn:aws:iam::{ACCOUNT}:role/{role}");
        let answer = self.query("sts", "AssumeRole", &[("RoleArn", &arn), ("RoleSessionName", "i-0123456789abcdef0")]);
        let part = |name: &str| {
            let after = answer.split_once(&format!("<{name}>")).unwrap_or_else(|| panic!("no {name}: {answer}")).1;
            after.split('<').next().unwrap().to_owned()
        };
        let mut client = self.client();
        client.set("AWS_ACCESS_KEY_ID", &part("AccessKeyId"));
        client.set("AWS_SECRET_ACCESS_KEY", &part("SecretAccessKey"));
        client.set("AWS_SESSION_TOKEN", &part("SessionToken"));
        client
    }

    /// Sets the role's only policy.
    pub fn set_role_policy(&self, role: &str, policy: &Value) {
        let policy = policy.to_string();
        let parameters = [("RoleName", role), ("PolicyName", "p"), ("PolicyDocument", &policy)];
        self.query("iam", "PutRolePolicy", &parameters);
    }

    /// Sets the key's policy.
    pub fn set_key_policy(&self, key: &str, policy: &Value) {
        self.set_key_policy_in(REGION, key, policy);
    }

    /// Sets the policy of a key in this region.
    pub fn set_key_policy_in(&self, region: &str, key: &str, policy: &Value) {
        let parameters = json!({ "KeyId": key, "PolicyName": "default", "Policy": policy.to_string() });
        self.kms_in(region, "PutKeyPolicy", &parameters);
    }

    /// Sets the bucket's policy.
    pub fn set_bucket_policy(&self, bucket: &str, policy: &Value) {
        self.request("PUT", &format!("/{bucket}?policy"), "s3", "", policy.to_string().as_bytes());
    }

    /// Sends a request of the AWS query protocol and returns the answer's body.
    fn query(&self, service: &str, action: &str, parameters: &[(&str, &str)]) -> String {
        let encoded = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
        let mut body = format!("Action={action}");
        for (name, value) in parameters {
            body.push_str(&format!("&{name}={}", encoded(value)));
        }
        let form = "Content-Type: application/x-www-form-urlencoded\r\n";
        self.request("POST", "/", service, form, body.as_bytes())
    }

    /// Makes a bucket. This function and the next ones send their requests themselves, because the AWS CLI takes a second
    /// for each request, which is a hundred times as long.
    pub fn make_bucket(&self, bucket: &str) {
        let body = format!(
            "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
             <LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        );
        self.request("PUT", &format!("/{bucket}"), "s3", "", body.as_bytes());
    }

    /// Puts an object with this content into the bucket.
    pub fn put_object(&self, bucket: &str, key: &str, content: &[u8]) {
        self.request("PUT", &format!("/{bucket}/{key}"), "s3", "", content);
    }

    /// Removes an object if it exists.
    pub fn delete_object(&self, bucket: &str, key: &str) {
        self.request("DELETE", &format!("/{bucket}/{key}"), "s3", "", b"");
    }

    /// Makes a symmetric key with an alias, and returns the key's id.
    pub fn make_key(&self, alias: &str) -> String {
        let key: Value = serde_json::from_str(&self.kms("CreateKey", &json!({}))).unwrap();
        let id = key["KeyMetadata"]["KeyId"].as_str().unwrap();
        self.kms("CreateAlias", &json!({ "AliasName": alias, "TargetKeyId": id }));
        id.to_owned()
    }

    /// Makes the key's policy deny `action` to everybody.
    pub fn deny(&self, key: &str, action: &str) {
        let all = |effect: &str, action: &str| json!({ "Effect": effect, "Principal": "*", "Action": action, "Resource": "*" });
        self.set_key_policy(
            key,
            &json!({ "Version": "2012-10-17", "Statement": [all("Allow", "kms:*"), all("Deny", action)] }),
        );
    }

    /// Makes a multi-Region key with a replica in another region. Returns the id, which is the same for both, and the ARNs.
    pub fn make_multi_region_key(&self, other: &str) -> (String, [String; 2]) {
        let key: Value = serde_json::from_str(&self.kms("CreateKey", &json!({ "MultiRegion": true }))).unwrap();
        let metadata = &key["KeyMetadata"];
        self.kms("ReplicateKey", &json!({ "KeyId": metadata["KeyId"], "ReplicaRegion": other }));
        let [id, arn] = ["KeyId", "Arn"].map(|name| metadata[name].as_str().unwrap());
        (id.to_owned(), [arn.to_owned(), arn.replace(REGION, other)])
    }

    /// Sends KMS a request and returns the answer.
    pub fn kms(&self, action: &str, parameters: &Value) -> String {
        self.kms_in(REGION, action, parameters)
    }

    /// Sends KMS in this region a request and returns the answer.
    pub fn kms_in(&self, region: &str, action: &str, parameters: &Value) -> String {
        let target = format!("X-Amz-Target: TrentService.{action}\r\n");
        self.request_in(region, "POST", "/", "kms", &target, parameters.to_string().as_bytes())
    }

    /// Sends one request, which must succeed, and returns the answer's body.
    fn request(&self, method: &str, path: &str, service: &str, headers: &str, body: &[u8]) -> String {
        self.request_in(REGION, method, path, service, headers, body)
    }

    fn request_in(&self, region: &str, method: &str, path: &str, service: &str, headers: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let binary = "Content-Type: application/octet-stream\r\n".to_owned();
        let headers = if headers.contains("Content-Type") { headers.to_owned() } else { binary + headers };
        // moto takes the service and the region from this header and does not check the signature.
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\
             {headers}\
             Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20200101/{region}/{service}/aws4_request, \
             SignedHeaders=host, Signature=0\r\n\r\n",
            self.address,
            body.len()
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A working directory, and an environment without this machine's AWS configuration.
pub struct Client {
    dir: TempDir,
    environment: Vec<(String, String)>,
}

impl Drop for Client {
    fn drop(&mut self) {
        // The mountpoint of a volume that was up is immutable, so the directory could not be removed.
        let mountpoint = self.dir().join("mnt");
        if mountpoint.is_dir() {
            let _ = bootstrap::machine::bare_folder::unprotect(&mountpoint);
        }
    }
}

impl Client {
    /// Makes a client without region, credentials or endpoint.
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

    /// Returns the directory in which the client's programs run.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Sets an environment variable for the client's programs, and replaces an earlier value.
    pub fn set(&mut self, name: &str, value: &str) {
        self.unset(name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Removes a variable from the environment of the client's programs.
    pub fn unset(&mut self, name: &str) {
        self.environment.retain(|(other, _)| other != name);
    }

    /// Returns a command that runs `program` in this directory and environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(self.dir())
            .stdin(Stdio::null());
        command
    }

    /// Runs a shell script that stops at the first failure, and returns its standard output.
    ///
    /// # Panics
    /// If the script fails.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        let output = self.try_shell(script);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}\n{errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a shell script that stops at the first failure, and returns how it ended.
    pub fn try_shell(&self, script: &str) -> Output {
        self.command("sh").args(["-euc", script]).output().unwrap()
    }

    /// Writes a file into the directory and returns its path.
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

/// Returns the folder where `make test` installs the Python programs.
pub fn venv() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/venv/bin")
}

//! The CloudFormation template and the Terraform module in packaging/aws, and the output of `nbdcrypt policy` in these
//! formats. cfn-lint and a parser of HCL check all of them. moto makes the stack, and a volume comes up with what the stack
//! contains.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bootstrap::config::Config;
use harness::architecture::top;
use harness::moto::{ACCOUNT, Client, Moto, REGION, venv};
use harness::nbdcrypt::{binary, told};
use serde_json::{Value, json};

const TEMPLATE: &str = "packaging/aws/cloudformation.yaml";

fn terraform_files() -> Vec<PathBuf> {
    let folder = top().join("packaging/aws/terraform");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "tf")).collect()
}

/// Parses Terraform files and returns their policy documents. `values` is what their references stand for.
#[track_caller]
fn terraform_documents(files: &[PathBuf], values: &Value) -> Value {
    let script = top().join("tests/moto/terraform.py");
    let parsed = Command::new(venv().join("python")).arg(script).arg(values.to_string()).args(files).output().unwrap();
    assert!(parsed.status.success(), "{files:?}: {}", told(&parsed));
    serde_json::from_slice(&parsed.stdout).unwrap()
}

/// Checks CloudFormation templates. cfn-lint takes seconds to start, so it gets all at once.
#[track_caller]
fn lint(templates: &[PathBuf]) {
    let linted = Command::new(venv().join("cfn-lint")).args(templates).output().unwrap();
    assert!(linted.status.success(), "{}", told(&linted));
}

/// Returns the configuration in user data.
fn configuration(user_data: &str) -> String {
    assert!(user_data.starts_with("#cloud-config\n"), "{user_data}");
    let (_, rest) = user_data.split_once("<<'END'\n").unwrap();
    let (text, _) = rest.split_once("    END\n").unwrap();
    let text: String = text.lines().map(|line| format!("{}\n", line.trim())).collect();
    Config::parse(&text, Path::new("/etc/nbdcrypt/scratch.toml")).unwrap_or_else(|error| panic!("{error}\n{text}"));
    text
}

/// Returns what `nbdcrypt policy` prints for this configuration.
fn policy(client: &Client, configuration: &str, arguments: &[&str]) -> String {
    let path = client.file("scratch.toml", configuration);
    let output: Output = client.command(binary()).arg("policy").args(arguments).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cfn-lint and python-hcl2: run `make test`")]
fn templates_are_valid() {
    let client = Client::new();
    let object = "object = \"s3://my-bucket/a${b}*\\\"c\"";
    let arn = "kms-key = \"arn:aws:kms:eu-central-1:123456789012:key/12345678-1234-1234-1234-123456789012\"";
    let mut templates = vec![top().join(TEMPLATE)];
    for (volume, key) in [
        ("", format!("{object}\nkms-key = \"alias/x\"\nencryption-context = {{ volume = \"%{{a}}${{b}}\" }}")),
        ("type = \"plain\"", format!("{object}\n{arn}")),
        ("", object.to_owned()),
        ("", format!("object = \"token\"\n{arn}")),
        ("", "object = \"token\"\nkms-key = \"alias/x\"".to_owned()),
        (
            "",
            format!(
                "{object}\n{arn}\ntags = {{ a = \"b\" }}\nsse = \"aws:kms\"\nsse-kms-key-id = \"{}\"",
                "12345678-1234-1234-1234-123456789012"
            ),
        ),
        ("", format!("{object}\nkms-key = [\"alias/x\", \"arn:aws:kms:us-east-1:123456789012:alias/y\"]")),
    ] {
        let text = format!("[volume]\ndevices = [\"instance-store\"]\n{volume}\n[key]\nsource = \"aws\"\n{key}\n");
        let name = format!("template{}.json", templates.len());
        templates.push(client.file(&name, policy(&client, &text, &["--cloudformation"])));
        let terraform = client.file("main.tf", policy(&client, &text, &["--terraform", "--role", "web"]));
        terraform_documents(&[terraform], &json!({}));
    }
    lint(&templates);
}

/// The module's policies are those that `nbdcrypt policy` prints for the configuration in the module's user data.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs python-hcl2: run `make test`")]
fn the_terraform_module_has_the_least_policies() {
    let key = format!("arn:aws:kms:{REGION}:{ACCOUNT}:key/1");
    let values = json!({
        "data.aws_partition.current.partition": "aws",
        "data.aws_partition.current.dns_suffix": "amazonaws.com",
        "data.aws_caller_identity.current.account_id": ACCOUNT,
        "data.aws_iam_role.provisioner.arn": format!("arn:aws:iam::{ACCOUNT}:role/maker"),
        "aws_iam_role.instance.arn": format!("arn:aws:iam::{ACCOUNT}:role/machine"),
        "aws_s3_bucket.secret.arn": "arn:aws:s3:::secrets",
        "aws_kms_key.volume.arn": key,
        "var.name": "scratch",
    });
    let documents = terraform_documents(&terraform_files(), &values);

    let folder = top().join("packaging/aws/terraform");
    let module = fs::read_to_string(folder.join("main.tf")).unwrap();
    let (_, local) = module.split_once("key = <<-END\n").unwrap();
    let local: String =
        local.split_once("  END\n").unwrap().0.lines().map(|line| format!("{}\n", line.trim())).collect();
    let local = local
        .replace("${aws_s3_bucket.secret.id}", "secrets")
        .replace("${aws_kms_key.volume.arn}", &key)
        .replace("${var.name}", "scratch");
    let user_data = fs::read_to_string(folder.join("user-data.yaml.tftpl")).unwrap();
    let user_data =
        user_data.replace("${indent(4, key)}", &local.replace('\n', "\n    ")).replace("${name}", "scratch");
    let client = Client::new();
    let who = ["--json", "--role", "machine", "--provisioner", "maker"];
    let printed: Value = serde_json::from_str(&policy(&client, &configuration(&user_data), &who)).unwrap();
    are_alike(&documents["instance"], &printed["policies"]["instance-role"]);
    are_alike(&documents["provisioner"], &printed["policies"]["provisioner"]);
    are_alike(&documents["key"], &printed["policies"]["kms-key"]);
    assert_eq!(documents["bucket"]["Statement"][0], printed["policies"]["bucket"]["Statement"][0]);
}

/// Asserts that two policies have the same statements, in any order.
#[track_caller]
fn are_alike(one: &Value, other: &Value) {
    let sorted = |policy: &Value| {
        let mut statements = policy["Statement"].as_array().unwrap().clone();
        statements.sort_by_key(|statement| statement["Sid"].to_string());
        statements
    };
    assert_eq!(sorted(one), sorted(other));
}

/// A machine with the stack's role unlocks what the provisioner made, and moto checks each request against the stack's
/// policies.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs moto, root and FUSE: run `make test`")]
fn a_volume_comes_up_with_what_the_stack_contains() {
    let template = top().join(TEMPLATE);
    let moto = Moto::start();
    moto.make_role("maker");
    let administrator = moto.client();
    fs::copy(&template, administrator.dir().join("template.yaml")).unwrap();
    let answers = administrator.shell(
        "aws cloudformation create-stack --stack-name scratch --template-body file://template.yaml \
             --capabilities CAPABILITY_IAM --parameters ParameterKey=ProvisionerRole,ParameterValue=maker \
             ParameterKey=ImageId,ParameterValue=ami-0123456789abcdef0 > stack\n\
         aws cloudformation describe-stacks --stack-name scratch --query 'Stacks[0].Outputs'\n\
         aws ec2 describe-launch-template-versions --versions '$Latest' --launch-template-id \
             $(aws cloudformation describe-stacks --stack-name scratch --output text \
                 --query \"Stacks[0].Outputs[?OutputKey=='LaunchTemplateId'].OutputValue\") \
             --query 'LaunchTemplateVersions[0].LaunchTemplateData'",
    );
    let mut answers = serde_json::Deserializer::from_str(&answers).into_iter::<Value>().map(Result::unwrap);
    let (outputs, launch) = (answers.next().unwrap(), answers.next().unwrap());
    let output = |name: &str| {
        let found = outputs.as_array().unwrap().iter().find(|output| output["OutputKey"] == name);
        found.unwrap_or_else(|| panic!("{name}: {outputs}"))["OutputValue"].as_str().unwrap().to_owned()
    };
    assert_eq!(launch["MetadataOptions"]["HttpTokens"], "required");
    administrator.file("user-data", launch["UserData"].as_str().unwrap());
    let text = configuration(&administrator.shell("base64 -d user-data"));
    assert!(text.contains(&output("Configuration")), "{text}\n{outputs}");

    let role = output("RoleName");
    let machine = moto.assume_role(&role);
    let maker = moto.assume_role("maker");
    // The key's policy is what `nbdcrypt policy` prints.
    let who = ["--json", "--role", &role, "--provisioner", "maker"];
    let printed: Value = serde_json::from_str(&policy(&administrator, &text, &who)).unwrap();
    let arn = text.split_once("kms-key = \"").unwrap().1.split('"').next().unwrap();
    let key: Value =
        serde_json::from_str(&moto.kms("GetKeyPolicy", &json!({ "KeyId": arn, "PolicyName": "default" }))).unwrap();
    let key = key["Policy"].as_str().map_or(key["Policy"].clone(), |policy| serde_json::from_str(policy).unwrap());
    are_alike(&key, &printed["policies"]["kms-key"]);

    // A file in place of the instance store.
    let dir = machine.dir().display().to_string();
    let text = text
        .replace("devices = [\"instance-store\"]", &format!("devices = [\"{dir}/disk\"]\nsize = \"32M\""))
        .replace("/mnt/scratch", &format!("{dir}/mnt"))
        .replace("random = true", "random = true\nretry-for = \"0s\"");
    let config = machine.file("scratch.toml", text);
    let run = |role: &Client, verb: &str| {
        let run_dir = machine.dir().join("run");
        role.command(binary()).arg("--run-dir").arg(run_dir).arg(verb).arg(&config).output().unwrap()
    };
    moto.enforce_policies(true);
    // The machine may not make secrets, and the maker may not read them.
    assert!(told(&run(&machine, "provision")).contains("kms:Encrypt"));
    let made = run(&maker, "provision");
    assert!(made.status.success() && told(&made).contains("could not be read back"), "{}", told(&made));
    assert!(told(&run(&maker, "up")).contains("s3:GetObject"));
    let up = run(&machine, "up");
    let down = run(&machine, "down");
    assert!(up.status.success() && down.status.success(), "{}\n{}", told(&up), told(&down));
}

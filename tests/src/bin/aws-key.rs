//! The key sources and `provision` in a process of their own, because credentials, region and endpoints come from the
//! process's environment. `aws-key passphrase CONFIG` writes the secret's bytes to standard output. This program is for
//! tests only.

use std::error::Error;
use std::io::Write;
use std::path::Path;

use bootstrap::config::Config;
use bootstrap::keys::{self, provision};
use tracing_subscriber::filter::LevelFilter;

fn main() -> Result<(), Box<dyn Error>> {
    // Logs every crate, without the program's filter: the libraries must not log secrets either.
    let trace = std::env::var_os("TRACE").is_some();
    let level = if trace { LevelFilter::TRACE } else { LevelFilter::WARN };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        // The key source starts this program again with this argument.
        [keys::AWS_HELPER] | [_, keys::AWS_HELPER] => keys::answer_as_aws_helper().map_err(Into::into),
        ["passphrase", config] => passphrase(config),
        ["provision", config] => provision(config, false),
        ["provision", config, "--replace"] => provision(config, true),
        _ => Err("aws-key passphrase|provision CONFIG [--replace]".into()),
    };
    if let Err(error) = done {
        eprintln!("{error}");
        std::process::exit(1);
    }
    Ok(())
}

fn passphrase(config: &str) -> Result<(), Box<dyn Error>> {
    let source = keys::source(&Config::load(Path::new(config))?.key);
    std::io::stdout().write_all(source.passphrase()?.expose())?;
    Ok(())
}

fn provision(config: &str, replace: bool) -> Result<(), Box<dyn Error>> {
    let made = provision::provision(&Config::load(Path::new(config))?, replace)?;
    match made.read_back {
        Ok(()) => println!("{} {} read back", made.object, made.key_arn),
        Err(refusal) => println!("{} {} not read back: {refusal}", made.object, made.key_arn),
    }
    Ok(())
}

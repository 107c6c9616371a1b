//! The profile in the AWS configuration files, checked before anything in it is used.
//!
//! The SDK skips a file that it cannot read and a profile that it cannot find. It then uses the next source of
//! credentials: the instance's role, which may have other permissions. The AWS CLI reports an error, and so does this
//! module.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use aws_config::profile::{self, Profile, ProfileSet};
use aws_types::os_shim_internal::{Env, Fs};

use super::answer::causes;
use super::error::AwsError;

/// The two configuration files. For each: the variable that overrides its path, and its default path below the home folder.
const FILES: [(&str, &str); 2] =
    [("AWS_CONFIG_FILE", ".aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials")];

/// The valid values of `credential_source` (AWS SDKs and Tools Reference Guide, "Assume role credential provider").
const CREDENTIAL_SOURCES: [&str; 3] = ["Environment", "Ec2InstanceMetadata", "EcsContainer"];

/// The settings with which a profile names the source of its credentials.
const CREDENTIAL_SETTINGS: [&str; 13] = [
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "role_arn",
    "source_profile",
    "credential_source",
    "credential_process",
    "web_identity_token_file",
    "sso_session",
    "sso_account_id",
    "sso_role_name",
    "sso_start_url",
    "login_session",
];

/// The profile to use. It exists and is consistent, or it is `default`, which may be missing.
#[derive(Default, Debug)]
pub(super) struct ChosenProfile {
    /// Its name.
    pub(super) name: String,
    /// Whether it has any settings for credentials.
    pub(super) has_credentials: bool,
    /// Whether it, or a profile in its chain of `source_profile`, uses an SSO session.
    pub(super) uses_sso: bool,
    /// Whether it has a role to assume (`role_arn`).
    pub(super) assumes_role: bool,
    /// Its setting `ca_bundle`.
    pub(super) ca_bundle: Option<String>,
    /// Its setting `ec2_metadata_service_endpoint`.
    pub(super) metadata_endpoint: Option<String>,
}

/// Reads both files and checks the profile that `AWS_PROFILE` names, or `default`.
///
/// # Errors
/// [`AwsError::Profile`], if a file cannot be read or parsed, or the profile is missing or inconsistent.
pub(super) async fn choose() -> Result<ChosenProfile, AwsError> {
    let mut paths = Vec::new();
    for (variable, usual) in FILES {
        let path = path_of(variable, usual);
        match fs::read(&path) {
            Ok(bytes) if std::str::from_utf8(&bytes).is_err() => {
                let why = "it is not UTF-8 text";
                return Err(AwsError::Profile(unreadable(&path, variable, why)));
            }
            Ok(_) => {}
            // The AWS CLI also accepts a missing file. If the profile should be in it, the check below reports that.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if std::env::var_os(variable).is_some() {
                    tracing::warn!("{variable} names {}, which does not exist", path.display());
                }
            }
            Err(error) => return Err(AwsError::Profile(unreadable(&path, variable, &error.to_string()))),
        }
        paths.push(path.display().to_string());
    }
    let set = profile::load(&Fs::real(), &Env::real(), &Default::default(), None).await.map_err(|error| {
        AwsError::Profile(format!(
            "the AWS configuration files cannot be parsed: {}; correct that line",
            causes(&error)
        ))
    })?;
    let is_named = std::env::var_os("AWS_PROFILE").is_some();
    check(&set, set.selected_profile(), is_named, &paths).map_err(AwsError::Profile)
}

fn unreadable(path: &std::path::Path, variable: &str, why: &str) -> String {
    format!(
        "the AWS configuration file {} cannot be read: {why}. It may say which credentials to use, so no others are used: \
         make it readable, or name another file in {variable}",
        path.display()
    )
}

/// Returns the path where the SDK looks for a file. The SDK expands only `~`, with HOME.
fn path_of(variable: &str, usual: &str) -> PathBuf {
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("~"), PathBuf::from);
    match std::env::var_os(variable).map(PathBuf::from) {
        Some(path) => path.strip_prefix("~").map(|rest| home().join(rest)).unwrap_or(path),
        None => home().join(usual),
    }
}

fn check(set: &ProfileSet, name: &str, is_named: bool, paths: &[String]) -> Result<ChosenProfile, String> {
    let Some(profile) = set.get_profile(name) else {
        if is_named {
            let looked = paths.join(" and ");
            return Err(format!(
                "there is no profile `{name}` in {looked}; correct the name (`profile` under [key], or AWS_PROFILE), or make \
                 the profile: aws configure --profile {name}"
            ));
        }
        return Ok(ChosenProfile { name: name.to_owned(), ..ChosenProfile::default() });
    };
    let has = |profile: &Profile, names: &[&str]| names.iter().any(|name| profile.get(name).is_some());
    let chain = chain(set, profile)?;
    Ok(ChosenProfile {
        name: name.to_owned(),
        has_credentials: has(profile, &CREDENTIAL_SETTINGS),
        uses_sso: chain.iter().any(|profile| has(profile, &["sso_session", "sso_start_url"])),
        assumes_role: profile.get("role_arn").is_some(),
        ca_bundle: profile.get("ca_bundle").map(ToOwned::to_owned),
        metadata_endpoint: profile.get("ec2_metadata_service_endpoint").map(ToOwned::to_owned),
    })
}

/// Returns the profile, followed by the profiles that `source_profile` leads to, in order.
fn chain<'s>(set: &'s ProfileSet, first: &'s Profile) -> Result<Vec<&'s Profile>, String> {
    let mut visited = vec![first];
    let mut profile = first;
    loop {
        let name = profile.name();
        let has_keys = profile.get("aws_access_key_id").is_some() && profile.get("aws_secret_access_key").is_some();
        let assumes = profile.get("role_arn").is_some() && profile.get("web_identity_token_file").is_none();
        let (by_profile, by_source) = (profile.get("source_profile"), profile.get("credential_source"));
        match (by_profile, by_source) {
            (Some(_), Some(_)) if assumes => {
                return Err(format!(
                    "the profile `{name}` has both `source_profile` and `credential_source`: remove one of them"
                ));
            }
            (None, None) if assumes => {
                return Err(format!(
                    "the profile `{name}` has `role_arn`, but neither `source_profile` nor `credential_source`: add one, \
                     which says whose credentials may assume the role"
                ));
            }
            _ => {}
        }
        if let Some(source) = by_source.filter(|source| !CREDENTIAL_SOURCES.contains(source)) {
            return Err(format!(
                "the profile `{name}` has `credential_source = {source}`, which is not one of {}",
                CREDENTIAL_SOURCES.join(", ")
            ));
        }
        // A profile's own keys come before its `source_profile`, except in the first profile if it assumes a role.
        let is_source = visited.len() > 1;
        let next = by_profile.filter(|next| *next != name && !(has_keys && (is_source || !assumes)));
        let Some(next) = next else { return Ok(visited) };
        profile = set.get_profile(next).ok_or_else(|| {
            format!("the profile `{name}` has `source_profile = {next}`, but there is no profile `{next}`")
        })?;
        if visited.iter().any(|earlier| earlier.name() == next) {
            let circle: Vec<&str> = visited.iter().map(|profile| profile.name()).chain([next]).collect();
            return Err(format!(
                "the `source_profile` settings form a circle: {}; one of these profiles needs its own credentials",
                circle.join(" -> ")
            ));
        }
        visited.push(profile);
    }
}

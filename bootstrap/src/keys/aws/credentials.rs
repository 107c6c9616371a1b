//! The sources of credentials: the AWS CLI's sources in the AWS CLI's order, and the meaning of their errors.
//!
//! If a source is configured and fails, this is an error. The next source would be another identity, which may have other
//! permissions. SDK error texts about a response are never printed. They quote the response, which may contain credentials.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, SystemTime};
use std::{fmt, fs, io};

use aws_config::ecs::EcsCredentialsProvider;
use aws_config::environment::EnvironmentVariableCredentialsProvider;
use aws_config::imds::client::error::ImdsError;
use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::web_identity_token::WebIdentityTokenCredentialsProvider;
use aws_credential_types::Credentials;
use aws_credential_types::provider::ProvideCredentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::SdkError;
use aws_sdk_sts::operation::assume_role::AssumeRoleError;
use aws_sdk_sts::operation::assume_role_with_web_identity::AssumeRoleWithWebIdentityError;

use super::answer::{self, causes, chain, is_io};
use super::error::{AwsError, Service};
use super::profile::ChosenProfile;
use super::retry::Course;
use crate::config::AwsKeyConfig;
use crate::machine::root::SYSFS;

/// Credentials that expire sooner than this are renewed before they are used.
const MARGIN: Duration = Duration::from_secs(5);

/// A source of credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// `AWS_ACCESS_KEY_ID` and related variables.
    Environment,
    /// A profile in the configuration files.
    Profile,
    /// A web identity token, named by `AWS_WEB_IDENTITY_TOKEN_FILE`.
    WebIdentity,
    /// The container's credentials service.
    Container,
    /// The instance's metadata service.
    Instance,
}

/// Returns the order in which the AWS CLI asks the sources (botocore, `create_credential_resolver`). A profile's role
/// comes before a web identity, and a web identity before a profile's keys.
fn order(profile: &ChosenProfile) -> [Source; 5] {
    use Source::{Container, Environment, Instance, Profile, WebIdentity};
    match profile.assumes_role {
        true => [Environment, Profile, WebIdentity, Container, Instance],
        false => [Environment, WebIdentity, Profile, Container, Instance],
    }
}

/// How long credentials are valid. This decides what a refusal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The keys of a user, valid until someone withdraws them.
    LongTerm,
    /// A role's credentials from the environment. They expire and cannot be renewed here.
    Fixed,
    /// A role's credentials from a source that can renew them.
    Renewable,
}

/// Credentials that were found.
pub(super) struct Found {
    pub(super) credentials: Credentials,
    pub(super) kind: Kind,
    source: Source,
}

// The output omits even the access key id.
impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Found").field("kind", &self.kind).field("source", &self.source).finish_non_exhaustive()
    }
}

impl Found {
    /// Returns whether the credentials come from the instance's metadata service.
    pub(super) fn is_of_instance(&self) -> bool {
        self.source == Source::Instance
    }

    /// Returns the source for display.
    pub(super) fn source(&self) -> &'static str {
        match self.source {
            Source::Environment => "the environment",
            Source::Profile => "a profile of the AWS CLI",
            Source::WebIdentity => "a web identity token",
            Source::Container => "the container's credentials service",
            Source::Instance => "the instance's role",
        }
    }

    /// Returns whether the credentials should be renewed because they have expired or will expire soon.
    pub(super) fn is_over(&self) -> bool {
        let soon = SystemTime::now() + MARGIN;
        self.kind == Kind::Renewable && self.credentials.expiry().is_some_and(|expiry| expiry < soon)
    }
}

/// Asks the sources one after another.
///
/// # Errors
/// The error of the first source that is configured and fails, or [`AwsError::NoCredentials`] if no source has
/// credentials.
pub(super) async fn find(
    config: &AwsKeyConfig,
    profile: &ChosenProfile,
    provider: &ProviderConfig,
) -> Result<Found, AwsError> {
    // As with `aws --profile`, a profile that is configured by name overrides the environment.
    let by_profile = config.profile.is_some();
    check_environment(by_profile, &|name| std::env::var(name).ok().filter(|value| !value.trim().is_empty()))
        .map_err(AwsError::Profile)?;
    let mut tried = Vec::new();
    let mut is_instance = is_ec2(Path::new(SYSFS)) || is_set("AWS_EC2_METADATA_SERVICE_ENDPOINT");
    for source in order(profile) {
        if by_profile && matches!(source, Source::Environment | Source::WebIdentity) {
            continue;
        }
        match ask(source, provider).await {
            Ok(credentials) => {
                let kind = match (credentials.session_token(), source) {
                    (None, _) => Kind::LongTerm,
                    (Some(_), Source::Environment) => Kind::Fixed,
                    (Some(_), _) => Kind::Renewable,
                };
                return Ok(Found { credentials, kind, source });
            }
            Err(error @ CredentialsError::CredentialsNotLoaded(_)) => match source {
                Source::Profile if profile.has_credentials => return Err(failure(source, profile, &error)),
                Source::Instance => {
                    let absence = absence_of_role(&error);
                    is_instance = absence.may_pass(is_instance);
                    tried.push(absence.to_string());
                }
                Source::Profile => tried.push(format!("the profile `{}` has none", profile.name)),
                Source::Environment => tried.push("the environment has none".to_owned()),
                Source::WebIdentity | Source::Container => {}
            },
            Err(error) => return Err(failure(source, profile, &error)),
        }
    }
    Err(AwsError::NoCredentials { tried: tried.join(", "), transient: is_instance })
}

async fn ask(source: Source, provider: &ProviderConfig) -> Result<Credentials, CredentialsError> {
    match source {
        Source::Environment => EnvironmentVariableCredentialsProvider::new().provide_credentials().await,
        Source::Profile => {
            ProfileFileCredentialsProvider::builder().configure(provider).build().provide_credentials().await
        }
        Source::WebIdentity => {
            WebIdentityTokenCredentialsProvider::builder().configure(provider).build().provide_credentials().await
        }
        Source::Container => EcsCredentialsProvider::builder().configure(provider).build().provide_credentials().await,
        Source::Instance => ImdsCredentialsProvider::builder().configure(provider).build().provide_credentials().await,
    }
}

/// Checks that both variables of a pair are set, or neither. The SDK treats a pair as not set if one of its variables
/// is missing.
fn check_environment(by_profile: bool, set: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
    if by_profile {
        return Ok(());
    }
    let secret = || set("AWS_SECRET_ACCESS_KEY").or_else(|| set("SECRET_ACCESS_KEY"));
    let halves = [
        (set("AWS_ACCESS_KEY_ID").is_some() && secret().is_none(), "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        (
            set("AWS_WEB_IDENTITY_TOKEN_FILE").is_some() && set("AWS_ROLE_ARN").is_none(),
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_ROLE_ARN",
        ),
    ];
    match halves.into_iter().find(|(is_half, ..)| *is_half) {
        Some((_, there, missing)) => Err(format!(
            "{there} is set in the environment but {missing} is not; set both, or unset {there} to use other credentials"
        )),
        None => Ok(()),
    }
}

/// Why the instance provides no role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    /// `AWS_EC2_METADATA_DISABLED` is set.
    Off,
    /// The metadata service answers, but knows no role.
    NoRole,
    /// No metadata service answers.
    Unreachable,
}

impl Absence {
    /// Returns whether waiting may help. A role that was attached seconds ago is not in the metadata yet. The metadata
    /// service may also become reachable a little later than this program starts.
    fn may_pass(self, is_instance: bool) -> bool {
        match self {
            Self::Off => false,
            Self::NoRole => true,
            Self::Unreachable => is_instance,
        }
    }
}

impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "AWS_EC2_METADATA_DISABLED disables the instance's metadata",
            Self::NoRole => "the instance has no role, or got it only seconds ago",
            Self::Unreachable => "no instance metadata service answers",
        })
    }
}

fn absence_of_role(error: &CredentialsError) -> Absence {
    match error.source().map(ToString::to_string).unwrap_or_default() {
        said if said.contains("404") => Absence::NoRole,
        said if said.contains("disabled") => Absence::Off,
        _ => Absence::Unreachable,
    }
}

/// Returns the error for a source that is configured and failed. The error quotes an SDK text only if that text never includes
/// a response.
fn failure(source: Source, profile: &ChosenProfile, error: &CredentialsError) -> AwsError {
    let from = match source {
        Source::Environment => "the environment".to_owned(),
        Source::Profile => format!("the profile `{}`", profile.name),
        Source::WebIdentity => "the web identity token (AWS_WEB_IDENTITY_TOKEN_FILE)".to_owned(),
        Source::Container => "the container's credentials service".to_owned(),
        Source::Instance => "the instance metadata service".to_owned(),
    };
    let (detail, course) = found(source, profile, error);
    AwsError::Credentials { from, detail, course }
}

fn found(source: Source, profile: &ChosenProfile, error: &CredentialsError) -> (String, Course) {
    if let Some(found) = chain(error).find_map(of_sts) {
        return found;
    }
    if let Some(found) = chain(error).find_map(|cause| cause.downcast_ref::<ImdsError>().map(of_imds)) {
        return found;
    }
    let said = error.source().map(ToString::to_string).unwrap_or_default();
    if matches!(error, CredentialsError::ProviderTimedOut(_)) {
        return ("no answer in time".to_owned(), Course::Again);
    }
    match (source, error) {
        // The SDK returns these two errors if the metadata service reports a role that cannot be assumed. The service also
        // reports such a role for a few seconds after a role was attached. Both texts contain only the response's code and
        // message.
        (Source::Instance, CredentialsError::InvalidConfiguration(_)) => (said, Course::Again),
        (Source::Instance, _) if said.starts_with("Error retrieving credentials from IMDS:") => (said, Course::Again),
        // These texts contain only names of settings and profiles.
        (Source::Profile, CredentialsError::InvalidConfiguration(_) | CredentialsError::CredentialsNotLoaded(_)) => {
            (said, Course::Final)
        }
        (Source::Container, CredentialsError::InvalidConfiguration(_)) => {
            let detail = "AWS_CONTAINER_CREDENTIALS_FULL_URI, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI or the authorization \
                          token is not usable";
            (detail.to_owned(), Course::Final)
        }
        // The service throttles requests, is not ready, or is failing. The agent of ECS or EKS gives all of these answers for a
        // while after its start.
        (Source::Container, _) if said.starts_with("Non-success status") => (status(&said), Course::Again),
        _ if said.contains("external process exited with") => of_process(&said),
        _ if said.starts_with("Error retrieving credentials from external process") => {
            ("the output of its credential_process is not the JSON of credentials".to_owned(), Course::Final)
        }
        _ if is_io(error) => (of_io(error), Course::Again),
        _ if profile.uses_sso && source == Source::Profile => of_sso(profile, error),
        // The answer cannot be parsed, perhaps because it was cut off, so it is requested again.
        _ => ("its answer is not the JSON of credentials".to_owned(), Course::Again),
    }
}

fn of_sts(cause: &(dyn Error + 'static)) -> Option<(String, Course)> {
    if let Some(error) = cause.downcast_ref::<SdkError<AssumeRoleError, HttpResponse>>() {
        return Some(of_sts_error(error));
    }
    cause.downcast_ref::<SdkError<AssumeRoleWithWebIdentityError, HttpResponse>>().map(of_sts_error)
}

fn of_sts_error<E>(error: &SdkError<E, HttpResponse>) -> (String, Course)
where
    E: aws_sdk_s3::error::ProvideErrorMetadata + Error + 'static,
{
    match answer::answer(error, Service::Sts, "its endpoint".to_owned()) {
        Ok(answer) => {
            let course = answer::course(&answer, Kind::Renewable);
            (format!("STS refuses ({}): {}", answer.code, answer.message), course)
        }
        Err(error) => (error.to_string(), error.course()),
    }
}

fn of_imds(error: &ImdsError) -> (String, Course) {
    match error {
        ImdsError::ErrorResponse(answer) => {
            let status = answer.response().status().as_u16();
            // 403 means that the instance's metadata is disabled, 400 that the request is malformed.
            let course = if matches!(status, 400 | 403) { Course::Final } else { Course::Again };
            (format!("it answers with HTTP status {status}"), course)
        }
        ImdsError::FailedToLoadToken(_) => ("it provides no session token".to_owned(), Course::Again),
        ImdsError::IoError(_) => ("its answer was cut off".to_owned(), Course::Again),
        _ => ("its answer is malformed".to_owned(), Course::Again),
    }
}

/// Returns a text with only the number from `said`, so that no other part of `said` is printed.
fn status(said: &str) -> String {
    let digits: String = said.chars().filter(char::is_ascii_digit).collect();
    format!("it answers with HTTP status {digits}")
}

/// Returns the error for a failed credential_process. Omits its standard error, which may contain secrets.
fn of_process(said: &str) -> (String, Course) {
    let how = said.split_once("exited with code ").map_or("", |(_, how)| how);
    let how = how.split(". Stderr").next().unwrap_or(how);
    // sh(1): the program does not exist, or cannot be executed.
    let is_missing = how.ends_with(": 126") || how.ends_with(": 127");
    // The program may prompt the user, so retry only briefly: the user must not be prompted repeatedly for minutes.
    let course = if is_missing { Course::Final } else { Course::Briefly };
    (format!("its credential_process failed ({how}); run it by hand to see why"), course)
}

fn of_io(error: &CredentialsError) -> String {
    let kind = chain(error).find_map(|cause| cause.downcast_ref::<io::Error>());
    kind.map_or_else(|| "it cannot be reached".to_owned(), ToString::to_string)
}

/// Returns the error of an SSO source. An expired session is final, because only the user can log in again.
fn of_sso(profile: &ChosenProfile, error: &CredentialsError) -> (String, Course) {
    let said = causes(error).to_ascii_lowercase();
    if ["unauthorized", "expired", "cached", "token", "registration"].iter().any(|word| said.contains(word)) {
        let detail =
            format!("its SSO session has expired or does not exist; log in: aws sso login --profile {}", profile.name);
        return (detail, Course::Final);
    }
    ("SSO provides none".to_owned(), Course::Again)
}

fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// Returns whether this is an EC2 instance. Its metadata service and role may become available a little later than its
/// network. Elsewhere, waiting for missing credentials does not help.
fn is_ec2(sysfs: &Path) -> bool {
    // For Nitro instances see EC2 User Guide, "Detect whether a host is an EC2 instance". Xen instances have a UUID that
    // starts with "ec2".
    let says =
        |file: &str, test: fn(&str) -> bool| fs::read_to_string(sysfs.join(file)).is_ok_and(|text| test(text.trim()));
    says("class/dmi/id/sys_vendor", |vendor| vendor == "Amazon EC2")
        || says("hypervisor/uuid", |uuid| uuid.starts_with("ec2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> ChosenProfile {
        ChosenProfile { name: "p".to_owned(), has_credentials: true, ..ChosenProfile::default() }
    }

    #[test]
    fn half_a_pair_in_the_environment_is_an_error() {
        let check = |by_profile: bool, set: &[&str]| {
            check_environment(by_profile, &|name| set.contains(&name).then(|| "x".to_owned()))
        };
        assert_eq!(check(false, &[]), Ok(()));
        assert_eq!(check(false, &["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]), Ok(()));
        assert_eq!(check(false, &["AWS_ACCESS_KEY_ID", "SECRET_ACCESS_KEY"]), Ok(()));
        assert!(check(false, &["AWS_ACCESS_KEY_ID"]).unwrap_err().contains("AWS_SECRET_ACCESS_KEY is not"));
        assert!(check(false, &["AWS_WEB_IDENTITY_TOKEN_FILE"]).unwrap_err().contains("AWS_ROLE_ARN is not"));
        assert_eq!(check(true, &["AWS_ACCESS_KEY_ID"]), Ok(()), "not used if a profile is configured by name");
    }

    #[test]
    fn each_failure_of_a_source_is_final_or_transient() {
        let provider = |text: &str| CredentialsError::provider_error(text.to_owned());
        let invalid = |text: &str| CredentialsError::invalid_configuration(text.to_owned());
        let process = "Error retrieving credentials: external process exited with code exit status: ";
        let table = [
            (Source::Instance, invalid("[AssumeRoleUnauthorizedAccess] EC2 cannot"), Course::Again, "Unauthorized"),
            (Source::Instance, provider("Error retrieving credentials from IMDS: Failed m"), Course::Again, "Failed m"),
            (Source::Instance, CredentialsError::unhandled("found: MARKER"), Course::Again, "not the JSON"),
            (Source::Container, provider("Non-success status from X: StatusCode(429)"), Course::Again, "status 429"),
            (Source::Container, CredentialsError::unhandled("MARKER"), Course::Again, "not the JSON"),
            (Source::Container, invalid("invalid full URI MARKER"), Course::Final, "FULL_URI"),
            (Source::Profile, invalid("profile: no source"), Course::Final, "no source"),
            (Source::Profile, provider(&format!("{process}1. Stderr: MARKER")), Course::Briefly, "(exit status: 1)"),
            (Source::Profile, provider(&format!("{process}127. Stderr: MARKER")), Course::Final, "exit status: 127"),
            (
                Source::Profile,
                provider("Error retrieving credentials from external process, MARKER"),
                Course::Final,
                "JSON",
            ),
            (Source::Profile, CredentialsError::provider_timed_out(Duration::from_secs(1)), Course::Again, "in time"),
            (Source::WebIdentity, CredentialsError::provider_error(io::Error::other("gone")), Course::Again, "gone"),
        ];
        for (source, error, course, words) in table {
            let (said, found) = found(source, &profile(), &error);
            assert_eq!(found, course, "{said}");
            assert!(said.contains(words) && !said.contains("MARKER"), "{said}");
        }
        let sso = ChosenProfile { uses_sso: true, ..profile() };
        let (said, course) = found(Source::Profile, &sso, &provider("the cached token has expired"));
        assert!(said.contains("aws sso login --profile p") && course == Course::Final, "{said}");
    }

    #[test]
    fn a_role_is_waited_for_only_if_it_may_appear() {
        let absent = |text: &str| absence_of_role(&CredentialsError::not_loaded(text.to_owned()));
        assert_eq!(absent("received 404 from IMDS"), Absence::NoRole);
        assert_eq!(absent("IMDS disabled by AWS_EC2_METADATA_DISABLED env var"), Absence::Off);
        assert_eq!(absent("could not communicate with IMDS"), Absence::Unreachable);
        assert!(Absence::NoRole.may_pass(false) && !Absence::Off.may_pass(true));
        assert!(Absence::Unreachable.may_pass(true) && !Absence::Unreachable.may_pass(false));
    }

    #[test]
    fn found_credentials_are_not_printed() {
        let credentials = Credentials::new("AKIAMARKER", "MARKER", Some("MARKER".to_owned()), None, "test");
        let found = Found { credentials, kind: Kind::Fixed, source: Source::Environment };
        assert!(!format!("{found:?}").contains("MARKER"));
    }
}

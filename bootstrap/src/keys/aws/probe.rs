//! Asks AWS whether it would give the secret, without decrypting it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::error::AwsError;
use super::kms::Ciphertext;
use super::retry::Patience;
use super::session::{KmsKey, Session};
use super::{kms, s3};
use crate::config::{AwsKeyConfig, SecretLocation};

/// The time limit for each service. No request is repeated.
const LIMIT: Duration = Duration::from_secs(8);
/// The maximum difference of the clocks in seconds that causes no warning. AWS accepts five minutes (AWS General
/// Reference, "Signature Version 4"), and this leaves a reserve.
const MOST_SKEW: i64 = 120;

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum About {
    /// The credentials, and the region.
    Credentials,
    /// The object in S3.
    S3,
    /// The key in KMS.
    Kms,
    /// This machine's clock.
    Clock,
}

/// What a finding means for `up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outlook {
    /// `up` would work.
    Well,
    /// `up` would work, but not in this way.
    Less,
    /// `up` would fail.
    Ill,
    /// This is not known yet.
    Unknown,
}

/// One result of the probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was checked.
    pub about: About,
    /// What the result means for `up`.
    pub outlook: Outlook,
    /// What was found.
    pub found: String,
}

impl Finding {
    fn of(about: About, result: Result<String, String>) -> Self {
        match result {
            Ok(found) => Self { about, outlook: Outlook::Well, found },
            Err(found) => Self { about, outlook: Outlook::Ill, found },
        }
    }
}

/// Asks for credentials, for the object, and for dry runs of the decryption. `ciphertexts` are those in the tokens, if the
/// secret is in the header of an existing volume.
pub(super) async fn findings(config: &AwsKeyConfig, ciphertexts: Vec<Ciphertext>) -> Vec<Finding> {
    let patience = Patience::from_now(Duration::ZERO);
    let session = match within(Session::open(config, patience)).await {
        Ok(session) => session,
        Err(why) => return vec![Finding::of(About::Credentials, Err(why))],
    };
    let mut found = vec![Finding::of(About::Credentials, Ok(format!("from {}", session.credentials_source())))];
    let ciphertexts = match &config.object {
        SecretLocation::Token => ciphertexts,
        SecretLocation::Object(object) => {
            let got = within(s3::get(&session, patience, object)).await;
            let region = session.at_s3().region;
            let said = got.as_ref().map(|_| format!("{object} can be read, in {region}")).map_err(Clone::clone);
            found.push(Finding::of(About::S3, said));
            got.into_iter().map(|bytes| Ciphertext { name: String::new(), bytes }).collect()
        }
    };
    found.extend(of_kms(config, &session, patience, &ciphertexts).await);
    found.extend(session.clock_ahead().map(of_clock));
    found
}

async fn of_kms(
    config: &AwsKeyConfig,
    session: &Session,
    patience: Patience,
    ciphertexts: &[Ciphertext],
) -> Vec<Finding> {
    if !ciphertexts.is_empty() {
        let mut found = Vec::new();
        for key in session.kms_keys() {
            found.push(Finding::of(About::Kms, decrypts(config, session, patience, key, ciphertexts).await));
        }
        return settled(found);
    }
    let (Some(key), SecretLocation::Token) = (session.kms_keys().first(), &config.object) else {
        let found = "not asked, since there is no ciphertext to ask about".to_owned();
        return vec![Finding { about: About::Kms, outlook: Outlook::Unknown, found }];
    };
    let allowed = within(kms::may_encrypt(session, patience, config)).await;
    let said = format!(
        "KMS in {} would encrypt a new secret with {} (a dry run). Whether it would decrypt the secret can be told once the \
         volume exists",
        key.region,
        named(key)
    );
    vec![Finding::of(About::Kms, allowed.map(|()| said))]
}

/// Returns whether KMS would decrypt any of the ciphertexts with this key. The error is about the first ciphertext.
async fn decrypts(
    config: &AwsKeyConfig,
    session: &Session,
    patience: Patience,
    key: &KmsKey,
    ciphertexts: &[Ciphertext],
) -> Result<String, String> {
    let mut first_error = None;
    for ciphertext in ciphertexts {
        match within(kms::may_decrypt(session, patience, config, key, &ciphertext.bytes)).await {
            Ok(()) => {
                return Ok(format!("KMS in {} would decrypt the secret with {} (a dry run)", key.region, named(key)));
            }
            Err(why) => first_error = first_error.or(Some(why)),
        }
    }
    Err(first_error.unwrap_or_default())
}

fn named(key: &KmsKey) -> &str {
    key.name.as_deref().unwrap_or("the key of the ciphertext")
}

/// One key that decrypts is enough for `up`.
fn settled(mut found: Vec<Finding>) -> Vec<Finding> {
    if found.iter().any(|finding| finding.outlook == Outlook::Well) {
        for finding in found.iter_mut().filter(|finding| finding.outlook == Outlook::Ill) {
            finding.outlook = Outlook::Less;
        }
    }
    found
}

fn of_clock(ahead: i64) -> Finding {
    let way = if ahead > 0 { "behind" } else { "ahead of" };
    let said = format!("this machine's clock is {} s {way} AWS's", ahead.unsigned_abs());
    Finding::of(About::Clock, if ahead.abs() > MOST_SKEW { Err(said) } else { Ok(said) })
}

async fn within<T>(asked: impl Future<Output = Result<T, AwsError>>) -> Result<T, String> {
    match timeout(LIMIT, asked).await {
        Ok(answer) => answer.map_err(|error| error.without_attempts().to_string()),
        Err(_) => Err(format!("AWS did not answer within {} s", LIMIT.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_that_decrypts_is_enough() {
        let finding = |decrypts: bool| {
            Finding::of(About::Kms, if decrypts { Ok("") } else { Err("") }.map(str::to_owned).map_err(str::to_owned))
        };
        let outlooks = |decrypts: &[bool]| -> Vec<Outlook> {
            settled(decrypts.iter().map(|decrypts| finding(*decrypts)).collect())
                .iter()
                .map(|finding| finding.outlook)
                .collect()
        };
        assert_eq!(outlooks(&[true, true]), [Outlook::Well, Outlook::Well]);
        assert_eq!(outlooks(&[false, true]), [Outlook::Less, Outlook::Well]);
        assert_eq!(outlooks(&[false, false]), [Outlook::Ill, Outlook::Ill]);
    }

    #[test]
    fn a_clock_that_is_minutes_off_is_ill() {
        for (ahead, outlook, words) in [
            (0, Outlook::Well, "0 s ahead of"),
            (30, Outlook::Well, "30 s behind"),
            (400, Outlook::Ill, "400 s behind"),
            (-400, Outlook::Ill, "400 s ahead of"),
        ] {
            let found = of_clock(ahead);
            assert!(found.outlook == outlook && found.found.contains(words), "{ahead}: {found:?}");
        }
    }
}

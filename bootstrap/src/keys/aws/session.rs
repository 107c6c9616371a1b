//! The way to AWS: region, credentials, endpoints and HTTP client, from where every AWS tool takes them.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ConfigBag, Credentials, Intercept, ProvideCredentials, RuntimeComponents, SharedCredentialsProvider,
};
use aws_sdk_s3::error::BoxError;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use aws_types::service_config::ServiceConfigKey;

use super::answer::{causes, is_io};
use super::error::AwsKeyError;
use super::retry::{Patience, retried};
use crate::config::{AwsKeyConfig, SYSFS};

/// A TCP and TLS connection takes no longer, or is as good as none.
const CONNECT: Duration = Duration::from_secs(4);
/// One request with its answer: both are a few kilobytes.
pub(super) const ATTEMPT: Duration = Duration::from_secs(10);
/// One walk through the chain of credential sources, which may ask several services, or run a program.
const CREDENTIALS: Duration = Duration::from_secs(60);

/// The two clients, with credentials that were seen to be there.
pub(super) struct Session {
    pub(super) s3: aws_sdk_s3::Client,
    pub(super) kms: aws_sdk_kms::Client,
    /// The region that is asked.
    pub(super) region: String,
    /// For error texts.
    pub(super) s3_endpoint: Endpoint,
    pub(super) kms_endpoint: Endpoint,
}

impl Session {
    /// Finds region and credentials. On an EC2 instance they are waited for: the metadata service and the role may come
    /// a little later than the program.
    pub(super) async fn open(config: &AwsKeyConfig, patience: Patience) -> Result<Self, AwsKeyError> {
        let overdue = || AwsKeyError::Credentials { detail: "no answer from their source".to_owned(), transient: true };
        let (sdk, credentials) = retried(patience, CREDENTIALS, overdue, async || {
            let sdk = load(config).await;
            let credentials = credentials(config, &sdk).await?;
            if sdk.region().is_none() {
                return Err(AwsKeyError::NoRegion { transient: is_ec2(Path::new(SYSFS)) });
            }
            Ok((sdk, credentials))
        })
        .await?;
        let region = sdk.region().map(ToString::to_string).ok_or(AwsKeyError::NoRegion { transient: false })?;
        let credentials = SharedCredentialsProvider::new(credentials);

        let s3_url = config.s3_endpoint_url.clone().or_else(|| configured_endpoint(&sdk, "S3"));
        let s3_endpoint = Endpoint::default();
        let mut s3 = aws_sdk_s3::config::Builder::from(&sdk)
            .credentials_provider(credentials.clone())
            .interceptor(s3_endpoint.clone());
        if let Some(url) = s3_url {
            // As the AWS CLI does: behind an endpoint of one's own there is seldom a name for each bucket.
            s3 = s3.endpoint_url(url).force_path_style(true);
        }

        let kms_url = config.kms_endpoint_url.clone().or_else(|| configured_endpoint(&sdk, "KMS"));
        let kms_endpoint = Endpoint::default();
        let mut kms = aws_sdk_kms::config::Builder::from(&sdk)
            .credentials_provider(credentials)
            .interceptor(kms_endpoint.clone());
        if let Some(url) = kms_url {
            if url.starts_with("http://") && !is_loopback(&url) {
                tracing::warn!("KMS at {url} answers without TLS: the password crosses the network in the clear");
            }
            kms = kms.endpoint_url(url);
        }
        Ok(Self {
            s3: aws_sdk_s3::Client::from_conf(s3.build()),
            kms: aws_sdk_kms::Client::from_conf(kms.build()),
            region,
            s3_endpoint,
            kms_endpoint,
        })
    }
}

async fn load(config: &AwsKeyConfig) -> SdkConfig {
    // ring, not aws-lc: no C library to build, and the roots that the system trusts.
    let http = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(ATTEMPT).build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .timeout_config(timeouts)
        // `retried` does it, up to the configured time and for all requests alike.
        .retry_config(RetryConfig::disabled());
    if let Some(region) = &config.region {
        loader = loader.region(Region::new(region.clone()));
    }
    if let Some(profile) = &config.profile {
        loader = loader.profile_name(profile);
    }
    loader.load().await
}

async fn credentials(config: &AwsKeyConfig, sdk: &SdkConfig) -> Result<Credentials, AwsKeyError> {
    let profile = config.profile.clone().or_else(|| std::env::var("AWS_PROFILE").ok());
    let Some(provider) = sdk.credentials_provider() else {
        return Err(AwsKeyError::NoCredentials { tried: String::new(), profile, transient: false });
    };
    provider.provide_credentials().await.map_err(|error| match &error {
        CredentialsError::CredentialsNotLoaded(_) => AwsKeyError::NoCredentials {
            tried: error.source().map(causes).unwrap_or_default(),
            profile,
            transient: is_ec2(Path::new(SYSFS)),
        },
        CredentialsError::ProviderTimedOut(_) => AwsKeyError::Credentials { detail: causes(&error), transient: true },
        _ => AwsKeyError::Credentials { detail: causes(&error), transient: is_io(&error) },
    })
}

/// Whether this is an EC2 instance, whose metadata service and role may come a little later than its network. Anywhere
/// else, credentials that are not there will not come by waiting.
fn is_ec2(sysfs: &Path) -> bool {
    // Nitro instances (EC2 User Guide, "Detect whether a host is an EC2 instance"); Xen ones say so in their UUID.
    let says =
        |file: &str, test: fn(&str) -> bool| fs::read_to_string(sysfs.join(file)).is_ok_and(|text| test(text.trim()));
    says("class/dmi/id/sys_vendor", |vendor| vendor == "Amazon EC2")
        || says("hypervisor/uuid", |uuid| uuid.starts_with("ec2"))
}

/// What `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, or the profile's services say.
fn configured_endpoint(sdk: &SdkConfig, service: &str) -> Option<String> {
    let key = ServiceConfigKey::builder().service_id(service).env("AWS_ENDPOINT_URL").profile("endpoint_url").build();
    let own = key.ok().and_then(|key| sdk.service_config()?.load_config(key));
    own.or_else(|| sdk.endpoint_url().map(ToOwned::to_owned))
}

fn is_loopback(url: &str) -> bool {
    let host = url.trim_start_matches("http://");
    ["127.", "localhost", "[::1]"].iter().any(|loopback| host.starts_with(loopback))
}

/// Where the last request went: errors of the network name it, and the SDK's own do not.
#[derive(Clone, Debug, Default)]
pub(super) struct Endpoint(Arc<Mutex<String>>);

impl Endpoint {
    pub(super) fn uri(&self) -> String {
        let uri = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if uri.is_empty() { "its endpoint".to_owned() } else { uri.clone() }
    }
}

impl Intercept for Endpoint {
    fn name(&self) -> &'static str {
        "Endpoint"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let uri = context.request().uri();
        // Scheme and authority: what stands before the third slash.
        let end = uri.match_indices('/').nth(2).map_or(uri.len(), |(at, _)| at);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = uri[..end].to_owned();
        Ok(())
    }
}

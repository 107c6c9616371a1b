//! Prepares access to AWS: region, credentials, endpoints and HTTP client, from the usual sources of AWS tools.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_config::identity::IdentityCache;
use aws_config::provider_config::ProviderConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::future;
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ConfigBag, Intercept, ProvideCredentials, RuntimeComponents, SharedCredentialsProvider, SharedHttpClient,
};
use aws_sdk_s3::error::BoxError;
use aws_types::service_config::ServiceConfigKey;
use tokio::time::timeout;

use super::clock::Clock;
use super::credentials::{self, Found, Kind};
use super::error::{At, AwsError, Service};
use super::region::Regions;
use super::retry::{Course, Patience, in_turn, retried};
use super::{http, profile, region};
use crate::config::{AwsKeyConfig, StoredAs};

/// The time limit for a TCP and TLS connection.
const CONNECT: Duration = Duration::from_secs(4);
/// The time limit for one request with its response. Both are a few kilobytes.
const ATTEMPT: Duration = Duration::from_secs(10);
/// The time limit for asking all sources of credentials, which may ask several services, or run a program.
const CREDENTIALS: Duration = Duration::from_secs(60);

/// The clients of S3 and KMS, with credentials that have been found.
pub(super) struct Session {
    config: AwsKeyConfig,
    provider: ProviderConfig,
    /// The client, and the region in which the bucket is assumed to be.
    s3: Mutex<(aws_sdk_s3::Client, String)>,
    s3_is_fixed: bool,
    /// At least one.
    kms: Vec<KmsKey>,
    credentials: Current,
    /// Set when AWS refuses the credentials and others may work.
    is_stale: AtomicBool,
    s3_endpoint: Endpoint,
    clock: Clock,
}

/// A KMS key, and the client of KMS in the key's region.
pub(super) struct KmsKey {
    pub(super) client: aws_sdk_kms::Client,
    pub(super) region: String,
    /// The key to name in requests. `None` means any key that KMS lets this machine use.
    pub(super) name: Option<String>,
    endpoint: Endpoint,
}

impl KmsKey {
    /// Returns the address to which the last request went.
    pub(super) fn endpoint(&self) -> String {
        self.endpoint.uri()
    }
}

impl Session {
    /// Finds region and credentials. On an EC2 instance this function waits for both, because the metadata service and the role
    /// may become available a little later than the program starts.
    pub(super) async fn open(config: &AwsKeyConfig, patience: Patience) -> Result<Self, AwsError> {
        let profile = profile::choose().await?;
        let http = http::client(&profile)?;
        let overdue = || AwsError::overdue_credentials(CREDENTIALS);
        let opened = retried(patience, CREDENTIALS, overdue, async || {
            let sdk = load(&http, Region::from_static("none")).await;
            let provider = provider(&http, &sdk);
            // Credentials from STS need a region, so the region comes first. A missing region is an error only after
            // the credentials are found.
            let regions = region::find(config, &provider, false).await;
            let region = regions.as_ref().ok().map(|regions| Region::new(regions.sts.clone()));
            let provider = provider.with_region(region);
            let found = credentials::find(config, &profile, &provider).await?;
            let regions = match regions {
                Err(AwsError::NoRegion { .. }) => Err(AwsError::NoRegion { transient: found.is_of_instance() }),
                regions => regions,
            }?;
            Ok((sdk, provider, found, regions))
        });
        let (sdk, provider, found, regions) = opened.await?;
        Self::new(config, sdk, provider, found, regions)
    }

    fn new(
        config: &AwsKeyConfig,
        sdk: SdkConfig,
        provider: ProviderConfig,
        found: Found,
        regions: Regions,
    ) -> Result<Self, AwsError> {
        let credentials = Current(Arc::new(Mutex::new(found)));
        let shared = SharedCredentialsProvider::new(credentials.clone());

        let clock = Clock::default();
        let s3_url = config.s3_endpoint_url.clone().or_else(|| configured_endpoint(&sdk, "S3"));
        let s3_endpoint = Endpoint::default();
        let mut s3 = aws_sdk_s3::config::Builder::from(&sdk)
            .region(Region::new(regions.s3.clone()))
            .credentials_provider(shared.clone())
            .interceptor(s3_endpoint.clone())
            .interceptor(clock.clone());
        if let Some(url) = s3_url {
            // As in the AWS CLI: a custom endpoint seldom has a host name for each bucket.
            s3 = s3.endpoint_url(url).force_path_style(true);
        }

        let kms_url = config.kms_endpoint_url.clone().or_else(|| configured_endpoint(&sdk, "KMS"));
        if let Some(url) = kms_url.as_ref().filter(|url| url.starts_with("http://") && !is_loopback(url)) {
            let url = http::without_userinfo(url);
            tracing::warn!("KMS at {url} answers without TLS: the password crosses the network in the clear");
        }
        let kms_key = |(number, region): (usize, String)| {
            let endpoint = Endpoint::default();
            let mut kms = aws_sdk_kms::config::Builder::from(&sdk)
                .region(Region::new(region.clone()))
                .credentials_provider(shared.clone())
                .interceptor(endpoint.clone())
                .interceptor(clock.clone());
            if let Some(url) = &kms_url {
                kms = kms.endpoint_url(url.clone());
            }
            let name = config.kms_keys.get(number).cloned();
            KmsKey { client: aws_sdk_kms::Client::from_conf(kms.build()), region, name, endpoint }
        };
        let kms = regions.kms.into_iter().enumerate().map(kms_key).collect();
        Ok(Self {
            config: config.clone(),
            provider,
            s3: Mutex::new((aws_sdk_s3::Client::from_conf(s3.build()), regions.s3)),
            s3_is_fixed: regions.s3_is_fixed,
            kms,
            credentials,
            is_stale: AtomicBool::new(false),
            s3_endpoint,
            clock,
        })
    }

    /// Makes requests to S3 until one succeeds or fails permanently, or the time is over. Before each attempt, credentials that
    /// have expired or that AWS refused are renewed.
    pub(super) async fn ask_s3<T>(
        &self,
        patience: Patience,
        mut attempt: impl AsyncFnMut() -> Result<T, AwsError>,
    ) -> Result<T, AwsError> {
        let overdue = || overdue(Service::S3, self.s3_endpoint.uri());
        retried(patience, CREDENTIALS + ATTEMPT, &overdue, async || self.attempt(&overdue, attempt()).await).await
    }

    /// Makes requests to KMS as [`Session::ask_s3`] does. The keys take turns (see [`in_turn`]); `names` are their names for
    /// errors. `attempt` gets the index of the key. One key may occur several times.
    pub(super) async fn ask_kms<T>(
        &self,
        patience: Patience,
        keys: &[&KmsKey],
        names: &[String],
        mut attempt: impl AsyncFnMut(usize) -> Result<T, AwsError>,
    ) -> Result<T, AwsError> {
        let endpoint = |way: usize| keys.get(way).map(|key| key.endpoint()).unwrap_or_default();
        let overdue = |way| overdue(Service::Kms, endpoint(way));
        in_turn(patience, CREDENTIALS + ATTEMPT, names, overdue, async |way| {
            self.attempt(|| overdue(way), attempt(way)).await
        })
        .await
    }

    /// Makes one attempt. Renews the credentials first, if they can no longer be used.
    async fn attempt<T>(
        &self,
        overdue: impl Fn() -> AwsError,
        attempt: impl Future<Output = Result<T, AwsError>>,
    ) -> Result<T, AwsError> {
        self.renew().await?;
        let result = timeout(ATTEMPT, attempt).await.unwrap_or_else(|_| Err(overdue()));
        if result.as_ref().is_err_and(|error| error.course() == Course::Renew) {
            self.is_stale.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Renews the credentials if they can no longer be used.
    async fn renew(&self) -> Result<(), AwsError> {
        if !self.is_stale.load(Ordering::Relaxed) && !self.credentials.with(Found::is_over) {
            return Ok(());
        }
        let profile = profile::choose().await?;
        let found = credentials::find(&self.config, &profile, &self.provider).await?;
        self.credentials.replace(found);
        self.is_stale.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Returns S3's client for the bucket's region.
    pub(super) fn s3(&self) -> aws_sdk_s3::Client {
        self.s3.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Uses `region`, which S3 named, for the bucket from now on. Returns `false` if this does not help: the region is
    /// already in use, or the configuration fixes another one.
    pub(super) fn follow_bucket(&self, region: &str) -> bool {
        let mut s3 = self.s3.lock().unwrap_or_else(PoisonError::into_inner);
        if self.s3_is_fixed || s3.1 == region || !region::is_region(region) {
            return false;
        }
        tracing::debug!("the bucket is in {region}, not in {}", s3.1);
        let there = s3.0.config().to_builder().region(Region::new(region.to_owned())).build();
        *s3 = (aws_sdk_s3::Client::from_conf(there), region.to_owned());
        true
    }

    /// Returns S3 with the region in which it is asked.
    pub(super) fn at_s3(&self) -> At {
        At { service: Service::S3, region: self.s3.lock().unwrap_or_else(PoisonError::into_inner).1.clone() }
    }

    /// Returns the address to which the last request to S3 went.
    pub(super) fn s3_endpoint(&self) -> String {
        self.s3_endpoint.uri()
    }

    /// Returns how the object is stored in S3.
    pub(super) fn stored_as(&self) -> &StoredAs {
        &self.config.stored_as
    }

    /// Returns the KMS keys in their order. There is at least one.
    pub(super) fn kms_keys(&self) -> &[KmsKey] {
        &self.kms
    }

    /// Returns how long the credentials are valid.
    pub(super) fn credentials_kind(&self) -> Kind {
        self.credentials.with(|found| found.kind)
    }

    /// Returns where the credentials come from, for display.
    pub(super) fn credentials_source(&self) -> &'static str {
        self.credentials.with(Found::source)
    }

    /// Returns by how many seconds AWS's clock is ahead of this machine's, once AWS has answered.
    pub(super) fn clock_ahead(&self) -> Option<i64> {
        self.clock.ahead()
    }
}

fn overdue(service: Service, endpoint: String) -> AwsError {
    AwsError::unreachable(service, endpoint, format!("no answer within {} s", ATTEMPT.as_secs()))
}

/// Returns the other settings of environment and profile: endpoints, dual stack, FIPS.
async fn load(http: &SharedHttpClient, region: Region) -> SdkConfig {
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(ATTEMPT).build();
    aws_config::defaults(BehaviorVersion::latest())
        .http_client(http.clone())
        .timeout_config(timeouts)
        // `retried` repeats requests, up to the configured time and for all requests alike.
        .retry_config(RetryConfig::disabled())
        // `Session` keeps the credentials, and knows when to renew them.
        .identity_cache(IdentityCache::no_cache())
        .no_credentials()
        .region(region)
        .load()
        .await
}

/// Returns the settings of `sdk` in the form that the sources of credentials need.
fn provider(http: &SharedHttpClient, sdk: &SdkConfig) -> ProviderConfig {
    let provider = ProviderConfig::without_region()
        .with_http_client(http.clone())
        .with_retry_config(RetryConfig::disabled())
        .with_use_fips(sdk.use_fips())
        .with_use_dual_stack(sdk.use_dual_stack());
    match sdk.timeout_config() {
        Some(timeouts) => provider.with_timeout_config(timeouts.clone()),
        None => provider,
    }
}

/// Returns the endpoint from `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, or the profile's `services` section.
fn configured_endpoint(sdk: &SdkConfig, service: &str) -> Option<String> {
    let key = ServiceConfigKey::builder().service_id(service).env("AWS_ENDPOINT_URL").profile("endpoint_url").build();
    let own = key.ok().and_then(|key| sdk.service_config()?.load_config(key));
    own.or_else(|| sdk.endpoint_url().map(ToOwned::to_owned))
}

fn is_loopback(url: &str) -> bool {
    let Some(host) = http::host(url) else { return false };
    let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    is_address || host.eq_ignore_ascii_case("localhost")
}

/// The credentials that both clients use. They can be replaced.
#[derive(Clone, Debug)]
struct Current(Arc<Mutex<Found>>);

impl Current {
    fn with<T>(&self, look: impl FnOnce(&Found) -> T) -> T {
        look(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, found: Found) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = found;
    }
}

impl ProvideCredentials for Current {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::ready(Ok(self.with(|found| found.credentials.clone())))
    }
}

/// The address of the last request. Network errors quote it, because the SDK's errors do not contain it.
#[derive(Clone, Debug, Default)]
struct Endpoint(Arc<Mutex<String>>);

impl Endpoint {
    fn uri(&self) -> String {
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
        let uri = http::without_userinfo(context.request().uri());
        // Scheme and authority end before the third slash.
        let end = uri.match_indices('/').nth(2).map_or(uri.len(), |(at, _)| at);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = uri[..end].to_owned();
        Ok(())
    }
}

//! The HTTP client, with proxies and certificate authorities as in the AWS CLI.

use std::path::PathBuf;

use aws_sdk_s3::config::{HttpClient, RuntimeComponents, SharedHttpClient};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, Connector};
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use base64ct::{Base64, Encoding};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::error::AwsError;
use super::profile::ChosenProfile;

/// The addresses of the services that give credentials to an instance or a container (EC2 User Guide, "Access instance
/// metadata"; ECS Developer Guide, "Task IAM role"; EKS User Guide, "EKS Pod Identity"). They answer only this machine, so a
/// proxy cannot reach them, and a proxy must not see their answers.
const LOCAL_SERVICES: [&str; 5] =
    ["169.254.169.254", "[fd00:ec2::254]", "169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"];

/// The variables that name other addresses for these services.
const LOCAL_SERVICE_VARIABLES: [&str; 2] = ["AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];

/// The proxy variables, as in curl and the AWS CLI.
const PROXY_VARIABLES: [&str; 6] = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];

/// Returns a client that uses the proxies in HTTPS_PROXY, HTTP_PROXY and NO_PROXY. If AWS_CA_BUNDLE or `ca_bundle` is set,
/// it trusts those certificate authorities instead of the system's.
///
/// # Errors
/// [`AwsError::CaBundle`], if the bundle cannot be read or contains no usable certificate.
pub(super) fn client(profile: &ChosenProfile) -> Result<SharedHttpClient, AwsError> {
    let bundle = std::env::var_os("AWS_CA_BUNDLE").filter(|path| !path.is_empty()).map(PathBuf::from);
    let bundle = bundle.or_else(|| profile.ca_bundle.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from));
    let trusted = match bundle {
        None => TrustStore::default(),
        Some(path) => {
            let fault = |why: String| AwsError::CaBundle { path: path.clone(), why };
            let pem = std::fs::read(&path).map_err(|error| fault(error.to_string()))?;
            let certificates = certificates(&pem);
            if certificates.is_empty() {
                return Err(fault("it contains no usable certificate in PEM form".to_owned()));
            }
            certificates.into_iter().fold(TrustStore::empty(), TrustStore::with_pem_certificate)
        }
    };
    let context = TlsContext::builder().with_trust_store(trusted).build();
    let context = context.map_err(|error| AwsError::Runtime(std::io::Error::other(error.to_string())))?;
    // ring needs no C library to be built, unlike aws-lc.
    let provider = Provider::Rustls(CryptoMode::Ring);
    let direct = Builder::new().tls_provider(provider.clone()).tls_context(context.clone()).build_https();
    let proxied = Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = Connector::builder()
            .tls_provider(provider.clone())
            .tls_context(context.clone())
            .proxy_config(ProxyConfig::from_env());
        connector.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            connector.set_sleep_impl(components.sleep_impl());
        }
        connector.build()
    });
    let moved = LOCAL_SERVICE_VARIABLES.into_iter().filter_map(|name| std::env::var(name).ok());
    let moved = moved.chain(profile.metadata_endpoint.clone());
    let never_proxied = moved.filter_map(|uri| authority(&uri).map(ToOwned::to_owned)).collect();
    Ok(SharedHttpClient::new(ByDestination { direct, proxied, never_proxied }))
}

/// Returns the variable that names a proxy, such as `HTTPS_PROXY`, for error texts. The proxy's URL is not shown, since it
/// may contain a password.
pub(super) fn proxy_variable() -> Option<&'static str> {
    PROXY_VARIABLES.into_iter().find(|name| std::env::var_os(name).is_some_and(|proxy| !proxy.is_empty()))
}

/// Returns the certificates of a bundle, each in its own PEM text. Certificates that cannot belong to an authority are
/// left out, because the SDK panics at them.
fn certificates(pem: &[u8]) -> Vec<String> {
    let found = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok);
    let usable = found.filter(|certificate| RootCertStore::empty().add(certificate.clone()).is_ok());
    let pem = |certificate: CertificateDer<'_>| {
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", Base64::encode_string(&certificate))
    };
    usable.map(pem).collect()
}

/// Returns the host and port in a URI.
fn authority(uri: &str) -> Option<&str> {
    let rest = uri.split_once("://")?.1;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    Some(authority.rsplit('@').next().unwrap_or(authority))
}

/// Returns the host in a URI. An IPv6 address keeps its brackets.
pub(super) fn host(uri: &str) -> Option<&str> {
    let authority = authority(uri)?;
    // The port follows a host without brackets, or the closing bracket.
    Some(match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    })
}

/// Returns a URI without user and password, for errors and the log.
pub(super) fn without_userinfo(uri: &str) -> String {
    let Some((scheme, rest)) = uri.split_once("://") else { return uri.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (with_userinfo, path) = rest.split_at(end);
    let authority = with_userinfo.rsplit('@').next().unwrap_or(with_userinfo);
    format!("{scheme}://{authority}{path}")
}

/// Two clients. Only one of them uses the proxies.
#[derive(Clone, Debug)]
struct ByDestination<C> {
    direct: C,
    proxied: C,
    /// More hosts, with their ports, that are reached directly.
    never_proxied: Vec<String>,
}

impl<C> ByDestination<C> {
    fn for_uri(&self, uri: &str) -> &C {
        let (Some(authority), Some(host)) = (authority(uri), host(uri)) else { return &self.proxied };
        let is_local = LOCAL_SERVICES.contains(&host) || self.never_proxied.iter().any(|never| never == authority);
        if is_local { &self.direct } else { &self.proxied }
    }
}

impl HttpClient for ByDestination<SharedHttpClient> {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(ByDestination {
            direct: self.direct.http_connector(settings, components),
            proxied: self.proxied.http_connector(settings, components),
            never_proxied: self.never_proxied.clone(),
        })
    }
}

impl HttpConnector for ByDestination<SharedHttpConnector> {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        self.for_uri(request.uri()).call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_password_of_an_endpoint_are_removed() {
        for (uri, shown) in [
            ("http://u:p@127.0.0.1:9/x?y=@", "http://127.0.0.1:9/x?y=@"),
            ("https://a@b@kms.example", "https://kms.example"),
            ("https://kms.example/a@b", "https://kms.example/a@b"),
        ] {
            assert_eq!(without_userinfo(uri), shown);
        }
    }

    #[test]
    fn the_host_is_the_one_that_is_connected_to() {
        for (uri, expected) in [
            ("http://localhost@evil.example:80/", "evil.example"),
            ("http://[::1]:8080", "[::1]"),
            ("http://127.evil.example#x", "127.evil.example"),
        ] {
            assert_eq!(host(uri), Some(expected));
        }
    }

    #[test]
    fn only_services_of_this_machine_are_reached_directly() {
        let never_proxied = vec!["127.0.0.1:1338".to_owned()];
        let route = ByDestination { direct: "direct", proxied: "proxied", never_proxied };
        for (uri, expected) in [
            ("http://169.254.169.254/latest/api/token", "direct"),
            ("http://169.254.169.254:80/latest", "direct"),
            ("http://[fd00:ec2::254]/latest", "direct"),
            ("http://[fd00:ec2::254]:80/latest", "direct"),
            ("http://169.254.170.2/v2/credentials?id=1", "direct"),
            ("http://169.254.170.23/v1/credentials", "direct"),
            ("http://127.0.0.1:1338/latest", "direct"),
            ("http://127.0.0.1:1339/latest", "proxied"),
            ("https://kms.eu-central-1.amazonaws.com/", "proxied"),
            ("https://169.254.169.254.example.com/", "proxied"),
        ] {
            assert_eq!(*route.for_uri(uri), expected, "{uri}");
        }
    }
}

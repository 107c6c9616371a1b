//! Where metrics are served: `[metrics]`, and `--metrics` of `serve`.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, anyhow};

use crate::machine::group;
use crate::machine::socket_file::Permissions;

/// Where metrics are served. Only this machine can reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// A unix socket, by its absolute path.
    Unix(PathBuf),
    /// A port on a loopback address.
    Tcp(SocketAddr),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if !Path::new(path).is_absolute() || path.contains('\0') {
                return Err(format!("`{text}` names no absolute path; write unix:/run/nbdcrypt/scratch.metrics"));
            }
            return Ok(Self::Unix(path.into()));
        }
        let Ok(address) = text.parse::<SocketAddr>() else {
            return Err(format!(
                "`{text}` is neither a unix socket such as unix:/run/nbdcrypt/scratch.metrics nor a loopback address such as \
                 127.0.0.1:9105"
            ));
        };
        if !address.ip().to_canonical().is_loopback() {
            return Err(format!(
                "other machines could reach {address}, and anyone may read the metrics: use a loopback address such as \
                 127.0.0.1:{}, or a unix socket, and let a proxy with TLS and a password pass them on",
                address.port()
            ));
        }
        if address.port() == 0 {
            return Err(format!("`{text}` has no port; write one such as 127.0.0.1:9105"));
        }
        Ok(Self::Tcp(address))
    }
}

impl MetricsAddress {
    /// Returns the path of the unix socket, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// Where a volume's metrics are served, and to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsConfig {
    /// The address.
    pub listen: MetricsAddress,
    /// The group whose members may connect to the unix socket, by its name or number. Without it, only root may.
    pub group: Option<String>,
}

impl MetricsConfig {
    /// Returns the permissions of the unix socket.
    ///
    /// # Errors
    /// Fails if there is no such group on this machine.
    pub fn permissions(&self) -> Result<Permissions> {
        let Some(name) = &self.group else { return Ok(Permissions::ONLY_THIS_USER) };
        group::find(name).map(Permissions::with_group).map_err(|why| anyhow!("group = \"{name}\": {why}"))
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::Gid;

    use super::*;

    #[test]
    fn only_this_machine_can_be_given() {
        for good in ["unix:/run/nbdcrypt/scratch.metrics", "127.0.0.1:9105", "127.1.2.3:1", "[::1]:9105"] {
            assert_eq!(good.parse::<MetricsAddress>().unwrap().to_string(), good);
        }
        for (wrong, why) in [
            ("0.0.0.0:9105", "use a loopback address such as 127.0.0.1:9105"),
            ("192.0.2.1:9105", "other machines could reach 192.0.2.1:9105"),
            ("[::]:9105", "loopback"),
            ("[::ffff:192.0.2.1]:9105", "loopback"),
            ("localhost:9105", "neither"),
            (":9105", "neither"),
            ("9105", "neither"),
            ("127.0.0.1:0", "has no port"),
            ("unix:scratch.metrics", "no absolute path"),
            ("/run/scratch.metrics", "neither"),
        ] {
            let error = wrong.parse::<MetricsAddress>().unwrap_err();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_group_may_connect_besides_root() {
        let permissions = |group: Option<&str>| {
            let listen = MetricsAddress::Unix("/run/x".into());
            MetricsConfig { listen, group: group.map(str::to_owned) }.permissions()
        };
        assert_eq!(permissions(None).unwrap().mode, 0o600);
        let of = |name| permissions(Some(name)).map(|found| (found.mode, found.group.map(Gid::as_raw)));
        assert_eq!(of("root").unwrap(), (0o660, Some(0)));
        assert_eq!(of("4242").unwrap(), (0o660, Some(4242)));
        assert!(of("no such group").unwrap_err().to_string().contains("getent group"));
    }
}

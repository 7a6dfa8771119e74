//! Options about certificates, and where no TLS is spoken.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::listen::Address;
use clap::Args;
use thiserror::Error;

use crate::certificates::{CertificateError, Certificates};
use crate::store::SharedStore;

/// See the module.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Certificates")]
pub struct Transport {
    /// A name or address that others reach this controller at, besides those of --listen; may be given
    /// several times
    #[arg(long = "tls-name", value_name = "NAME|IP")]
    pub tls_names: Vec<String>,
    /// What the key of the installation's authority is sealed with in the store; the same file for all
    /// controllers of it [default: ca-secret in the state directory]
    #[arg(long, value_name = "FILE")]
    pub ca_secret: Option<PathBuf>,
    /// How long certificates of hosts and controllers last; they are renewed after half of it
    #[arg(long, value_name = "SECONDS", default_value = "604800", value_parser = clap::value_parser!(u32).range(2..=31_536_000))]
    pub certificate_lifetime: u32,
    /// Show this certificate instead, and have no authority: PEM, with what leads to its authority, for
    /// mortise://controllers/NAME. Read again for each connection
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "client_ca"])]
    pub tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Who makes the certificates of hosts and users then, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub client_ca: Option<PathBuf>,
    /// Serve, and command hosts, without TLS beyond this machine: whoever is on the network can do
    /// everything
    #[arg(long)]
    pub insecure: bool,
}

impl Transport {
    /// Refuses what would be open to everybody.
    ///
    /// # Errors
    /// Which address it is.
    pub fn check(&self, listen: &[Address], nodes: &[Address]) -> Result<(), TransportError> {
        if self.insecure {
            return Ok(());
        }
        if let Some(address) = listen.iter().find(|address| !address.is_private()) {
            return Err(TransportError::Listen(address.clone()));
        }
        match nodes.iter().find(|address| !address.is_private()) {
            Some(address) => Err(TransportError::Node(address.clone())),
            None => Ok(()),
        }
    }

    /// What is shown and believed, if TLS is spoken anywhere.
    ///
    /// # Errors
    /// When there is nothing to show.
    pub async fn certificates(
        &self,
        store: &SharedStore,
        state_dir: &Path,
        listen: &[Address],
        nodes: &[Address],
    ) -> Result<Option<Certificates>, CertificateError> {
        if !listen.iter().chain(nodes).any(Address::is_tls) {
            return Ok(None);
        }
        let store = store.clone();
        if let (Some(chain), Some(key), Some(authorities)) =
            (&self.tls_cert, &self.tls_key, &self.client_ca)
        {
            let files = pki::Files {
                identity: Some((chain.clone(), key.clone())),
                authorities: authorities.clone(),
            };
            return Certificates::of_files(store, files).map(Some);
        }
        let secret = self.ca_secret.clone();
        let secret = secret.unwrap_or_else(|| state_dir.join("ca-secret"));
        let lifetime = Duration::from_secs(self.certificate_lifetime.into());
        let names = self.names(listen);
        Certificates::own(store, &secret, names, lifetime)
            .await
            .map(Some)
    }

    /// What is in the certificate for those that look for a server by its name.
    fn names(&self, listen: &[Address]) -> Vec<String> {
        let mut names = self.tls_names.clone();
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        for address in listen {
            if let Address::Tls(address) = address
                && let Some((host, _)) = address.rsplit_once(':')
            {
                names.push(host.trim_matches(['[', ']']).to_owned());
            }
        }
        names.retain(|name| !matches!(name.as_str(), "0.0.0.0" | "::"));
        names.sort();
        names.dedup();
        names
    }
}

/// What would be open to everybody.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The API.
    #[error(
        "--listen {0}: without TLS whoever is on that network can do everything; write --listen https://{0}, or a loopback address or unix:PATH, or add --insecure"
    )]
    Listen(Address),
    /// An agent.
    #[error(
        "--node {0}: without TLS whoever is on that network can do everything there; have the host join (vmctl host token create), or add --insecure"
    )]
    Node(Address),
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::options::Options;

    fn refused(args: &[&str]) -> Option<String> {
        let args = ["controller"].iter().chain(args);
        let options = Options::try_parse_from(args).unwrap();
        let checked = options.transport.check(&options.listen, &options.nodes);
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn what_others_reach_without_tls_is_refused() {
        assert_eq!(refused(&["--standalone"]), None);
        let both = [
            "--standalone",
            "--listen",
            "unix:/s",
            "--listen",
            "https://0.0.0.0:1",
        ];
        assert_eq!(refused(&both), None);
        let open = refused(&["--standalone", "--listen", "0.0.0.0:7070"]).unwrap();
        assert!(open.contains("--listen https://0.0.0.0:7070"), "{open}");
        assert_eq!(
            refused(&["--standalone", "--listen", "0.0.0.0:7070", "--insecure"]),
            None
        );
        let node = refused(&["--node", "192.0.2.1:1", "--node", "unix:/a"]).unwrap();
        assert!(node.contains("--node 192.0.2.1:1"), "{node}");
        assert_eq!(refused(&["--node", "https://192.0.2.1:1"]), None);
    }
}

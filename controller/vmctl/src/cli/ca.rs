//! `vmctl ca ...`

use std::path::PathBuf;

use clap::Subcommand;

/// `vmctl ca ...`
#[derive(Debug, Subcommand)]
pub(crate) enum CaCommand {
    /// Show the authorities whose certificates are believed
    #[command(after_help = "Examples:
  vmctl ca show                 which ones, and the SHA-256 that node-agent join --ca-hash takes
  vmctl ca show --pem > ca.pem  for vmctl --ca and other clients")]
    Show {
        /// Their certificates
        #[arg(long)]
        pem: bool,
    },
    /// Make another authority; the former ones are believed until they are deleted
    #[command(after_help = "Examples:
  vmctl ca rotate
  vmctl ca show                 until no host shows a certificate of the former one; then
  vmctl ca delete 00000001")]
    Rotate,
    /// Believe an authority no more
    Delete {
        /// The authority
        authority: String,
        /// Even if hosts show certificates of it
        #[arg(long)]
        force: bool,
    },
    /// Make a key and get a certificate for it, which says who asks
    #[command(after_help = "Examples:
  vmctl ca issue alice --role admin --dir ~/.mortise
  vmctl ca issue ci --role operator --in-project web --ttl 7d
  vmctl --endpoint https://10.0.0.1:7070 --ca ca.pem --tls-cert alice.pem --tls-key alice.key vm list")]
    Issue {
        /// Whom the certificate names
        user: String,
        /// viewer, operator, admin or fault-injector; may be given several times
        #[arg(long = "role", value_name = "ROLE", required = true)]
        roles: Vec<String>,
        /// The only project it may see and change; may be given several times [default: all]
        #[arg(long = "in-project", value_name = "PROJECT")]
        projects: Vec<String>,
        /// How long it lasts: 12h, 30d
        #[arg(long, value_name = "TIME", default_value = "30d", value_parser = super::parse_seconds)]
        ttl: u32,
        /// Where USER.pem, USER.key and ca.pem are written
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
    },
}

//! The programs of others that networks are made with.

use std::path::PathBuf;

use super::error::NetworkError;

/// A program and Debian's package of it.
pub(super) type Program = (&'static str, &'static str);

/// Sets nftables rules.
pub(super) const NFT: Program = ("nft", "nftables");
/// Serves DHCP, DNS and router advertisements.
pub(super) const DNSMASQ: Program = ("dnsmasq", "dnsmasq-base");

/// Where a program is: beside this one, in PATH, or where administrators' programs are.
///
/// # Errors
/// When it is in none of them.
pub(super) fn find(id: &str, (program, package): Program) -> Result<PathBuf, NetworkError> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"].map(PathBuf::from);
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .chain(usual)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
        .ok_or_else(|| NetworkError::NoProgram {
            id: id.to_owned(),
            program,
            package,
        })
}

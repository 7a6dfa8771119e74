//! Where Mortise keeps things on a host when nobody says otherwise.

use std::path::PathBuf;

/// What survives a reboot: `/var/lib/mortise` for root, else `$XDG_STATE_HOME/mortise`
/// (`~/.local/state/mortise`).
pub fn default_state_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/var/lib/mortise".into();
    }
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .unwrap_or_else(per_user)
        .join("mortise")
}

/// Sockets: `/run/mortise` for root, else `$XDG_RUNTIME_DIR/mortise`.
pub fn default_run_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/run/mortise".into();
    }
    absolute("XDG_RUNTIME_DIR")
        .unwrap_or_else(per_user)
        .join("mortise")
}

/// The XDG specification says to ignore relative paths.
fn absolute(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

fn per_user() -> PathBuf {
    PathBuf::from(format!("/tmp/mortise-{}", nix::unistd::geteuid()))
}

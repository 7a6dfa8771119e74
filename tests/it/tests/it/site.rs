//! Where the files are that tests use: variables set by `cargo lab test` and printed by
//! `cargo lab env`.

use std::path::PathBuf;

/// The file or folder that a variable names.
pub(crate) fn path(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!(
            "{variable} is not set: run `cargo lab test`, or first `eval \"$(cargo lab env)\"`"
        ),
    }
}

/// One of Mortise's programs.
pub(crate) fn program(name: &str) -> PathBuf {
    path("MORTISE_BIN_DIR").join(name)
}

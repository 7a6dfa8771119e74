//! What a binary of the agent answers about itself before it takes anything over: that it understands the
//! old one's command line, can read the records of the VMs, and what it speaks. It changes nothing.
//!
//! ```text
//! node-agent probe STATE_DIR ARGUMENTS...     prints: node-agent VERSION protocol N
//! ```

use std::{ffi::OsString, path::PathBuf};

use anyhow::Context as _;
use clap::Parser as _;

use crate::{cli::Cli, record};

const NAME: &str = "node-agent";

/// Answers.
///
/// # Errors
/// Why this binary cannot take the place of the one that asks.
pub(crate) fn run(args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let mut args = args;
    let state_dir = args.next().context("no state directory is named")?;
    let line = std::iter::once(OsString::from(NAME)).chain(args);
    Cli::try_parse_from(line).context("it does not understand the agent's command line")?;
    record::read_all(&PathBuf::from(state_dir))?;
    println!("{}", answer(env!("CARGO_PKG_VERSION"), api::PROTOCOL));
    Ok(())
}

fn answer(version: &str, protocol: u32) -> String {
    format!("{NAME} {version} protocol {protocol}")
}

/// Version and protocol in an answer.
pub(crate) fn parse(said: &str) -> Option<(String, u32)> {
    let mut words = said.split_whitespace();
    let (name, version) = (words.next()?, words.next()?);
    let (word, protocol) = (words.next()?, words.next()?);
    let whole = name == NAME && word == "protocol" && words.next().is_none();
    whole.then_some(())?;
    Some((version.to_owned(), protocol.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_understood_and_others_are_not() {
        assert_eq!(parse(&answer("2.1.0", 3)), Some(("2.1.0".to_owned(), 3)));
        for other in [
            "",
            "node-agent 2.1.0",
            "sleep (GNU coreutils) 9.1",
            "node-agent 2 protocol x",
        ] {
            assert_eq!(parse(other), None, "{other:?}");
        }
    }
}

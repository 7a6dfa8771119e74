//! Chromium, in which tests look at pages. Not part of the stamp: it is large, and tests that need it are
//! skipped without it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Fetcher, Program, unpacked_program};
use crate::progress::step;
use crate::tool;

const PROGRAM: &str = "usr/lib/chromium/chromium";
/// Pages need one font at least.
const PACKAGES: [&str; 3] = ["chromium", "fontconfig-config", "fonts-dejavu-core"];

/// A program to call; `None`, with the reason told, where it cannot be had.
pub(crate) fn obtain(dir: &Path) -> Option<Program> {
    let installed = ["chromium", "chromium-browser", "google-chrome"];
    if let Some(file) = installed.into_iter().find_map(tool::find) {
        return Some(Program {
            file,
            library_dirs: Vec::new(),
        });
    }
    let given_up = dir.join("chromium.unavailable");
    if given_up.exists() {
        return None;
    }
    match fetch(dir) {
        Ok(program) => Some(program),
        Err(error) => {
            step(format_args!(
                "tests that need a browser are skipped: {error:#}"
            ));
            let words = format!("{error:#}\nremove this file to try again\n");
            let _ = fs::write(given_up, words);
            None
        }
    }
}

fn fetch(dir: &Path) -> Result<Program> {
    let stamp = dir.join("chromium.root");
    let known = fs::read_to_string(&stamp).map(PathBuf::from);
    let root = match known {
        Ok(root) if root.join(PROGRAM).is_file() => root,
        _ => {
            let lock = fs::File::create(dir.join("lock"))?;
            lock.lock()
                .context("cannot lock target/lab/artifacts/lock")?;
            let root = Fetcher::new(dir)?.packages("chromium", &PACKAGES)?;
            fs::write(&stamp, root.as_os_str().as_encoded_bytes())?;
            root
        }
    };
    let file = root.join(PROGRAM);
    anyhow::ensure!(file.is_file(), "the package chromium has no {PROGRAM}");
    let mut program = unpacked_program(&root, file);
    // Its sound library looks for its other half there.
    let sound = root.join("usr/lib/x86_64-linux-gnu/pulseaudio");
    program.library_dirs.extend(sound.is_dir().then_some(sound));
    Ok(program)
}

//! Debian packages, fetched with apt and unpacked beside the system, never installed.
//!
//! Installing would change the machine and can break it: where a newer qemu-utils is
//! installed, `apt-get install qemu-system-x86` removes it. So root, too, uses
//! `apt-get download` and `dpkg -x`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::progress::step;
use crate::tool;

/// A package at a version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

/// Which package lists apt uses.
enum Lists {
    System,
    /// Fetched by us, because the system has none or they are stale.
    Private,
}

/// The system's apt with its configuration and sources.
pub(crate) struct Apt {
    /// Our package lists and caches.
    dir: PathBuf,
    lists: Lists,
}

impl Apt {
    /// # Errors
    /// When this is no Debian-like machine or no package lists can be had.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        for name in ["apt-get", "apt-cache", "dpkg"] {
            ensure!(
                tool::find(name).is_some(),
                "{name} is not there, so packages cannot be fetched; install by hand: \
                 qemu-system-x86_64, busybox (static), mke2fs and a Debian cloud kernel, or use Debian 12"
            );
        }
        let mut apt = Self {
            dir: dir.to_owned(),
            lists: Lists::System,
        };
        let system_has_lists = fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
            entries
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
        });
        if !system_has_lists {
            apt.update()?;
        }
        Ok(apt)
    }

    /// Fetches package lists of our own; the system's stay as they are.
    pub(crate) fn update(&mut self) -> Result<()> {
        step("fetching package lists (apt-get update, into target/lab)");
        self.lists = Lists::Private;
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(self.dir.join(sub))?;
        }
        tool::output(self.command("apt-get").arg("update")).context(
            "package lists cannot be fetched; check the network and /etc/apt/sources.list",
        )?;
        Ok(())
    }

    /// True if the lists are the system's, which may be older than the mirror.
    pub(crate) fn may_be_stale(&self) -> bool {
        matches!(self.lists, Lists::System)
    }

    /// The version that would be installed now, and what it depends on.
    pub(crate) fn candidate(&self, name: &str) -> Result<(Package, Vec<String>)> {
        let text =
            tool::output(
                self.command("apt-cache")
                    .args(["show", "--no-all-versions", name]),
            )
            .with_context(|| {
                format!(
                    "apt knows no package {name}; add Debian 12's main section to the apt sources"
                )
            })?;
        let field = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        let version = field("Version: ")
            .context("apt-cache show printed no version")?
            .to_owned();
        let depends = field("Depends: ").unwrap_or_default();
        Ok((
            Package {
                name: name.to_owned(),
                version,
            },
            parse_depends(depends),
        ))
    }

    /// The packages, with all they need that the system has not.
    pub(crate) fn closure(&self, names: &[&str]) -> Result<Vec<Package>> {
        let text = tool::output(
            self.command("apt-get")
                .args(["install", "-s", "--no-install-recommends"])
                .args(names),
        )?;
        Ok(parse_simulation(&text))
    }

    /// Unpacks these packages into `root`, which appears only when it is complete.
    pub(crate) fn unpack(&self, packages: &[Package], root: &Path) -> Result<()> {
        let work = root.with_extension(format!("partial-{}", std::process::id()));
        let debs = work.join("debs");
        let tree = work.join("tree");
        fs::create_dir_all(&debs).with_context(|| format!("cannot create {}", debs.display()))?;
        fs::create_dir_all(&tree)?;
        let result = self.unpack_into(packages, &debs, &tree).and_then(|()| {
            let moved = fs::rename(&tree, root);
            moved.with_context(|| format!("cannot create {}", root.display()))
        });
        // Whatever happened, the downloads are not needed any more.
        let _ = fs::remove_dir_all(&work);
        result
    }

    fn unpack_into(&self, packages: &[Package], debs: &Path, tree: &Path) -> Result<()> {
        let wanted = packages
            .iter()
            .map(|package| format!("{}={}", package.name, package.version));
        tool::output(
            self.command("apt-get")
                .current_dir(debs)
                .arg("download")
                .args(wanted),
        )?;
        for deb in fs::read_dir(debs)? {
            tool::output(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(tree))?;
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // Root's apt would fetch as the user _apt, which may not write to our directory.
        command
            .args(["-q", "-o", "APT::Sandbox::User=root"])
            .env("LC_ALL", "C");
        if let Lists::Private = self.lists {
            let dir = |sub: &str| self.dir.join(sub).display().to_string();
            command.args(["-o", &format!("Dir::State::Lists={}", dir("lists"))]);
            command.args(["-o", &format!("Dir::Cache={}", dir("cache"))]);
        }
        command
    }
}

/// The first alternative of each dependency, without version and architecture.
fn parse_depends(field: &str) -> Vec<String> {
    field
        .split(',')
        .filter_map(|dependency| dependency.split('|').next())
        .filter_map(|name| name.trim().split([' ', ':', '(']).next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// `Inst NAME [OLD VERSION] (VERSION ORIGIN [ARCH])`, one line a package.
fn parse_simulation(text: &str) -> Vec<Package> {
    let mut packages: Vec<Package> = text
        .lines()
        .filter_map(|line| line.strip_prefix("Inst "))
        .filter_map(|line| {
            let name = line.split([' ', ':']).next()?;
            let version = line.split_once('(')?.1.split(' ').next()?;
            Some(Package {
                name: name.to_owned(),
                version: version.to_owned(),
            })
        })
        .collect();
    packages.sort();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simulation_lines_give_names_and_new_versions() {
        let text = "Reading package lists...\n\
            Remv qemu-utils [1:10.0.2]\n\
            Inst seabios (1.16.2-1 Debian:12.15/oldstable [all])\n\
            Inst libfdt1 [1.5-1] (1.6.1-4+b1 Debian:12.15/oldstable [amd64]) []\n\
            Conf seabios (1.16.2-1 Debian:12.15/oldstable [all])\n";
        let found = parse_simulation(text);
        let pairs: Vec<_> = found
            .iter()
            .map(|p| (p.name.as_str(), p.version.as_str()))
            .collect();
        assert_eq!(pairs, [("libfdt1", "1.6.1-4+b1"), ("seabios", "1.16.2-1")]);
    }

    #[test]
    fn dependencies_lose_versions_and_alternatives() {
        let names = parse_depends("linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), a:any | b, c");
        assert_eq!(names, ["linux-image-6.1.0-56-cloud-amd64", "a", "c"]);
    }
}

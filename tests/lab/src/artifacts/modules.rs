//! Kernel modules in the order in which they must be loaded.
//!
//! An unpacked kernel package has no `modules.dep` (installing it would run depmod), so the
//! dependencies are read from the modules' own `.modinfo` section.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tool::filter;

/// One loadable module.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Module {
    pub(crate) name: String,
    /// The uncompressed `.ko`.
    pub(crate) image: Vec<u8>,
}

/// The wanted modules with their dependencies, dependencies first. What is built into this
/// kernel is left out.
///
/// # Errors
/// When a wanted module is neither there nor built in.
pub(crate) fn resolve(modules_dir: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut available = BTreeMap::new();
    index(&modules_dir.join("kernel"), &mut available)?;
    let builtin = fs::read_to_string(modules_dir.join("modules.builtin"))
        .with_context(|| format!("no modules.builtin in {}", modules_dir.display()))?
        .lines()
        .map(|line| module_name(Path::new(line)))
        .collect();
    let mut resolver = Resolver {
        available,
        builtin,
        seen: BTreeSet::new(),
        ordered: Vec::new(),
    };
    for name in wanted {
        resolver.visit(name)?;
    }
    Ok(resolver.ordered)
}

struct Resolver {
    available: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    seen: BTreeSet<String>,
    ordered: Vec<Module>,
}

impl Resolver {
    fn visit(&mut self, name: &str) -> Result<()> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || !self.seen.insert(name.clone()) {
            return Ok(());
        }
        let path = self
            .available
            .get(&name)
            .with_context(|| format!("this kernel has no module {name}, and it is not built in"))?;
        let image = read_module(path)?;
        for dependency in dependencies(&image) {
            self.visit(&dependency)?;
        }
        self.ordered.push(Module { name, image });
        Ok(())
    }
}

fn index(dir: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            index(&path, found)?;
        } else if path.to_string_lossy().contains(".ko") {
            found.insert(module_name(&path), path);
        }
    }
    Ok(())
}

fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split(".ko")
        .next()
        .unwrap_or_default()
        .replace('-', "_")
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => filter("xz", &["-dc"], &bytes),
        Some("zst") => filter("zstd", &["-dc"], &bytes),
        Some("gz") => filter("gzip", &["-dc"], &bytes),
        _ => Ok(bytes),
    }
}

/// The `depends=a,b` entry of `.modinfo`, a run of NUL-terminated `key=value` strings.
fn dependencies(image: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = image.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = image[at + KEY.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str, modules: &[(&str, &str)], builtin: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("lab-modules-{name}-{}", std::process::id()));
        let kernel = root.join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        fs::write(root.join("modules.builtin"), builtin).unwrap();
        for (file, depends) in modules {
            let image = format!("ELF\0license=GPL\0depends={depends}\0intree=Y\0");
            fs::write(kernel.join(file), image).unwrap();
        }
        root
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let root = tree(
            "order",
            &[
                ("kvm-amd.ko", "kvm,ccp"),
                ("kvm.ko", "irqbypass"),
                ("irqbypass.ko", ""),
            ],
            "kernel/drivers/crypto/ccp.ko\n",
        );
        let modules = resolve(&root, &["kvm_amd", "kvm"]).unwrap();
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "kvm_amd"]);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_missing_module_is_named() {
        let root = tree("missing", &[("a.ko", "b")], "");
        let error = resolve(&root, &["a"]).unwrap_err();
        assert!(error.to_string().contains("no module b"), "{error}");
        fs::remove_dir_all(root).unwrap();
    }
}

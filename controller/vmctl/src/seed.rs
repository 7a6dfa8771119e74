//! Files for cloud-init that are read here and sent with a VM's spec.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use api::controller as pb;
use api::validate::{MAX_META_DATA_BYTES, MAX_NETWORK_CONFIG_BYTES, MAX_USER_DATA_BYTES};

use crate::cli::SeedArgs;

/// What cloud-init takes user-data for something by.
const USER_DATA_BEGINS: [&[u8]; 6] = [
    b"#",
    b"Content-Type:",
    b"MIME-Version:",
    b"## template:",
    b"From ",
    b"\x1f\x8b",
];

/// Puts the files over what `spec` has already.
///
/// # Errors
/// When one cannot be read, or is not what it should be.
pub(crate) fn add(args: &SeedArgs, spec: &mut pb::VmSpec) -> anyhow::Result<()> {
    let mut seed = spec.cloud_init.take().unwrap_or_default();
    if let Some(path) = &args.user_data {
        seed.user_data = read(path, MAX_USER_DATA_BYTES)?;
        let known = USER_DATA_BEGINS
            .iter()
            .any(|begin| seed.user_data.starts_with(begin));
        if !known {
            bail!(
                "{}: cloud-init ignores user-data that begins like this; let its first line be #cloud-config or #!/bin/sh",
                path.display()
            );
        }
    }
    if let Some(path) = &args.meta_data {
        seed.meta_data = read(path, MAX_META_DATA_BYTES)?;
    }
    if let Some(path) = &args.network_config {
        seed.network_config = read(path, MAX_NETWORK_CONFIG_BYTES)?;
    }
    for path in &args.ssh_keys {
        let text = String::from_utf8(read(path, MAX_META_DATA_BYTES)?)
            .with_context(|| format!("{} is not text", path.display()))?;
        if text.contains("PRIVATE KEY") {
            bail!(
                "{} is a private key; name the public one, its file ends in .pub",
                path.display()
            );
        }
        let lines = text.lines().map(str::trim);
        let keys = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        seed.ssh_keys.extend(keys.map(str::to_owned));
    }
    if seed != pb::CloudInit::default() {
        spec.cloud_init = Some(seed);
    }
    Ok(())
}

/// `-` is stdin.
fn read(path: &Path, max: usize) -> anyhow::Result<Vec<u8>> {
    let cannot = || format!("cannot read {}", path.display());
    let mut content = Vec::new();
    let limit = max as u64 + 1;
    match path.as_os_str() == "-" {
        true => std::io::stdin().take(limit).read_to_end(&mut content),
        false => File::open(path)
            .with_context(cannot)?
            .take(limit)
            .read_to_end(&mut content),
    }
    .with_context(cannot)?;
    if content.is_empty() {
        bail!("{} is empty", path.display());
    }
    if content.len() > max {
        bail!(
            "{} has more than the {max} bytes that fit; have cloud-init fetch the rest (#include)",
            path.display()
        );
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn keys_of_all_files_are_taken_line_by_line() {
        let first = file(b"# laptop\nssh-ed25519 AAAA a\n\nssh-rsa BBBB b\n");
        let second = file(b"ssh-ed25519 CCCC c");
        let args = SeedArgs {
            ssh_keys: vec![first.path().to_owned(), second.path().to_owned()],
            ..Default::default()
        };
        let mut spec = pb::VmSpec::default();
        add(&args, &mut spec).unwrap();
        assert_eq!(spec.cloud_init.unwrap().ssh_keys.len(), 3);
    }

    #[test]
    fn files_that_cloud_init_would_ignore_are_refused() {
        for (content, wanted) in [
            (&b"users: []\n"[..], "#cloud-config"),
            (b"", "is empty"),
            (&[b'#'; MAX_USER_DATA_BYTES + 1], "bytes that fit"),
        ] {
            let user_data = file(content);
            let args = SeedArgs {
                user_data: Some(user_data.path().to_owned()),
                ..Default::default()
            };
            let error = add(&args, &mut pb::VmSpec::default()).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }

    #[test]
    fn private_keys_stay_here() {
        let key = file(b"-----BEGIN OPENSSH PRIVATE KEY-----\n");
        let args = SeedArgs {
            ssh_keys: vec![key.path().to_owned()],
            ..Default::default()
        };
        let error = add(&args, &mut pb::VmSpec::default()).unwrap_err();
        assert!(error.to_string().contains(".pub"), "{error}");
    }

    #[test]
    fn vm_without_files_has_no_seed() {
        let mut spec = pb::VmSpec::default();
        add(&SeedArgs::default(), &mut spec).unwrap();
        assert_eq!(spec.cloud_init, None);
    }
}

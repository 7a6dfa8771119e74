//! Seeds for cloud-init: their bounds, and how they are printed, which is without their content.

use std::fmt;

use super::machine::Machine;
use super::*;

/// Eight times what EC2 takes; a seed travels in one message with the rest of the spec.
pub const MAX_USER_DATA_BYTES: usize = 128 << 10;
/// Of what users give.
pub const MAX_META_DATA_BYTES: usize = 64 << 10;
/// Of what users give.
pub const MAX_NETWORK_CONFIG_BYTES: usize = 64 << 10;
/// Public keys of one VM.
pub const MAX_SSH_KEYS: usize = 64;
/// Name of the disk that holds the seed.
pub const SEED_DISK: &str = "cidata";

/// Meta-data on its way to a host has ids and keys added.
const MAX_COMPLETE_META_DATA_BYTES: usize = 96 << 10;
/// An RSA key of 16384 bits has less than 3 KiB.
const MAX_SSH_KEY_BYTES: usize = 8 << 10;
/// So that all keys fit in what is added to meta-data.
const MAX_SSH_KEYS_BYTES: usize = 16 << 10;

pub(super) fn controller(machine: &mut Machine<'_>, seed: &controller::CloudInit) {
    let at = format!("{}.cloud_init", machine.at);
    machine.names.push((at.clone(), SEED_DISK.to_owned()));
    let found = &mut *machine.found;
    let files = [
        (
            "user_data",
            &seed.user_data,
            seed.user_data_bytes,
            MAX_USER_DATA_BYTES,
        ),
        (
            "meta_data",
            &seed.meta_data,
            seed.meta_data_bytes,
            MAX_META_DATA_BYTES,
        ),
        (
            "network_config",
            &seed.network_config,
            seed.network_config_bytes,
            MAX_NETWORK_CONFIG_BYTES,
        ),
    ];
    for (name, content, shown_bytes, max) in files {
        let field = format!("{at}.{name}");
        bounded(found, &field, content, max);
        // What `vm show` printed, fed to `vm create`: the guest would come up without its accounts.
        found.require(shown_bytes == 0 || !content.is_empty(), &field, || {
            format!("had {shown_bytes} bytes, which are not shown again; give them anew")
        });
    }
    for (name, content) in [
        ("meta_data", &seed.meta_data),
        ("network_config", &seed.network_config),
    ] {
        text(found, &format!("{at}.{name}"), content);
    }
    ssh_keys(found, &at, seed);
}

fn ssh_keys(found: &mut Violations, at: &str, seed: &controller::CloudInit) {
    let field = format!("{at}.ssh_keys");
    let keys = &seed.ssh_keys;
    found.require(keys.len() <= MAX_SSH_KEYS, &field, || {
        format!("has {} keys, at most {MAX_SSH_KEYS} fit", keys.len())
    });
    let total: usize = keys.iter().map(String::len).sum();
    found.require(total <= MAX_SSH_KEYS_BYTES, &field, || {
        format!("has {total} bytes, at most {MAX_SSH_KEYS_BYTES} fit")
    });
    for (index, key) in keys.iter().enumerate() {
        let field = format!("{field}[{index}]");
        let private = key.contains("PRIVATE KEY");
        found.require(!private, &field, || {
            "is a private key; give the public one (its file ends in .pub)".into()
        });
        let is_key = key.len() <= MAX_SSH_KEY_BYTES
            && !key.contains(|c: char| c.is_control())
            && key.split(' ').count() >= 2;
        found.require(private || is_key, &field, || {
            "must be one line such as: ssh-ed25519 AAAA... name".into()
        });
    }
    let twice = !keys.is_empty() && has_top_level_key(&seed.meta_data, "public-keys");
    found.require(!twice, &field, || {
        "meta_data has public-keys already; give all keys there, or none".into()
    });
}

pub(super) fn node(machine: &mut Machine<'_>, seed: &node::CloudInit) {
    let at = format!("{}.cloud_init", machine.at);
    machine.names.push((at.clone(), SEED_DISK.to_owned()));
    let found = &mut *machine.found;
    let meta_data = format!("{at}.meta_data");
    found.require(!seed.meta_data.is_empty(), &meta_data, || {
        "is empty; cloud-init wants an instance-id there".into()
    });
    bounded(
        found,
        &meta_data,
        &seed.meta_data,
        MAX_COMPLETE_META_DATA_BYTES,
    );
    let user_data = format!("{at}.user_data");
    bounded(found, &user_data, &seed.user_data, MAX_USER_DATA_BYTES);
    bounded(
        found,
        &format!("{at}.network_config"),
        &seed.network_config,
        MAX_NETWORK_CONFIG_BYTES,
    );
}

fn bounded(found: &mut Violations, field: &str, content: &[u8], max: usize) {
    found.require(content.len() <= max, field, || {
        format!("has {} bytes, at most {max} fit", content.len())
    });
}

fn text(found: &mut Violations, field: &str, content: &[u8]) {
    found.require(std::str::from_utf8(content).is_ok(), field, || {
        "is not UTF-8 text".into()
    });
}

/// Whether a YAML or JSON mapping of a seed has this key at its top level, as far as that can be told
/// without a parser: keys of block mappings are lines without indentation, those of JSON are quoted.
pub fn has_top_level_key(mapping: &[u8], key: &str) -> bool {
    let text = String::from_utf8_lossy(mapping);
    if text.trim_start().starts_with('{') {
        return text.contains(&format!("\"{key}\""));
    }
    text.lines().any(|line| {
        let quotes: &[char] = &['"', '\''];
        let Some((name, _)) = line.split_once(':') else {
            return false;
        };
        name.trim_end().trim_matches(quotes) == key
    })
}

impl fmt::Debug for controller::CloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudInit")
            .field("user_data", &Hidden(self.user_data.len()))
            .field("meta_data", &Hidden(self.meta_data.len()))
            .field("network_config", &Hidden(self.network_config.len()))
            .field("ssh_keys", &self.ssh_keys.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for node::CloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudInit")
            .field("user_data", &Hidden(self.user_data.len()))
            .field("meta_data", &Hidden(self.meta_data.len()))
            .field("network_config", &Hidden(self.network_config.len()))
            .finish()
    }
}

struct Hidden(usize);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({} bytes)", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_in_block_mappings_and_json() {
        let yaml = b"---\n# instance-id: no\nlocal-hostname : web\n nested:\n  instance-id: no\n";
        assert!(has_top_level_key(yaml, "local-hostname"));
        assert!(!has_top_level_key(yaml, "instance-id"));
        assert!(has_top_level_key(b"\"instance-id\": i-1\n", "instance-id"));
        assert!(has_top_level_key(
            b" {\"instance-id\": \"i-1\"}",
            "instance-id"
        ));
        assert!(!has_top_level_key(b"", "instance-id"));
    }

    #[test]
    fn seeds_are_printed_without_their_content() {
        let seed = node::CloudInit {
            user_data: b"password: sesame".to_vec(),
            ..Default::default()
        };
        let text = format!("{seed:?}");
        assert!(
            text.contains("16 bytes") && !text.contains("sesame"),
            "{text}"
        );
        let bytes = format!("{:?}", seed.user_data);
        assert!(!text.contains(&bytes[1..8]), "{text}");
    }
}

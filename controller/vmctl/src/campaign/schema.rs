//! What a campaign's file may say. Every value knows its line, so that whatever is wrong with it is
//! told at its place.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_saphyr::Spanned;

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct File {
    pub(super) name: Spanned<String>,
    #[serde(default)]
    pub(super) description: String,
    pub(super) seed: Option<u64>,
    pub(super) duration: Spanned<String>,
    pub(super) settle: Option<Spanned<String>>,
    pub(super) ttl: Option<Spanned<String>>,
    /// Of faults and probes that name none of their own.
    #[serde(default)]
    pub(super) target: Target,
    pub(super) faults: Vec<Spanned<Fault>>,
    #[serde(default)]
    pub(super) probes: Vec<Spanned<Probe>>,
    #[serde(default)]
    pub(super) expect: Expect,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Target {
    pub(super) vm: Option<Spanned<String>>,
    pub(super) device: Option<Spanned<String>>,
    /// daemon, vmm or agent
    pub(super) process: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) queues: Vec<u32>,
    #[serde(default)]
    pub(super) ops: Vec<Spanned<String>>,
    /// FIRST-LAST, in sectors of 512 bytes
    pub(super) lba: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) messages: Vec<String>,
    pub(super) nth: Option<u64>,
    pub(super) every: Option<u64>,
    pub(super) probability: Option<f64>,
    pub(super) max_hits: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Schedule {
    pub(super) after: Option<Spanned<String>>,
    pub(super) every: Option<Spanned<String>>,
    pub(super) jitter: Option<Spanned<String>>,
    pub(super) times: Option<u32>,
    #[serde(rename = "for")]
    pub(super) lasts: Option<Spanned<String>>,
}

/// A fault, with the parameters of all kinds; `kinds` says which kind has which.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Fault {
    pub(super) id: Spanned<String>,
    pub(super) kind: Spanned<String>,
    #[serde(default)]
    pub(super) target: Target,
    #[serde(default)]
    pub(super) schedule: Schedule,
    pub(super) delay: Option<Spanned<String>>,
    pub(super) jitter: Option<Spanned<String>>,
    pub(super) length: Option<Spanned<String>>,
    pub(super) errno: Option<Spanned<String>>,
    pub(super) bytes: Option<Spanned<u64>>,
    pub(super) end: Option<Spanned<String>>,
    pub(super) sectors: Option<Spanned<i64>>,
    pub(super) window: Option<Spanned<u32>>,
    pub(super) copies: Option<Spanned<u32>>,
    pub(super) bytes_per_second: Option<Spanned<String>>,
    pub(super) down: Option<Spanned<String>>,
    pub(super) up: Option<Spanned<String>>,
    pub(super) peers: Option<Spanned<Vec<String>>>,
    pub(super) features: Option<Spanned<u64>>,
    pub(super) signal: Option<Spanned<u32>>,
    pub(super) limit: Option<Spanned<String>>,
    pub(super) binary: Option<Spanned<String>>,
    pub(super) offset: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Probe {
    pub(super) id: Spanned<String>,
    pub(super) check: Spanned<String>,
    /// start, during, end
    pub(super) at: Vec<Spanned<String>>,
    pub(super) vm: Option<Spanned<String>>,
    pub(super) device: Option<Spanned<String>>,
    pub(super) contains: Option<String>,
    pub(super) figure: Option<String>,
    pub(super) at_most: Option<f64>,
    #[serde(default)]
    pub(super) stop: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Expect {
    /// Of each fault that `hits` does not name.
    pub(super) min_hits: Option<u64>,
    #[serde(default)]
    pub(super) hits: BTreeMap<String, Spanned<u64>>,
    #[serde(default)]
    pub(super) oracle: bool,
    pub(super) guest_errors: Option<u64>,
    pub(super) stall_p99: Option<Spanned<String>>,
    pub(super) stall_max: Option<Spanned<String>>,
    pub(super) recovery_p99: Option<Spanned<String>>,
    pub(super) recovery_max: Option<Spanned<String>>,
    /// untouched (the default) or may-change
    pub(super) others: Option<Spanned<String>>,
}

//! `--host`, `--zone` and the like as the API has them, and a scheduler's answer as a table.

use anyhow::{Context as _, bail};
use api::controller as pb;

use crate::cli::host::PlacementArgs;
use crate::output;

/// Adds what the command line says to a spec.
///
/// # Errors
/// When a word is none that means anything.
pub(crate) fn apply(args: &PlacementArgs, spec: &mut pb::VmSpec) -> anyhow::Result<()> {
    for label in &args.labels {
        let (key, value) = pair("--vm-label", label)?;
        spec.labels.insert(key, value);
    }
    let mut placement = spec.placement.clone().unwrap_or_default();
    if let Some(host) = &args.host {
        placement.host = host_name(host);
    }
    placement.zones.extend(args.zones.iter().cloned());
    for label in &args.node_selector {
        let (key, value) = pair("--node-selector", label)?;
        placement.node_selector.insert(key, value);
    }
    for text in &args.tolerations {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        placement.tolerations.push(pb::Toleration {
            key: key.to_owned(),
            value: value.to_owned(),
        });
    }
    for text in &args.near {
        placement.affinity.push(term("--near", text, false)?);
    }
    for text in &args.away_from {
        placement.affinity.push(term("--away-from", text, true)?);
    }
    if let Some(bound) = args.max_vms_per_daemon {
        placement.max_vms_per_daemon = bound;
    }
    if placement != pb::Placement::default() {
        spec.placement = Some(placement);
    }
    Ok(())
}

/// `h1` or `hosts/h1`.
pub(crate) fn host_name(host: &str) -> String {
    format!("hosts/{}", host.trim_start_matches("hosts/"))
}

/// `KEY=VALUE`.
pub(crate) fn pair(option: &str, text: &str) -> anyhow::Result<(String, String)> {
    let (key, value) = text
        .split_once('=')
        .with_context(|| format!("{option} {text}: give KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn term(option: &str, text: &str, anti: bool) -> anyhow::Result<pb::Affinity> {
    let (label, preferred) = match text.strip_suffix(",preferred") {
        Some(label) => (label, true),
        None => (text, false),
    };
    let (scope, label) = label.split_once(':').unwrap_or(("host", label));
    let scope = match scope {
        "host" => pb::AffinityScope::Host,
        "zone" => pb::AffinityScope::Zone,
        "daemon" => pb::AffinityScope::Daemon,
        other => bail!("{option} {text}: {other:?} is none of host, zone and daemon"),
    };
    let (key, value) = pair(option, label)?;
    Ok(pb::Affinity {
        labels: [(key, value)].into(),
        scope: scope as i32,
        anti,
        preferred,
    })
}

/// What every host says to a VM.
pub(crate) fn print(verdicts: &[pb::PlacementVerdict]) {
    let rows: Vec<Vec<String>> = verdicts.iter().map(row).collect();
    output::table(&["HOST", "SCORE", "WHY NOT"], &rows);
}

fn row(verdict: &pb::PlacementVerdict) -> Vec<String> {
    let reasons = verdict.refusals.iter();
    let reasons: Vec<&str> = reasons.map(|refusal| refusal.reason.as_str()).collect();
    let score = match reasons.is_empty() {
        true => format!("{:.0}", verdict.score),
        false => "-".to_owned(),
    };
    vec![
        output::id(&verdict.host),
        score,
        output::or_dash(&reasons.join("; ")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_say_what_where_and_how_much() {
        let read = term("--near", "zone:app=db,preferred", false).unwrap();
        assert_eq!(read.scope(), pb::AffinityScope::Zone);
        assert_eq!(read.labels["app"], "db");
        assert!(read.preferred && !read.anti);
        let read = term("--away-from", "app=db", true).unwrap();
        assert_eq!(read.scope(), pb::AffinityScope::Host);
        assert!(!read.preferred && read.anti);
        for wrong in ["rack:app=db", "app", "zone:app"] {
            assert!(term("--near", wrong, false).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nothing_said_is_nothing_asked() {
        let mut spec = pb::VmSpec::default();
        apply(&PlacementArgs::default(), &mut spec).unwrap();
        assert_eq!(spec, pb::VmSpec::default());
        let args = PlacementArgs {
            host: Some("h1".into()),
            ..Default::default()
        };
        apply(&args, &mut spec).unwrap();
        assert_eq!(spec.placement.unwrap().host, "hosts/h1");
    }

    #[test]
    fn refusals_are_told_in_one_line() {
        let refusal = |reason: &str| pb::PlacementRefusal {
            reason: reason.into(),
            ..Default::default()
        };
        let verdict = pb::PlacementVerdict {
            host: "hosts/a".into(),
            score: 0.0,
            refusals: vec![refusal("it is cordoned"), refusal("no room")],
        };
        assert_eq!(row(&verdict), ["a", "-", "it is cordoned; no room"]);
    }
}

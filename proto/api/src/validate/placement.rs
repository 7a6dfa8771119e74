//! Where VMs may run, and what is decided about hosts.

use std::collections::BTreeMap;

use super::*;
use crate::controller as pb;

const MAX_LABELS: usize = 32;
const MAX_LABEL_BYTES: usize = 63;
const MAX_TERMS: usize = 16;
const MAX_TAINTS: usize = 16;
const MAX_WORDS: usize = 64;
const MAX_WORD_BYTES: usize = 127;
/// More than that is no ratio but a mistake.
const MAX_OVERCOMMIT: f64 = 100.0;

/// What a VM's spec says of its place, and the labels that others look at.
pub(super) fn placement(found: &mut Violations, at: &str, spec: &pb::VmSpec) {
    labels(found, &format!("{at}.labels"), &spec.labels);
    let Some(placement) = &spec.placement else {
        return;
    };
    let at = format!("{at}.placement");
    host(found, &format!("{at}.host"), &placement.host);
    labels(
        found,
        &format!("{at}.node_selector"),
        &placement.node_selector,
    );
    few(
        found,
        &format!("{at}.zones"),
        placement.zones.len(),
        MAX_TERMS,
    );
    for (index, zone) in placement.zones.iter().enumerate() {
        word(found, &format!("{at}.zones[{index}]"), zone);
    }
    let tolerations = &placement.tolerations;
    few(
        found,
        &format!("{at}.tolerations"),
        tolerations.len(),
        MAX_TERMS,
    );
    few(
        found,
        &format!("{at}.affinity"),
        placement.affinity.len(),
        MAX_TERMS,
    );
    for (index, term) in placement.affinity.iter().enumerate() {
        let at = format!("{at}.affinity[{index}]");
        labels(found, &format!("{at}.labels"), &term.labels);
        found.require(!term.labels.is_empty(), &format!("{at}.labels"), || {
            "must say which VMs it is about".into()
        });
        let known = pb::AffinityScope::try_from(term.scope).is_ok();
        found.require(known, &format!("{at}.scope"), || "is not known".into());
    }
    let features = &placement.cpu_features;
    few(
        found,
        &format!("{at}.cpu_features"),
        features.len(),
        MAX_WORDS,
    );
    for (index, feature) in features.iter().enumerate() {
        word(found, &format!("{at}.cpu_features[{index}]"), feature);
    }
    text(found, &format!("{at}.cpu_model"), &placement.cpu_model);
    let kvm = matches!(placement.kvm.as_str(), "" | "hardware" | "interpreted");
    found.require(kvm, &format!("{at}.kvm"), || {
        format!("must be hardware or interpreted, not {:?}", placement.kvm)
    });
    text(found, &format!("{at}.min_version"), &placement.min_version);
}

/// `hosts/{host}` or nothing.
pub(super) fn host(found: &mut Violations, field: &str, name: &str) {
    if !name.is_empty()
        && let Err(error) = names::flat_id(name, "hosts")
    {
        found.add(field, error.to_string());
    }
}

/// Checks a request and gives the id of its host.
///
/// # Errors
/// INVALID_ARGUMENT, naming what is wrong.
pub fn update_host_request(request: &pb::UpdateHostRequest) -> Result<String, Status> {
    let mut found = Violations::new();
    let host = request.host.clone().unwrap_or_default();
    let id = names::flat_id(&host.name, "hosts").map(str::to_owned);
    if let Err(error) = &id {
        found.add("host.name", error.to_string());
    }
    let paths = request.update_mask.clone().unwrap_or_default().paths;
    found.require(!paths.is_empty(), "update_mask", || "is empty".into());
    for path in &paths {
        let known = matches!(
            path.as_str(),
            "spec.labels"
                | "spec.zone"
                | "spec.taints"
                | "spec.cpu_overcommit"
                | "spec.memory_overcommit"
        );
        found.require(known, "update_mask", || {
            format!("{path:?} cannot be changed this way")
        });
    }
    let spec = host.spec.unwrap_or_default();
    labels(&mut found, "host.spec.labels", &spec.labels);
    text(&mut found, "host.spec.zone", &spec.zone);
    few(
        &mut found,
        "host.spec.taints",
        spec.taints.len(),
        MAX_TAINTS,
    );
    for (index, taint) in spec.taints.iter().enumerate() {
        word(
            &mut found,
            &format!("host.spec.taints[{index}].key"),
            &taint.key,
        );
        text(
            &mut found,
            &format!("host.spec.taints[{index}].value"),
            &taint.value,
        );
    }
    for (field, ratio) in [
        ("host.spec.cpu_overcommit", spec.cpu_overcommit),
        ("host.spec.memory_overcommit", spec.memory_overcommit),
    ] {
        found.require((0.0..=MAX_OVERCOMMIT).contains(&ratio), field, || {
            format!("must be 0 to {MAX_OVERCOMMIT}, not {ratio}")
        });
    }
    found.into_result()?;
    Ok(id.unwrap_or_default())
}

fn labels(found: &mut Violations, field: &str, labels: &BTreeMap<String, String>) {
    few(found, field, labels.len(), MAX_LABELS);
    for (key, value) in labels {
        let at = format!("{field}[{key}]");
        let letters = |text: &str, more: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || more.as_bytes().contains(&byte);
            text.len() <= MAX_LABEL_BYTES && text.bytes().all(plain)
        };
        // Commas, equals signs and colons part them where they are counted.
        found.require(!key.is_empty() && letters(key, "./-_"), &at, || {
            format!("its key must be 1 to {MAX_LABEL_BYTES} of A-Z, a-z, 0-9, and ./-_")
        });
        found.require(letters(value, "./-_"), &at, || {
            format!("its value must be at most {MAX_LABEL_BYTES} of A-Z, a-z, 0-9, and ./-_")
        });
    }
}

fn few(found: &mut Violations, field: &str, count: usize, limit: usize) {
    found.require(count <= limit, field, || {
        format!("has {count} entries, {limit} at most are allowed")
    });
}

fn word(found: &mut Violations, field: &str, word: &str) {
    found.require(!word.is_empty(), field, || "is empty".into());
    text(found, field, word);
}

fn text(found: &mut Violations, field: &str, text: &str) {
    found.require(text.len() <= MAX_WORD_BYTES, field, || {
        format!("is longer than {MAX_WORD_BYTES} bytes")
    });
    no_control_characters(found, field, text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(placement: pb::Placement) -> Option<String> {
        let mut found = Violations::new();
        let spec = pb::VmSpec {
            placement: Some(placement),
            ..Default::default()
        };
        super::placement(&mut found, "vm.spec", &spec);
        found.into_result().err().map(|s| s.message().to_owned())
    }

    #[test]
    fn places_are_checked() {
        assert_eq!(problem(pb::Placement::default()), None);
        let host = |name: &str| pb::Placement {
            host: name.into(),
            ..Default::default()
        };
        assert_eq!(problem(host("hosts/a1")), None);
        assert!(problem(host("a1")).unwrap().contains("placement.host"));
        let selector = |key: &str, value: &str| pb::Placement {
            node_selector: [(key.to_owned(), value.to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(problem(selector("disk", "nvme")), None);
        for (key, value) in [("a,b", "c"), ("", "c"), ("a", "b=c"), ("a:b", "")] {
            assert!(problem(selector(key, value)).is_some(), "{key}={value}");
        }
        let nobody = pb::Placement {
            affinity: vec![pb::Affinity::default()],
            ..Default::default()
        };
        assert!(problem(nobody).unwrap().contains("affinity[0].labels"));
    }

    #[test]
    fn what_is_decided_about_hosts_is_checked() {
        let request = |path: &str, ratio: f64| pb::UpdateHostRequest {
            host: Some(pb::Host {
                name: "hosts/a".into(),
                spec: Some(pb::HostSpec {
                    cpu_overcommit: ratio,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec![path.into()],
            }),
        };
        let good = update_host_request(&request("spec.cpu_overcommit", 4.0));
        assert_eq!(good.unwrap(), "a");
        assert!(update_host_request(&request("spec.cordoned", 1.0)).is_err());
        for ratio in [-1.0, f64::NAN, 1e9] {
            let wrong = request("spec.cpu_overcommit", ratio);
            assert!(update_host_request(&wrong).is_err(), "{ratio}");
        }
    }
}

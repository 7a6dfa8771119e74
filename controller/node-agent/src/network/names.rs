//! What a network's interfaces are called on its host.

use api::node::NetworkSpec;

use crate::tap::fnv1a;

/// IFNAMSIZ less the NUL.
const MAX_NAME_BYTES: usize = 15;

/// The bridge that is the network's own, or the one it names.
pub(super) fn bridge(spec: &NetworkSpec) -> String {
    match spec.bridge.as_str() {
        "" => interface("mb", &spec.id),
        bridge => bridge.to_owned(),
    }
}

/// Its VXLAN device.
pub(super) fn vxlan(id: &str) -> String {
    interface("mx", id)
}

/// The tap that leads from its switch to its bridge.
pub(super) fn uplink(id: &str) -> String {
    interface("mu", id)
}

/// Readable where it fits.
fn interface(prefix: &str, id: &str) -> String {
    let readable = format!("{prefix}-{id}");
    if readable.len() <= MAX_NAME_BYTES {
        return readable;
    }
    format!("{prefix}.{:012x}", fnv1a(id.as_bytes()) & 0xffff_ffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_fit_and_do_not_collide() {
        assert_eq!(interface("mb", "front"), "mb-front");
        let long = "a".repeat(63);
        assert_eq!(interface("mb", &long).len(), MAX_NAME_BYTES);
        assert_ne!(interface("mb", &long), interface("mb", &long[..62]));
    }
}

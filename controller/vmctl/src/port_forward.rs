//! Ports of the host that are a guest's, as they are typed: `tcp:8080:80`, `udp:[::1]:53:5353`.

use api::controller::PortForward;

/// Parses `PROTOCOL:[ADDRESS:]HOST-PORT[:GUEST-PORT]`, an IPv6 address in brackets.
///
/// # Errors
/// With what to type instead.
pub(crate) fn parse(text: &str) -> Result<PortForward, String> {
    parts(text).ok_or_else(|| {
        format!(
            "port-forward={text}: give PROTOCOL:[ADDRESS:]HOST-PORT[:GUEST-PORT], such as tcp:2222:22 or udp:[::1]:53:5353"
        )
    })
}

/// As people read it: `tcp 127.0.0.1:8080 to port 80`.
pub(crate) fn shown(forward: &PortForward) -> String {
    let address = match forward.host_address.as_str() {
        "" => String::new(),
        address if address.contains(':') => format!("[{address}]:"),
        address => format!("{address}:"),
    };
    let guest_port = match forward.guest_port {
        0 => forward.host_port,
        port => port,
    };
    format!(
        "{} {address}{} to port {guest_port}",
        forward.protocol, forward.host_port
    )
}

fn parts(text: &str) -> Option<PortForward> {
    let (protocol, rest) = text.split_once(':')?;
    let (host_address, ports) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once("]:")?,
        // Of three parts the first is an address, of two none is.
        None if rest.matches(':').count() == 2 || rest.split(':').next()?.contains('.') => {
            rest.split_once(':')?
        }
        None => ("", rest),
    };
    let (host_port, guest_port) = match ports.split_once(':') {
        Some((host, guest)) => (host.parse().ok()?, guest.parse().ok()?),
        None => (ports.parse().ok()?, 0),
    };
    matches!(protocol, "tcp" | "udp").then(|| PortForward {
        protocol: protocol.to_owned(),
        host_address: host_address.to_owned(),
        host_port,
        guest_port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_the_guests_port_may_be_left_out() {
        for (text, address, host_port, guest_port) in [
            ("tcp:2222:22", "", 2222, 22),
            ("udp:53", "", 53, 0),
            ("tcp:127.0.0.1:8080:80", "127.0.0.1", 8080, 80),
            ("tcp:127.0.0.1:8080", "127.0.0.1", 8080, 0),
            ("tcp:[::1]:8080:80", "::1", 8080, 80),
        ] {
            let forward = parse(text).unwrap();
            let found = (
                forward.host_address.as_str(),
                forward.host_port,
                forward.guest_port,
            );
            assert_eq!(found, (address, host_port, guest_port), "{text}");
        }
    }

    #[test]
    fn mistakes_are_answered_with_an_example() {
        for text in ["", "tcp", "sctp:1:2", "tcp:a:b", "tcp:1:2:3:4", "tcp:[::1"] {
            let error = parse(text).unwrap_err();
            assert!(error.contains("tcp:2222:22"), "{text}: {error}");
        }
    }
}

//! Single fields, wherever they occur.

use super::*;

pub(super) fn one_id(field: &str, value: &str) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, field, value);
    found.into_result()
}

pub(super) fn resource(
    mut found: Violations,
    name: Result<names::Name, names::NameError>,
) -> Result<names::Name, Status> {
    match name {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add("name", error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}

pub(super) fn parent_project(found: &mut Violations, parent: &str) {
    if let Err(error) = names::Parent::parse(parent).and_then(names::Parent::project) {
        found.add("parent", error.to_string());
    }
}

pub(super) fn request_id(found: &mut Violations, value: &str) {
    let fits = value.len() <= 64
        && value
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    found.require(fits, "request_id", || {
        "must be at most 64 of A-Z, a-z, 0-9, - and _".into()
    });
}

pub(super) fn id(found: &mut Violations, field: &str, value: &str) {
    found.require(names::is_id(value), field, || {
        format!("{value:?} {}", names::ID_RULE)
    });
}

pub(super) fn absolute(found: &mut Violations, field: &str, path: &str) {
    found.require(path.starts_with('/'), field, || match path {
        "" => "is missing".to_owned(),
        _ => format!("{path:?} must be an absolute path"),
    });
    // PATH_MAX with its NUL.
    found.require(path.len() < 4096, field, || {
        "is longer than 4095 bytes".into()
    });
    // Options on vmm-core's and the daemons' command lines are separated by commas.
    found.require(!path.contains(','), field, || {
        format!("{path:?} has a comma, which cannot be passed on; rename it")
    });
    no_control_characters(found, field, path);
}

pub(super) fn no_control_characters(found: &mut Violations, field: &str, text: &str) {
    found.require(!text.contains(|c: char| c.is_control()), field, || {
        "has a control character".into()
    });
}

pub(super) fn at_most(found: &mut Violations, field: &str, value: u32, max: u32) {
    found.require(value <= max, field, || {
        format!("must be at most {max}, not {value}")
    });
}

pub(super) fn serial(found: &mut Violations, field: &str, text: &str) {
    let printable = text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    found.require(printable && text.len() <= MAX_SERIAL_BYTES, field, || {
        format!("{text:?} must be at most {MAX_SERIAL_BYTES} bytes of printable ASCII")
    });
}

pub(super) fn token(found: &mut Violations, field: &str, fd: Option<&device::FdRef>) {
    let fits = fd.is_some_and(|fd| {
        (1..=crate::fds::MAX_TOKEN_BYTES).contains(&fd.token.len())
            && fd
                .token
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    });
    found.require(fits, &format!("{field}.token"), || {
        "must be the token of descriptors sent before: 1 to 64 letters, digits and hyphens".into()
    });
}

/// Empty is fine: an address is then made up.
pub(super) fn mac(found: &mut Violations, field: &str, text: &str) {
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|octet| match octet.len() {
            // from_str_radix alone would take a sign.
            2 if octet.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                u8::from_str_radix(octet, 16).ok()
            }
            _ => None,
        })
        .collect();
    let unicast = octets.is_some_and(|octets| {
        octets.len() == 6 && octets[0] & 1 == 0 && octets.iter().any(|octet| *octet != 0)
    });
    found.require(text.is_empty() || unicast, field, || {
        format!("{text:?} must be a unicast address such as 52:54:00:12:34:56")
    });
}

/// The range that virtio and Linux's tap share; 0 leaves it to the default.
pub(super) fn mtu(found: &mut Violations, field: &str, value: u32) {
    found.require(value == 0 || (68..=65521).contains(&value), field, || {
        format!("must be 68 to 65521, not {value}")
    });
}

pub(super) fn interface(found: &mut Violations, field: &str, name: &str) {
    let fits = name.len() <= MAX_INTERFACE_BYTES
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b',' | b'%'));
    found.require(fits, field, || {
        format!(
            "{name:?} cannot be an interface: at most 15 bytes without spaces, '/', '%' and ','"
        )
    });
}

pub(super) fn is_cidr(text: &str) -> bool {
    text.split_once('/').is_some_and(|(address, prefix)| {
        let Ok(address) = address.parse::<std::net::IpAddr>() else {
            return false;
        };
        let max = if address.is_ipv4() { 32 } else { 128 };
        prefix.parse::<u8>().is_ok_and(|prefix| prefix <= max)
    })
}

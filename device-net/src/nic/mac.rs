//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

/// A unicast Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MacAddress(pub(crate) [u8; 6]);

impl MacAddress {
    /// A random locally administered address.
    pub(crate) fn random() -> Self {
        let mut octets = [0; 6];
        // SAFETY: six bytes of a live array; so few are never delivered in part.
        let got = unsafe { libc::getrandom(octets.as_mut_ptr().cast(), octets.len(), 0) };
        assert_eq!(got, 6, "getrandom failed");
        octets[0] = octets[0] & 0xfc | 0x02;
        Self(octets)
    }

    /// `octets`, unless they are a group's or nobody's address.
    pub(crate) fn unicast(octets: [u8; 6]) -> Option<Self> {
        (octets[0] & 1 == 0 && octets != [0; 6]).then_some(Self(octets))
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let refused = || MacError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            // from_str_radix takes a sign.
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet = part
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(refused)?;
        }
        match parts.next() {
            None => Self::unicast(octets).ok_or_else(refused),
            Some(_) => Err(refused()),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Not an address that a NIC can have.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a unicast Ethernet address such as 52:54:00:12:34:56")]
pub(crate) struct MacError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_print_as_they_are_written() {
        let text = "52:54:00:ab:cd:0f";
        assert_eq!(text.parse::<MacAddress>().unwrap().to_string(), text);
    }

    #[test]
    fn group_null_and_malformed_addresses_are_refused() {
        for text in [
            "",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:54:00:12:34:567",
            "+2:54:00:12:34:56",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn random_addresses_are_local_unicast_and_differ() {
        let [a, b] = [(); 2].map(|()| MacAddress::random());
        assert_eq!(a.0[0] & 0x03, 0x02);
        assert_ne!(a, b);
    }
}

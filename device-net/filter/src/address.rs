//! Addresses, prefixes and sets of them.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it stands for a group of stations, broadcast among them.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// 01:80:c2:00:00:00 to 0f, which bridges keep to themselves (IEEE 802.1Q table 8-1).
    pub(crate) fn is_link_control(self) -> bool {
        self.0[..5] == [0x01, 0x80, 0xc2, 0, 0] && self.0[5] < 0x10
    }

    /// The link-local address that is made of it (RFC 4291 appendix A).
    pub(crate) fn link_local(self) -> Address {
        let [a, b, c, d, e, f] = self.0;
        let octets = [
            0xfe,
            0x80,
            0,
            0,
            0,
            0,
            0,
            0,
            a ^ 2,
            b,
            c,
            0xff,
            0xfe,
            d,
            e,
            f,
        ];
        Address(u128::from_be_bytes(octets))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let bad = || AddressError::Mac(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let digits = parts.next().filter(|part| {
                (1..=2).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
            *octet = u8::from_str_radix(digits.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(bad()),
        }
    }
}

/// An IPv4 or IPv6 address; the former as ::ffff:a.b.c.d, which is no address on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub(crate) u128);

const MAPPED: u128 = 0xffff << 32;

impl Address {
    /// ::
    pub(crate) const UNSPECIFIED_V6: Self = Self(0);
    /// 0.0.0.0
    pub(crate) const UNSPECIFIED_V4: Self = Self(MAPPED);

    pub(crate) fn v4(octets: [u8; 4]) -> Self {
        Self(MAPPED | u128::from(u32::from_be_bytes(octets)))
    }

    /// Not necessarily an address of the wire: see [`Address::is_ipv4`].
    pub(crate) fn v6(octets: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(octets))
    }

    /// Whether it is one of IPv4.
    pub fn is_ipv4(self) -> bool {
        self.0 >> 32 == 0xffff
    }

    /// In fe80::/10.
    pub(crate) fn is_link_local_v6(self) -> bool {
        self.0 >> 118 == 0x3fa
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::v4(v4.octets()),
            IpAddr::V6(v6) => Self::v6(v6.octets()),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.0).to_canonical()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let address: IpAddr = text
            .parse()
            .map_err(|_| AddressError::Address(text.to_owned()))?;
        match address {
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
                Err(AddressError::Address(text.to_owned()))
            }
            _ => Ok(address.into()),
        }
    }
}

/// Addresses that begin alike; a single address is a prefix of its whole length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr {
    first: Address,
    last: Address,
}

impl Cidr {
    /// Whether `address` is one of them.
    pub fn contains(&self, address: Address) -> bool {
        self.is_ipv4() == address.is_ipv4() && (self.first..=self.last).contains(&address)
    }

    /// Its ranges: IPv4's addresses lie in the midst of IPv6's, but belong to no prefix of theirs.
    fn ranges(self) -> impl Iterator<Item = (Address, Address)> {
        let last_v4 = MAPPED | u128::from(u32::MAX);
        let surrounds_v4 = self.first.0 < MAPPED && self.last.0 > last_v4;
        let (head, tail) = if surrounds_v4 {
            let head = (self.first, Address(MAPPED - 1));
            (head, Some((Address(last_v4 + 1), self.last)))
        } else {
            ((self.first, self.last), None)
        };
        std::iter::once(head).chain(tail)
    }

    /// Whether these are addresses of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.first.is_ipv4()
    }
}

impl From<Address> for Cidr {
    fn from(address: Address) -> Self {
        Self {
            first: address,
            last: address,
        }
    }
}

impl FromStr for Cidr {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let Some((address, len)) = text.split_once('/') else {
            return Ok(text.parse::<Address>()?.into());
        };
        let address: Address = address.parse()?;
        let max_len = if address.is_ipv4() { 32 } else { 128 };
        let len = len
            .parse::<u32>()
            .ok()
            .filter(|&bits| bits <= max_len && !len.starts_with('+'))
            .ok_or_else(|| AddressError::Length(text.to_owned(), max_len))?;
        let host_bits = u128::MAX.checked_shr(128 - (max_len - len)).unwrap_or(0);
        if address.0 & host_bits != 0 {
            return Err(AddressError::HostBits {
                text: text.to_owned(),
                network: Address(address.0 & !host_bits),
                len,
            });
        }
        Ok(Self {
            first: address,
            last: Address(address.0 | host_bits),
        })
    }
}

/// Text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No [`Mac`].
    #[error("{0:?} is no MAC address like 52:54:00:12:34:56")]
    Mac(String),
    /// No [`Address`].
    #[error("{0:?} is no address like 192.0.2.1 or 2001:db8::1")]
    Address(String),
    /// No [`Cidr`], because of what comes after the slash.
    #[error("{0:?}: after the slash is the length of the prefix, 0 to {1}")]
    Length(String, u32),
    /// Something is set behind the prefix.
    #[error("{text:?} has bits set behind its prefix; did you mean {network}/{len}?")]
    HostBits {
        /// As it was written.
        text: String,
        /// Without these bits.
        network: Address,
        /// As it was written.
        len: u32,
    },
}

/// A set of addresses, for look-ups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AddressSet {
    /// Ascending, with gaps in between.
    ranges: Vec<(Address, Address)>,
}

impl AddressSet {
    pub(crate) fn contains(&self, address: Address) -> bool {
        let after = self.ranges.partition_point(|&(first, _)| first <= address);
        after
            .checked_sub(1)
            .is_some_and(|index| address <= self.ranges[index].1)
    }
}

impl FromIterator<Cidr> for AddressSet {
    fn from_iter<I: IntoIterator<Item = Cidr>>(cidrs: I) -> Self {
        let mut all: Vec<_> = cidrs.into_iter().flat_map(Cidr::ranges).collect();
        all.sort_unstable();
        let mut ranges: Vec<(Address, Address)> = Vec::with_capacity(all.len());
        for (first, last) in all {
            match ranges.last_mut() {
                Some(before) if first.0 <= before.1.0.saturating_add(1) => {
                    before.1 = before.1.max(last);
                }
                _ => ranges.push((first, last)),
            }
        }
        ranges.shrink_to_fit();
        Self { ranges }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn prefixes_contain_what_begins_alike() {
        for (prefix, inside, outside) in [
            ("10.0.0.0/8", "10.255.1.2", "11.0.0.0"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.4"),
            ("0.0.0.0/0", "255.255.255.255", "::1"),
            ("::/0", "ffff::1", "0.0.0.0"),
            ("2001:db8::/32", "2001:db8:ffff::", "2001:db9::"),
            ("fe80::1/128", "fe80::1", "fe80::2"),
        ] {
            let set: AddressSet = [cidr(prefix)].into_iter().collect();
            for (probe, expected) in [(inside, true), (outside, false)] {
                let probe = address(probe);
                assert_eq!(cidr(prefix).contains(probe), expected, "{prefix} {probe}");
                assert_eq!(set.contains(probe), expected, "{prefix} {probe}");
            }
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (text, named) in [
            ("10.0.0.1/8", "did you mean 10.0.0.0/8"),
            ("10.0.0.0/33", "0 to 32"),
            ("2001:db8::/129", "0 to 128"),
            ("10.0.0.0/+8", "0 to 32"),
            ("10.0.0.0/", "0 to 32"),
            ("10.0.0", "no address"),
            ("::ffff:10.0.0.1", "no address"),
            ("", "no address"),
        ] {
            let error = text.parse::<Cidr>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        for text in [
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "g::::::",
            "+1:2:3:4:5:6",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        assert_eq!(
            "52:54:0:12:34:56".parse(),
            Ok(Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]))
        );
    }

    #[test]
    fn link_local_address_is_made_of_the_mac() {
        let mac: Mac = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!(mac.link_local(), address("fe80::5054:ff:fe12:3456"));
        assert!(mac.link_local().is_link_local_v6());
        assert!(!address("fec0::1").is_link_local_v6());
    }

    proptest! {
        #[test]
        fn set_contains_what_any_of_its_prefixes_contains(
            prefixes in prop::collection::vec((any::<u32>(), 20_u32..=32), 0..40),
            probes in prop::collection::vec(any::<u32>(), 20),
        ) {
            let cidrs: Vec<Cidr> = prefixes
                .iter()
                // Close to one another, so that they overlap and touch.
                .map(|&(bits, len)| {
                    let network = (bits & 0xffff) & u32::MAX.checked_shl(32 - len).unwrap_or(0);
                    cidr(&format!("{}/{len}", std::net::Ipv4Addr::from(network)))
                })
                .collect();
            let set: AddressSet = cidrs.iter().copied().collect();
            let edges = cidrs.iter().flat_map(|c| {
                [c.first.0.wrapping_sub(1), c.first.0, c.last.0, c.last.0 + 1].map(Address)
            });
            let probes = probes.iter().map(|p| Address::v4((p & 0xffff).to_be_bytes()));
            for probe in edges.chain(probes) {
                let expected = cidrs.iter().any(|cidr| cidr.contains(probe));
                prop_assert_eq!(set.contains(probe), expected);
            }
        }
    }
}

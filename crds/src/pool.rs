//! Address ranges and pools: the text a user writes, parsed once into values that cannot be wrong.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;

/// An IP address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4, `AF_INET`.
    V4,
    /// IPv6, `AF_INET6`.
    V6,
}

impl Family {
    /// The family of an address.
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Length of an address in bits: 32 or 128.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What is wrong with a pool, in words for the author of the ServiceGroup.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// A pool with a slash that is no prefix.
    #[error("invalid CIDR \"{0}\"")]
    Cidr(String),
    /// A subnet that is no prefix.
    #[error("invalid CIDR address: {0}")]
    Subnet(String),
    /// The first address of a range does not parse.
    #[error("invalid IP range \"{range}\": invalid start IP \"{ip}\"")]
    Start {
        /// The range as written.
        range: String,
        /// Its part that is no address.
        ip: String,
    },
    /// The last address of a range does not parse.
    #[error("invalid IP range \"{range}\": invalid end IP \"{ip}\"")]
    End {
        /// The range as written.
        range: String,
        /// Its part that is no address.
        ip: String,
    },
    /// The ends of a range are of different families.
    #[error("invalid IP range \"{0}\": start and end are of different families")]
    MixedFamilies(String),
    /// The range runs backwards.
    #[error("invalid IP range \"{0}\": the start lies behind the end; swap them")]
    Reversed(String),
    /// The range leaves the subnet.
    #[error("{} range ({first} - {last}) not contained by network {subnet}", upper(*first))]
    OutsideSubnet {
        /// First address of the range.
        first: IpAddr,
        /// Last address of the range.
        last: IpAddr,
        /// The subnet as written.
        subnet: IpNet,
    },
    /// An aggregation that is neither `default` nor a prefix length of the family.
    #[error("invalid aggregation \"{0}\": write default, or a slash and a prefix length such as /32")]
    Aggregation(String),
    /// A pool stands in the field of the other family.
    #[error("{field} holds the {found} pool {pool}; move it to the field of its family")]
    WrongField {
        /// The field, such as `v4pools`.
        field: &'static str,
        /// The family found there.
        found: Family,
        /// The pool as written.
        pool: String,
    },
}

fn upper(ip: IpAddr) -> &'static str {
    match Family::of(ip) {
        Family::V4 => "IPV4",
        Family::V6 => "IPV6",
    }
}

/// An inclusive range of addresses of one family. Network and broadcast addresses count as any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

impl AddressRange {
    /// First address.
    pub const fn first(&self) -> IpAddr {
        self.first
    }

    /// Last address, inclusive.
    pub const fn last(&self) -> IpAddr {
        self.last
    }

    /// Family of both ends.
    pub const fn family(&self) -> Family {
        Family::of(self.first)
    }

    /// Whether `ip` lies in the range.
    pub fn contains(&self, ip: IpAddr) -> bool {
        Family::of(ip) == self.family() && self.first <= ip && ip <= self.last
    }

    /// Whether the two ranges have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.family() == other.family() && self.first <= other.last && other.first <= self.last
    }

    /// The addresses that both ranges have.
    pub fn common(&self, other: &Self) -> Option<Self> {
        self.overlaps(other).then(|| Self {
            first: self.first.max(other.first),
            last: self.last.min(other.last),
        })
    }

    /// Number of addresses, saturating at `u64::MAX` (an IPv6 /64 has one more).
    pub fn size(&self) -> u64 {
        let span = number(self.last) - number(self.first);
        u64::try_from(span).unwrap_or(u64::MAX).saturating_add(1)
    }
}

impl From<IpNet> for AddressRange {
    /// All of a subnet, the first and the last address too.
    fn from(net: IpNet) -> Self {
        Self {
            first: net.network(),
            last: net.broadcast(),
        }
    }
}

impl From<IpAddr> for AddressRange {
    fn from(ip: IpAddr) -> Self {
        Self { first: ip, last: ip }
    }
}

/// An address as a number, so that ranges of both families share their arithmetic.
pub fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// The address of a family with this number; `None` when it does not fit an IPv4 address.
pub fn address(family: Family, number: u128) -> Option<IpAddr> {
    match family {
        Family::V4 => u32::try_from(number).ok().map(|n| Ipv4Addr::from(n).into()),
        Family::V6 => Some(Ipv6Addr::from(number).into()),
    }
}

impl FromStr for AddressRange {
    type Err = PoolError;

    /// Reads `from-to` (blanks around the addresses are ignored), a CIDR, or a single address.
    ///
    /// A CIDR starts at the address as written: `192.168.1.10/24` is .10 to .255.
    fn from_str(text: &str) -> Result<Self, PoolError> {
        let (first, last) = if text.contains('/') {
            let net: IpNet = text.trim().parse().map_err(|_| PoolError::Cidr(text.into()))?;
            (net.addr(), net.broadcast())
        } else {
            let (from, to) = text.split_once('-').unwrap_or((text, text));
            let (from, to) = (from.trim(), to.trim());
            let first = from.parse().map_err(|_| PoolError::Start {
                range: text.into(),
                ip: from.into(),
            })?;
            let last = to.parse().map_err(|_| PoolError::End {
                range: text.into(),
                ip: to.into(),
            })?;
            (first, last)
        };
        if Family::of(first) != Family::of(last) {
            return Err(PoolError::MixedFamilies(text.into()));
        }
        if first > last {
            return Err(PoolError::Reversed(text.into()));
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// How wide the prefix of a routed VIP on the dummy interface is, and so what a routing daemon sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aggregation {
    /// The mask of the pool's subnet.
    #[default]
    Subnet,
    /// A stated prefix length in bits.
    Length(u8),
}

impl Aggregation {
    /// Reads `default`, an empty text (the same), or `/n`.
    ///
    /// # Errors
    /// When the text is neither, or `n` is not within 8 and the family's length.
    pub fn parse(text: &str, family: Family) -> Result<Self, PoolError> {
        if text.is_empty() || text == "default" {
            return Ok(Self::Subnet);
        }
        text.strip_prefix('/')
            .and_then(|n| n.parse().ok())
            .filter(|n| (8..=family.bits()).contains(n))
            .map(Self::Length)
            .ok_or_else(|| PoolError::Aggregation(text.into()))
    }
}

/// One range of addresses with the subnet it lies in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The addresses given out.
    pub range: AddressRange,
    /// The subnet, as written: it contains the range.
    pub subnet: IpNet,
    /// Prefix on the dummy interface when the address is routed.
    pub aggregation: Aggregation,
    /// The range as its author wrote it, for status and messages.
    pub text: String,
}

impl Pool {
    /// Reads the three fields of a pool.
    ///
    /// # Errors
    /// The first thing wrong with them, naming it as written.
    pub fn parse(pool: &str, subnet: &str, aggregation: Option<&str>) -> Result<Self, PoolError> {
        let range: AddressRange = pool.parse()?;
        let net: IpNet = subnet.trim().parse().map_err(|_| PoolError::Subnet(subnet.into()))?;
        if !(net.contains(&range.first()) && net.contains(&range.last())) {
            return Err(PoolError::OutsideSubnet {
                first: range.first(),
                last: range.last(),
                subnet: net,
            });
        }
        Ok(Self {
            range,
            subnet: net,
            aggregation: Aggregation::parse(aggregation.unwrap_or_default(), range.family())?,
            text: pool.into(),
        })
    }

    /// Prefix length in bits of this pool's addresses on the dummy interface.
    pub fn routed_prefix(&self) -> u8 {
        match self.aggregation {
            Aggregation::Subnet => self.subnet.prefix_len(),
            Aggregation::Length(n) => n,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_read_as_upstream_reads_them() {
        for (name, text, first, last) in [
            ("from-to", "10.0.0.1-10.0.0.9", "10.0.0.1", "10.0.0.9"),
            (
                "blanks around addresses",
                " 10.0.0.1 - 10.0.0.9 ",
                "10.0.0.1",
                "10.0.0.9",
            ),
            ("cidr", "10.189.0.0/16", "10.189.0.0", "10.189.255.255"),
            (
                "cidr starts as written",
                "192.168.1.10/24",
                "192.168.1.10",
                "192.168.1.255",
            ),
            ("one address", "10.0.0.1", "10.0.0.1", "10.0.0.1"),
            ("ipv6 cidr", "fd00::5/120", "fd00::5", "fd00::ff"),
            ("ipv6 range", "fd00::1-fd00::a", "fd00::1", "fd00::a"),
            ("whole ipv6", "::/0", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            let range: AddressRange = text.parse().expect(name);
            assert_eq!(range.first(), first.parse::<IpAddr>().unwrap(), "{name}");
            assert_eq!(range.last(), last.parse::<IpAddr>().unwrap(), "{name}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_pool_is_said_in_a_sentence() {
        for (pool, subnet, aggregation, sentence) in [
            ("10.0.0.0/33", "10.0.0.0/8", "", "invalid CIDR \"10.0.0.0/33\""),
            ("10.0.0.1-10.0.0.2", "10.0.0.0", "", "invalid CIDR address: 10.0.0.0"),
            (
                "x-10.0.0.2",
                "10.0.0.0/8",
                "",
                "invalid IP range \"x-10.0.0.2\": invalid start IP \"x\"",
            ),
            (
                "10.0.0.1-y",
                "10.0.0.0/8",
                "",
                "invalid IP range \"10.0.0.1-y\": invalid end IP \"y\"",
            ),
            (
                "10.0.0.1-fd00::1",
                "10.0.0.0/8",
                "",
                "invalid IP range \"10.0.0.1-fd00::1\": start and end are of different families",
            ),
            (
                "10.0.0.9-10.0.0.1",
                "10.0.0.0/8",
                "",
                "invalid IP range \"10.0.0.9-10.0.0.1\": the start lies behind the end; swap them",
            ),
            (
                "10.1.0.1-10.1.0.9",
                "10.0.0.0/24",
                "",
                "IPV4 range (10.1.0.1 - 10.1.0.9) not contained by network 10.0.0.0/24",
            ),
            (
                "10.0.0.1-10.0.0.9",
                "10.0.0.0/24",
                "32",
                "invalid aggregation \"32\": write default, or a slash and a prefix length such as /32",
            ),
            (
                "10.0.0.1-10.0.0.9",
                "10.0.0.0/24",
                "/128",
                "invalid aggregation \"/128\": write default, or a slash and a prefix length such as /32",
            ),
            (
                "10.0.0.1,10.0.0.5",
                "10.0.0.0/24",
                "",
                "invalid IP range \"10.0.0.1,10.0.0.5\": invalid start IP \"10.0.0.1,10.0.0.5\"",
            ),
        ] {
            let error = Pool::parse(pool, subnet, Some(aggregation)).expect_err(pool);
            assert_eq!(error.to_string(), sentence);
        }
    }

    #[test]
    fn a_routed_address_gets_the_aggregation_as_its_mask() {
        let prefix = |a| {
            Pool::parse("10.0.0.1-10.0.0.9", "10.0.0.0/24", a)
                .unwrap()
                .routed_prefix()
        };
        assert_eq!(prefix(None), 24);
        assert_eq!(prefix(Some("default")), 24);
        assert_eq!(prefix(Some("/32")), 32);
        assert_eq!(prefix(Some("/16")), 16);
    }

    #[test]
    fn sizes_are_counted_without_overflow() {
        let size = |t: &str| t.parse::<AddressRange>().unwrap().size();
        assert_eq!(size("10.0.0.0/8"), 1 << 24);
        assert_eq!(size("10.0.0.7"), 1);
        assert_eq!(size("fd00::/64"), u64::MAX);
        assert_eq!(size("::/0"), u64::MAX);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(pool in ".{0,40}", subnet in ".{0,20}", agg in ".{0,6}") {
            let _ = Pool::parse(&pool, &subnet, Some(&agg));
        }

        #[test]
        fn a_range_survives_being_written_and_read(a: u32, b: u32) {
            let (a, b) = (a.min(b), a.max(b));
            let text = format!("{}-{}", Ipv4Addr::from(a), Ipv4Addr::from(b));
            let range: AddressRange = text.parse().unwrap();
            prop_assert_eq!(range.to_string().parse::<AddressRange>().unwrap(), range);
            prop_assert_eq!(range.size(), u64::from(b - a) + 1);
            prop_assert_eq!(address(Family::V4, number(range.first())), Some(range.first()));
        }
    }
}

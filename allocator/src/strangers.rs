//! Hosts outside the cluster that have addresses of ours, and how far they are believed.
//!
//! A node that would announce an address asks on the wire whether somebody has it. Anybody there may say yes, to one question
//! or to all of them. So a Service is given another address, and the address is kept from all others for a while, but within
//! a budget: a Service moves at most [`MOVES`] times within [`KEPT`], and one host (by its Ethernet address), and all hosts of
//! one subnet together, keep at most [`share`] of a pool's addresses. What goes beyond changes nothing: the Service keeps its
//! address, which no node announces while the host has it, and the ServiceGroup says which host it is.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crds::ServiceKey;
use crds::conflict::Mac;
use crds::pool::Pool;
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;

/// How long an address is kept from Services after a host was found to have it, and how long a move counts.
pub const KEPT: Duration = Duration::from_mins(10);
/// How often a Service is given another address for hosts' sake within [`KEPT`].
pub const MOVES: usize = 2;

const LEAST_SHARE: u64 = 4;

/// How many of a pool's addresses one host, or all of a subnet, may keep from Services: four, or a twentieth where that is
/// more, but not more than a quarter, and one at least.
pub const fn share(size: u64) -> u64 {
    let twentieth = size / 20;
    let most = if twentieth > LEAST_SHARE {
        twentieth
    } else {
        LEAST_SHARE
    };
    let quarter = if size / 4 > 1 { size / 4 } else { 1 };
    if most < quarter { most } else { quarter }
}

/// A host outside the cluster that has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// Its Ethernet address.
    pub mac: Mac,
    /// The node that found it.
    pub node: String,
    /// When it is forgotten, unless it is found again.
    pub until: Timestamp,
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let until = self.until.strftime("%H:%M UTC");
        write!(f, "a host outside the cluster, MAC {}, until {until}", self.mac)
    }
}

/// Why a host is not heeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excess {
    /// The Service was given other addresses as often as is allowed.
    Moves,
    /// The host keeps as many addresses as it may.
    Host,
    /// The hosts of the subnet keep as many addresses as they may.
    Subnet,
}

/// The hosts that are heeded, by address, and what was spent on them.
#[derive(Debug, Default)]
pub struct Strangers {
    known: BTreeMap<IpAddr, Stranger>,
    moves: HashMap<ServiceKey, Vec<Timestamp>>,
}

impl Strangers {
    /// The hosts that are heeded, each by the address it has.
    pub const fn all(&self) -> &BTreeMap<IpAddr, Stranger> {
        &self.known
    }

    /// Takes note of a host that `node` found to have an address of `service`, if the budget allows: then the Service is to
    /// be given another. `pool` is where the address comes from, as far as it is ours.
    ///
    /// # Errors
    /// Why it is not heeded.
    pub fn heed(
        &mut self,
        (service, ip, mac, node): (&ServiceKey, IpAddr, Mac, &str),
        pool: Option<&Pool>,
        now: Timestamp,
    ) -> Result<(), Excess> {
        if self.known.contains_key(&ip) {
            return Ok(());
        }
        let is_recent = |moved: &Timestamp| now.duration_since(*moved).unsigned_abs() < KEPT;
        self.moves.retain(|_, times| {
            times.retain(is_recent);
            !times.is_empty()
        });
        if self.moves.get(service).is_some_and(|times| times.len() >= MOVES) {
            return Err(Excess::Moves);
        }
        // Of addresses that a provider gives out nobody knows how many there are: then it is the least.
        let share = pool.map_or(LEAST_SHARE, |pool| share(pool.range.size()));
        let of_host = self.known.values().filter(|stranger| stranger.mac == mac).count();
        let around = IpNet::new(ip, if ip.is_ipv4() { 24 } else { 64 }).ok();
        let subnet = pool.map(|pool| pool.subnet).or(around);
        let is_near = |ip: &IpAddr| subnet.is_some_and(|subnet| subnet.contains(ip));
        let of_subnet = self.known.keys().filter(|known| is_near(known)).count();
        for (count, excess) in [(of_host, Excess::Host), (of_subnet, Excess::Subnet)] {
            if u64::try_from(count).unwrap_or(u64::MAX) >= share {
                return Err(excess);
            }
        }
        self.moves.entry(service.clone()).or_default().push(now);
        let stranger = Stranger {
            mac,
            node: node.to_owned(),
            until: now.saturating_add(KEPT).unwrap_or(Timestamp::MAX),
        };
        self.known.insert(ip, stranger);
        Ok(())
    }

    /// Forgets the host that has an address. Returns whether there was one.
    pub fn forget(&mut self, ip: IpAddr) -> bool {
        self.known.remove(&ip).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool() -> Pool {
        Pool::parse("10.0.0.0-10.0.0.31", "10.0.0.0/24", None).unwrap()
    }

    fn at(minutes: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + minutes * 60).unwrap()
    }

    /// Those whose time is over, which the controller forgets one by one.
    fn due(strangers: &Strangers, now: Timestamp) -> Vec<IpAddr> {
        let due = strangers.all().iter().filter(|(_, stranger)| stranger.until <= now);
        due.map(|(ip, _)| *ip).collect()
    }

    fn heed(strangers: &mut Strangers, who: u8, host: u8, last: u8, minutes: i64) -> Result<(), Excess> {
        let (service, mac) = (ServiceKey::new("ns", who.to_string()), Mac([2, 0, 0, 0, 0, host]));
        strangers.heed(
            (&service, IpAddr::from([10, 0, 0, last]), mac, "n"),
            Some(&pool()),
            at(minutes),
        )
    }

    #[test]
    fn a_share_is_four_addresses_or_a_twentieth_but_not_more_than_a_quarter() {
        for (size, expected) in [
            (1, 1),
            (2, 1),
            (4, 1),
            (8, 2),
            (12, 3),
            (16, 4),
            (32, 4),
            (100, 5),
            (1000, 50),
        ] {
            assert_eq!(share(size), expected, "of {size}");
        }
        assert!(share(u64::MAX) > 1 << 59);
    }

    #[test]
    fn a_service_moves_twice_in_ten_minutes_and_again_when_they_are_over() {
        let mut strangers = Strangers::default();
        for (host, minutes, expected) in [
            (1, 0, Ok(())),
            (2, 1, Ok(())),
            (3, 2, Err(Excess::Moves)),
            (3, 9, Err(Excess::Moves)),
            (3, 10, Ok(())),
            (4, 10, Err(Excess::Moves)),
            (4, 11, Ok(())),
        ] {
            for ip in due(&strangers, at(minutes)) {
                strangers.forget(ip);
            }
            assert_eq!(
                heed(&mut strangers, 0, host, host, minutes),
                expected,
                "host {host}, minute {minutes}"
            );
        }
    }

    #[test]
    fn neither_one_host_nor_many_of_a_subnet_keep_more_than_their_share() {
        let mut strangers = Strangers::default();
        let one = (0..6).map(|n| heed(&mut strangers, n, 1, n, 0)).collect::<Vec<_>>();
        assert_eq!(
            one,
            [Ok(()), Ok(()), Ok(()), Ok(()), Err(Excess::Host), Err(Excess::Host)]
        );
        let mut strangers = Strangers::default();
        let many = (0..5).map(|n| heed(&mut strangers, n, n, n, 0)).collect::<Vec<_>>();
        assert_eq!(many, [Ok(()), Ok(()), Ok(()), Ok(()), Err(Excess::Subnet)]);
        // What is known is no news, and costs nothing.
        assert_eq!(heed(&mut strangers, 9, 0, 0, 0), Ok(()));
        assert_eq!(strangers.all().len(), 4);
        assert!(strangers.forget(IpAddr::from([10, 0, 0, 0])));
        assert_eq!(heed(&mut strangers, 7, 7, 7, 0), Ok(()), "one is gone");
    }

    #[test]
    fn of_addresses_that_a_provider_gives_out_a_host_keeps_the_least_share() {
        let mut strangers = Strangers::default();
        let heeded = (0..8u8).map(|n| {
            let (service, mac) = (ServiceKey::new("ns", n.to_string()), Mac([2, 0, 0, 0, 0, n]));
            strangers
                .heed((&service, IpAddr::from([192, 0, 2, n]), mac, "n"), None, at(0))
                .is_ok()
        });
        assert_eq!(heeded.filter(|is_heeded| *is_heeded).count(), 4);
    }

    proptest! {
        /// Whatever hosts say: no Service moves more than twice in ten minutes, and the pool keeps its share.
        #[test]
        fn no_host_takes_more_than_the_budget(said in prop::collection::vec((0u8..6, 0u8..4, 0u8..32, 0i64..4), 0..200)) {
            let mut strangers = Strangers::default();
            let (mut minutes, mut moves) = (0, Vec::new());
            for (who, host, last, pause) in said {
                minutes += pause;
                for ip in due(&strangers, at(minutes)) {
                    strangers.forget(ip);
                }
                let is_known = strangers.all().contains_key(&IpAddr::from([10, 0, 0, last]));
                if heed(&mut strangers, who, host, last, minutes).is_ok() && !is_known {
                    moves.push((who, minutes));
                }
                let recent = moves.iter().filter(|(of, when)| *of == who && minutes - when < 10).count();
                prop_assert!(recent <= MOVES);
                prop_assert!(strangers.all().len() <= 4);
            }
        }
    }
}

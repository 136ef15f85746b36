//! What Services bring to an address, and who holds it.
//!
//! There is one of each for every Service, so that they take no more room than they need.

use std::fmt;

use crds::ServiceKey;
use smol_str::SmolStr;

/// A port of a Service as clients see it; its target and node ports play no part in sharing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: SmolStr,
    /// The number.
    pub number: i32,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.protocol, self.number)
    }
}

/// What a Service brings to an address it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Services with equal keys may share an address.
    pub sharing_key: Option<String>,
    /// The ports it listens on.
    pub ports: Ports,
}

/// Ports, sorted, each once. Every Service has a few and keeps them as long as it lives: a set of the standard
/// library takes up room for eleven.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports(Box<[Port]>);

impl Ports {
    /// The lowest port that is in both.
    pub fn common(&self, other: &Self) -> Option<&Port> {
        self.0.iter().find(|port| other.0.binary_search(port).is_ok())
    }

    /// Whether no port is in both.
    pub fn is_disjoint(&self, other: &Self) -> bool {
        self.common(other).is_none()
    }

    /// The ports, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &Port> {
        self.0.iter()
    }
}

impl FromIterator<Port> for Ports {
    fn from_iter<I: IntoIterator<Item = Port>>(ports: I) -> Self {
        let mut ports: Vec<Port> = ports.into_iter().collect();
        ports.sort_unstable();
        ports.dedup();
        Self(ports.into())
    }
}

/// Who holds an address, sorted, each with what it brings. Nearly always it is one, and room is taken for as many
/// as there are.
#[derive(Debug, Default)]
pub(crate) struct Holders(Vec<(ServiceKey, Claim)>);

impl Holders {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ServiceKey, &Claim)> {
        self.0.iter().map(|(holder, claim)| (holder, claim))
    }

    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn place(&self, service: &ServiceKey) -> Result<usize, usize> {
        self.0.binary_search_by(|(holder, _)| holder.cmp(service))
    }

    pub(crate) fn get(&self, service: &ServiceKey) -> Option<&Claim> {
        let (_, claim) = self.0.get(self.place(service).ok()?)?;
        Some(claim)
    }

    /// Makes `service` a holder, and returns what it brought before.
    pub(crate) fn insert(&mut self, service: &ServiceKey, claim: Claim) -> Option<Claim> {
        match self.place(service) {
            Ok(place) => {
                let (_, held) = self.0.get_mut(place)?;
                Some(std::mem::replace(held, claim))
            }
            Err(place) => {
                // One at a time, but for an address that thousands share.
                if self.0.len() < 8 {
                    self.0.reserve_exact(1);
                }
                self.0.insert(place, (service.clone(), claim));
                None
            }
        }
    }

    pub(crate) fn remove(&mut self, service: &ServiceKey) -> Option<Claim> {
        let place = self.place(service).ok()?;
        Some(self.0.remove(place).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(numbers: &[i32]) -> Ports {
        let port = |number: &i32| Port {
            protocol: "TCP".into(),
            number: *number,
        };
        numbers.iter().map(port).collect()
    }

    #[test]
    fn ports_are_a_set() {
        assert_eq!(ports(&[443, 80, 80]), ports(&[80, 443]));
        assert_eq!(ports(&[1, 2, 3]).common(&ports(&[9, 3, 2])).unwrap().number, 2);
        assert!(ports(&[1, 3]).is_disjoint(&ports(&[2, 4])));
        assert!(ports(&[]).is_disjoint(&ports(&[2])));
    }

    #[test]
    fn an_address_has_each_holder_once() {
        let mut holders = Holders::default();
        let claim = |number| Claim {
            sharing_key: None,
            ports: ports(&[number]),
        };
        let keys: Vec<ServiceKey> = (0..20).map(|i| ServiceKey::new("ns", format!("{i:02}"))).collect();
        for key in keys.iter().rev() {
            assert_eq!(holders.insert(key, claim(1)), None);
        }
        assert!(holders.iter().map(|(holder, _)| holder).eq(&keys), "sorted");
        assert_eq!(holders.insert(&keys[7], claim(2)), Some(claim(1)));
        assert_eq!(holders.get(&keys[7]), Some(&claim(2)));
        assert_eq!(holders.remove(&keys[7]), Some(claim(2)));
        assert_eq!((holders.remove(&keys[7]), holders.len()), (None, 19));
    }
}

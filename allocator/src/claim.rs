//! What Services bring to an address, and who holds it.
//!
//! There is one of each for every Service, so that they take no more room than they need.

use std::collections::BTreeMap;
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
    /// How it shares its address; `None` where it does not.
    pub sharing: Option<Box<Sharing>>,
    /// The ports it listens on.
    pub ports: Ports,
    /// Another controller gave it its addresses: they are in use, and it is not ours to move them.
    pub is_foreign: bool,
}

/// How a Service shares its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// Services of a namespace with equal keys may share an address.
    pub key: String,
    /// Other namespaces, or `*` for all, whose Services may share with it, if they name its namespace as well.
    pub namespaces: Vec<SmolStr>,
    /// Which endpoints serve it.
    pub endpoints: Endpoints,
}

/// The endpoints that serve what arrives on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Endpoints {
    /// All, wherever they are: `externalTrafficPolicy: Cluster`.
    #[default]
    Everywhere,
    /// Those of that node (`externalTrafficPolicy: Local`), so that it matters which node has the address.
    OnTheNode {
        /// Selects the Pods. Empty: whoever writes the EndpointSlices decides.
        selector: BTreeMap<String, String>,
        /// It stays so on local addresses too, where it becomes `Cluster` otherwise.
        is_kept: bool,
    },
}

/// What keeps two Services from sharing an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Not both have the same key.
    Key,
    /// They are of different namespaces, and not both name the other's.
    Namespace,
    /// Both have this port.
    Port(Port),
    /// One serves from the endpoints of the node only, and the other not from the same.
    Endpoints,
}

impl Claim {
    /// The key by which it shares its address.
    pub fn sharing_key(&self) -> Option<&str> {
        self.sharing.as_ref().map(|sharing| sharing.key.as_str())
    }

    /// Whether two Services have the same key, and each may share with the namespace of the other.
    pub(crate) fn is_mate(&self, own: &ServiceKey, other: &Self, of: &ServiceKey) -> bool {
        match (&self.sharing, &other.sharing) {
            (Some(one), Some(two)) => one.key == two.key && one.admits(own, of) && two.admits(of, own),
            _ => false,
        }
    }

    /// What keeps two Services from sharing an address. `is_local`: it is announced on the interface of one node, where
    /// `externalTrafficPolicy: Local` becomes `Cluster` unless its author insists.
    pub(crate) fn obstacle(&self, own: &ServiceKey, other: &Self, of: &ServiceKey, is_local: bool) -> Option<Obstacle> {
        let (Some(one), Some(two)) = (&self.sharing, &other.sharing) else {
            return Some(Obstacle::Key);
        };
        if one.key != two.key {
            return Some(Obstacle::Key);
        }
        if !(one.admits(own, of) && two.admits(of, own)) {
            return Some(Obstacle::Namespace);
        }
        if let Some(port) = other.ports.common(&self.ports) {
            return Some(Obstacle::Port(port.clone()));
        }
        let is_same = match (one.endpoints.on_the_node(is_local), two.endpoints.on_the_node(is_local)) {
            (None, None) => true,
            (Some(one), Some(two)) => own.namespace == of.namespace && !one.is_empty() && one == two,
            _ => false,
        };
        (!is_same).then_some(Obstacle::Endpoints)
    }

    /// How much harm two Services on one address do each other: none, none yet, or that one has the other's traffic.
    pub(crate) fn harm(&self, own: &ServiceKey, other: &Self, of: &ServiceKey, is_local: bool) -> Harm {
        match self.obstacle(own, other, of, is_local) {
            None => Harm::None,
            Some(_) if self.ports.is_disjoint(&other.ports) => Harm::Bearable,
            Some(_) => Harm::Traffic,
        }
    }

    /// Whether two that shared an address before may go on though a rule came that they do not meet.
    pub(crate) fn may_go_on(&self, other: &Self) -> bool {
        self.sharing_key().is_some()
            && self.sharing_key() == other.sharing_key()
            && self.ports.is_disjoint(&other.ports)
    }

    /// Whether a claim that was `self` still shares as it did: its ports, and whom it names, may have changed.
    pub(crate) fn shares_like(&self, now: &Self) -> bool {
        match (&self.sharing, &now.sharing) {
            (Some(one), Some(two)) => one.key == two.key && one.endpoints == two.endpoints,
            (None, None) => true,
            _ => false,
        }
    }
}

/// How much harm two Services on one address do each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Harm {
    /// They share it.
    None,
    /// They may not share it, but all their ports differ.
    Bearable,
    /// One gets what is meant for the other.
    Traffic,
}

impl Sharing {
    fn admits(&self, own: &ServiceKey, other: &ServiceKey) -> bool {
        let is_named = |name: &SmolStr| name == "*" || *name == other.namespace;
        own.namespace == other.namespace || self.namespaces.iter().any(is_named)
    }
}

impl Endpoints {
    /// The selector, where it matters which node has the address.
    const fn on_the_node(&self, is_local: bool) -> Option<&BTreeMap<String, String>> {
        match self {
            Self::OnTheNode { selector, is_kept } if *is_kept || !is_local => Some(selector),
            _ => None,
        }
    }
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

/// One of those who hold an address.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) service: ServiceKey,
    pub(crate) claim: Claim,
    /// The lower of two was here first with a claim that did not harm the other.
    pub(crate) turn: u64,
    /// It was here when the ledger was made.
    pub(crate) is_old: bool,
}

/// Who holds an address, sorted, each with what it brings. Nearly always it is one, and room is taken for as many
/// as there are.
#[derive(Debug, Default)]
pub(crate) struct Holders(Vec<Holder>);

impl Holders {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Holder> {
        self.0.iter()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Holder> {
        self.0.iter_mut()
    }

    pub(crate) const fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn place(&self, service: &ServiceKey) -> Result<usize, usize> {
        self.0.binary_search_by(|holder| holder.service.cmp(service))
    }

    pub(crate) fn get(&self, service: &ServiceKey) -> Option<&Holder> {
        self.0.get(self.place(service).ok()?)
    }

    /// Makes `service` a holder, and returns what it brought before. It is the last to have come, unless it was here and
    /// what it brings now does no other more harm than before.
    pub(crate) fn insert(&mut self, service: &ServiceKey, claim: Claim, turn: u64, is_local: bool) -> Option<Claim> {
        match self.place(service) {
            Ok(place) => {
                let held = &self.0.get(place)?.claim;
                let is_worse = |other: &Holder| {
                    let harm = |claim: &Claim| claim.harm(service, &other.claim, &other.service, is_local);
                    other.service != *service && harm(&claim) > harm(held)
                };
                let is_worse = *held != claim && self.iter().any(is_worse);
                let held = self.0.get_mut(place)?;
                held.is_old &= held.claim.shares_like(&claim);
                if is_worse {
                    held.turn = turn;
                }
                Some(std::mem::replace(&mut held.claim, claim))
            }
            Err(place) => {
                // One at a time, but for an address that thousands share.
                if self.0.len() < 8 {
                    self.0.reserve_exact(1);
                }
                let holder = Holder {
                    service: service.clone(),
                    claim,
                    turn,
                    is_old: false,
                };
                self.0.insert(place, holder);
                None
            }
        }
    }

    pub(crate) fn remove(&mut self, service: &ServiceKey) -> Option<Claim> {
        let place = self.place(service).ok()?;
        Some(self.0.remove(place).claim)
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
            ports: ports(&[number]),
            ..Claim::default()
        };
        let keys: Vec<ServiceKey> = (0..20).map(|i| ServiceKey::new("ns", format!("{i:02}"))).collect();
        for key in keys.iter().rev() {
            assert_eq!(holders.insert(key, claim(1), 0, false), None);
        }
        assert!(holders.iter().map(|holder| &holder.service).eq(&keys), "sorted");
        assert_eq!(holders.insert(&keys[7], claim(2), 1, false), Some(claim(1)));
        assert_eq!(holders.get(&keys[7]).unwrap().claim, claim(2));
        assert_eq!(holders.remove(&keys[7]), Some(claim(2)));
        assert_eq!((holders.remove(&keys[7]), holders.len()), (None, 19));
    }
}

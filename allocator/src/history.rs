//! Who had which address when: what outlives events, which the API server keeps for an hour, and the allocator itself.
//!
//! It lies in `ConfigMap`s of the install namespace that the allocator alone writes, two rings of [`SEGMENTS`] objects each: one of
//! addresses given and taken, one of their moves between nodes, so that what nodes say pushes out nothing but what nodes said. An
//! object holds up to [`MOST_ENTRIES`] entries and [`MOST_BYTES`] bytes, one entry of JSON on a line; when it is full the oldest of
//! its ring is written over. So three quarters of a ring are remembered at least. A write rewrites one object, and carries all that
//! has come in some seconds.
//!
//! The Services stay the ledger: nothing is decided on what is read here. What an allocator did not live to write is found by the next
//! one when it compares the history with the Services, and is marked as noticed then.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use crds::ServiceKey;
use crds::event::cut;
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

/// How many objects a ring has.
pub const SEGMENTS: usize = 4;
/// How many entries an object has at most.
pub const MOST_ENTRIES: usize = 1_000;
/// How many bytes the entries of an object have at most.
pub const MOST_BYTES: usize = 128 * 1024;
/// How the names of the objects begin: the ring's name and a number follow.
pub const PREFIX: &str = "purelb-history-";
/// The rings.
pub const RINGS: [&str; 2] = ["given", "moved"];
/// The key of the entries in an object's data.
pub const ENTRIES: &str = "entries";
/// The key of the number by which the objects of a ring are in order: the highest is written.
pub const NUMBER: &str = "number";
/// How long a word of a node is at most, and the name of one.
const LONGEST_WORD: usize = 32;
const LONGEST_NAME: usize = 253;

/// Something that became of an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When.
    pub time: Timestamp,
    /// The address.
    pub ip: IpAddr,
    /// What became of it.
    #[serde(flatten)]
    pub what: What,
}

/// What became of an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum What {
    /// A Service got it.
    Given {
        /// The Service, as `namespace/name`.
        service: String,
        /// The ServiceGroup it came from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<String>,
        /// It was found so when an allocator started, which does not know exactly when.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        noticed: bool,
    },
    /// A Service has it no more.
    Taken {
        /// The Service, as `namespace/name`.
        service: String,
        /// It was found so when an allocator started, which does not know exactly when.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        noticed: bool,
    },
    /// It moved to another node.
    Moved {
        /// The node that had it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<String>,
        /// The node that has it since, which says so.
        to: String,
        /// Why.
        cause: String,
        /// How long nobody answered for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        milliseconds: Option<u32>,
    },
}

/// A move, as the node says it that an address moved to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// When.
    pub time: Timestamp,
    /// The address.
    pub ip: IpAddr,
    /// The node that had it.
    pub from: Option<String>,
    /// Why.
    pub cause: String,
    /// How long nobody answered for it.
    pub milliseconds: Option<u32>,
}

/// The name of an object of a ring.
pub fn name(ring: usize, segment: usize) -> String {
    format!("{PREFIX}{}-{segment}", RINGS.get(ring).copied().unwrap_or_default())
}

/// The names of all objects.
pub fn names() -> impl Iterator<Item = String> {
    (0..RINGS.len()).flat_map(|ring| (0..SEGMENTS).map(move |segment| name(ring, segment)))
}

/// The entries of a text; what does not read is left out.
pub fn entries(text: &str) -> impl Iterator<Item = Entry> {
    text.lines()
        .take(MOST_ENTRIES)
        .filter_map(|line| serde_json::from_str(line).ok())
}

/// An object as the API server has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Its number.
    pub number: u64,
    /// Its entries, one on each line.
    pub entries: String,
    /// Its resourceVersion.
    pub version: Option<String>,
}

#[derive(Debug, Default)]
struct Segment {
    number: u64,
    entries: Vec<Entry>,
    bytes: usize,
    version: Option<String>,
    is_unsaved: bool,
}

impl Segment {
    fn text(&self) -> String {
        let lines = self
            .entries
            .iter()
            .filter_map(|entry| serde_json::to_string(entry).ok());
        lines.fold(String::with_capacity(self.bytes), |text, line| text + &line + "\n")
    }
}

#[derive(Debug, Default)]
struct Ring {
    segments: [Segment; SEGMENTS],
    current: usize,
}

impl Ring {
    fn entries(&self) -> impl Iterator<Item = &Entry> {
        let mut order: Vec<&Segment> = self.segments.iter().collect();
        order.sort_by_key(|segment| segment.number);
        order.into_iter().flat_map(|segment| &segment.entries)
    }

    /// Whether entries were written over.
    fn has_forgotten(&self) -> bool {
        let most = self
            .segments
            .iter()
            .map(|segment| segment.number)
            .max()
            .unwrap_or_default();
        most >= SEGMENTS as u64
    }

    /// Returns whether older ones had to go.
    fn push(&mut self, entry: Entry) -> bool {
        let length = serde_json::to_string(&entry).map_or(0, |line| line.len() + 1);
        let number = self.segments.get(self.current).map_or(0, |segment| segment.number);
        let is_full = self
            .segments
            .get(self.current)
            .is_some_and(|segment| segment.entries.len() >= MOST_ENTRIES || segment.bytes + length > MOST_BYTES);
        let mut has_forgotten = false;
        if is_full {
            self.current = (self.current + 1) % SEGMENTS;
            if let Some(segment) = self.segments.get_mut(self.current) {
                has_forgotten = !segment.entries.is_empty();
                segment.entries.clear();
                (segment.bytes, segment.number) = (0, number + 1);
            }
        }
        if let Some(segment) = self.segments.get_mut(self.current) {
            segment.entries.push(entry);
            segment.bytes += length;
            segment.is_unsaved = true;
        }
        has_forgotten
    }

    fn read(saved: impl IntoIterator<Item = Saved>) -> Self {
        let mut ring = Self::default();
        for (segment, saved) in ring.segments.iter_mut().zip(saved) {
            segment.entries = entries(&saved.entries).collect();
            (segment.number, segment.version) = (saved.number, saved.version);
            segment.bytes = segment.text().len();
        }
        let current = ring
            .segments
            .iter()
            .enumerate()
            .rev()
            .max_by_key(|(_, segment)| (segment.number, segment.entries.len()));
        ring.current = current.map_or(0, |(place, _)| place);
        ring
    }
}

/// A ring, and the place of an object in it.
pub type Place = (usize, usize);

/// An object to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Its ring and its place there.
    pub place: Place,
    /// What is to be in it; the version is that which it is written over, none where it is not there.
    pub saved: Saved,
}

/// Who has an address, since when where the Service says so, and from which group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Held {
    since: Option<Timestamp>,
    addresses: Vec<(IpAddr, Option<SmolStr>)>,
}

/// Who had which address when.
#[derive(Debug, Default)]
pub struct History {
    given: Ring,
    moved: Ring,
    held: BTreeMap<ServiceKey, Held>,
    /// Moves that are in the ring.
    moves: HashSet<(Timestamp, IpAddr, String)>,
    is_known: bool,
}

impl History {
    /// Whether the objects were read: before that nothing is written.
    pub const fn is_known(&self) -> bool {
        self.is_known
    }

    /// Takes note of the addresses that a Service has, with the groups they are from. `since` is when its record was first made.
    /// Returns whether there is something new to write.
    pub fn hold(
        &mut self,
        service: &ServiceKey,
        addresses: &[(IpAddr, Option<String>)],
        since: Option<Timestamp>,
        now: Timestamp,
    ) -> bool {
        let of_group = |(ip, group): &(IpAddr, Option<String>)| (*ip, group.as_deref().map(SmolStr::from));
        let has = Held {
            since,
            addresses: addresses.iter().map(of_group).collect(),
        };
        let had = if has.addresses.is_empty() {
            self.held.remove(service)
        } else {
            self.held.insert(service.clone(), has.clone())
        };
        let had = had.unwrap_or_default();
        if !self.is_known {
            return false;
        }
        let is_in = |of: &Held, ip: IpAddr| of.addresses.iter().any(|(known, _)| *known == ip);
        let mut news = Vec::new();
        for (ip, _) in had.addresses.iter().filter(|(ip, _)| !is_in(&has, *ip)) {
            news.push(taken(service, *ip, now, false));
        }
        for (ip, group) in has.addresses.iter().filter(|(ip, _)| !is_in(&had, *ip)) {
            news.push(given(service, *ip, group.as_deref(), now, false));
        }
        let is_news = !news.is_empty();
        for entry in news {
            self.given.push(entry);
        }
        is_news
    }

    /// Takes note of the moves that a node says. Returns whether there is something new to write.
    pub fn hear(&mut self, node: &str, moves: &[Moved], now: Timestamp) -> bool {
        if !self.is_known {
            return false;
        }
        let oldest = if self.moved.has_forgotten() {
            self.moved.entries().map(|entry| entry.time).min()
        } else {
            None
        };
        let mut new: Vec<&Moved> = moves
            .iter()
            .filter(|moved| oldest.is_none_or(|oldest| moved.time > oldest))
            // A clock that is ahead is no prophet.
            .filter(|moved| moved.time.duration_since(now).as_secs() < 60)
            .collect();
        new.sort_by_key(|moved| moved.time);
        let mut is_news = false;
        for moved in new {
            if !self.moves.insert((moved.time, moved.ip, node.to_owned())) {
                continue;
            }
            is_news = true;
            let entry = Entry {
                time: moved.time,
                ip: moved.ip,
                what: What::Moved {
                    from: moved.from.as_deref().map(|from| cut(from, LONGEST_NAME)),
                    to: cut(node, LONGEST_NAME),
                    cause: cut(&moved.cause, LONGEST_WORD),
                    milliseconds: moved.milliseconds,
                },
            };
            if self.moved.push(entry) {
                self.remember_moves();
            }
        }
        is_news
    }

    fn remember_moves(&mut self) {
        let moves = self.moved.entries().filter_map(|entry| match &entry.what {
            What::Moved { to, .. } => Some((entry.time, entry.ip, to.clone())),
            _ => None,
        });
        self.moves = moves.collect();
    }

    /// Takes in the objects as the API server has them, in the order of [`names`], and notes what has come to differ from the
    /// Services since. Returns whether there is something new to write.
    pub fn know(&mut self, saved: Vec<Saved>, now: Timestamp) -> bool {
        let mut saved = saved.into_iter();
        self.given = Ring::read(saved.by_ref().take(SEGMENTS));
        self.moved = Ring::read(saved);
        self.remember_moves();
        self.is_known = true;

        let newest = self.given.entries().map(|entry| entry.time).max();
        let has_forgotten = self.given.has_forgotten();
        let mut known: BTreeSet<(IpAddr, String)> = BTreeSet::new();
        for entry in self.given.entries() {
            match &entry.what {
                What::Given { service, .. } => _ = known.insert((entry.ip, service.clone())),
                What::Taken { service, .. } => _ = known.remove(&(entry.ip, service.clone())),
                What::Moved { .. } => {}
            }
        }
        let mut news = Vec::new();
        for (service, held) in &self.held {
            let name = service.to_string();
            for (ip, group) in &held.addresses {
                if known.remove(&(*ip, name.clone())) {
                    continue;
                }
                let later = held.since.filter(|since| newest.is_none_or(|newest| *since > newest));
                // It may have had it for longer than the ring remembers.
                if later.is_none() && has_forgotten {
                    continue;
                }
                news.push(given(service, *ip, group.as_deref(), later.unwrap_or(now), true));
            }
        }
        for (ip, service) in known {
            let (namespace, name) = service.split_once('/').unwrap_or(("", &service));
            news.push(taken(&ServiceKey::new(namespace, name), ip, now, true));
        }
        news.sort_by_key(|entry| entry.time);
        let is_news = !news.is_empty();
        for entry in news {
            self.given.push(entry);
        }
        is_news
    }

    /// Whether there is nothing to write.
    pub fn is_saved(&self) -> bool {
        let mut segments = self.given.segments.iter().chain(&self.moved.segments);
        !segments.any(|segment| segment.is_unsaved)
    }

    /// The objects that have to be written.
    pub fn unsaved(&mut self) -> Vec<Write> {
        let mut writes = Vec::new();
        for (ring, of) in [&mut self.given, &mut self.moved].into_iter().enumerate() {
            for (place, segment) in of.segments.iter_mut().enumerate() {
                if std::mem::take(&mut segment.is_unsaved) {
                    let saved = Saved {
                        number: segment.number,
                        entries: segment.text(),
                        version: segment.version.clone(),
                    };
                    writes.push(Write {
                        place: (ring, place),
                        saved,
                    });
                }
            }
        }
        writes
    }

    /// Takes note of what became of a write: the version it made, or none where it failed and is to be tried again.
    pub fn written(&mut self, (ring, place): Place, version: Option<String>) {
        let ring = if ring == 0 { &mut self.given } else { &mut self.moved };
        if let Some(segment) = ring.segments.get_mut(place) {
            match version {
                Some(version) => segment.version = Some(version),
                None => segment.is_unsaved = true,
            }
        }
    }

    /// All entries, given and taken before moved.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.given.entries().chain(self.moved.entries())
    }
}

fn given(service: &ServiceKey, ip: IpAddr, group: Option<&str>, time: Timestamp, noticed: bool) -> Entry {
    let (service, group) = (service.to_string(), group.map(ToOwned::to_owned));
    let what = What::Given {
        service,
        group,
        noticed,
    };
    Entry { time, ip, what }
}

fn taken(service: &ServiceKey, ip: IpAddr, time: Timestamp, noticed: bool) -> Entry {
    let service = service.to_string();
    let what = What::Taken { service, noticed };
    Entry { time, ip, what }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    fn ip(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    fn web(number: u32) -> ServiceKey {
        ServiceKey::new("shop", format!("web{number}"))
    }

    fn has(number: u32) -> Vec<(IpAddr, Option<String>)> {
        vec![(ip(number), Some("default".to_owned()))]
    }

    /// The API server: what was written is there.
    #[derive(Default)]
    struct Server {
        saved: BTreeMap<(usize, usize), Saved>,
        writes: usize,
    }

    impl Server {
        fn take(&mut self, history: &mut History) {
            for write in history.unsaved() {
                self.writes += 1;
                let known = self.saved.get(&write.place).and_then(|saved| saved.version.clone());
                assert_eq!(known, write.saved.version, "written over what it was not made from");
                assert!(write.saved.entries.len() <= MOST_BYTES && write.saved.entries.lines().count() <= MOST_ENTRIES);
                let version = Some(self.writes.to_string());
                self.saved.insert(
                    write.place,
                    Saved {
                        version: version.clone(),
                        ..write.saved
                    },
                );
                history.written(write.place, version);
            }
        }

        fn all(&self) -> Vec<Saved> {
            let places = (0..RINGS.len()).flat_map(|ring| (0..SEGMENTS).map(move |place| (ring, place)));
            places
                .map(|place| self.saved.get(&place).cloned().unwrap_or_default())
                .collect()
        }

        fn next(&self, held: impl IntoIterator<Item = (ServiceKey, u32, i64)>, now: i64) -> History {
            let mut history = History::default();
            for (key, number, since) in held {
                assert!(!history.hold(&key, &has(number), Some(at(since)), at(now)));
            }
            history.know(self.all(), at(now));
            history
        }
    }

    fn shown(history: &History) -> Vec<String> {
        let line = |entry: &Entry| {
            let seconds = entry.time.as_second() - 1_700_000_000;
            let ip = entry.ip;
            match &entry.what {
                What::Given { service, noticed, .. } => format!("{seconds} {ip} given {service} {noticed}"),
                What::Taken { service, noticed } => format!("{seconds} {ip} taken {service} {noticed}"),
                What::Moved { from, to, cause, .. } => format!("{seconds} {ip} {from:?} {to} {cause}"),
            }
        };
        history.entries().map(line).collect()
    }

    #[test]
    fn what_was_given_and_taken_outlives_the_allocator() {
        let mut server = Server::default();
        let mut history = server.next([], 0);
        assert!(history.hold(&web(1), &has(1), None, at(1)));
        assert!(!history.hold(&web(1), &has(1), None, at(2)));
        assert!(history.hold(&web(1), &has(2), None, at(3)));
        server.take(&mut history);
        let expected = [
            "1 10.0.0.1 given shop/web1 false",
            "3 10.0.0.1 taken shop/web1 false",
            "3 10.0.0.2 given shop/web1 false",
        ];
        assert_eq!(shown(&history), expected);
        // Nothing is news to the next one.
        let mut next = server.next([(web(1), 2, 1)], 10);
        assert_eq!(shown(&next), expected);
        assert_eq!(next.unsaved(), []);
        assert!(next.hold(&web(1), &[], None, at(11)));
        assert_eq!(shown(&next).last().unwrap(), "11 10.0.0.2 taken shop/web1 false");
    }

    #[test]
    fn what_nobody_lived_to_write_is_noticed() {
        let mut server = Server::default();
        let mut history = server.next([(web(1), 1, -50)], 0);
        assert_eq!(shown(&history), ["-50 10.0.0.1 given shop/web1 true"]);
        history.hold(&web(2), &has(2), None, at(5));
        server.take(&mut history);
        // The first has lost its address meanwhile, a third has got one, and the second has another.
        let next = server.next([(web(3), 3, 20), (web(2), 4, 5)], 30);
        assert_eq!(
            shown(&next)[2..],
            [
                "20 10.0.0.3 given shop/web3 true",
                "30 10.0.0.4 given shop/web2 true",
                "30 10.0.0.1 taken shop/web1 true",
                "30 10.0.0.2 taken shop/web2 true"
            ]
        );
    }

    #[test]
    fn it_is_bounded_and_the_latest_is_kept() {
        let mut server = Server::default();
        let mut history = server.next([], 0);
        for number in 0..20_000 {
            history.hold(&web(number), &has(number), None, at(number.into()));
            if number % 700 == 0 {
                server.take(&mut history);
            }
        }
        server.take(&mut history);
        let bytes: usize = server.saved.values().map(|saved| saved.entries.len()).sum();
        assert!(bytes <= SEGMENTS * MOST_BYTES, "{bytes}");
        assert_eq!(server.saved.len(), SEGMENTS);
        let lines = shown(&history);
        assert!(
            (3 * MOST_ENTRIES..=SEGMENTS * MOST_ENTRIES).contains(&lines.len()),
            "{}",
            lines.len()
        );
        assert!(lines.last().unwrap().starts_with("19999 "), "{lines:?}");
        let sorted = history.entries().map(|entry| entry.time).collect::<Vec<_>>();
        assert!(sorted.is_sorted());
        // What it does not remember any more was given long ago, and is not given again.
        let all = (0..20_000).map(|number| (web(number), number, i64::from(number)));
        let mut next = server.next(all, 30_000);
        assert_eq!(shown(&next), lines);
        assert_eq!(next.unsaved(), []);
    }

    #[test]
    fn many_at_once_cost_a_few_writes() {
        let mut server = Server::default();
        let mut history = server.next([], 0);
        for number in 0..2_000 {
            history.hold(&web(number), &has(number), None, at(1));
        }
        server.take(&mut history);
        assert!(server.writes <= 3, "{}", server.writes);
    }

    #[test]
    fn moves_are_taken_once_and_push_out_nothing_but_moves() {
        let moved = |second: i64, number: u32| Moved {
            time: at(second),
            ip: ip(number),
            from: Some("a".repeat(1_000)),
            cause: "silent".repeat(100),
            milliseconds: Some(101),
        };
        let mut server = Server::default();
        let mut history = server.next([(web(1), 1, 0)], 0);
        assert!(history.hear("b", &[moved(7, 1), moved(5, 2), moved(10_000, 3)], at(8)));
        assert!(!history.hear("b", &[moved(5, 2), moved(7, 1)], at(9)));
        let lines = shown(&history);
        assert!(
            lines[1].starts_with("5 10.0.0.2 ") && lines[2].starts_with("7 10.0.0.1 "),
            "{lines:?}"
        );
        assert_eq!(lines.len(), 3);
        server.take(&mut history);
        let mut next = server.next([(web(1), 1, 0)], 20);
        assert!(
            !next.hear("b", &[moved(7, 1), moved(5, 2)], at(20)),
            "it is known already"
        );
        for number in 0..10_000 {
            next.hear(
                "b",
                &[moved(20 + i64::from(number), number)],
                at(20 + i64::from(number)),
            );
        }
        server.take(&mut next);
        assert_eq!(shown(&next)[0], lines[0]);
        let bytes: usize = server.saved.values().map(|saved| saved.entries.len()).sum();
        assert!(bytes <= (SEGMENTS + 1) * MOST_BYTES, "{bytes}");
        // One that was pushed out does not come back.
        assert!(!next.hear("b", &[moved(7, 1)], at(20_000)));
        assert!(next.moves.len() <= SEGMENTS * MOST_ENTRIES);
    }

    #[test]
    fn what_failed_is_written_again_and_what_does_not_read_is_left_out() {
        let mut history = History::default();
        let broken = Saved {
            entries: "nonsense\n{\"time\":\"2026-01-01T00:00:00Z\",\"ip\":\"10.0.0.1\",\"what\":\"given\",\"service\":\"a/b\"}\n{}\n".to_owned(),
            ..Saved::default()
        };
        assert!(history.know(vec![broken], at(0)), "nobody has it any more");
        let writes = history.unsaved();
        assert_eq!((writes.len(), writes[0].place), (1, (0, 0)));
        assert_eq!(history.unsaved(), []);
        history.written(writes[0].place, None);
        assert_eq!(history.unsaved(), writes);
        assert_eq!(names().count(), RINGS.len() * SEGMENTS);
        assert_eq!(names().next().unwrap(), "purelb-history-given-0");
    }
}

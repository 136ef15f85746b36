use super::*;
use crate::kernel::VipAddress;
use crate::members::Meta;
use crate::plan::Placed;

const NOW: Duration = Duration::from_secs(100);
const SECOND: Duration = Duration::from_secs(1);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn own() -> BTreeSet<IpNet> {
    ["10.0.0.1/24", "2001:db8::1/64"].map(|net| net.parse().unwrap()).into()
}

/// A member with these addresses, all at one Ethernet address.
fn member(name: &str, number: u8, subnets: &[&str]) -> Member {
    let subnets: BTreeSet<IpNet> = subnets.iter().map(|net| net.parse().unwrap()).collect();
    let meta = Meta {
        generation: 1,
        is_answering: true,
        macs: subnets
            .iter()
            .map(|net| (net.addr(), [2, 0, 0, 0, 0, number]))
            .collect(),
        subnets,
        ..Meta::default()
    };
    Member {
        name: name.to_owned(),
        addr: ([10, 0, 0, number], 7934).into(),
        meta,
    }
}

fn living(members: impl IntoIterator<Item = Member>) -> Living {
    members
        .into_iter()
        .map(|member| (member.name.clone(), member))
        .collect()
}

fn beside() -> Member {
    member("beside", 2, &["10.0.0.2/24", "2001:db8::2/64"])
}

fn routed() -> Verdict {
    Verdict::Routed(Placed {
        address: VipAddress::routed(9, ip("10.200.0.1"), 32),
        interface: "kube-lb0".into(),
    })
}

/// One routed address, and one peer, of which the kernel was told.
fn started() -> Flows {
    let mut flows = Flows::default();
    flows.meet(NOW, "this", &own(), &living([beside()]));
    flows.decided(&Scope::All, &[(ip("10.200.0.1"), routed())].into(), |_| Vec::new());
    let news = flows.news(NOW).unwrap();
    assert_eq!(news.before, None);
    assert_eq!(news.wanted.peers.len(), 1);
    flows.told(NOW, news.wanted);
    assert_eq!(flows.news(NOW), None);
    flows
}

fn peers(flows: &mut Flows, now: Duration) -> Vec<(IpAddr, bool)> {
    let wanted = flows
        .news(now)
        .map_or_else(|| flows.told.clone().unwrap(), |news| news.wanted);
    flows.told(now, wanted.clone());
    let first = |peer: &Peer| (*peer.addresses.values().next().unwrap(), peer.is_asked);
    wanted.peers.iter().map(first).collect()
}

#[test]
fn peers_are_those_on_the_same_segment_that_say_where_their_packets_come_from() {
    let mute = Member {
        meta: Meta {
            macs: BTreeMap::new(),
            ..member("mute", 5, &["10.0.0.5/24"]).meta
        },
        ..member("mute", 5, &[])
    };
    let silent = Member {
        meta: Meta {
            is_answering: false,
            ..member("silent", 6, &["10.0.0.6/24"]).meta
        },
        ..member("silent", 6, &[])
    };
    let mut flows = started();
    let all = [
        member("this", 1, &["10.0.0.1/24"]),
        beside(),
        member("rack", 3, &["10.0.1.3/24"]),
        member("wider", 4, &["10.0.0.4/16"]),
        mute,
        silent,
    ];
    flows.meet(NOW, "this", &own(), &living(all));
    assert_eq!(
        peers(&mut flows, NOW),
        [(ip("10.0.0.2"), true), (ip("10.0.0.6"), false)]
    );
    let peer = &flows.known["beside"].peer;
    assert_eq!(peer.addresses[&Family::V6], ip("2001:db8::2"));
    assert_eq!(peer.macs, [[2, 0, 0, 0, 0, 2]].into());
}

#[test]
fn one_whose_agent_starts_anew_is_asked_all_the_time() {
    let mut flows = started();
    let starting = |is_starting, generation| Member {
        meta: Meta {
            is_starting,
            generation,
            is_answering: false,
            ..beside().meta
        },
        ..beside()
    };
    let asked = [(ip("10.0.0.2"), true)];
    for (name, members, expected) in [
        ("it has left", living([]), &asked[..]),
        ("it says nothing yet", living([starting(false, 0)]), &asked),
        ("it starts", living([starting(true, 2)]), &asked),
        ("it is there", living([beside()]), &asked),
        (
            "it does not do so any more",
            living([starting(false, 2)]),
            &[(ip("10.0.0.2"), false)],
        ),
        (
            "nor does it start to",
            living([starting(true, 2)]),
            &[(ip("10.0.0.2"), false)],
        ),
    ] {
        flows.meet(NOW, "this", &own(), &members);
        assert_eq!(peers(&mut flows, NOW), expected, "{name}");
    }
}

#[test]
fn one_without_an_agent_is_forgotten_before_its_kernel_forgets() {
    let mut flows = started();
    flows.meet(NOW, "this", &own(), &living([]));
    assert_eq!(flows.news(NOW), None);
    flows.meet(NOW + ABSENCE / 2, "this", &own(), &living([]));
    assert_eq!(peers(&mut flows, NOW + ABSENCE / 2).len(), 1);
    flows.meet(NOW + ABSENCE, "this", &own(), &living([]));
    assert_eq!(peers(&mut flows, NOW + ABSENCE), []);
    assert!(flows.gone.is_empty(), "it may be alive");
    assert!(ABSENCE + REFRESH < TIMEOUT);
}

#[test]
fn the_dead_are_forgotten_at_once_and_asked_again_when_they_are_back() {
    let mut flows = started();
    flows.forget(NOW, |name| name == "another");
    assert_eq!(flows.news(NOW), None);
    flows.forget(NOW, |name| name == "beside");
    let news = flows.news(NOW).unwrap();
    assert_eq!(news.wanted.peers, []);
    assert_eq!(news.wanted.gone, [ip("10.0.0.2"), ip("2001:db8::2")].into());
    flows.told(NOW, news.wanted);
    assert_eq!(flows.news(NOW), None);
    // Gossip is slower: it is a member still.
    flows.meet(NOW, "this", &own(), &living([beside()]));
    flows.forget(NOW, |name| name == "beside");
    assert_eq!(flows.news(NOW), None);
    flows.forget(NOW + SECOND, |_| false);
    flows.meet(NOW + SECOND, "this", &own(), &living([beside()]));
    let back = flows.news(NOW + SECOND).unwrap().wanted;
    assert_eq!((back.peers.len(), back.gone.len()), (1, 0));
    flows.told(NOW + SECOND, back);
    // One that stays away is nothing that the kernel has to know when what it learned is over.
    flows.forget(NOW + 2 * SECOND, |name| name == "beside");
    let told = flows.news(NOW + 2 * SECOND).unwrap().wanted;
    assert_eq!(told.gone.len(), 2);
    flows.told(NOW + 2 * SECOND, told);
    flows.meet(NOW + LEARNED + 2 * SECOND, "this", &own(), &living([]));
    assert_eq!(flows.news(NOW + LEARNED + 2 * SECOND).unwrap().wanted.gone.len(), 0);
}

#[test]
fn addresses_are_those_that_are_routed_by_whomever_and_ports_those_of_quic() {
    let port = |name: &str, protocol, port| slice::Port {
        name: name.into(),
        protocol,
        port,
    };
    let ports = [
        port("https", 6, 443),
        port("", UDP, 443),
        port("dns", UDP, 53),
        port("quic", UDP, 8443),
        port("edge-h3", UDP, 8444),
        port("quick", UDP, 8445),
        port("http3", 6, 8446),
    ];
    let verdict = |reason| Verdict::Nobody(reason);
    let verdicts = BTreeMap::from([
        (ip("10.200.0.1"), routed()),
        (ip("10.200.0.2"), verdict(Reason::Withdrawn)),
        (ip("10.200.0.3"), verdict(Reason::EndpointElsewhere)),
        (ip("10.200.0.4"), verdict(Reason::Isolated)),
        (ip("10.200.0.5"), Verdict::Other("beside".into())),
    ]);
    let mut flows = started();
    flows.decided(&Scope::All, &verdicts, |vip| {
        let has_ports = vip == ip("10.200.0.1") || vip == ip("10.200.0.5");
        ports.iter().filter(|_| has_ports).collect()
    });
    let wanted = flows.news(NOW).unwrap().wanted;
    assert_eq!(
        wanted.vips,
        [ip("10.200.0.1"), ip("10.200.0.2"), ip("10.200.0.3")].into()
    );
    let quic = [443, 8443, 8444].map(|port| (ip("10.200.0.1"), port));
    assert_eq!(wanted.quic, quic.into());
    flows.told(NOW, wanted);

    // Some are looked at: one is gone, one is new, one has lost a port.
    let scope = Scope::Vips([ip("10.200.0.1"), ip("10.200.0.2"), ip("10.200.0.9")].into());
    let verdicts = BTreeMap::from([(ip("10.200.0.1"), routed()), (ip("10.200.0.9"), routed())]);
    flows.decided(&scope, &verdicts, |_| vec![&ports[1]]);
    let news = flows.news(NOW).unwrap();
    assert_eq!(
        news.wanted.vips,
        [ip("10.200.0.1"), ip("10.200.0.3"), ip("10.200.0.9")].into()
    );
    assert_eq!(
        news.wanted.quic,
        [(ip("10.200.0.1"), 443), (ip("10.200.0.9"), 443)].into()
    );
    assert!(news.before.is_some() && !news.is_refresh);
    flows.told(NOW, news.wanted);
    flows.decided(&scope, &verdicts, |_| vec![&ports[1]]);
    assert_eq!(flows.news(NOW), None, "nothing is new");
}

#[test]
fn the_kernel_is_told_once_and_again_before_it_forgets_and_what_it_refuses_later() {
    let mut flows = started();
    assert!(flows.is_answering());
    assert_eq!(flows.wake_in(NOW + SECOND), REFRESH.checked_sub(SECOND));
    let news = flows.news(NOW + REFRESH).unwrap();
    assert!(news.is_refresh);
    flows.told(NOW + REFRESH, news.wanted);
    assert_eq!(flows.news(NOW + REFRESH), None);

    flows.clear();
    let news = flows.news(NOW + REFRESH).unwrap();
    assert!(news.wanted.vips.is_empty() && news.wanted.peers.is_empty());
    flows.told(NOW + REFRESH, news.wanted);
    assert!(!flows.is_answering());
    assert_eq!(flows.news(NOW + 9 * REFRESH), None, "there is nothing to be forgotten");

    assert!(flows.failed(NOW) && !flows.failed(NOW + SECOND), "it is told once");
    assert_eq!(flows.news(NOW + 2 * SECOND), None);
    assert_eq!(flows.wake_in(NOW + 2 * SECOND), RETRY.checked_sub(SECOND));
    assert_eq!(flows.news(NOW + SECOND + RETRY).unwrap().before, None);
}

#[test]
fn one_that_starts_has_the_kernel_forget_what_it_was_told_before() {
    let mut flows = Flows::default();
    let news = flows.news(NOW).unwrap();
    assert_eq!((news.before, news.wanted), (None, Arc::default()));
}

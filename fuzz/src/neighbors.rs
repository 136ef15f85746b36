//! What comes from the segment, and what the routing daemon says, which tells of what its neighbours said.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::FutureExt;
use lbnodeagent::neighbor::frame::{
    Mac, arp_probe, claim, dad_solicitation, gratuitous_arp_reply, gratuitous_arp_request, solicitation, unsolicited_na,
};
use lbnodeagent::routing::{Kind, judge, sessions, shown};

/// How much of a frame is read.
const READ: usize = 128;

/// An Ethernet frame: what it claims stands in it, and what this program writes claims what it was to claim.
pub(crate) fn frame(bytes: &[u8]) {
    let claimed = claim(bytes);
    assert_eq!(claim(&bytes[..bytes.len().min(READ)]), claimed);
    if let Some((ip, mac)) = claimed {
        let octets = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        assert!(bytes.windows(6).any(|part| part == mac));
        assert!(bytes.windows(octets.len()).any(|part| part == octets));
        // What comes behind it, as where the driver pads it, makes it no other.
        assert!(bytes.len() < 86 || claim(&[bytes, &[0; 18]].concat()) == claimed);
    }

    let mut drawn = [0; 38];
    drawn.iter_mut().zip(bytes).for_each(|(byte, value)| *byte = *value);
    let mac = |at: usize| -> Mac { *drawn[at..].first_chunk().unwrap() };
    let (mac, other) = (mac(0), mac(6));
    let v4 = Ipv4Addr::from(*drawn[12..].first_chunk::<4>().unwrap());
    let v6 = Ipv6Addr::from(*drawn[16..].first_chunk::<16>().unwrap());
    let claims_v4 = (!v4.is_unspecified()).then_some((v4.into(), mac));
    assert_eq!(claim(&gratuitous_arp_request(mac, v4)), Some((v4.into(), mac)));
    assert_eq!(claim(&gratuitous_arp_reply(mac, v4)), claims_v4);
    assert_eq!(claim(&arp_probe(mac, v4, Some(other))), Some((v4.into(), mac)));
    assert_eq!(claim(&unsolicited_na(mac, v6, mac[0] == 0)), Some((v6.into(), mac)));
    assert_eq!(claim(&dad_solicitation(mac, v6, Some(other))), Some((v6.into(), mac)));
    // Who asks from an address of its own claims nothing.
    assert_eq!(claim(&solicitation(mac, Ipv6Addr::LOCALHOST, v6, other)), None);
}

/// What BIRD says at its control socket.
pub(crate) fn bird(bytes: &[u8]) {
    routing(Kind::Bird, bytes);
}

/// What FRR says at the socket of its bgpd.
pub(crate) fn frr(bytes: &[u8]) {
    routing(Kind::Frr, bytes);
}

fn routing(kind: Kind, bytes: &[u8]) {
    let socket = tokio::io::join(bytes, tokio::io::sink());
    let state = sessions(kind, socket).now_or_never().expect("all bytes are there");
    let held: BTreeSet<IpAddr> = [[10, 200, 0, 1].into(), Ipv6Addr::LOCALHOST.into()].into();
    assert!(judge(&held, &state).keys().eq(&held));
    let said = shown(kind, &state, None);
    assert_eq!(shown(kind, &state, Some(&said)), said);
    match &state {
        Ok(sessions) => assert!(said.problem.is_none() && said.sessions.len() <= sessions.len()),
        Err(why) => assert!(!why.is_empty() && said.problem.as_ref() == Some(why)),
    }
}

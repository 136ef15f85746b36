//! ARP and neighbour discovery frames over Ethernet: written byte by byte with their RFCs beside them, and read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// An Ethernet address as `ip neighbour` shows it.
pub fn shown(mac: Mac) -> String {
    crds::conflict::Mac(mac).to_string()
}

/// `ff:ff:ff:ff:ff:ff`.
const BROADCAST: Mac = [0xff; 6];
/// The Ethernet address of `ff02::1`: 33:33 and its last four bytes (RFC 2464 section 7).
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
/// The link-local all-nodes group (RFC 4291 section 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Length of an ARP frame for IPv4 over Ethernet in bytes: header 14, ARP 28. The driver pads it to the minimum of 60.
pub const ARP_FRAME_LEN: usize = 42;
/// Length of a neighbour solicitation frame without options in bytes: Ethernet 14, IPv6 40, `ICMPv6` 24.
pub const NS_FRAME_LEN: usize = 78;
/// Length of a neighbour solicitation frame with the sender's link-layer address in bytes: the same, and 8.
pub const NS_FROM_FRAME_LEN: usize = 86;
/// Length of a neighbour advertisement frame in bytes: Ethernet 14, IPv6 40, `ICMPv6` 24, option 8.
pub const NA_FRAME_LEN: usize = 86;

/// A gratuitous ARP request: broadcast, sender and target protocol address the VIP, target hardware address zero.
///
/// RFC 826 for the format, RFC 5227 section 2.3 ("ARP announcement") for the content. Makes everybody who has an entry
/// for the VIP update it.
pub fn gratuitous_arp_request(mac: Mac, ip: Ipv4Addr) -> [u8; ARP_FRAME_LEN] {
    arp(1, mac, [0; 6], ip)
}

/// An ARP probe: a request with the sender protocol address zero, which spoils nobody's cache (RFC 5227 section 2.1.1).
/// Whoever holds the address answers. To everybody, or to one host that is to say whether it does.
pub fn arp_probe(mac: Mac, ip: Ipv4Addr, to: Option<Mac>) -> [u8; ARP_FRAME_LEN] {
    arp_frame(to.unwrap_or(BROADCAST), 1, (mac, Ipv4Addr::UNSPECIFIED), ([0; 6], ip))
}

/// A gratuitous ARP reply: the same, but with the sender's own address as target hardware address (RFC 5944 section
/// 4.6). For those who update only from replies.
pub fn gratuitous_arp_reply(mac: Mac, ip: Ipv4Addr) -> [u8; ARP_FRAME_LEN] {
    arp(2, mac, mac, ip)
}

fn arp(operation: u8, sender: Mac, target: Mac, ip: Ipv4Addr) -> [u8; ARP_FRAME_LEN] {
    arp_frame(BROADCAST, operation, (sender, ip), (target, ip))
}

fn arp_frame(to: Mac, operation: u8, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> [u8; ARP_FRAME_LEN] {
    let mut frame = Frame::new();
    frame.put(&to).put(&sender.0).put(&[0x08, 0x06]);
    // Hardware type Ethernet, protocol type IPv4, their address lengths, operation.
    frame.put(&[0, 1, 0x08, 0x00, 6, 4, 0, operation]);
    frame.put(&sender.0).put(&sender.1.octets());
    frame.put(&target.0).put(&target.1.octets());
    frame.bytes
}

/// An unsolicited neighbour advertisement for a VIP, from the VIP to all nodes (RFC 4861 sections 4.4 and 7.2.6):
/// Override set so that existing entries are replaced, Solicited clear, Router as given, with the target link-layer
/// address option, hop limit 255.
///
/// `is_router` should say whether the node forwards IPv6 for others: hosts that use the VIP as a router drop it as one
/// when the flag is clear.
pub fn unsolicited_na(mac: Mac, ip: Ipv6Addr, is_router: bool) -> [u8; NA_FRAME_LEN] {
    const ROUTER: u8 = 0x80;
    const OVERRIDE: u8 = 0x20;
    let flags = if is_router { ROUTER | OVERRIDE } else { OVERRIDE };
    let mut message = Frame::<32>::new();
    // Type 136, code 0, checksum to come, flags and reserved bits, target, option 2 of one unit of eight bytes.
    message
        .put(&[136, 0, 0, 0, flags, 0, 0, 0])
        .put(&ip.octets())
        .put(&[2, 1])
        .put(&mac);
    let checksum = icmpv6_checksum(ip, ALL_NODES, &message.bytes);
    let [_, _, high, low, ..] = &mut message.bytes;
    [*high, *low] = checksum.to_be_bytes();

    let mut frame = Frame::new();
    frame.put(&ALL_NODES_MAC).put(&mac).put(&[0x86, 0xdd]);
    // Version 6, payload of 32 bytes, next header ICMPv6, hop limit 255.
    frame
        .put(&[0x60, 0, 0, 0, 0, 32, 58, 255])
        .put(&ip.octets())
        .put(&ALL_NODES.octets());
    frame.put(&message.bytes);
    frame.bytes
}

/// The neighbour solicitation of duplicate address detection: from the unspecified address to the solicited-node group
/// of the address, without options, hop limit 255 (RFC 4862 section 5.4.2, RFC 4861 section 4.3). Whoever holds the
/// address advertises it to all nodes. To the group's Ethernet address, or to that of one host that is to say whether it
/// does.
pub fn dad_solicitation(mac: Mac, ip: Ipv6Addr, to: Option<Mac>) -> [u8; NS_FRAME_LEN] {
    let [.., x, y, z] = ip.octets();
    // ff02::1:ff00:0/104 and the last 24 bits (RFC 4291 section 2.7.1); 33:33 and the last 32 (RFC 2464 section 7).
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z]);
    let mut message = Frame::<24>::new();
    message.put(&[135, 0, 0, 0, 0, 0, 0, 0]).put(&ip.octets());
    let checksum = icmpv6_checksum(Ipv6Addr::UNSPECIFIED, group, &message.bytes);
    let [_, _, high, low, ..] = &mut message.bytes;
    [*high, *low] = checksum.to_be_bytes();

    let mut frame = Frame::new();
    frame
        .put(&to.unwrap_or([0x33, 0x33, 0xff, x, y, z]))
        .put(&mac)
        .put(&[0x86, 0xdd]);
    frame
        .put(&[0x60, 0, 0, 0, 0, 24, 58, 255])
        .put(&Ipv6Addr::UNSPECIFIED.octets())
        .put(&group.octets());
    frame.put(&message.bytes);
    frame.bytes
}

/// A neighbour solicitation to one host that is to say whether it has an address, as neighbour unreachability detection
/// sends it (RFC 4861 section 7.3): from an address of the asker, to the address in question, with the source link-layer
/// address option, hop limit 255. The answer goes to the asker alone.
pub fn solicitation(mac: Mac, own: Ipv6Addr, ip: Ipv6Addr, to: Mac) -> [u8; NS_FROM_FRAME_LEN] {
    let mut message = Frame::<32>::new();
    message
        .put(&[135, 0, 0, 0, 0, 0, 0, 0])
        .put(&ip.octets())
        .put(&[1, 1])
        .put(&mac);
    let checksum = icmpv6_checksum(own, ip, &message.bytes);
    let [_, _, high, low, ..] = &mut message.bytes;
    [*high, *low] = checksum.to_be_bytes();

    let mut frame = Frame::new();
    frame.put(&to).put(&mac).put(&[0x86, 0xdd]);
    frame
        .put(&[0x60, 0, 0, 0, 0, 32, 58, 255])
        .put(&own.octets())
        .put(&ip.octets());
    frame.put(&message.bytes);
    frame.bytes
}

/// Which address a frame claims, and for whom: the sender of an ARP packet, the sought address of an ARP probe (who asks
/// for it so wants it, RFC 5227 section 2.1.1), and likewise of neighbour advertisements and of solicitations of
/// duplicate address detection. `None` for all else, and for what is malformed.
pub fn claim(frame: &[u8]) -> Option<(IpAddr, Mac)> {
    let (ethernet, packet) = frame.split_first_chunk::<14>()?;
    match ethernet {
        [.., 0x08, 0x06] => arp_claim(packet),
        [_, _, _, _, _, _, source @ .., 0x86, 0xdd] => icmpv6_claim(packet, *source.first_chunk()?),
        _ => None,
    }
}

fn arp_claim(packet: &[u8]) -> Option<(IpAddr, Mac)> {
    let ([0, 1, 0x08, 0, 6, 4, 0, operation], rest) = packet.split_first_chunk::<8>()? else {
        return None;
    };
    let (mac, rest) = rest.split_first_chunk::<6>()?;
    let (sender, rest) = rest.split_first_chunk::<4>()?;
    let (_, rest) = rest.split_first_chunk::<6>()?;
    let sought = rest.first_chunk::<4>()?;
    match (Ipv4Addr::from(*sender), operation) {
        (Ipv4Addr::UNSPECIFIED, 1) => Some((Ipv4Addr::from(*sought).into(), *mac)),
        (Ipv4Addr::UNSPECIFIED, _) => None,
        (ip, _) => Some((ip.into(), *mac)),
    }
}

/// Neighbour discovery is believed only with hop limit 255, which no router lets pass (RFC 4861 section 7.1).
fn icmpv6_claim(packet: &[u8], mac: Mac) -> Option<(IpAddr, Mac)> {
    let (header, message) = packet.split_first_chunk::<40>()?;
    let (head, rest) = message.split_first_chunk::<8>()?;
    let target = IpAddr::from(Ipv6Addr::from(*rest.first_chunk::<16>()?));
    let [0x60..=0x6f, _, _, _, _, _, 58, 255, source @ ..] = header else {
        return None;
    };
    let is_from_nobody = source.starts_with(&[0; 16]);
    match head {
        [135, 0, ..] if is_from_nobody => Some((target, mac)),
        // The link-layer address it tells is what others will send to.
        [136, 0, ..] => {
            let option = rest.get(16..24).and_then(|option| option.first_chunk::<8>());
            match option {
                Some([2, 1, told @ ..]) => Some((target, *told)),
                _ => Some((target, mac)),
            }
        }
        _ => None,
    }
}

/// The Internet checksum over the IPv6 pseudo-header and an `ICMPv6` message (RFC 4443 section 2.3, RFC 8200 section
/// 8.1).
fn icmpv6_checksum<const N: usize>(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8; N]) -> u16 {
    const NEXT_HEADER: u32 = 58;
    let words = |bytes: &[u8]| -> u32 {
        bytes
            .chunks(2)
            .map(|pair| match pair {
                [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
                _ => 0,
            })
            .sum()
    };
    let mut sum = words(&source.octets())
        + words(&destination.octets())
        + u32::try_from(N).unwrap_or_default()
        + NEXT_HEADER
        + words(message);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

/// Bytes written one after the other into a frame of known length.
struct Frame<const N: usize> {
    bytes: [u8; N],
    written: usize,
}

impl<const N: usize> Frame<N> {
    const fn new() -> Self {
        Self {
            bytes: [0; N],
            written: 0,
        }
    }

    fn put(&mut self, part: &[u8]) -> &mut Self {
        let free = self.bytes.iter_mut().skip(self.written);
        for (byte, value) in free.zip(part) {
            *byte = *value;
        }
        self.written += part.len();
        debug_assert!(self.written <= N, "the parts are longer than the frame");
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [0x02, 0x42, 0xac, 0x11, 0x00, 0x02];

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn frames_are_byte_for_byte_what_the_rfcs_say() {
        let v4 = Ipv4Addr::new(10, 31, 188, 64);
        let v6: Ipv6Addr = "2001:db8::64".parse().unwrap();
        let rows = [
            (
                "ARP announcement, RFC 5227 section 2.3",
                gratuitous_arp_request(MAC, v4).to_vec(),
                "ffffffffffff 0242ac110002 0806
                 0001 0800 06 04 0001
                 0242ac110002 0a1fbc40 000000000000 0a1fbc40",
            ),
            (
                "gratuitous ARP reply, RFC 5944 section 4.6",
                gratuitous_arp_reply(MAC, v4).to_vec(),
                "ffffffffffff 0242ac110002 0806
                 0001 0800 06 04 0002
                 0242ac110002 0a1fbc40 0242ac110002 0a1fbc40",
            ),
            (
                "unsolicited neighbour advertisement, RFC 4861 section 4.4",
                unsolicited_na(MAC, v6, false).to_vec(),
                "333300000001 0242ac110002 86dd
                 60000000 0020 3a ff
                 20010db8000000000000000000000064
                 ff020000000000000000000000000001
                 88 00 4c10 20000000
                 20010db8000000000000000000000064
                 02 01 0242ac110002",
            ),
            (
                "ARP probe, RFC 5227 section 2.1.1",
                arp_probe(MAC, v4, None).to_vec(),
                "ffffffffffff 0242ac110002 0806
                 0001 0800 06 04 0001
                 0242ac110002 00000000 000000000000 0a1fbc40",
            ),
            (
                "ARP probe to one host",
                arp_probe(MAC, v4, Some([2; 6])).to_vec(),
                "020202020202 0242ac110002 0806
                 0001 0800 06 04 0001
                 0242ac110002 00000000 000000000000 0a1fbc40",
            ),
            (
                "duplicate address detection, RFC 4862 section 5.4.2",
                dad_solicitation(MAC, v6, None).to_vec(),
                "3333ff000064 0242ac110002 86dd
                 60000000 0018 3a ff
                 00000000000000000000000000000000
                 ff0200000000000000000001ff000064
                 87 00 4c27 00000000
                 20010db8000000000000000000000064",
            ),
            (
                "neighbour unreachability detection, RFC 4861 section 7.3",
                solicitation(MAC, "2001:db8::11".parse().unwrap(), v6, [2; 6]).to_vec(),
                "020202020202 0242ac110002 86dd
                 60000000 0020 3a ff
                 20010db8000000000000000000000011
                 20010db8000000000000000000000064
                 87 00 3f4a 00000000
                 20010db8000000000000000000000064
                 01 01 0242ac110002",
            ),
            (
                "the same from a router",
                unsolicited_na(MAC, v6, true).to_vec(),
                "333300000001 0242ac110002 86dd
                 60000000 0020 3a ff
                 20010db8000000000000000000000064
                 ff020000000000000000000000000001
                 88 00 cc0f a0000000
                 20010db8000000000000000000000064
                 02 01 0242ac110002",
            ),
        ];
        for (name, frame, expected) in rows {
            assert_eq!(frame, bytes(expected), "{name}");
        }
    }

    /// What the row is about, a frame, what it claims.
    type Row<'a> = (&'a str, &'a [u8], Option<(IpAddr, Mac)>);

    #[test]
    fn a_claim_is_read_from_whatever_makes_one() {
        let v4 = Ipv4Addr::new(10, 31, 188, 64);
        let v6: Ipv6Addr = "2001:db8::64".parse().unwrap();
        let other = [2; 6];
        let mut question = arp_probe(MAC, v4, None);
        question[28..32].copy_from_slice(&[10, 31, 0, 9]);
        let mut from_afar = unsolicited_na(MAC, v6, false);
        from_afar[21] = 254;
        let mut forwarded = unsolicited_na(MAC, v6, false);
        forwarded[6..12].copy_from_slice(&other);
        let mut without_option = unsolicited_na(MAC, v6, false).to_vec();
        without_option.truncate(78);
        let asker = IpAddr::from([10, 31, 0, 9]);
        let rows: [Row; 10] = [
            ("announcement", &gratuitous_arp_request(MAC, v4), Some((v4.into(), MAC))),
            ("reply", &gratuitous_arp_reply(MAC, v4), Some((v4.into(), MAC))),
            ("probe", &arp_probe(MAC, v4, None), Some((v4.into(), MAC))),
            ("a question claims who asks", &question, Some((asker, MAC))),
            ("advertisement", &unsolicited_na(MAC, v6, false), Some((v6.into(), MAC))),
            ("advertisement through a proxy", &forwarded, Some((v6.into(), MAC))),
            (
                "advertisement without a link-layer address",
                &without_option,
                Some((v6.into(), MAC)),
            ),
            (
                "duplicate address detection",
                &dad_solicitation(MAC, v6, None),
                Some((v6.into(), MAC)),
            ),
            ("through a router", &from_afar, None),
            ("nothing", &[], None),
        ];
        for (name, frame, expected) in rows {
            assert_eq!(claim(frame), expected, "{name}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_frame_makes_the_reader_panic(kind in 0..2_usize, rest in proptest::collection::vec(proptest::num::u8::ANY, 0..100)) {
            let mut frame = vec![0; 12];
            frame.extend([[0x08, 0x06], [0x86, 0xdd]][kind]);
            frame.extend(rest);
            for length in 0..frame.len() {
                let _ = claim(&frame[..length]);
            }
        }
    }
}

//! From netlink messages to plain values. Whatever it does not know it leaves out.

use std::net::IpAddr;

use crds::Family;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};

use super::snapshot::{ADDRESS_METRIC, ADDRESS_PROTOCOL, Address, DefaultRoute, Link};

/// `INFINITY_LIFE_TIME` (`net/addrconf.h`): the lifetime, in seconds, of an address that stays.
pub(super) const FOREVER: u32 = u32::MAX;

/// The link a `RTM_NEWLINK` message describes.
pub(super) fn link(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        is_up: flags.contains(LinkFlags::Up),
        has_carrier: flags.contains(LinkFlags::LowerUp),
        is_loopback: flags.contains(LinkFlags::Loopback),
        is_noarp: flags.contains(LinkFlags::Noarp),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    link
}

/// The address a `RTM_NEWADDR` message describes; `None` for multicast and anycast ones.
pub(super) fn address(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut address = None;
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let mut protocol = None;
    let mut metric = None;
    let mut expires_in = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link the address attribute is the peer's, the local one ours.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(who) => protocol = Some(u8::from(*who)).filter(|p| *p != 0),
            AddressAttribute::RoutePriority(priority) => metric = Some(*priority),
            AddressAttribute::CacheInfo(cache) => expires_in = Some(cache.ifa_valid).filter(|left| *left != FOREVER),
            _ => {}
        }
    }
    let ip: IpAddr = local.or(address)?;
    Some(Address {
        protocol,
        is_ours: protocol == Some(ADDRESS_PROTOCOL) || metric == Some(ADDRESS_METRIC),
        expires_in,
        is_secondary: flags.contains(AddressFlags::Secondary),
        is_tentative: flags.contains(AddressFlags::Tentative),
        is_dad_failed: flags.contains(AddressFlags::Dadfailed),
        is_deprecated: flags.contains(AddressFlags::Deprecated),
        has_no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
        ..Address::new(message.header.index, ip, message.header.prefix_len)
    })
}

/// The default routes a `RTM_NEWROUTE` message describes: none, one, or one per next hop.
pub(super) fn default_routes(message: &RouteMessage) -> Vec<DefaultRoute> {
    let header = &message.header;
    let family = match header.address_family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return Vec::new(),
    };
    let mut table = u32::from(header.table);
    let mut metric = 0;
    let mut links = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(index) => links.push(*index),
            RouteAttribute::MultiPath(hops) => {
                links.extend(hops.iter().map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    let is_default = header.destination_prefix_length == 0
        && header.kind == RouteType::Unicast
        && table == u32::from(RouteHeader::RT_TABLE_MAIN);
    if !is_default {
        return Vec::new();
    }
    links
        .into_iter()
        .map(|link| DefaultRoute { family, link, metric })
        .collect()
}

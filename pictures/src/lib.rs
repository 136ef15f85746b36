//! The pictures of the book. `make pictures` draws them into `docs/pictures/`, and a test looks whether they are there as they are here.

pub mod drawing;
mod networks;

use drawing::{Drawing, WIDTH};

/// All pictures.
pub fn all() -> Vec<Drawing> {
    let mut all = vec![
        programs(),
        flow(),
        local(),
        cut(),
        routed(),
        way(),
        which_group(),
        troubleshooting(),
        home(),
        bars(),
    ];
    all.extend(networks::all());
    all
}

/// The middles of three nodes side by side.
const NODES: [(u32, &str); 3] = [(86, "node A"), (240, "node B"), (394, "node C")];
const MIDDLE: u32 = WIDTH / 2;

/// What passes between the two programs.
fn programs() -> Drawing {
    let mut d = Drawing::new(
        "programs",
        "You write ServiceGroups and Services. The allocator writes the address into the Service. The agents of all nodes read it: one \
         puts the address on its interface, another watches it.",
        330,
    );
    d.labelled((20, 20), (150, 44), &["you", "ServiceGroup, Service"]);
    d.arrow((170, 42), (248, 42), "");
    d.labelled((250, 20), (210, 44), &["allocator", "which Service, which address"]);
    d.arrow((355, 64), (355, 108), "");
    d.labelled(
        (250, 110),
        (210, 60),
        &["Service", "status: the address", "conditions: who, and why not"],
    );
    d.line((355, 170), (355, 200), "");
    d.line((110, 200), (370, 200), "");
    d.words(20, 192, "small", "all agents read it");
    d.arrow((110, 200), (110, 228), "");
    d.arrow((370, 200), (370, 228), "");
    d.labelled(
        (20, 230),
        (180, 60),
        &["agent on node A", "puts it on eth0", "and tells the neighbours"],
    );
    d.labelled((280, 230), (180, 60), &["agent on node B", "stands by", "watches A"]);
    d.arrow((280, 274), (202, 274), "dash");
    d.centred(
        MIDDLE,
        316,
        "small",
        "what each node announces comes back in its LBNode",
    );
    d
}

/// What the programs read, decide and write.
fn flow() -> Drawing {
    let mut d = Drawing::new(
        "flow",
        "The allocator reads ServiceGroups and Services, and writes each Service's status in one PATCH, which is the message to the nodes. The          agent reads Services, EndpointSlices, Nodes and its LBNodeAgent, hears the gossip, the standby watch and netlink, and changes in the          kernel what is not as planned. It answers in an LBNode. A routing daemon tells routers of what is on kube-lb0.",
        478,
    );
    d.labelled((20, 16), (210, 44), &["you write", "ServiceGroup, Service"]);
    d.arrow((230, 38), (268, 38), "");
    d.labelled((270, 16), (190, 44), &["allocator", "which address"]);
    d.arrow((365, 60), (365, 108), "");
    d.words(20, 90, "small", "one PATCH of services/status, and events");
    d.labelled((270, 110), (190, 44), &["Service", "the message to the nodes"]);
    d.arrow((365, 154), (365, 192), "");
    d.labelled(
        (20, 162),
        (210, 112),
        &[
            "the agent hears",
            "Service, EndpointSlice, Node,",
            "ServiceGroup, LBNodeAgent",
            "gossip: who is a member",
            "standby watch: who is there",
            "netlink: links, addresses",
        ],
    );
    d.arrow((230, 225), (268, 225), "");
    d.labelled(
        (270, 194),
        (190, 62),
        &["lbnodeagent", "plan(desired) −", "kernel(actual) = changes"],
    );
    d.arrow((365, 256), (365, 312), "");
    d.labelled(
        (270, 314),
        (190, 62),
        &["the node", "addresses, ARP and NA", "routed ones on kube-lb0"],
    );
    d.arrow((290, 256), (232, 330), "");
    d.labelled(
        (20, 314),
        (210, 62),
        &["LBNode", "the answer of each node,", "which the allocator reads"],
    );
    d.arrow((365, 376), (365, 412), "");
    d.labelled((270, 414), (190, 44), &["a routing daemon", "reads kube-lb0"]);
    d.arrow((268, 436), (232, 436), "");
    d.labelled((20, 414), (210, 44), &["routers", "hear of it by BGP: ECMP"]);
    d
}

/// One VIP on a LAN.
fn local() -> Drawing {
    let mut d = Drawing::new(
        "local",
        "A client asks the segment who has 192.168.1.200. Node A answers, whose interface has it. Node B stands by and watches A.",
        290,
    );
    d.labelled((165, 16), (150, 44), &["client", "192.168.1.50"]);
    d.line((MIDDLE, 60), (MIDDLE, 110), "");
    d.words(MIDDLE + 10, 82, "small", "who has 192.168.1.200?");
    d.words(MIDDLE + 10, 98, "small good", "A, at its MAC");
    d.line((20, 110), (460, 110), "");
    for (x, node) in NODES {
        d.line((x, 110), (x, 150), if x == 86 { "go" } else { "" });
        let own = match node {
            "node A" => "eth0 192.168.1.11",
            "node B" => "eth0 192.168.1.12",
            _ => "eth0 192.168.1.13",
        };
        d.rect((x - 68, 150), (136, 76), "box");
        d.centred(x, 170, "strong", node);
        d.centred(x, 188, "small", own);
    }
    d.centred(86, 206, "small good strong", "192.168.1.200");
    d.centred(86, 248, "small", "owner: answers");
    d.centred(240, 206, "small", "would be next");
    d.centred(240, 248, "small", "standby: watches A");
    d.arrow((172, 214), (156, 214), "dash");
    d.centred(394, 248, "small", "owner of other VIPs");
    d.centred(
        MIDDLE,
        276,
        "small",
        "Each VIP has an owner of its own, so VIPs spread over the nodes.",
    );
    d
}

/// The same with a cut cable, in milliseconds.
fn cut() -> Drawing {
    let mut d = Drawing::new(
        "cut",
        "Time line of a cut cable: after two questions without an answer the standby asks every 10 milliseconds, and the owner's kernel \
         too. After 100 milliseconds of silence it takes the address over and tells the neighbours.",
        250,
    );
    let at = |ms: u32| 96 + ms * 3;
    for (ms, label) in [(0, "0"), (25, "25"), (50, "50"), (100, "100 ms")] {
        d.line((at(ms), 40), (at(ms), 176), "dash");
        d.centred(at(ms), 30, "small", label);
    }
    d.words(12, 64, "strong", "owner");
    d.line((at(0) - 20, 60), (at(0), 60), "go");
    d.words(at(0) + 6, 64, "small bad", "cable cut");
    d.words(12, 114, "strong", "standby");
    for ms in [12, 37, 50, 60, 70, 80, 90] {
        d.line((at(ms), 102), (at(ms), 118), "");
    }
    d.words(at(4), 94, "small halo", "no answer, twice");
    d.words(at(53), 94, "small halo", "every 10 ms");
    d.arrow((at(100), 110), (462, 110), "go");
    d.words(12, 164, "strong", "client");
    d.line((at(0) - 20, 160), (at(0), 160), "go");
    d.line((at(0), 160), (at(101), 160), "stop dash");
    d.words(at(16), 152, "small bad halo", "about a tenth of a second");
    d.arrow((at(101), 160), (462, 160), "go");
    d.words(
        12,
        204,
        "small",
        "At 100 ms the standby adds the address and tells the neighbours",
    );
    d.words(
        12,
        221,
        "small",
        "(gratuitous ARP, unsolicited neighbour advertisements).",
    );
    d.words(
        12,
        238,
        "small",
        "Where only the agent is gone, the kernel answers, and nothing moves.",
    );
    d
}

/// Routed addresses.
fn routed() -> Drawing {
    let mut d = Drawing::new(
        "routed",
        "Every node holds 10.189.0.1/32 on kube-lb0 and tells the router by BGP. The router has three next hops and spreads connections.",
        280,
    );
    d.labelled((30, 16), (130, 40), &["client"]);
    d.arrow((160, 36), (178, 36), "go");
    d.labelled((180, 16), (270, 40), &["router", "10.189.0.1/32 → A, B, C"]);
    for (x, node) in NODES {
        d.arrow((MIDDLE + 40, 56), (x + 8, 148), "go");
        d.line((x - 18, 148), (MIDDLE - 30, 56), "dash");
        d.rect((x - 68, 150), (136, 62), "box");
        d.centred(x, 170, "strong", node);
        d.centred(x, 187, "small", "kube-lb0");
        d.centred(x, 203, "small good strong", "10.189.0.1/32");
    }
    d.words(20, 104, "small", "BGP: BIRD, FRR");
    d.words(388, 104, "small good", "packets");
    d.centred(
        MIDDLE,
        240,
        "small",
        "Nobody asks for it by ARP: a routing daemon has to tell routers.",
    );
    d.centred(
        MIDDLE,
        258,
        "small",
        "A node that dies is no next hop any more when its session ends.",
    );
    d
}

/// A Service's way, and where to look.
fn way() -> Drawing {
    let mut d = Drawing::new(
        "way",
        "The way of a Service, and where to look: its conditions Allocated and Announced, the LBNodes, the segment or the router's table, the \
         EndpointSlices.",
        452,
    );
    d.words(250, 24, "note strong", "look here");
    let steps: [(&str, &str, &[&str]); 5] = [
        (
            "Service",
            "type: LoadBalancer",
            &["kubectl describe service NAME", "its events"],
        ),
        (
            "allocator",
            "gives an address",
            &["condition purelb.io/Allocated", "kubectl get sg -n purelb"],
        ),
        (
            "agents",
            "put it on an interface",
            &["condition purelb.io/Announced", "kubectl get lbnodes -n purelb"],
        ),
        (
            "segment, or router",
            "finds the node",
            &["arping -I eth0 ADDRESS", "show ip route ADDRESS"],
        ),
        (
            "kube-proxy and Pod",
            "answer",
            &["curl on that node", "kubectl get endpointslices"],
        ),
    ];
    for (number, (name, what, look)) in (0..).zip(steps) {
        let y = 40 + 82 * number;
        d.labelled((20, y), (190, 50), &[name, what]);
        if number < 4 {
            d.arrow((115, y + 50), (115, y + 80), "");
        }
        d.line((212, y + 25), (240, y + 25), "dash");
        for (line, words) in (0..).zip(look) {
            d.words(250, y + 20 + 18 * line, "code note", words);
        }
    }
    d
}

/// A question with its answers, of a decision tree.
fn question(d: &mut Drawing, y: u32, lines: &[&str]) {
    d.labelled((20, y), (250, 54), lines);
}

fn which_group() -> Drawing {
    let mut d = Drawing::new(
        "which-group",
        "Which group: addresses of the nodes' own subnet are local. Others are remote, where routers speak BGP with the nodes. Addresses that \
         another program gives out are external or netbox.",
        372,
    );
    let steps: [(&[&str], &str, &[&str]); 3] = [
        (
            &["Does Netbox or a program", "of yours give addresses out?"],
            "yes",
            &["netbox, external", "it is asked for each"],
        ),
        (
            &["Are they of the subnet", "that the nodes are in?"],
            "yes",
            &["local", "one node has it: ARP"],
        ),
        (
            &["Do your routers speak BGP", "with the nodes?"],
            "yes",
            &["remote", "all nodes have it: BGP"],
        ),
    ];
    for (number, (asks, answer, group)) in (0..).zip(steps) {
        let y = 20 + 104 * number;
        question(&mut d, y, asks);
        d.arrow((270, y + 27), (304, y + 27), "go");
        d.words(274, y + 20, "small good", answer);
        d.rect((306, y + 2), (160, 50), "box");
        d.centred(386, y + 23, "strong good", group.first().unwrap_or(&""));
        d.centred(386, y + 41, "small", group.get(1).unwrap_or(&""));
        d.arrow((145, y + 54), (145, y + 102), "");
        d.words(153, y + 82, "small", "no");
    }
    d.labelled((20, 332), (446, 32), &["Take a range of the nodes' own subnet: local"]);
    d
}

fn troubleshooting() -> Drawing {
    let mut d = Drawing::new(
        "troubleshooting",
        "A Service does not answer: look first whether it has an address, then whether its Pods answer inside, who announces it, whether the \
         segment or the router finds that node, and whether kube-proxy of that node serves it.",
        588,
    );
    let steps: [(&[&str], &str, &[&str]); 5] = [
        (&["Has it an EXTERNAL-IP?"], "no", &["purelb.io/Allocated", "says why"]),
        (
            &["Does its CLUSTER-IP answer", "to a Pod?"],
            "no",
            &["no ready Pod,", "or a wrong targetPort"],
        ),
        (
            &["Does purelb.io/Announced", "name a node, or say routed?"],
            "no",
            &["by nobody: it says why,", "and the way out"],
        ),
        (
            &["Does arping find its MAC, or", "has the router the route?"],
            "no",
            &["a switch, a filter, or", "two that answer"],
        ),
        (
            &["Does it answer to curl", "on that node?"],
            "no",
            &["kube-proxy, or a firewall", "of the node"],
        ),
    ];
    for (number, (asks, answer, then)) in (0..).zip(steps) {
        let y = 20 + 104 * number;
        question(&mut d, y, asks);
        d.arrow((270, y + 27), (300, y + 27), "");
        d.words(274, y + 20, "small bad", answer);
        d.rect((302, y + 2), (166, 50), "box");
        for (line, words) in (0..).zip(then) {
            d.centred(385, y + 24 + 17 * line, "small", words);
        }
        d.arrow((145, y + 54), (145, y + 102), "go");
        d.words(153, y + 82, "small good", "yes");
    }
    d.labelled((20, 540), (448, 34), &["The answer's way back: routes, rp_filter"]);
    d
}

/// Addresses of a home network.
fn home() -> Drawing {
    let mut d = Drawing::new(
        "home",
        "The addresses of 192.168.1.0/24 at home: the router, fixed hosts with the nodes among them, the DHCP server's range, and the pool \
         outside of it.",
        250,
    );
    let at = |host: u32| 20 + host * 440 / 256;
    let parts: [(u32, u32, &str); 4] = [(1, 2, "bar"), (10, 20, "box"), (50, 200, "box"), (200, 231, "bar-good")];
    d.words(20, 30, "strong", "192.168.1.0/24");
    d.rect((20, 44), (440, 40), "");
    for (first, end, class) in parts {
        d.rect((at(first), 44), (at(end) - at(first), 40), class);
    }
    d.centred(at(125), 68, "small", "DHCP");
    for (y, class, address, what) in [
        (118, "", ".1", "the router: gateway, DNS, DHCP server"),
        (144, "", ".10 – .19", "fixed: the nodes, a NAS, a printer"),
        (
            170,
            "",
            ".50 – .199",
            "what the DHCP server gives out: set this in the router",
        ),
        (196, "good", ".200 – .230", "the pool of ServiceGroup default"),
    ] {
        d.words(20, y, &format!("code strong {class}"), address);
        d.words(126, y, "small", what);
    }
    d.words(
        20,
        226,
        "small",
        "Before you take a range: arping -D 192.168.1.200 finds nobody there.",
    );
    d
}

/// The measured failovers of docs/failover.md.
fn bars() -> Drawing {
    let mut d = Drawing::new(
        "bars",
        "The client's longest silence while the owner's cable is cut, median of 20: Bellwether 101 milliseconds, keepalived with an \
         advertisement every 0.1 s 302, keepalived as it comes 2761.",
        200,
    );
    d.words(20, 28, "strong", "Silence at a cut cable, median of 20, in ms");
    for (y, ms, class, name) in [
        (52, 101, "bar-good", "Bellwether, as it comes"),
        (98, 302, "bar", "keepalived, an advertisement every 0.1 s"),
        (144, 2761, "bar", "keepalived, every second, as it comes"),
    ] {
        let width = ms * 380 / 2761;
        d.words(20, y, "small", name);
        d.rect((20, y + 6), (width, 18), class);
        d.words(28 + width, y + 20, "small strong", &ms.to_string());
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_pictures_are_as_they_are_drawn_and_the_book_shows_each() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("docs");
        let pages: Vec<String> = std::fs::read_dir(&docs)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
            .map(|path| std::fs::read_to_string(path).unwrap())
            .collect();
        for picture in all() {
            let file = picture.file();
            let kept = std::fs::read_to_string(docs.join("pictures").join(&file)).unwrap_or_default();
            assert!(kept == picture.svg(), "{file} is old: make pictures");
            let link = format!("](pictures/{file})");
            assert!(pages.iter().any(|page| page.contains(&link)), "no page shows {file}");
        }
    }

    #[test]
    fn no_word_is_cut_off() {
        for picture in all() {
            for line in picture.svg().lines().filter(|line| line.starts_with("<text")) {
                let of = |name: &str| {
                    line.split(&format!("{name}=\""))
                        .nth(1)
                        .and_then(|rest| rest.split('"').next())
                };
                let x: usize = of("x").unwrap().parse().unwrap();
                let words = line
                    .split('>')
                    .nth(1)
                    .unwrap_or_default()
                    .split("</")
                    .next()
                    .unwrap_or_default();
                let per_letter = match of("class").unwrap() {
                    class if class.contains("code") => 73,
                    class if class.contains("strong") && !class.contains("small") => 80,
                    class if class.contains("small") => 64,
                    _ => 72,
                };
                let width = words.chars().count() * per_letter / 10;
                let (left, right) = match of("text-anchor") {
                    Some("middle") => (x.checked_sub(width / 2), x + width / 2),
                    _ => (Some(x), x + width),
                };
                assert!(
                    left.is_some() && right <= 480,
                    "{}: {words} ends at {right}",
                    picture.file()
                );
            }
        }
    }
}

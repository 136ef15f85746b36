//! Who speaks BGP with whom, for each network that `docs/routing.md` has configurations of.

use crate::MIDDLE;
use crate::drawing::Drawing;

/// All of them.
pub(crate) fn all() -> Vec<Drawing> {
    vec![one_router(), two_routers(), racks(), mesh(), reflectors(), sites()]
}

const NODE_AS: &str = "AS 64515";
/// Size of a node among three side by side, and the left edges of these.
const NODE: (u32, u32) = (120, 44);
const NODES: [(u32, &str); 3] = [(20, "w11"), (180, "w12"), (340, "…")];

/// Three nodes side by side, and lines to each from places above.
fn nodes(d: &mut Drawing, y: u32, above: &[(u32, u32)]) {
    for (x, name) in NODES {
        for from in above {
            d.line(*from, (x + NODE.0 / 2, y), "");
        }
        d.labelled((x, y), NODE, &[name, NODE_AS]);
    }
}

fn one_router() -> Drawing {
    let mut d = Drawing::new(
        "one-router",
        "Clients reach the nodes by one router, AS 64512. Each node, AS 64515, is a neighbour of the router.",
        196,
    );
    d.labelled((20, 16), (120, 44), &["clients"]);
    d.arrow((140, 38), (163, 38), "");
    d.labelled((165, 16), (150, 44), &["router", "AS 64512"]);
    d.words(326, 42, "code", "10.31.254.251");
    nodes(&mut d, 112, &[(MIDDLE, 60)]);
    d.centred(MIDDLE, 182, "small", "Each node is a neighbour of the router.");
    d
}

fn two_routers() -> Drawing {
    let mut d = Drawing::new(
        "two-routers",
        "Clients reach the nodes by two routers, both AS 64512. Each node, AS 64515, is a neighbour of both.",
        262,
    );
    d.labelled((180, 16), (120, 36), &["clients"]);
    for (x, name) in [(70, "router"), (270, "router2")] {
        d.arrow((MIDDLE, 52), (x + 70, 84), "");
        d.labelled((x, 86), (140, 44), &[name, "AS 64512"]);
    }
    nodes(&mut d, 178, &[(140, 130), (340, 130)]);
    d.centred(MIDDLE, 248, "small", "Each node is a neighbour of both routers.");
    d
}

fn racks() -> Drawing {
    let mut d = Drawing::new(
        "racks",
        "A spine, AS 64512, above two top-of-rack switches, tor1 in AS 64601 and tor2 in AS 64602. The nodes m and w11 are neighbours of tor1 \
         and in its AS, w21 and w22 of tor2.",
        262,
    );
    d.labelled((165, 16), (150, 44), &["spine", "AS 64512"]);
    for (x, tor, number, pair) in [
        (50, "tor1", "AS 64601", [(20, "m"), (135, "w11")]),
        (280, "tor2", "AS 64602", [(250, "w21"), (365, "w22")]),
    ] {
        let middle = x + 75;
        d.line((MIDDLE, 60), (middle, 96), "");
        d.labelled((x, 96), (150, 44), &[tor, number]);
        for (left, node) in pair {
            d.line((middle, 140), (left + 47, 176), "");
            d.labelled((left, 176), (95, 44), &[node, number]);
        }
    }
    d.centred(
        MIDDLE,
        246,
        "small",
        "Nodes are in the AS of their rack, and neighbours of its switch.",
    );
    d
}

fn mesh() -> Drawing {
    let mut d = Drawing::new(
        "mesh",
        "The router and the nodes m, w11 and w12 are all in AS 64515, and each is a neighbour of each.",
        216,
    );
    let corners = [
        (105, 36, "router"),
        (375, 36, "w11"),
        (105, 146, "m"),
        (375, 146, "w12"),
    ];
    for (number, (x, y, _)) in corners.iter().enumerate() {
        for (other_x, other_y, _) in corners.iter().skip(number + 1) {
            d.line((*x, *y), (*other_x, *other_y), "");
        }
    }
    for (x, y, name) in corners {
        d.labelled((x - 65, y - 20), (130, 40), &[name]);
    }
    d.centred(
        MIDDLE,
        200,
        "small",
        "All are in AS 64515, and each is a neighbour of each.",
    );
    d
}

fn reflectors() -> Drawing {
    let mut d = Drawing::new(
        "reflectors",
        "The nodes m, w11 and w12 are neighbours of two route reflectors, rr1 and rr2, and so is the router. All are in AS 64515.",
        246,
    );
    let reflectors = [(66, "rr1"), (152, "rr2")];
    for (y, node) in [(20, "m"), (88, "w11"), (156, "w12")] {
        for (middle, _) in reflectors {
            d.line((120, y + 20), (190, middle), "");
        }
        d.labelled((20, y), (100, 40), &[node]);
    }
    for (middle, name) in reflectors {
        d.line((290, middle), (360, 108), "");
        d.labelled((190, middle - 20), (100, 40), &[name]);
    }
    d.labelled((360, 88), (100, 40), &["router"]);
    d.centred(
        MIDDLE,
        226,
        "small",
        "All are in AS 64515, and neighbours of the reflectors alone.",
    );
    d
}

fn sites() -> Drawing {
    let mut d = Drawing::new(
        "sites",
        "Clients reach the core. The core reaches one address by the routers of two sites, behind each of which a cluster has it.",
        300,
    );
    d.labelled((180, 16), (120, 36), &["clients"]);
    d.arrow((MIDDLE, 52), (MIDDLE, 84), "");
    d.labelled((180, 86), (120, 36), &["core"]);
    for (x, router, cluster) in [
        (40, "router of site 1", "cluster 1"),
        (270, "router of site 2", "cluster 2"),
    ] {
        let middle = x + 85;
        d.arrow((MIDDLE, 122), (middle, 158), "");
        d.labelled((x, 160), (170, 36), &[router]);
        d.arrow((middle, 196), (middle, 228), "");
        d.labelled((x, 230), (170, 50), &[cluster, "a Service of the address"]);
    }
    d
}

//! `import` on objects of each load balancer that it knows.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may panic"
)]

use kubectl_purelb::import::{Import, Options, import};
use kubectl_purelb::read::Files;
use kubectl_purelb::render::{Format, Ink, Report, render};
use kubectl_purelb::verb::import::{difference, imported};
use serde_json::{Value, json};

fn options() -> Options {
    Options {
        peers: Vec::new(),
        namespace: "purelb".to_owned(),
        subnets: vec!["10.0.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()],
        is_loose: false,
    }
}

fn objects(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn of(text: &str) -> Import {
    import(&objects(text), &options())
}

/// Each group on a line: name, how, ranges with subnet and aggregation, namespaces.
fn groups(import: &Import) -> Vec<String> {
    let line = |group: &crds::ServiceGroup| {
        assert!(group.spec.parse().is_ok(), "{group:?}");
        let spec = &group.spec;
        let (kind, pools) = match (&spec.local, &spec.remote) {
            (Some(local), None) => ("local", &local.pools),
            (None, Some(remote)) => ("remote", &remote.pools),
            other => panic!("{other:?}"),
        };
        let ranges = pools.v4pools.iter().chain(&pools.v6pools).flatten();
        let ranges: Vec<String> = ranges
            .map(|pool| {
                let aggregation = pool.aggregation.as_deref().unwrap_or_default();
                format!("{} in {}{}", pool.pool, pool.subnet, aggregation.replace('/', " as /"))
            })
            .collect();
        let mut line = format!(
            "{} {kind}: {}",
            group.metadata.name.as_deref().unwrap(),
            ranges.join(", ")
        );
        if let Some(namespaces) = &spec.namespaces {
            line.push_str(" for ");
            line.push_str(&namespaces.join(", "));
        }
        if spec.enforce_namespaces == Some(true) {
            line += " alone";
        }
        if spec.namespace_default == Some(true) {
            line += " first";
        }
        line
    };
    import.groups.iter().map(line).collect()
}

fn remarked(import: &Import, object: &str, part: &str) -> bool {
    import
        .remarks
        .iter()
        .any(|remark| remark.object.contains(object) && remark.message.contains(part))
}

fn pool(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: metallb.io/v1beta1\nkind: IPAddressPool\nmetadata: {{name: {name}, namespace: metallb-system, labels: {{zone: {name}}}}}\nspec: {spec}\n---\n"
    )
}

fn advertisement(kind: &str, spec: &str) -> String {
    format!(
        "apiVersion: metallb.io/v1beta1\nkind: {kind}\nmetadata: {{name: adv, namespace: metallb-system}}\nspec: {spec}\n---\n"
    )
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn pools_of_metallb_become_groups() {
    let l2 = || advertisement("L2Advertisement", "{interfaces: [eth0]}");
    let bgp = |spec: &str| advertisement("BGPAdvertisement", spec);
    for (name, text, expected, remarks) in [
        (
            "a CIDR, whose last address is given out",
            pool("a", "{addresses: [10.1.0.0/24]}") + &l2(),
            vec!["default local: 10.1.0.0/24 in 10.1.0.0/23"],
            vec![("IPAddressPool metallb-system/a", "is called here"), ("subnets", "default (10.1.0.0/23)")],
        ),
        (
            "from first to last, in a subnet of the nodes",
            pool("default", "{addresses: ['10.0.0.1-10.0.0.9', ' 10.0.0.20 - 10.0.0.21 ']}") + &l2(),
            vec!["default local: 10.0.0.1-10.0.0.9 in 10.0.0.0/16, 10.0.0.20-10.0.0.21 in 10.0.0.0/16"],
            vec![],
        ),
        (
            "a CIDR with host bits is its network",
            pool("default", "{addresses: [10.0.1.10/24]}") + &l2(),
            vec!["default local: 10.0.1.0/24 in 10.0.0.0/16"],
            vec![],
        ),
        (
            "buggy addresses",
            pool("default", "{avoidBuggyIPs: true, addresses: [10.0.1.0/24, 10.0.2.250-10.0.3.5, 10.0.4.1-10.0.4.9]}") + &l2(),
            vec![
                "default local: 10.0.1.1-10.0.1.254 in 10.0.0.0/16, 10.0.2.250-10.0.2.254 in 10.0.0.0/16, 10.0.3.1-10.0.3.5 in 10.0.0.0/16, \
                 10.0.4.1-10.0.4.9 in 10.0.0.0/16",
            ],
            vec![],
        ),
        (
            "too many pieces without buggy addresses",
            pool("default", "{avoidBuggyIPs: true, addresses: [10.0.0.0/17]}") + &l2(),
            vec!["default local: 10.0.0.0/17 in 10.0.0.0/16"],
            vec![("metallb-system/default", "more than 64 pieces")],
        ),
        (
            "both families",
            pool("default", "{addresses: ['10.0.0.1-10.0.0.9', 'fd00::10-fd00::20', 'fd01::/120']}") + &l2(),
            vec!["default local: 10.0.0.1-10.0.0.9 in 10.0.0.0/16, fd00::10-fd00::20 in fd00::/64, fd01::/120 in fd01::/64"],
            vec![],
        ),
        (
            "of those that are open the first by priority is for who asks for nothing",
            pool("b", "{addresses: [10.0.1.1-10.0.1.9], serviceAllocation: {priority: 20}}")
                + &pool("c", "{addresses: [10.0.2.1-10.0.2.9], serviceAllocation: {priority: 10}}")
                + &pool("a", "{addresses: [10.0.3.1-10.0.3.9]}")
                + &l2(),
            vec![
                "b local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16",
                "default local: 10.0.2.1-10.0.2.9 in 10.0.0.0/16",
                "a local: 10.0.3.1-10.0.3.9 in 10.0.0.0/16",
            ],
            vec![("metallb-system/a", "have to name a"), ("metallb-system/b", "have to name b")],
        ),
        (
            "one that was given to nobody who did not ask is not called default",
            pool("default", "{autoAssign: false, addresses: [10.0.1.1-10.0.1.9]}") + &l2(),
            vec!["default-pool local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16"],
            vec![("metallb-system/default", "it is called default-pool")],
        ),
        (
            "namespaces, of which one has two pools",
            pool("a", "{addresses: [10.0.1.1-10.0.1.9], serviceAllocation: {priority: 5, namespaces: [shop, web]}}")
                + &pool("b", "{addresses: [10.0.2.1-10.0.2.9], serviceAllocation: {priority: 9, namespaces: [shop]}}")
                + &l2(),
            vec![
                "a local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16 for shop, web first",
                "b local: 10.0.2.1-10.0.2.9 in 10.0.0.0/16 for shop",
            ],
            vec![("metallb-system/a", "enforceNamespaces")],
        ),
        (
            "selectors of Services and namespaces",
            pool(
                "a",
                "{addresses: [10.0.1.1-10.0.1.9], serviceAllocation: {serviceSelectors: [{matchLabels: {app: x}}], namespaceSelectors: [{matchLabels: {x: y}}]}}",
            ) + &l2(),
            vec!["a local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16"],
            vec![("a", "serviceSelectors"), ("a", "namespaceSelectors")],
        ),
        (
            "BGP, with an aggregation",
            pool("a", "{addresses: [192.0.2.0/24]}") + &bgp("{aggregationLength: 26, localPref: 100, communities: ['1:2']}"),
            vec!["default remote: 192.0.2.0/24 in 192.0.2.0/23 as /26"],
            vec![("BGPAdvertisement", "communities, localPref")],
        ),
        (
            "BGP for one pool by name, L2 for another by label, none for the third",
            pool("a", "{addresses: [10.0.1.1-10.0.1.9], autoAssign: false}")
                + &pool("b", "{addresses: [198.51.100.1-198.51.100.9], autoAssign: false}")
                + &pool("c", "{addresses: [10.0.3.1-10.0.3.9], autoAssign: false}")
                + &advertisement("L2Advertisement", "{ipAddressPoolSelectors: [{matchLabels: {zone: a}}]}")
                + &bgp("{ipAddressPools: [b]}"),
            vec![
                "a local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16",
                "b remote: 198.51.100.1-198.51.100.9 in 198.51.100.0/24 as /32",
                "c local: 10.0.3.1-10.0.3.9 in 10.0.0.0/16",
            ],
            vec![("metallb-system/c", "no L2Advertisement"), ("L2Advertisement", "it names no interfaces")],
        ),
        (
            "both kinds for one",
            pool("default", "{addresses: [10.0.1.1-10.0.1.9]}") + &l2() + &bgp("{nodeSelectors: [{matchLabels: {rack: a}}]}"),
            vec!["default local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16"],
            vec![("metallb-system/default", "by L2 and by BGP"), ("BGPAdvertisement", "only some nodes")],
        ),
        (
            "what does not read is left out",
            pool("default", "{addresses: [10.0.1.9-10.0.1.1, nonsense, 10.0.1.1-fd00::1, 10.0.1.77, 10.0.0.0/40]}") + &pool("b", "{addresses: [x]}") + &l2(),
            vec!["default local: 10.0.1.77 in 10.0.0.0/16"],
            vec![
                ("default", "10.0.1.9-10.0.1.1 is left out: invalid IP range"),
                ("default", "nonsense is left out"),
                ("default", "different families"),
                ("default", "10.0.0.0/40 is left out"),
                ("metallb-system/b", "its range x is left out"),
            ],
        ),
        (
            "ranges that overlap inside, and with another",
            pool("a", "{addresses: [10.0.1.1-10.0.1.9, 10.0.1.5-10.0.1.20], autoAssign: false}")
                + &pool("b", "{addresses: [10.0.2.1-10.0.2.9], autoAssign: false}")
                + &pool("c", "{addresses: [10.0.2.5], autoAssign: false}")
                + &l2(),
            vec!["b local: 10.0.2.1-10.0.2.9 in 10.0.0.0/16", "c local: 10.0.2.5 in 10.0.0.0/16"],
            vec![("metallb-system/a", "overlap; take the common addresses out of one; it is left out"), ("metallb-system/c", "overlaps")],
        ),
        (
            "a peer, a community and a profile",
            "apiVersion: metallb.io/v1beta2\nkind: BGPPeer\nmetadata: {name: tor, namespace: metallb-system}\nspec: {myASN: 64500, peerASN: 64501, peerAddress: 10.0.0.254, bfdProfile: quick, nodeSelectors: [{matchLabels: {rack: a}}]}\n---\n".to_owned()
                + &advertisement("Community", "{communities: [{name: x, value: '1:2'}]}") + &advertisement("BFDProfile", "{}"),
            vec![],
            vec![
                ("BGPPeer metallb-system/tor", "bgp: {localAS: 64500, neighbors: [{address: 10.0.0.254, as: 64501}]}; also bfd: true of the neighbor, bgp.nodes"),
                ("Community", "bgp.communities"),
                ("BFDProfile", "bgp.bfd"),
            ],
        ),
        (
            "the ConfigMap of 0.12",
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: config, namespace: metallb-system}\ndata:\n  config: |\n    peers: [{peer-address: 10.0.0.254, my-asn: 64500, peer-asn: 64501}]\n    bgp-communities: {x: '1:2'}\n    address-pools:\n    - {name: My_Pool, protocol: layer2, addresses: [10.0.1.0/24], avoid-buggy-ips: true, auto-assign: false}\n    - {name: routed, protocol: bgp, addresses: [192.0.2.1-192.0.2.9], bgp-advertisements: [{aggregation-length: 32}, {aggregation-length: 24}]}\n".to_owned(),
            vec![
                "my-pool local: 10.0.1.1-10.0.1.254 in 10.0.0.0/16",
                "default remote: 192.0.2.1-192.0.2.9 in 192.0.2.0/24 as /32",
            ],
            vec![("peer 10.0.0.254", "localAS: 64500"), ("ConfigMap metallb-system/config", "bgp-communities")],
        ),
        (
            "a ConfigMap that is no YAML",
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: config, namespace: metallb-system}\ndata: {config: 'address-pools: [}'}\n".to_owned(),
            vec![],
            vec![("ConfigMap metallb-system/config", "is no YAML")],
        ),
    ] {
        let import = of(&text);
        assert_eq!(groups(&import), expected, "{name}: {:#?}", import.remarks);
        for (object, part) in remarks {
            assert!(remarked(&import, object, part), "{name}: {part}: {:#?}", import.remarks);
        }
    }
}

#[test]
fn pools_of_kube_vip_become_groups() {
    let config = |data: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: kubevip, namespace: kube-system}}\ndata: {data}\n---\n"
        )
    };
    let set = |env: &str| {
        format!(
            "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {{name: kube-vip-ds, namespace: kube-system}}\nspec: {{template: {{spec: {{containers: [{{image: 'ghcr.io/kube-vip/kube-vip:v1', env: {env}}}]}}}}}}\n---\n"
        )
    };
    for (name, text, expected, remarks) in [
        (
            "ranges for all and for a namespace",
            config("{range-global: '10.0.0.1-10.0.0.9,10.0.0.20-10.0.0.21', cidr-shop: 10.0.1.0/29}"),
            vec![
                "default local: 10.0.0.1-10.0.0.9 in 10.0.0.0/16, 10.0.0.20-10.0.0.21 in 10.0.0.0/16",
                "shop local: 10.0.1.0/29 in 10.0.0.0/16 for shop alone",
            ],
            vec![],
        ),
        (
            "ends left out, both families, and what has no equivalent",
            config(
                "{cidr-global: '10.0.1.0/29,fd00::/120', skip-end-ips-in-cidr: 'true', search-order: desc, interface-shop: eth1, allow-share-shop: 'true'}",
            ),
            vec!["default local: 10.0.1.1-10.0.1.6 in 10.0.0.0/16, fd00::/120 in fd00::/64"],
            vec![
                ("search-order", "lowest"),
                ("interface-shop", "LBNodeAgent"),
                ("allow-share-shop", "allow-shared-ip"),
            ],
        ),
        (
            "DHCP and nonsense",
            config("{cidr-global: 0.0.0.0/32, range-shop: x}"),
            vec![],
            vec![("cidr-global", "DHCP"), ("range-shop", "its range x is left out")],
        ),
        (
            "BGP",
            config("{range-global: 192.0.2.1-192.0.2.9}")
                + &set(
                    "[{name: bgp_enable, value: 'true'}, {name: bgp_as, value: '64500'}, {name: bgp_peeraddress, value: 10.0.0.254}, {name: bgp_peeras, value: '64501'}, {name: cp_enable, value: 'true'}]",
                ),
            vec!["default remote: 192.0.2.1-192.0.2.9 in 192.0.2.0/24 as /32"],
            vec![
                (
                    "kube-vip-ds",
                    "localAS: 64500, neighbors: [{address: 10.0.0.254, as: 64501}]",
                ),
                ("kube-vip-ds", "svc_enable"),
            ],
        ),
    ] {
        let import = of(&text);
        assert_eq!(groups(&import), expected, "{name}: {:#?}", import.remarks);
        for (object, part) in remarks {
            assert!(remarked(&import, object, part), "{name}: {part}: {:#?}", import.remarks);
        }
    }
    let import = of(&set("[{name: vip_interface, value: ens18.100}]"));
    assert_eq!(import.agents.len(), 1);
    assert_eq!(
        import.agents[0].spec.local.as_ref().unwrap().local_interface(),
        "^(ens18\\.100)$"
    );
}

#[test]
fn pools_of_cilium_become_groups() {
    let object = |kind: &str, name: &str, spec: &str| {
        format!("apiVersion: cilium.io/v2alpha1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n")
    };
    let policy = |spec: &str| object("CiliumL2AnnouncementPolicy", "l2", spec);
    let routes = || {
        object(
            "CiliumBGPAdvertisement",
            "bgp",
            "{advertisements: [{advertisementType: Service, service: {addresses: [LoadBalancerIP]}}]}",
        )
    };
    for (name, text, expected, remarks) in [
        (
            "blocks of every form",
            object(
                "CiliumLoadBalancerIPPool",
                "blue",
                "{allowFirstLastIPs: 'No', blocks: [{cidr: 10.0.1.0/29}, {start: 10.0.2.1, stop: 10.0.2.9}, {start: 10.0.3.7}, {stop: 10.0.4.1}]}",
            ) + &policy("{interfaces: ['^eth[0-9]+'], loadBalancerIPs: true}"),
            vec![
                "default local: 10.0.1.0/29 in 10.0.0.0/16, 10.0.2.1-10.0.2.9 in 10.0.0.0/16, 10.0.3.7 in 10.0.0.0/16",
            ],
            vec![
                ("CiliumLoadBalancerIPPool blue", "neither cidr nor start"),
                ("blue", "allowFirstLastIPs"),
                ("Cilium", "goes on giving out"),
            ],
        ),
        (
            "by namespace, by label, and disabled",
            object(
                "CiliumLoadBalancerIPPool",
                "a",
                "{blocks: [{cidr: 10.0.1.0/29}], serviceSelector: {matchLabels: {io.kubernetes.service.namespace: shop}}}",
            ) + &object(
                "CiliumLoadBalancerIPPool",
                "b",
                "{blocks: [{cidr: 10.0.2.0/29}], serviceSelector: {matchExpressions: [{key: color, operator: In, values: [red]}]}}",
            ) + &object(
                "CiliumLoadBalancerIPPool",
                "c",
                "{disabled: true, cidrs: [{cidr: 10.0.3.0/29}]}",
            ) + &policy("{externalIPs: true, serviceSelector: {matchLabels: {a: b}}}"),
            vec![
                "a local: 10.0.1.0/29 in 10.0.0.0/16 for shop",
                "b local: 10.0.2.0/29 in 10.0.0.0/16",
                "c local: 10.0.3.0/29 in 10.0.0.0/16",
            ],
            vec![
                ("IPPool a", "enforceNamespaces"),
                ("IPPool b", "serviceSelector"),
                ("IPPool c", "disabled"),
                ("l2", "externalIPs"),
                ("l2", "serviceSelector"),
            ],
        ),
        (
            "BGP, with the peers of the new and of the old control plane",
            object(
                "CiliumLoadBalancerIPPool",
                "a",
                "{blocks: [{cidr: 192.0.2.0/29}, {cidr: 'fd05::/120'}]}",
            ) + &routes()
                + &object(
                    "CiliumBGPClusterConfig",
                    "new",
                    "{bgpInstances: [{localASN: 64500, peers: [{peerAddress: 10.0.0.254, peerASN: 64501}]}]}",
                )
                + &object(
                    "CiliumBGPPeeringPolicy",
                    "old",
                    "{nodeSelector: {matchLabels: {rack: a}}, virtualRouters: [{localASN: 64502, serviceSelector: {}, neighbors: [{peerAddress: 10.0.0.253/32, peerASN: 64503}]}]}",
                )
                + &object("CiliumBGPPeerConfig", "cfg", "{}"),
            vec!["default remote: 192.0.2.0/29 in 192.0.2.0/24 as /32, fd05::/120 in fd05::/64 as /128"],
            vec![
                ("new", "localAS: 64500"),
                ("old", "address: 10.0.0.253, as: 64503"),
                ("old", "bgp.nodes"),
                ("cfg", "timers"),
            ],
        ),
        (
            "announced by nobody, and by both",
            object("CiliumLoadBalancerIPPool", "a", "{blocks: [{cidr: 10.0.1.0/29}]}"),
            vec!["default local: 10.0.1.0/29 in 10.0.0.0/16"],
            vec![("IPPool a", "nobody announced")],
        ),
    ] {
        let import = of(&text);
        assert_eq!(groups(&import), expected, "{name}: {:#?}", import.remarks);
        for (object, part) in remarks {
            assert!(remarked(&import, object, part), "{name}: {part}: {:#?}", import.remarks);
        }
    }
}

#[test]
fn interfaces_and_nodes_become_one_lbnodeagent_or_none() {
    let agents = |text: &str| -> Vec<Value> {
        let import = of(text);
        import
            .agents
            .iter()
            .map(|agent| json!([agent.metadata.name, agent.spec]))
            .collect()
    };
    let l2 = |spec: &str| advertisement("L2Advertisement", spec);
    assert_eq!(agents(&l2("{}")), Vec::<Value>::new());
    assert_eq!(
        agents(&l2("{interfaces: [eth0, br+x.5]}")),
        [json!(["default", {"local": {"localInterface": "^(eth0|br\\+x\\.5)$"}}])]
    );
    let racks =
        "{nodeSelectors: [{matchLabels: {rack: a}}, {matchExpressions: [{key: rack, operator: In, values: [b]}]}]}";
    assert_eq!(
        agents(&l2(racks)),
        [
            json!(["default", {"local": {}, "nodeSelector": {"matchLabels": {"rack": "a"}}}]),
            json!(["default-2", {"local": {}, "nodeSelector": {"matchExpressions": [{"key": "rack", "operator": "In", "values": ["b"]}]}}]),
        ]
    );
    let several = l2("{interfaces: [eth0]}") + &l2("{interfaces: [eth1]}");
    assert_eq!(agents(&several), Vec::<Value>::new());
    assert!(remarked(
        &of(&several),
        "L2Advertisement",
        "write one for each kind of node"
    ));
    let wrong = "apiVersion: cilium.io/v2alpha1\nkind: CiliumL2AnnouncementPolicy\nmetadata: {name: l2}\nspec: {interfaces: ['eth(']}\n";
    assert_eq!(agents(wrong), Vec::<Value>::new());
    assert!(remarked(
        &of(wrong),
        "CiliumL2AnnouncementPolicy l2",
        "cannot be translated"
    ));
}

fn service(name: &str, annotations: &str, spec: &str, ips: &[&str]) -> String {
    let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: web, annotations: {annotations}}}\nspec: {{type: LoadBalancer, ports: [{{port: 80}}]{spec}}}\nstatus: {{loadBalancer: {{ingress: {}}}}}\n---\n",
        Value::from(ips)
    )
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn services_ask_for_what_they_have() {
    let pools = || {
        pool("first", "{addresses: [10.0.1.1-10.0.1.99, 'fd00::1-fd00::99']}")
            + &pool("dmz", "{addresses: [10.0.2.1-10.0.2.99], autoAssign: false}")
            + &pool(
                "web",
                "{addresses: [10.0.3.1-10.0.3.9], serviceAllocation: {namespaces: [web]}}",
            )
            + &advertisement("L2Advertisement", "{interfaces: [eth0]}")
    };
    for (name, text, expected, remarks) in [
        (
            "asked for nothing",
            service("s", "{metallb.io/ip-allocated-from-pool: first}", "", &["10.0.1.7"]),
            json!({"purelb.io/addresses": "10.0.1.7", "purelb.io/allocated-by": "PureLB"}),
            vec![],
        ),
        (
            "named the pool that has another name here",
            service("s", "{metallb.universe.tf/address-pool: first}", "", &["10.0.1.7", "fd00::7"]),
            json!({"purelb.io/addresses": "10.0.1.7,fd00::7", "purelb.io/allocated-by": "PureLB", "purelb.io/service-group": "default"}),
            vec![],
        ),
        (
            "got its address from a pool that it does not name",
            service("s", "{}", "", &["10.0.2.7"]),
            json!({"purelb.io/addresses": "10.0.2.7", "purelb.io/allocated-by": "PureLB", "purelb.io/service-group": "dmz"}),
            vec![],
        ),
        (
            "from its namespace's own",
            service("s", "{}", "", &["10.0.3.7"]),
            json!({"purelb.io/addresses": "10.0.3.7", "purelb.io/allocated-by": "PureLB"}),
            vec![],
        ),
        (
            "insists, and has nothing yet",
            service("s", "{metallb.io/loadBalancerIPs: '10.0.1.8, fd00::8'}", "", &[]),
            json!({"purelb.io/addresses": "10.0.1.8,fd00::8"}),
            vec![],
        ),
        (
            "insists on another",
            service("s", "{metallb.io/loadBalancerIPs: 10.0.1.8}", "", &["10.0.1.7"]),
            json!({"purelb.io/addresses": "10.0.1.8", "purelb.io/allocated-by": "PureLB"}),
            vec![("web/s", "asks for 10.0.1.8 and has 10.0.1.7")],
        ),
        (
            "spec.loadBalancerIP, as kube-vip writes it",
            service("s", "{kube-vip.io/loadbalancerIPs: 10.0.1.8, kube-vip.io/vipHost: node1}", ", loadBalancerIP: 10.0.1.8", &["10.0.1.8"]),
            json!({"purelb.io/addresses": "10.0.1.8", "purelb.io/allocated-by": "PureLB"}),
            vec![],
        ),
        (
            "traffic policy Local",
            service("s", "{}", ", externalTrafficPolicy: Local", &["10.0.1.8"]),
            json!({"purelb.io/addresses": "10.0.1.8", "purelb.io/allocated-by": "PureLB", "purelb.io/allow-local": ""}),
            vec![],
        ),
        (
            "Cilium's words",
            service("s", "{lbipam.cilium.io/ips: 10.0.1.8, lbipam.cilium.io/sharing-key: k, lbipam.cilium.io/sharing-cross-namespace: '*'}", "", &[]),
            json!({"purelb.io/addresses": "10.0.1.8", "purelb.io/allow-shared-ip": "k", "purelb.io/allow-shared-ip-namespaces": "*"}),
            vec![],
        ),
        (
            "older words of Cilium's",
            service("s", "{io.cilium/lb-ipam-ips: 10.0.1.8, io.cilium/lb-ipam-sharing-key: k}", "", &[]),
            json!({"purelb.io/addresses": "10.0.1.8", "purelb.io/allow-shared-ip": "k"}),
            vec![],
        ),
        (
            "two of a family",
            service("s", "{}", "", &["10.0.1.8", "10.0.1.9"]),
            json!({"purelb.io/allocated-by": "PureLB"}),
            vec![("web/s", "they are not pinned")],
        ),
        (
            "an address of no pool",
            service("s", "{metallb.io/address-pool: dmz}", "", &["10.9.9.9"]),
            json!({"purelb.io/service-group": "dmz"}),
            vec![("web/s", "10.9.9.9, which none of these pools has")],
        ),
        ("another's altogether", service("s", "{}", "", &["203.0.113.9"]), json!(null), vec![]),
        (
            "that does not read",
            service("s", "{a: true}", "", &["10.0.1.7"]),
            json!(null),
            vec![("Service web/s", "does not read: invalid type")],
        ),
        ("of a cloud", service("s", "{}", "", &[]), json!(null), vec![]),
        (
            "another class",
            service("s", "{}", ", loadBalancerClass: metallb.io/metallb", &["10.0.1.7"]),
            json!(null),
            vec![("web/s", "create it again without, with purelb.io/addresses: 10.0.1.7")],
        ),
        (
            "DHCP, nonsense, unknown words and an unknown pool",
            service("s", "{kube-vip.io/loadbalancerIPs: 0.0.0.0, metallb.io/loadBalancerIPs: x, metallb.io/what: v, metallb.io/address-pool: z, kube-vip.io/serviceInterface: eth1}", "", &[]),
            json!(null),
            vec![("web/s", "DHCP"), ("web/s", "no list of addresses: x"), ("web/s", "metallb.io/what has no equivalent"), ("web/s", "pool z, which is not there"), ("web/s", "kube-vip.io/serviceInterface is eth1")],
        ),
        (
            "ours already",
            "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: web}\nspec: {type: LoadBalancer, ports: [{port: 80}]}\nstatus: {loadBalancer: {ingress: [{ip: 10.0.1.7}]}, conditions: [{type: purelb.io/Granted, status: 'True', reason: Local, message: 10.0.1.7 from default, lastTransitionTime: '2026-01-01T00:00:00Z'}]}\n".to_owned(),
            json!(null),
            vec![],
        ),
        (
            "said in our words before",
            service("s", "{purelb.io/service-group: dmz, purelb.io/addresses: 10.0.2.7, purelb.io/allocated-by: PureLB, metallb.io/address-pool: first}", "", &["10.0.2.7"]),
            json!(null),
            vec![],
        ),
        (
            "at a node's address",
            "apiVersion: v1\nkind: Node\nmetadata: {name: n}\nstatus: {addresses: [{type: InternalIP, address: 10.0.0.7}]}\n---\napiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: svclb-s-1, namespace: kube-system}\n---\n".to_owned()
                + &service("s", "{}", "", &["10.0.0.7"]),
            json!(null),
            vec![("K3s' servicelb", "--disable=servicelb")],
        ),
    ] {
        let import = of(&(pools() + &text));
        let found = import.services.first().map(|service| &service.annotations);
        assert_eq!(json!(found), expected, "{name}: {:#?}", import.remarks);
        for (object, part) in remarks {
            assert!(remarked(&import, object, part), "{name}: {part}: {:#?}", import.remarks);
        }
    }
    let loose = Options {
        is_loose: true,
        ..options()
    };
    let import = import(&objects(&(pools() + &service("s", "{}", "", &["10.0.2.7"]))), &loose);
    assert_eq!(
        json!(import.services[0].annotations),
        json!({"purelb.io/allocated-by": "PureLB", "purelb.io/service-group": "dmz"})
    );
}

#[test]
fn services_that_share_an_address_may_go_on() {
    let other = |text: String| text.replace("namespace: web", "namespace: shop");
    let text = pool("default", "{addresses: [10.0.1.1-10.0.1.99]}")
        + &service("a", "{metallb.io/allow-shared-ip: k}", "", &["10.0.1.7"])
        + &other(service("b", "{metallb.io/allow-shared-ip: k}", "", &["10.0.1.7"]))
        + &service("c", "{}", "", &["10.0.1.8"])
        + &service("d", "{}", "", &["10.0.1.8"]);
    let import = of(&text);
    let of_name = |name: &str| {
        let mut services = import.services.iter();
        let annotations = &services.find(|service| service.name == name).unwrap().annotations;
        let get = |key: &str| annotations.get(key).cloned();
        (
            get("purelb.io/allow-shared-ip"),
            get("purelb.io/allow-shared-ip-namespaces"),
        )
    };
    assert_eq!(of_name("a"), (Some("k".to_owned()), Some("shop".to_owned())));
    assert_eq!(of_name("b"), (Some("k".to_owned()), Some("web".to_owned())));
    assert_eq!(of_name("c"), (Some("shared-10.0.1.8".to_owned()), None));
    assert_eq!(of_name("d"), (Some("shared-10.0.1.8".to_owned()), None));
}

#[test]
fn two_load_balancers_have_names_beside_each_other_and_one_alone_may_be_asked_for() {
    let text = pool("default", "{addresses: [10.0.1.1-10.0.1.9]}")
        + "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kubevip, namespace: kube-system}\ndata: {range-global: 10.0.2.1-10.0.2.9}\n";
    assert_eq!(
        groups(&of(&text)),
        [
            "default local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16",
            "default-2 local: 10.0.2.1-10.0.2.9 in 10.0.0.0/16"
        ]
    );
    // A group of ours that is called default already stays what it is.
    let ours = "---\napiVersion: purelb.io/v2\nkind: ServiceGroup\nmetadata: {name: default, namespace: purelb}\nspec: {local: {v4pool: {pool: 10.0.9.1, subnet: 10.0.0.0/16}}}\n";
    assert_eq!(
        groups(&of(&(pool("a", "{addresses: [10.0.1.1-10.0.1.9]}") + ours))),
        ["a local: 10.0.1.1-10.0.1.9 in 10.0.0.0/16"]
    );
    let one = Options {
        peers: vec![kubectl_purelb::import::Peer::KubeVip],
        ..options()
    };
    assert_eq!(
        groups(&import(&objects(&text), &one)),
        ["default local: 10.0.2.1-10.0.2.9 in 10.0.0.0/16"]
    );
}

#[test]
fn what_is_printed_is_read_again_and_what_is_there_already_is_no_difference() {
    let text = pool("first", "{addresses: [10.0.1.1-10.0.1.99]}")
        + &advertisement("L2Advertisement", "{interfaces: [eth0]}")
        + &service("s", "{metallb.io/allow-shared-ip: \"it's: one\"}", "", &["10.0.1.7"]);
    let there = objects(&text);
    let result = imported(&of(&text));
    let yaml = render(&result, Format::Table, Ink::default()).unwrap();
    assert!(
        yaml.starts_with("# To be applied with: kubectl apply --server-side"),
        "{yaml}"
    );
    assert!(yaml.contains("\n# IPAddressPool metallb-system/first: "), "{yaml}");
    let mut files = Files::default();
    files.parse(&yaml).unwrap();
    assert_eq!(
        (files.groups.len(), files.agents.len(), files.services.len()),
        (1, 1, 1)
    );
    assert_eq!(
        result.names(),
        [
            "servicegroup/purelb/default",
            "lbnodeagent/purelb/default",
            "service/web/s"
        ]
    );

    let shown = render(&difference(&result, &there), Format::Table, Ink::default()).unwrap();
    assert_eq!(
        shown,
        "+ ServiceGroup/purelb/default
  + spec.local.v4pools: [{\"pool\":\"10.0.1.1-10.0.1.99\",\"subnet\":\"10.0.0.0/16\"}]
+ LBNodeAgent/purelb/default
  + spec.local.localInterface: \"^(eth0)$\"
~ Service/web/s
  + metadata.annotations[purelb.io/addresses]: \"10.0.1.7\"
  + metadata.annotations[purelb.io/allocated-by]: \"PureLB\"
  + metadata.annotations[purelb.io/allow-shared-ip]: \"it's: one\"
"
    );
    let mut after = objects(&yaml);
    after.extend(there);
    // Imported again it is the same.
    let result = imported(&import(&after, &options()));
    let shown = render(&difference(&result, &after[..3]), Format::Table, Ink::default()).unwrap();
    assert_eq!(shown, "nothing would change\n");
}

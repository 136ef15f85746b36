//! Clusters that are written down.

use kubectl_purelb::cluster::Cluster;
use serde_json::{Value, json};

/// When they are looked at.
pub(crate) const NOW: &str = "2026-01-01T12:00:00Z";

const HEALTHY: &str = "
kind: Node
metadata: {name: a, labels: {kubernetes.io/os: linux}}
status: {addresses: [{type: InternalIP, address: 10.0.0.101}], conditions: [{type: Ready, status: 'True'}]}
---
kind: Node
metadata: {name: b, labels: {kubernetes.io/os: linux}}
status: {addresses: [{type: InternalIP, address: 10.0.0.102}], conditions: [{type: Ready, status: 'True'}]}
---
kind: Node
metadata: {name: c, labels: {kubernetes.io/os: linux}}
status: {addresses: [{type: InternalIP, address: 10.0.0.103}], conditions: [{type: Ready, status: 'True'}]}
---
kind: DaemonSet
metadata: {name: lbnodeagent, namespace: purelb, labels: {component: lbnodeagent}}
spec:
  selector: {}
  template: {spec: {nodeSelector: {kubernetes.io/os: linux}, containers: []}}
---
kind: Lease
metadata: {name: purelb-allocator, namespace: purelb}
spec: {holderIdentity: allocator-a, leaseDurationSeconds: 10, renewTime: '2026-01-01T11:59:58.000000Z'}
---
kind: ServiceGroup
metadata: {name: default, namespace: purelb, creationTimestamp: '2026-01-01T10:00:00Z'}
spec: {local: {v4pool: {pool: 10.0.0.1-10.0.0.9, subnet: 10.0.0.0/16}}}
---
kind: LBNodeAgent
metadata: {name: default, namespace: purelb}
spec: {local: {}}
---
kind: Service
metadata: {name: web, creationTimestamp: '2026-01-01T11:00:00Z'}
spec: {type: LoadBalancer, clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 80}]}
status:
  loadBalancer: {ingress: [{ip: 10.0.0.1}]}
  conditions:
  - {type: purelb.io/Allocated, status: 'True', reason: Assigned, message: from pool default, lastTransitionTime: '2026-01-01T11:00:00Z'}
  - {type: purelb.io/Granted, status: 'True', reason: Local, message: 10.0.0.1 from default, lastTransitionTime: '2026-01-01T11:00:00Z'}
  - {type: purelb.io/Announced, status: 'True', reason: Announced, message: 10.0.0.1 by a (eth0), lastTransitionTime: '2026-01-01T11:00:00Z'}
---
kind: EndpointSlice
metadata: {name: web-1, namespace: default, labels: {kubernetes.io/service-name: web}}
endpoints: [{nodeName: a, addresses: [10.244.0.2], conditions: {ready: true}}]
---
kind: Event
metadata: {name: web.1, namespace: default}
reason: AddressAssigned
type: Normal
note: Assigned
eventTime: '2026-01-01T11:50:00.000000Z'
regarding: {kind: Service, namespace: default, name: web}
reportingController: purelb-allocator
";

fn lbnode(name: &str, number: usize) -> Value {
    let ip = format!("10.0.0.{}/16", 101 + number);
    json!({
        "kind": "LBNode",
        "metadata": {"name": name, "namespace": "purelb"},
        "spec": {},
        "status": {"version": "0.1.0", "members": 3, "renewed": "2026-01-01T11:59:30Z", "configuration": "purelb/default",
            "interfaces": [{"name": "eth0", "subnets": [ip]}], "local": 0, "routed": 0},
    })
}

/// Three nodes with one Service, with which all is well.
pub(crate) fn healthy() -> Cluster {
    with(&[])
}

/// The same with these objects beside, or in the place of those of their names.
pub(crate) fn with(more: &[&str]) -> Cluster {
    let mut objects: Vec<Value> = serde_saphyr::from_multiple(HEALTHY).unwrap();
    objects.extend(
        ["a", "b", "c"]
            .iter()
            .enumerate()
            .map(|(number, name)| lbnode(name, number)),
    );
    for object in objects
        .iter_mut()
        .filter(|object| object["kind"] == "LBNode" && object["metadata"]["name"] == "a")
    {
        object["status"]["local"] = json!(1);
        object["status"]["announcing"] =
            json!([{"interface": "eth0", "addresses": [{"ip": "10.0.0.1", "since": "2026-01-01T11:58:50Z"}]}]);
        object["status"]["moves"] = json!([{"time": "2026-01-01T11:58:50Z", "ip": "10.0.0.1", "from": "c", "cause": "silent", "milliseconds": 101}]);
    }
    for text in more {
        let object: Value = serde_saphyr::from_str(text).unwrap();
        let id = |object: &Value| {
            let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
            (
                object["kind"].clone(),
                namespace.to_owned(),
                object["metadata"]["name"].clone(),
            )
        };
        let new = id(&object);
        objects.retain(|known| id(known) != new);
        objects.push(object);
    }
    cluster(objects)
}

fn cluster(objects: Vec<Value>) -> Cluster {
    let mut cluster = Cluster {
        now: NOW.parse().unwrap(),
        version: Some("v1.34.0".to_owned()),
        ..Cluster::default()
    };
    for mut object in objects {
        let kind = object["kind"].as_str().unwrap().to_owned();
        let is_ours = ["ServiceGroup", "LBNodeAgent", "LBNode"].contains(&kind.as_str());
        object["apiVersion"] = match kind.as_str() {
            _ if is_ours => "purelb.io/v2",
            "DaemonSet" => "apps/v1",
            "Lease" => "coordination.k8s.io/v1",
            "EndpointSlice" => "discovery.k8s.io/v1",
            "Event" => "events.k8s.io/v1",
            _ => "v1",
        }
        .into();
        if kind != "Node" && object["metadata"]["namespace"].is_null() {
            object["metadata"]["namespace"] = "default".into();
        }
        object["metadata"]["resourceVersion"] = "1".into();
        match kind.as_str() {
            "Node" => cluster.nodes.push(read(object)),
            "DaemonSet" => cluster.lbnodeagent = Some(read(object)),
            "Lease" => cluster.lease = Some(read(object)),
            "ServiceGroup" => cluster.groups.push(read(object)),
            "LBNodeAgent" => cluster.agents.push(read(object)),
            "LBNode" => cluster.lbnodes.push(read(object)),
            "Service" => {
                let crds::Slim(service) = read(object);
                cluster.services.push(service);
            }
            "EndpointSlice" => cluster.slices.push(read(object)),
            "Event" => cluster.events.push(read(object)),
            other => panic!("{other}"),
        }
    }
    cluster
}

fn read<T: serde::de::DeserializeOwned>(object: Value) -> T {
    let text = object.to_string();
    serde_json::from_value(object).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Many Services on many nodes, each announced by one of them.
pub(crate) fn large(services: usize, nodes: usize) -> Cluster {
    let at = |number: usize| format!("10.{}.{}.{}", 1 + number / 65_536, number / 256 % 256, number % 256);
    let mut objects = vec![
        json!({"kind": "ServiceGroup", "metadata": {"name": "default", "namespace": "purelb"},
            "spec": {"local": {"v4pool": {"pool": "10.1.0.0-10.1.255.254", "subnet": "10.0.0.0/8"}}}}),
        json!({"kind": "LBNodeAgent", "metadata": {"name": "default", "namespace": "purelb"}, "spec": {"local": {}}}),
        json!({"kind": "Lease", "metadata": {"name": "purelb-allocator", "namespace": "purelb"},
            "spec": {"holderIdentity": "a", "leaseDurationSeconds": 10, "renewTime": "2026-01-01T11:59:58.000000Z"}}),
    ];
    for number in 0..services {
        let (ip, node) = (at(number), number % nodes);
        let time = "2026-01-01T11:00:00Z";
        let condition = |type_: &str, reason: &str, message: String| json!({"type": type_, "status": "True", "reason": reason, "message": message, "lastTransitionTime": time});
        let name = format!("s{number}");
        objects.push(
            json!({"kind": "Service", "metadata": {"name": name, "creationTimestamp": time},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.200.0.1", "ports": [{"port": 80}]},
            "status": {"loadBalancer": {"ingress": [{"ip": ip}]}, "conditions": [
                condition("purelb.io/Allocated", "Assigned", "from pool default".to_owned()),
                condition("purelb.io/Granted", "Local", format!("{ip} from default")),
                condition("purelb.io/Announced", "Announced", format!("{ip} by n{node} (eth0)")),
            ]}}),
        );
        objects.push(json!({"kind": "EndpointSlice", "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "endpoints": [{"nodeName": format!("n{node}"), "addresses": ["10.244.0.2"], "conditions": {"ready": true}}]}));
    }
    for node in 0..nodes {
        let name = format!("n{node}");
        let own = format!("10.250.0.{node}");
        let held = (0..services)
            .filter(|number| number % nodes == node)
            .map(|number| json!({"ip": at(number)}));
        let held: Vec<Value> = held.collect();
        objects.push(json!({"kind": "Node", "metadata": {"name": name},
            "status": {"addresses": [{"type": "InternalIP", "address": own}]}}));
        objects.push(
            json!({"kind": "LBNode", "metadata": {"name": name, "namespace": "purelb"}, "spec": {},
            "status": {"version": "0.1.0", "members": nodes, "renewed": "2026-01-01T11:59:30Z", "local": held.len(),
                "interfaces": [{"name": "eth0", "subnets": [format!("{own}/8")]}],
                "announcing": [{"interface": "eth0", "addresses": held}]}}),
        );
    }
    cluster(objects)
}

//! The walkthrough's Services and their VIPs, and what can be seen of one from everywhere.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use crds::annotations;
use e2e::{Lab, Node};
use k8s_openapi::api::core::v1::Service;
use kube::{Api, ResourceExt};

use crate::screen::Screen;

/// The namespace of the walkthrough's Services.
pub(crate) const NAMESPACE: &str = "nginx-quic";
/// The label of the walkthrough's web servers, and how many there are.
pub(crate) const BACKENDS: (&str, usize) = ("app=nginx-lb", 4);
/// A Service of the walkthrough and the address it is to get.
pub(crate) struct Vip {
    /// The Service's name.
    pub(crate) service: &'static str,
    /// Its address.
    pub(crate) address: &'static str,
    /// Is it local, so that one node answers for it on the LAN, or routed, so that all do?
    pub(crate) is_local: bool,
}

/// The walkthrough's six Services.
pub(crate) const VIPS: [Vip; 6] = [
    vip("nginx-lb-service", "10.31.188.64", true),
    vip("nginx-lb2-service", "10.31.188.65", true),
    vip("nginx-lb3-service", "10.31.188.66", true),
    vip("nginx-lb4-service", "10.31.188.100", true),
    vip("nginx-lb5-service", "10.189.0.0", false),
    vip("nginx-lb6-service", "10.189.100.100", false),
];
/// The local one and the routed one that are looked at more closely.
pub(crate) const LOCAL: &Vip = &VIPS[0];
pub(crate) const ROUTED: &Vip = &VIPS[4];

const fn vip(service: &'static str, address: &'static str, is_local: bool) -> Vip {
    Vip {
        service,
        address,
        is_local,
    }
}

impl Vip {
    /// Where its clients are: on the same LAN, or behind the router.
    pub(crate) fn client(&self) -> &'static str {
        if self.is_local { "client" } else { "outside" }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

pub(crate) fn local_vips() -> impl Iterator<Item = &'static Vip> {
    VIPS.iter().filter(|vip| vip.is_local)
}

pub(crate) fn routed_vips() -> impl Iterator<Item = &'static Vip> {
    VIPS.iter().filter(|vip| !vip.is_local)
}

/// A Service of the walkthrough as the API server has it.
pub(crate) async fn service(lab: &Lab, vip: &Vip) -> Result<Service> {
    let api: Api<Service> = Api::namespaced(lab.client(), NAMESPACE);
    api.get(vip.service)
        .await
        .with_context(|| format!("getting Service {}", vip.service))
}

/// What is worth reading in what `kubectl describe` prints of a Service.
pub(crate) struct Description {
    pub(crate) annotations: Vec<String>,
    /// Reason and message of each event.
    pub(crate) events: Vec<(String, String)>,
}

impl Description {
    /// That of a Service, if it has these events, each with a reason and a part of its message.
    pub(crate) async fn with(lab: &Lab, vip: &Vip, expected: &[(&str, &str)]) -> Result<Self> {
        let shown = lab.kubectl(["describe", "svc", "-n", NAMESPACE, vip.service]).await?;
        let found = Self::read(&shown);
        for (reason, message) in expected {
            ensure!(
                found.events.iter().any(|(r, m)| r == reason && m.contains(message)),
                "{} has no event {reason} with {message:?}:\n{shown}",
                vip.service
            );
        }
        Ok(found)
    }

    fn read(shown: &str) -> Self {
        let (before, events) = shown.split_once("\nEvents:").unwrap_or((shown, ""));
        let annotations = before
            .lines()
            .filter_map(|line| line.find("purelb.io/").and_then(|at| line.get(at..)))
            .map(str::to_owned);
        let events = events.lines().filter_map(|line| {
            // Type, reason, age, reporter and message are two spaces apart or more; an age such as `3s (x2 over 4s)` is not.
            let mut columns = line.splitn(2, "purelb-");
            let reason = columns.next()?.split_whitespace().nth(1)?;
            let message = columns.next()?.split_once(' ')?.1.trim();
            Some((reason.to_owned(), message.to_owned()))
        });
        Self {
            annotations: annotations.collect(),
            events: events.collect(),
        }
    }

    pub(crate) fn show(&self, screen: &Screen) {
        for annotation in &self.annotations {
            screen.note(annotation);
        }
        for (reason, message) in &self.events {
            screen.event(reason, message);
        }
        screen.say("");
    }
}

/// The node that a local Service's annotation names.
pub(crate) async fn owner<'a>(lab: &'a Lab, vip: &Vip) -> Result<&'a Node> {
    let service = service(lab, vip).await?;
    let (key, interface) = (annotations::ANNOUNCING_IPV4, "eth0");
    let value = service
        .annotations()
        .get(key)
        .with_context(|| format!("{} has no annotation {key}", vip.service))?;
    let (name, on) = value.split_once(',').context("an annotation without an interface")?;
    ensure!(on == interface, "{key} of {} is {value}", vip.service);
    lab.node(name)
}

/// What curl got from a VIP.
pub(crate) struct Curled {
    /// The client's address and port as the web server saw it.
    pub(crate) body: String,
    /// The namespace of the node that let the request in.
    pub(crate) entered_by: String,
    /// The namespace of the web server's node.
    pub(crate) answered_by: String,
}

/// Asks a VIP with curl from where its clients are.
pub(crate) async fn curl(lab: &Lab, vip: &Vip) -> Result<Curled> {
    let url = vip.url();
    let argv = [
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--max-time",
        "5",
        "--include",
        &url,
    ];
    let shown = lab.exec(vip.client(), argv).await?;
    let answering = shown
        .lines()
        .find_map(|line| line.strip_prefix("x-node: "))
        .context("an answer that does not say where from")?;
    let body = shown.lines().last().context("an empty answer")?.trim();
    let (source, _) = body.rsplit_once(':').with_context(|| format!("the answer {body:?}"))?;
    Ok(Curled {
        body: body.to_owned(),
        entered_by: entry(lab, source.parse()?)?.ns.clone(),
        answered_by: lab.node(answering.trim())?.ns.clone(),
    })
}

/// The node that let a request in, which puts its own address in place of the client's (externalTrafficPolicy Cluster).
pub(crate) fn entry(lab: &Lab, source: IpAddr) -> Result<&Node> {
    lab.nodes()
        .iter()
        .find(|node| source == node.ipv4)
        .with_context(|| format!("{source}, which the web server saw, is no node's address"))
}

/// The client's neighbour entry of each local VIP and its owner's namespace; fails where the two are not the same node.
pub(crate) async fn neighbour_table(lab: &Lab) -> Result<Vec<(String, String)>> {
    let mut table = Vec::new();
    for vip in local_vips() {
        let owner = owner(lab, vip).await?;
        let entry = neighbour(lab, vip.address).await?;
        ensure!(
            entry.contains(&owner.mac()),
            "{} owns {}, the client has {entry}",
            owner.ns,
            vip.address
        );
        table.push((entry, owner.ns.clone()));
    }
    Ok(table)
}

/// A neighbour entry, and the node it leads to.
pub(crate) fn neighbour_line((entry, node): &(String, String)) -> String {
    format!("{entry:<58}  → {node}")
}

/// The client's neighbour entry of an address, as `ip neigh` shows it.
pub(crate) async fn neighbour(lab: &Lab, address: &str) -> Result<String> {
    let shown = lab
        .exec("client", ["ip", "neigh", "show", "dev", "eth0", address])
        .await?;
    let line = shown.lines().next().map(str::trim);
    line.map(str::to_owned)
        .with_context(|| format!("the client has no neighbour {address}"))
}

//! `bgp`: the sessions of the nodes' routing daemons, and the routes that none of them advertises.

use serde::Serialize;

use crate::render::{Colour, Ink, Report, Table};
use crate::view::{Presence, View};

/// The sessions.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sessions {
    #[serde(rename = "sessions")]
    all: Vec<Session>,
    without_daemon: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Session {
    node: String,
    daemon: String,
    neighbor: String,
    state: String,
    established: bool,
}

/// All sessions.
pub fn sessions(view: &View<'_>) -> Sessions {
    let (mut sessions, mut without_daemon) = (Vec::new(), Vec::new());
    for (name, agent) in view
        .agents
        .iter()
        .filter(|(_, agent)| agent.presence == Presence::Speaking)
    {
        let Some(daemon) = agent.said.and_then(|said| said.routing_daemon.as_ref()) else {
            without_daemon.push(name.clone());
            continue;
        };
        if let Some(problem) = &daemon.problem {
            sessions.push(Session {
                node: name.clone(),
                daemon: daemon.name.clone(),
                neighbor: "–".to_owned(),
                state: problem.clone(),
                established: false,
            });
        }
        sessions.extend(daemon.sessions.iter().map(|session| Session {
            node: name.clone(),
            daemon: daemon.name.clone(),
            neighbor: session.neighbor.clone(),
            state: session.state.clone(),
            established: session.state == "Established",
        }));
    }
    Sessions {
        all: sessions,
        without_daemon,
        not_asked: super::check::not_asked(view.cluster),
    }
}

impl Report for Sessions {
    const KIND: &'static str = "Sessions";

    fn text(&self, ink: Ink) -> String {
        let mut table = Table::new(&["NODE", "DAEMON", "NEIGHBOUR", "STATE"]);
        for session in &self.all {
            let cells = [&session.node, &session.daemon, &session.neighbor, &session.state];
            table.painted(cells.map(Clone::clone), (!session.established).then_some(Colour::Red));
        }
        let mut text = if table.is_empty() {
            "no agent can ask a routing daemon\n".to_owned()
        } else {
            table.text(ink)
        };
        if !self.without_daemon.is_empty() && !table.is_empty() {
            text.push_str("no daemon that can be asked: ");
            text.push_str(&crate::render::some(&self.without_daemon, 8, ", "));
            text.push('\n');
        }
        text
    }

    fn names(&self) -> Vec<String> {
        self.all
            .iter()
            .map(|session| format!("{} {}", session.node, session.neighbor))
            .collect()
    }
}

/// The routes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Routes {
    nodes: Vec<OfNode>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_asked: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct OfNode {
    node: String,
    routed: u32,
    unadvertised: Vec<Unadvertised>,
}

#[derive(Debug, Serialize)]
struct Unadvertised {
    address: String,
    reason: String,
    message: String,
}

/// How many routed addresses each node has, and those that its daemon advertises no route to.
pub fn routes(view: &View<'_>) -> Routes {
    let speaking = view
        .agents
        .iter()
        .filter(|(_, agent)| agent.presence == Presence::Speaking);
    let nodes = speaking.filter_map(|(name, agent)| {
        let said = agent.said?;
        let unadvertised = said.unadvertised.iter().map(|of| Unadvertised {
            address: of.ip.clone(),
            reason: of.reason.clone(),
            message: of.message.clone(),
        });
        Some(OfNode {
            node: name.clone(),
            routed: said.routed,
            unadvertised: unadvertised.collect(),
        })
    });
    Routes {
        nodes: nodes.collect(),
        not_asked: super::check::not_asked(view.cluster),
    }
}

impl Report for Routes {
    const KIND: &'static str = "Routes";

    fn text(&self, ink: Ink) -> String {
        let mut table = Table::new(&["NODE", "ROUTED", "NOT ADVERTISED", "WHY"]);
        for node in &self.nodes {
            if node.unadvertised.is_empty() {
                table.row([
                    node.node.clone(),
                    node.routed.to_string(),
                    "0".to_owned(),
                    String::new(),
                ]);
            }
            for of in &node.unadvertised {
                let cells = [
                    node.node.clone(),
                    node.routed.to_string(),
                    of.address.clone(),
                    of.message.clone(),
                ];
                table.painted(cells, Some(Colour::Red));
            }
        }
        table.text(ink)
    }

    fn names(&self) -> Vec<String> {
        self.nodes.iter().map(|node| format!("node/{}", node.node)).collect()
    }
}

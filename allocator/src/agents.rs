//! What becomes of each LBNodeAgent: which nodes use it, with which interfaces, and what is wrong with it.
//!
//! The nodes choose for themselves (`lbnodeagent`'s `config`) and say in their LBNodes what they chose. What no node can say, since
//! none reads it, is said here: that one lies in another namespace, or selects no node.

use std::collections::{BTreeMap, BTreeSet};

use crds::LBNodeAgent;
use crds::event::{LONGEST, Notice, Reason, cut};
use crds::lbnodeagent::LBNodeAgentStatus;
use kube::ResourceExt;
use kube::core::SelectorExt;

use crate::sentence;

/// The labels of a Node.
pub type Labels = BTreeMap<String, String>;

/// What a node says of the LBNodeAgent that it uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Namespace and name, `purelb/default`.
    pub configuration: Option<String>,
    /// The interfaces whose subnets it can announce.
    pub interfaces: Vec<String>,
    /// Why it announces less than it could.
    pub problem: Option<String>,
    /// Its agent knows of a routing daemon.
    pub has_daemon: bool,
}

/// The status of an LBNodeAgent, and what its author is told, where no node can tell that.
pub fn judge(
    agent: &LBNodeAgent,
    install_namespace: &str,
    nodes: &BTreeMap<String, Labels>,
    uses: &BTreeMap<String, Use>,
) -> (LBNodeAgentStatus, Option<Notice>) {
    let (namespace, name) = (agent.namespace().unwrap_or_default(), agent.name_any());
    if namespace != install_namespace {
        let problem = format!("it is in namespace \"{namespace}\", and only those in \"{install_namespace}\" count");
        let told = format!(
            "Ignored: LBNodeAgents are read only from the PureLB install namespace, and {namespace} is not it. Move it: kubectl get \
             lbnodeagent {name} -n {namespace} -o yaml | sed 's/namespace: {namespace}/namespace: {install_namespace}/' | kubectl \
             apply -f -"
        );
        return (
            faulty(&problem),
            Some(Notice::warning(Reason::LBNodeAgentOutOfScope, told)),
        );
    }
    let title = format!("{namespace}/{name}");
    let using: BTreeMap<&String, &Use> = uses
        .iter()
        .filter(|(_, used)| used.configuration.as_ref() == Some(&title))
        .collect();
    let interfaces: BTreeSet<&String> = using.values().flat_map(|used| &used.interfaces).collect();
    let (problem, told) = match problem(agent, nodes, uses, &using) {
        Some((problem, told)) => (Some(problem), told),
        None => (None, None),
    };
    let status = LBNodeAgentStatus {
        nodes: i64::try_from(using.len()).unwrap_or(i64::MAX),
        interfaces: Some(interfaces.into_iter().take(sentence::LISTED).cloned().collect())
            .filter(|names: &Vec<String>| !names.is_empty()),
        problem: problem.map(|problem| cut(&problem, LONGEST)),
    };
    (status, told)
}

fn faulty(problem: &str) -> LBNodeAgentStatus {
    LBNodeAgentStatus {
        problem: Some(cut(problem, LONGEST)),
        ..LBNodeAgentStatus::default()
    }
}

/// What is wrong with one of the install namespace.
fn problem(
    agent: &LBNodeAgent,
    nodes: &BTreeMap<String, Labels>,
    uses: &BTreeMap<String, Use>,
    using: &BTreeMap<&String, &Use>,
) -> Option<(String, Option<Notice>)> {
    if agent.spec.local.is_none() {
        let problem = "it has no spec.local, so it applies to no node: add local: {}";
        return Some((problem.to_owned(), None));
    }
    let selector = match agent.spec.selector() {
        Ok(selector) => selector,
        // The nodes tell of it.
        Err(why) => return Some((format!("nodeSelector could not be evaluated ({why})"), None)),
    };
    let Some(selector) = selector else {
        return on_nodes(using);
    };
    let selected: Vec<&String> = nodes
        .iter()
        .filter(|(_, labels)| selector.matches(labels))
        .map(|(node, _)| node)
        .collect();
    if selected.is_empty() && !nodes.is_empty() {
        let problem = format!(
            "its nodeSelector matches none of the {} nodes, so it applies nowhere: no node has {selector}. kubectl get nodes \
             --show-labels shows what they have",
            nodes.len()
        );
        return Some((problem.clone(), Some(Notice::warning(Reason::NoNodeSelected, problem))));
    }
    if using.is_empty() {
        let others = selected
            .iter()
            .filter_map(|node| uses.get(*node)?.configuration.clone());
        let others: Vec<String> = others.collect::<BTreeSet<_>>().into_iter().collect();
        if !others.is_empty() {
            let others = sentence::list(&others, ", ");
            let problem = format!("the nodes that it selects use another: {others}, which takes precedence");
            return Some((problem, None));
        }
    }
    on_nodes(using)
}

/// What the nodes that use it say is wrong. They have told of it.
fn on_nodes(using: &BTreeMap<&String, &Use>) -> Option<(String, Option<Notice>)> {
    let wrong: Vec<&str> = using.values().filter_map(|used| used.problem.as_deref()).collect();
    let problem = (*wrong.first()?).to_owned();
    let all = using.len();
    let problem = match wrong.len() - 1 {
        0 => problem,
        more => format!("{problem} (and on {more} more of {all} nodes)"),
    };
    Some((problem, None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn agent(namespace: &str, spec: &Value) -> LBNodeAgent {
        let object = json!({
            "apiVersion": "purelb.io/v2", "kind": "LBNodeAgent",
            "metadata": {"namespace": namespace, "name": "a"}, "spec": spec,
        });
        serde_json::from_value(object).unwrap()
    }

    fn used(configuration: &str, problem: Option<&str>) -> Use {
        Use {
            configuration: Some(configuration.into()),
            interfaces: vec!["eth0".into()],
            problem: problem.map(Into::into),
            has_daemon: false,
        }
    }

    fn nodes() -> BTreeMap<String, Labels> {
        let labels = |node: &str| Labels::from([("name".into(), node.into())]);
        ["n1", "n2", "n3"].map(|node| (node.to_owned(), labels(node))).into()
    }

    fn on(node: &str) -> Value {
        json!({"nodeSelector": {"matchLabels": {"name": node}}, "local": {}})
    }

    fn uses(all: &[(&str, Use)]) -> BTreeMap<String, Use> {
        all.iter()
            .map(|(node, used)| ((*node).to_owned(), used.clone()))
            .collect()
    }

    #[test]
    fn each_says_which_nodes_use_it_and_what_is_wrong_with_it() {
        let nodes = nodes();
        let well = || used("purelb/a", None);
        let bad = |why| used("purelb/a", Some(why));
        for (name, namespace, spec, uses, expected, count, reason) in [
            (
                "well",
                "purelb",
                json!({"local": {}}),
                uses(&[("n1", well()), ("n2", well())]),
                "",
                2,
                None,
            ),
            (
                "in another namespace",
                "default",
                json!({"local": {}}),
                uses(&[("n1", well())]),
                "it is in namespace \"default\", and only those in \"purelb\" count",
                0,
                Some("LBNodeAgentOutOfScope"),
            ),
            (
                "selects no node",
                "purelb",
                on("n9"),
                uses(&[]),
                "its nodeSelector matches none of the 3 nodes, so it applies nowhere: no node has name=n9. kubectl get nodes \
                 --show-labels shows what they have",
                0,
                Some("NoNodeSelected"),
            ),
            (
                "selects one",
                "purelb",
                on("n1"),
                uses(&[("n1", well()), ("n2", used("purelb/b", None))]),
                "",
                1,
                None,
            ),
            (
                "another comes first",
                "purelb",
                on("n1"),
                uses(&[("n1", used("purelb/0", None))]),
                "the nodes that it selects use another: purelb/0, which takes precedence",
                0,
                None,
            ),
            (
                "for what no other selects",
                "purelb",
                json!({"local": {}}),
                uses(&[("n1", used("purelb/0", None))]),
                "",
                0,
                None,
            ),
            ("no agent runs yet", "purelb", on("n1"), uses(&[]), "", 0, None),
            (
                "no interface on two nodes",
                "purelb",
                json!({"local": {}}),
                uses(&[
                    ("n1", bad("matches no interface of n1")),
                    ("n2", bad("of n2")),
                    ("n3", well()),
                ]),
                "matches no interface of n1 (and on 1 more of 3 nodes)",
                3,
                None,
            ),
        ] {
            let (status, told) = judge(&agent(namespace, &spec), "purelb", &nodes, &uses);
            let problem = status.problem.unwrap_or_default();
            assert_eq!(problem, expected, "{name}");
            assert_eq!(status.nodes, count, "{name}");
            assert_eq!(status.interfaces.is_some(), count > 0, "{name}");
            assert_eq!(told.map(|told| told.reason.name()), reason, "{name}");
        }
    }

    #[test]
    fn one_that_does_not_read_or_says_nothing_applies_nowhere() {
        let near = json!({"nodeSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}, "local": {}});
        for (spec, expected) in [
            (near, "nodeSelector could not be evaluated ("),
            (
                json!({}),
                "it has no spec.local, so it applies to no node: add local: {}",
            ),
        ] {
            let (status, told) = judge(&agent("purelb", &spec), "purelb", &nodes(), &uses(&[]));
            let problem = status.problem.unwrap_or_default();
            assert!(problem.starts_with(expected), "{problem}");
            assert_eq!(
                (status.nodes, told),
                (0, None),
                "the nodes tell of it, or nobody has to"
            );
        }
    }

    #[test]
    fn who_is_told_of_another_namespace_learns_the_command_that_moves_it() {
        let (_, told) = judge(
            &agent("web", &json!({"local": {}})),
            "purelb",
            &BTreeMap::new(),
            &BTreeMap::new(),
        );
        let command =
            "kubectl get lbnodeagent a -n web -o yaml | sed 's/namespace: web/namespace: purelb/' | kubectl apply -f -";
        assert!(told.unwrap().message.ends_with(command));
    }
}

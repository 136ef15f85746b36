//! What the API server accepts and refuses, and in which words: the CRDs as users meet them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::{Lab, Options, wait_until};

const SOON: Duration = Duration::from_secs(20);

fn group(name: usize, version: &str, spec: &str) -> String {
    format!(
        "apiVersion: purelb.io/{version}\nkind: ServiceGroup\nmetadata: {{name: g{name}, namespace: purelb}}\nspec: {spec}\n"
    )
}

/// Name of the row, version, spec, and what the refusal says; nothing where it is accepted.
type Row = (&'static str, &'static str, &'static str, Option<&'static str>);

const V4: &str = "{pool: 10.0.0.1-10.0.0.9, subnet: 10.0.0.0/24}";

const ROWS: &[Row] = &[
    (
        "flat v1 form",
        "v1",
        "{local: {pool: 10.0.0.1-10.0.0.9, subnet: 10.0.0.0/24, aggregation: /32}}",
        None,
    ),
    (
        "v1 pools of both families",
        "v1",
        "{local: {v4pool: {pool: 10.0.0.0/24, subnet: 10.0.0.0/24, aggregation: default}, v6pool: {pool: 'fd00::/64', subnet: 'fd00::/64', aggregation: /128}}}",
        None,
    ),
    (
        "v1 netbox",
        "v1",
        "{netbox: {url: 'http://netbox/', tenant: t, aggregation: default}}",
        None,
    ),
    (
        "one address, blanks around the dash, a CIDR",
        "v2",
        "{remote: {v4pools: [{pool: 10.0.0.1, subnet: 10.0.0.0/24}, {pool: '10.0.0.5 - 10.0.0.9', subnet: 10.0.0.0/24}, {pool: 10.0.0.16/28, subnet: 10.0.0.0/24}]}}",
        None,
    ),
    ("external", "v2", "{external: {provider: p, announce: remote}}", None),
    (
        "namespaces",
        "v2",
        "{local: {v4pool: {pool: 10.0.0.0/24, subnet: 10.0.0.0/24}}, namespaces: [a], enforceNamespaces: true, namespaceDefault: true}",
        None,
    ),
    (
        "external with a socket elsewhere",
        "v2",
        "{external: {provider: p, announce: remote, socket: /run/p.sock}}",
        None,
    ),
    (
        "external with a relative socket",
        "v2",
        "{external: {provider: p, announce: remote, socket: p.sock}}",
        Some("socket must be an absolute path such as /var/run/purelb/ipam.sock"),
    ),
    (
        "netbox without a slash",
        "v1",
        "{netbox: {url: 'http://netbox', tenant: t, aggregation: default}}",
        Some("url must start with http:// or https:// and end with /"),
    ),
    (
        "reversed",
        "v2",
        "{local: {v4pool: {pool: 10.0.0.9-10.0.0.1, subnet: 10.0.0.0/24}}}",
        Some("pool must not end before it starts: swap its addresses"),
    ),
    (
        "reversed flat",
        "v1",
        "{local: {pool: 10.0.0.9-10.0.0.1, subnet: 10.0.0.0/24}}",
        Some("pool must not end before it starts"),
    ),
    (
        "outside the subnet",
        "v2",
        "{local: {v4pool: {pool: 10.0.1.1-10.0.1.9, subnet: 10.0.0.0/24}}}",
        Some("pool must lie inside subnet"),
    ),
    (
        "a CIDR wider than the subnet",
        "v2",
        "{local: {v4pool: {pool: 10.0.0.0/16, subnet: 10.0.0.0/24}}}",
        Some("pool must lie inside subnet"),
    ),
    (
        "families mixed",
        "v2",
        "{local: {v4pool: {pool: '10.0.0.1-fd00::1', subnet: 10.0.0.0/24}}}",
        Some("pool must lie inside subnet"),
    ),
    (
        "no addresses",
        "v2",
        "{local: {v4pool: {pool: here-there, subnet: 10.0.0.0/24}}}",
        Some("pool must be a range such as 192.168.1.10-192.168.1.99, or a CIDR"),
    ),
    (
        "a comma list",
        "v2",
        "{local: {v4pool: {pool: '10.0.0.1,10.0.0.2', subnet: 10.0.0.0/24}}}",
        Some("pool must be a range"),
    ),
    (
        "no subnet",
        "v2",
        "{local: {v4pool: {pool: 10.0.0.1-10.0.0.2, subnet: 10.0.0.0}}}",
        Some("subnet must be a CIDR such as 192.168.1.0/24 or fd00:1::/64"),
    ),
    (
        "IPv6 in an IPv4 field",
        "v2",
        "{remote: {v4pools: [{pool: 'fd00::/120', subnet: 'fd00::/64'}]}}",
        Some("v4pools takes IPv4 pools only"),
    ),
    (
        "IPv6 length for IPv4",
        "v2",
        "{remote: {v4pool: {pool: 10.0.0.1-10.0.0.9, subnet: 10.0.0.0/24, aggregation: /64}}}",
        Some("aggregation of an IPv4 pool must be default or a length from /8 to /32"),
    ),
    (
        "aggregation without a slash",
        "v1",
        "{local: {v4pool: {pool: 10.0.0.1-10.0.0.9, subnet: 10.0.0.0/24, aggregation: '32'}}}",
        Some("aggregation in body should match"),
    ),
    (
        "no pool",
        "v2",
        "{local: {}}",
        Some("at least one pool must be specified"),
    ),
    (
        "half a flat pool",
        "v1",
        "{local: {pool: 10.0.0.1-10.0.0.9}}",
        Some("local.pool and local.subnet belong together"),
    ),
    (
        "flat and v4pool",
        "v1",
        "{local: {pool: 10.0.0.1-10.0.0.9, subnet: 10.0.0.0/24, v4pool: {pool: 10.1.0.1, subnet: 10.1.0.0/24}}}",
        Some("keep one of the two"),
    ),
    ("nothing", "v1", "{}", Some("one of local and netbox must be specified")),
    (
        "local and remote",
        "v2",
        "{local: {v4pool: {pool: 10.0.0.1, subnet: 10.0.0.0/24}}, remote: {v4pool: {pool: 10.1.0.1, subnet: 10.1.0.0/24}}}",
        Some("exactly one of local, remote, or external must be specified"),
    ),
    (
        "enforcing nothing",
        "v2",
        "{local: {v4pool: {pool: 10.0.0.1, subnet: 10.0.0.0/24}}, enforceNamespaces: true}",
        Some("enforceNamespaces requires a non-empty namespaces list, otherwise it silently enforces nothing"),
    ),
    (
        "default of nothing",
        "v2",
        "{local: {v4pool: {pool: 10.0.0.1, subnet: 10.0.0.0/24}}, namespaceDefault: true}",
        Some("namespaceDefault requires a non-empty namespaces list, otherwise it defaults nothing"),
    ),
];

#[test]
fn good_groups_are_accepted_and_bad_ones_refused_in_a_sentence() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        lab.install().await?;
        ensure!(
            lab.install()
                .await?
                .lines()
                .all(|line| line.ends_with("unchanged") || line.ends_with("configured")),
            "a second apply changes nothing"
        );
        wait_until("the definitions are served", SOON, async || {
            lab.kubectl(["get", "sg", "-A"]).await
        })
        .await?;
        for (number, &(name, version, spec, refusal)) in ROWS.iter().enumerate() {
            let applied = lab.apply(&group(number, version, spec)).await;
            match (refusal, applied) {
                (None, applied) => _ = applied.with_context(|| format!("{name} was refused"))?,
                (Some(refusal), Ok(_)) => anyhow::bail!("{name} was accepted; expected: {refusal}"),
                (Some(refusal), Err(error)) => {
                    ensure!(
                        format!("{error:#}").contains(refusal),
                        "{name}: no {refusal:?} in {error:#}"
                    );
                }
            }
        }
        one_object_reads_as_both_versions(&lab).await?;
        kubectl_says_it_all(&lab).await
    })
}

/// v1's default marks its groups; whichever version reads them finds every field.
async fn one_object_reads_as_both_versions(lab: &Lab) -> Result<()> {
    lab.apply(&group(100, "v1", &format!("{{local: {{v4pool: {V4}}}}}")))
        .await?;
    lab.apply(&group(
        101,
        "v2",
        &format!("{{remote: {{v4pool: {V4}}}, namespaces: [a]}}"),
    ))
    .await?;
    let field = async |version: &str, name: &str, path: &str| {
        let kind = format!("servicegroups.{version}.purelb.io");
        lab.kubectl([
            "get",
            &kind,
            name,
            "-n",
            "purelb",
            "-o",
            &format!("jsonpath={{{path}}}"),
        ])
        .await
    };
    for version in ["v1", "v2"] {
        ensure!(
            field(version, "g100", ".spec.announce").await? == "Auto",
            "{version} of a v1 group"
        );
        ensure!(
            field(version, "g100", ".spec.local.v4pool.subnet").await? == "10.0.0.0/24",
            "{version}"
        );
        ensure!(
            field(version, "g101", ".spec.namespaces[0]").await? == "a",
            "{version} of a v2 group"
        );
    }
    ensure!(
        field("v2", "g101", ".spec.announce").await?.is_empty(),
        "a v2 group chooses for itself"
    );
    let v1 = lab
        .kubectl(["get", "servicegroups.v1.purelb.io", "-n", "purelb"])
        .await?;
    let heading: Vec<&str> = v1.lines().next().unwrap_or_default().split_whitespace().collect();
    ensure!(heading == ["NAME", "AGE"], "v1 shows what it always showed: {v1}");
    Ok(())
}

/// Columns, short names, the category, and an explanation of any field.
async fn kubectl_says_it_all(lab: &Lab) -> Result<()> {
    lab.apply(
        "apiVersion: purelb.io/v2\nkind: LBNodeAgent\nmetadata: {name: default, namespace: purelb}\nspec: {local: {}}\n",
    )
    .await?;
    let all = lab.kubectl(["get", "purelb", "-n", "purelb", "-o", "name"]).await?;
    for name in ["lbnodeagent.purelb.io/default", "servicegroup.purelb.io/g101"] {
        ensure!(
            all.lines().any(|line| line == name),
            "no {name} in `kubectl get purelb`: {all}"
        );
    }
    let few = "NAME ANNOUNCE IPAM ALLOCATED-V4 ALLOCATED-V6 PROBLEM AGE";
    let many = "NAME ANNOUNCE IPAM ALLOCATED-V4 ALLOCATED-V6 ADDRESSES AVAILABLE-V4 AVAILABLE-V6 NAMESPACES ENFORCED BOUND PROBLEM AGE";
    let agents = "NAME INTERFACES NODES PROBLEM AGE";
    for (kind, output, expected) in [
        ("servicegroups", "", few),
        ("sg", "wide", many),
        ("sgs", "", few),
        ("lbnodeagents", "", agents),
        ("lbna", "", agents),
        ("lbnas", "wide", agents),
    ] {
        let shown = lab.kubectl(["get", kind, "-n", "purelb", "-o", output]).await?;
        let heading: Vec<&str> = shown.lines().next().unwrap_or_default().split_whitespace().collect();
        ensure!(
            heading.join(" ") == expected,
            "kubectl get {kind} -o {output:?}: {shown}"
        );
    }
    // That every field has a text is a unit test of the definitions; here, that it arrives, in both versions.
    for version in ["v1", "v2"] {
        for (field, text) in [
            ("servicegroup.spec.local.v4pools.pool", "First and last address"),
            ("servicegroup.status.allocatedIPv4", "IPv4 addresses in use"),
            ("lbnodeagent.spec.local.garpConfig.count", "Rounds"),
        ] {
            let explained = lab
                .kubectl(["explain", field, &format!("--api-version=purelb.io/{version}")])
                .await?;
            ensure!(explained.contains(text), "{version} {field}: {explained}");
        }
    }
    Ok(())
}

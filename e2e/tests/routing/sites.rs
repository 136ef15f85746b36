//! Two clusters announce one address: anycast, with a core that spreads over both sites.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use e2e::{Config, Daemon, Lab, Options, wait_until};

use super::stage::{SOON, VIP, VIP6, apply_services};

/// A site: its router's addresses towards the core, and the core's towards it.
struct Site {
    router: [&'static str; 2],
    core: [&'static str; 2],
}

const FIRST: Site = Site {
    router: ["172.31.0.1", "fd00:172:31::1"],
    core: ["172.31.0.2", "fd00:172:31::2"],
};
const SECOND: Site = Site {
    router: ["172.31.3.1", "fd00:172:31:3::1"],
    core: ["172.31.3.2", "fd00:172:31:3::2"],
};

/// Brings up a site's cluster and its router, and returns the names of its Pods.
async fn start_site(lab: &Lab, site: &Site) -> Result<BTreeSet<String>> {
    lab.install().await?;
    lab.start_product().await?;
    apply_services(lab).await?;
    let config = Config::read("anycast/site.conf")?
        .with("ROUTER_ID", site.router[0])
        .with("CORE_IPV4", site.core[0])
        .with("CORE_IPV6", site.core[1]);
    lab.start_speaker(Daemon::Frr, "router", &config).await?;
    for ns in ["w11", "w12"] {
        let config = Config::read("ebgp/node-bird.conf")?.of(lab.node(ns)?);
        lab.start_speaker(Daemon::Bird, ns, &config).await?;
    }
    let pods = lab.ready_pods("web", "app=web", lab.nodes().len()).await?;
    let names = pods.into_iter().filter_map(|pod| pod.metadata.name);
    Ok(names.map(|name| format!("web/{name}")).collect())
}

/// Lays the cable between the core, which is the first lab's outside, and the second lab's router, whose own outside goes.
async fn join(first: &Lab, second: &Lab) -> Result<()> {
    second.connect(("router", "core"), first, ("outside", "site2"))?;
    for (lab, ns, commands) in [
        (
            second,
            "router",
            "link del outside\n\
             addr add 172.31.3.1/24 dev core\naddr add fd00:172:31:3::1/64 dev core nodad\nlink set core up\n\
             route add 172.31.0.0/24 via 172.31.3.2\nroute add fd00:172:31::/64 via fd00:172:31:3::2\n",
        ),
        (
            first,
            "outside",
            "addr add 172.31.3.2/24 dev site2\naddr add fd00:172:31:3::2/64 dev site2 nodad\nlink set site2 up\n",
        ),
        (
            first,
            "router",
            "route add 172.31.3.0/24 via 172.31.0.2\nroute add fd00:172:31:3::/64 via fd00:172:31::2\n",
        ),
    ] {
        let script = format!("ip -batch - <<'END'\n{commands}END");
        lab.exec(ns, ["sh", "-c", &script]).await?;
    }
    let settings = "for family in ipv4 ipv6; do echo 1 >/proc/sys/net/$family/fib_multipath_hash_policy; done\n\
                    echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter";
    first.exec("outside", ["sh", "-c", settings]).await.map(drop)
}

/// Waits until the core sends the address to these sites.
async fn core_sends(first: &Lab, sites: &[Site]) -> Result<()> {
    let routers: Vec<IpAddr> = sites
        .iter()
        .map(|site| site.router[0].parse())
        .collect::<Result<_, _>>()?;
    wait_until("the core has the sites for next hops", SOON, async || {
        let hops = first.next_hops("outside", &format!("{VIP}/32")).await?;
        ensure!(hops == routers, "{hops:?}, not {routers:?}");
        // Next hops of IPv6 are link-local.
        let hops = first.next_hops("outside", &format!("{VIP6}/128")).await?;
        ensure!(hops.len() == routers.len(), "{hops:?}");
        Ok(())
    })
    .await
}

/// The Pods that answer requests from many source ports.
async fn answering(first: &Lab) -> Result<BTreeSet<String>> {
    let mut pods = BTreeSet::new();
    for vip in [VIP.to_owned(), format!("[{VIP6}]")] {
        for _ in 0..60 {
            pods.insert(first.get("outside", &format!("http://{vip}/")).await?.pod);
        }
    }
    Ok(pods)
}

#[test]
fn two_clusters_announce_one_address() -> Result<()> {
    let options = |site: usize| Options {
        name: Some(format!("two_clusters_announce_one_address-{site}")),
        ..Options::default()
    };
    Lab::run(options(1), async |first| {
        let pods_of_first = start_site(&first, &FIRST).await?;
        // From here on this thread's network is the second lab's: of the first, only its hosts are asked.
        let both = move || {
            Lab::run(options(2), async |second| {
                join(&first, &second).await?;
                first
                    .start_speaker(Daemon::Frr, "outside", &Config::read("anycast/core.conf")?)
                    .await?;
                let pods_of_second = start_site(&second, &SECOND).await?;
                core_sends(&first, &[FIRST, SECOND]).await?;
                let expected: BTreeSet<_> = pods_of_first.union(&pods_of_second).cloned().collect();
                let answered = answering(&first).await?;
                ensure!(
                    answered == expected,
                    "of both sites' {expected:?} answered {answered:?}"
                );
                second.kubectl(["delete", "service", "exact", "-n", "web"]).await?;
                core_sends(&first, &[FIRST]).await?;
                let answered = answering(&first).await?;
                ensure!(
                    answered == pods_of_first,
                    "of the first site's {pods_of_first:?} answered {answered:?}"
                );
                Ok(())
            })
        };
        tokio::task::spawn_blocking(both).await?.context("two sites")
    })
}

//! A provider that answers what cannot be.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use crds::annotations;
use e2e::ipam::serve;
use e2e::{Lab, Options, wait_until};
use ipam::{Address, AllocateRequest, AllocateResponse, ReleaseRequest, ReleaseResponse, StatsRequest, StatsResponse};
use kube::ResourceExt;
use kube::api::ListParams;
use serde_json::json;
use tonic::{Request, Response, Status};

use super::{GROUPS, SOCKET, SOON, Sides, group};

/// Service, what it is answered, and reason and message of its condition.
const LIES: [(&str, &[&str], &str, &str); 9] = [
    (
        "none",
        &[],
        "ProviderMistaken",
        "answered with 0 addresses where 1 to 16 are allowed",
    ),
    (
        "garbage",
        &["10.220.0.300"],
        "ProviderMistaken",
        "answered with \"10.220.0.300\", which is no address",
    ),
    (
        "twice",
        &["10.220.0.9", "10.220.0.9"],
        "ProviderMistaken",
        "answered with 10.220.0.9 twice",
    ),
    (
        "family",
        &["fd00::9"],
        "ProviderMistaken",
        "answered with fd00::9, an IPv6 address",
    ),
    (
        "taken",
        &["10.220.0.1"],
        "ProviderMistaken",
        "gave 10.220.0.1, which is in use by default/honest",
    ),
    (
        "pool",
        &["10.31.200.7"],
        "ProviderMistaken",
        "which is in a range of ServiceGroup \"default\"",
    ),
    ("refused", &[], "ProviderRefused", "refused (not for you)"),
    (
        "many",
        &[
            "10.221.0.1",
            "10.221.0.2",
            "10.221.0.3",
            "10.221.0.4",
            "10.221.0.5",
            "10.221.0.6",
            "10.221.0.7",
            "10.221.0.8",
            "10.221.0.9",
            "10.221.0.10",
            "10.221.0.11",
            "10.221.0.12",
            "10.221.0.13",
            "10.221.0.14",
            "10.221.0.15",
            "10.221.0.16",
            "10.221.0.17",
        ],
        "ProviderMistaken",
        "answered with 17 addresses",
    ),
    (
        "pinned",
        &["10.220.0.8"],
        "ProviderMistaken",
        "which is none of the addresses asked for",
    ),
];

/// A provider that answers what a test tells it to, and remembers what it is asked.
#[derive(Clone, Default)]
struct Liar {
    answers: BTreeMap<&'static str, Vec<&'static str>>,
    released: Arc<Mutex<Vec<String>>>,
}

impl Liar {
    /// The Services whose addresses came back.
    fn heard(&self) -> MutexGuard<'_, Vec<String>> {
        self.released.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl ipam::ipam_server::Ipam for Liar {
    async fn allocate(&self, request: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let service = request.into_inner().service;
        let answer = self.answers.get(service.trim_start_matches("default/"));
        let answer = answer.ok_or_else(|| Status::permission_denied("not for you"))?;
        let ips = answer.iter().map(|ip| Address { ip: (*ip).to_owned() }).collect();
        Ok(Response::new(AllocateResponse { ips }))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        self.heard().push(request.into_inner().service);
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        Err(Status::unimplemented("no"))
    }
}

#[test]
fn a_provider_that_lies_is_not_believed() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        lab.apply(GROUPS).await?;
        let mut liar = Liar::default();
        liar.answers.insert("honest", vec!["10.220.0.1"]);
        liar.answers.insert("several", vec!["10.220.0.2", "10.220.0.3"]);
        let lies = LIES.iter().filter(|lie| lie.0 != "refused");
        liar.answers
            .extend(lies.map(|(name, answer, ..)| (*name, answer.to_vec())));
        let provider = liar.clone();
        let socket = lab.outside(SOCKET);
        tokio::spawn(async move { serve(provider, Path::new(&socket)).await });
        lab.start_allocator().await?;
        sides.create("honest", &group("ext"), json!({})).await?;
        sides.has("honest", &["10.220.0.1"]).await?;
        sides.create("several", &group("ext"), json!({})).await?;
        sides.has("several", &["10.220.0.2", "10.220.0.3"]).await?;
        for (name, _, reason, text) in LIES {
            let mut marks = group("ext").to_vec();
            if name == "pinned" {
                marks.push((annotations::ADDRESSES, "10.220.0.7"));
            }
            sides.create(name, &marks, json!({})).await?;
            sides.waits(name, reason, text).await?;
        }
        let heard = || liar.heard().clone();
        for (name, ..) in LIES.iter().filter(|lie| lie.0 != "refused") {
            wait_until(&format!("what {name} was given went back"), SOON, async || {
                ensure!(heard().contains(&format!("default/{name}")), "{:?}", heard());
                Ok(())
            })
            .await?;
        }
        ensure!(!heard().contains(&"default/honest".to_owned()), "{:?}", heard());
        sides.has("honest", &["10.220.0.1"]).await?;
        for service in sides.api.list(&ListParams::default()).await? {
            let name = service.name_any();
            if name != "kubernetes" {
                sides.delete(&name).await?;
                sides.gone(&name).await?;
            }
        }
        Ok(())
    })
}

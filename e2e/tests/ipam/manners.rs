//! How a provider is treated: asked when it is on record, once at a time, and given back what no Service shows.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use crds::service::{ingress, reserved_in};
use e2e::ipam::{Reference, serve};
use e2e::{Lab, Options, wait_until};
use ipam::release_request::What;
use ipam::{AllocateRequest, AllocateResponse, ReleaseRequest, ReleaseResponse, StatsRequest, StatsResponse};
use k8s_openapi::api::core::v1::Service;
use kube::api::Api;
use serde_json::json;
use tonic::{Request, Response, Status};

use super::{GROUPS, LEDGER, SOCKET, SOON, Sides, group};

/// A provider that takes its time, and looks at the Services it is asked about.
#[derive(Clone)]
struct Witness {
    provider: Arc<Reference>,
    services: Api<Service>,
    busy: Arc<Mutex<BTreeSet<String>>>,
    faults: Arc<Mutex<Vec<String>>>,
    answered: Arc<Mutex<Vec<String>>>,
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Witness {
    async fn service(&self, key: &str) -> Option<Service> {
        let found = self.services.get_opt(key.trim_start_matches("default/")).await;
        found.ok().flatten()
    }

    fn fault(&self, is_one: bool, what: String) {
        if is_one {
            lock(&self.faults).push(what);
        }
    }

    /// Takes note that a Service is being dealt with.
    async fn begin(&self, what: &str, service: &str) {
        let is_free = lock(&self.busy).insert(service.to_owned());
        self.fault(!is_free, format!("{what} of {service} before the last was answered"));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }

    fn end(&self, what: &str, service: &str) {
        lock(&self.busy).remove(service);
        lock(&self.answered).push(format!("{what} {service}"));
    }
}

#[tonic::async_trait]
impl ipam::ipam_server::Ipam for Witness {
    async fn allocate(&self, request: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let key = request.get_ref().service.clone();
        let service = self.service(&key).await;
        let is_on_record = service.is_some_and(|service| reserved_in(&service).any(|group| group == "ext"));
        self.fault(!is_on_record, format!("{key} has no finalizer when it is asked for"));
        self.begin("Allocate", &key).await;
        let answer = self.provider.allocate(request).await;
        self.end("Allocate", &key);
        answer
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let (key, what) = (request.get_ref().service.clone(), request.get_ref().what.clone());
        let shown = self
            .service(&key)
            .await
            .map(|service| ingress(&service))
            .unwrap_or_default();
        let is_shown = match &what {
            Some(What::Ip(ip)) => shown.iter().any(|shown| shown.to_string() == *ip),
            _ => !shown.is_empty(),
        };
        self.fault(is_shown, format!("{key} shows {shown:?} and {what:?} is given back"));
        self.begin("Release", &key).await;
        let answer = self.provider.release(request).await;
        self.end("Release", &key);
        answer
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        self.provider.stats(request).await
    }
}

#[test]
fn a_provider_is_asked_once_at_a_time_and_given_back_what_no_service_shows() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        let sides = Sides::new(&lab);
        lab.install().await?;
        lab.apply(GROUPS).await?;
        let ranges = ["10.220.0.1-10.220.0.4".parse()?, "fd00:220::1-fd00:220::4".parse()?];
        let pools = [("ext".to_owned(), ranges.to_vec())].into();
        let witness = Witness {
            provider: Arc::new(Reference::new(pools, &lab.outside(LEDGER))?),
            services: sides.api.clone(),
            busy: Arc::default(),
            faults: Arc::default(),
            answered: Arc::default(),
        };
        let (provider, socket) = (witness.clone(), lab.outside(SOCKET));
        tokio::spawn(async move { serve(provider, Path::new(&socket)).await });
        lab.start_allocator().await?;
        let both = json!({"ipFamilyPolicy": "RequireDualStack"});
        sides.create("web", &group("ext"), both).await?;
        // It changes while the provider thinks.
        wait_until("the provider thinks", SOON, async || {
            ensure!(lock(&witness.busy).contains("default/web"), "not yet");
            Ok(())
        })
        .await?;
        for n in 0..5 {
            let mark = json!({"metadata": {"annotations": {"purelb.io/allow-local": n.to_string()}}});
            sides.patch("web", mark).await?;
        }
        sides.has("web", &["10.220.0.1", "fd00:220::1"]).await?;
        let less = json!({"spec": {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIPs": null}});
        sides.patch("web", less).await?;
        sides.has("web", &["10.220.0.1"]).await?;
        sides.agree("ext").await?;
        sides.patch("web", json!({"spec": {"type": "ClusterIP"}})).await?;
        sides.agree("ext").await?;
        sides.patch("web", json!({"spec": {"type": "LoadBalancer"}})).await?;
        sides.has("web", &["10.220.0.1"]).await?;
        sides.delete("web").await?;
        sides.gone("web").await?;
        sides.agree("ext").await?;
        let answered = lock(&witness.answered).clone();
        let of_it: Vec<&str> = answered
            .iter()
            .filter_map(|said| said.strip_suffix(" default/web"))
            .collect();
        let expected = ["Allocate", "Release", "Release", "Allocate", "Release"];
        ensure!(of_it == expected, "it was asked {of_it:?}");
        let faults = lock(&witness.faults).clone();
        ensure!(faults.is_empty(), "{faults:?}");
        Ok(())
    })
}

//! A provider behind a Unix socket, which speaks `purelb.ipam.v1`.
//!
//! The protocol has no word for "another one": a provider gives a Service what it has already, and most give the lowest
//! free address. So while another is asked for than one that a host outside the cluster has, that one is reserved in a
//! name of its own, and nothing stays in that name: what a crash leaves there is given back when the provider is first
//! asked how full it is.

use std::collections::BTreeSet;
use std::error::Error;
use std::net::IpAddr;
use std::path::PathBuf;

use crds::{Family, ServiceKey};
use hyper_util::rt::TokioIo;
use ipam::allocate_request::Want as Wanted;
use ipam::ipam_client::IpamClient;
use ipam::release_request::What;
use ipam::{AllocateRequest, Explicit, Families, ReleaseRequest, StatsRequest};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};

use super::Calls;
use super::{PATIENCE, Problem, Query, Return, Stats, Want, cut};

/// How many addresses that others have a provider may give before it is enough.
const SWAPS: usize = 8;

/// In whose name addresses of hosts outside the cluster are reserved for a moment. No Service has a dot in its name.
fn stranger() -> ServiceKey {
    ServiceKey::new("host", "outside.cluster")
}

/// A connection that is made when it is needed, and again when it broke.
#[derive(Debug)]
pub struct Client {
    socket: String,
    channel: IpamClient<Channel>,
    calls: Calls,
    /// The pools in which nothing is reserved in the name of [`stranger`]. Whoever holds the lock may do so.
    clear: Mutex<BTreeSet<String>>,
}

impl Client {
    /// A client of whoever listens on `socket`.
    pub fn new(socket: &str, calls: Calls) -> Self {
        let path = PathBuf::from(socket);
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The name goes into the request's :authority and nowhere else.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(PATIENCE)
            .connect_with_connector_lazy(connector);
        Self {
            socket: socket.to_owned(),
            channel: IpamClient::new(channel),
            calls,
            clear: Mutex::default(),
        }
    }

    /// Asks for addresses; they come as the provider wrote them.
    ///
    /// # Errors
    /// What it answered instead.
    pub async fn allocate(&self, query: &Query) -> Result<Vec<String>, Problem> {
        let given = self.ask(query).await?;
        let unwanted = unwanted(query, &given);
        if unwanted.is_empty() {
            return Ok(given);
        }
        let mut clear = self.clear.lock().await;
        clear.remove(&query.pool);
        let swapped = self.swap(query, unwanted).await;
        if self.release(&query.pool, &stranger(), &Return::All).await.is_ok() {
            clear.insert(query.pool.clone());
        }
        // No other is to be had: the Service may still show what it had.
        match swapped {
            Err(_) => self.ask(query).await,
            given => given,
        }
    }

    /// Gets others for addresses that hosts outside the cluster have.
    async fn swap(&self, query: &Query, mut unwanted: Vec<IpAddr>) -> Result<Vec<String>, Problem> {
        for _ in 0..SWAPS {
            for ip in unwanted {
                tracing::debug!(pool = query.pool, service = %query.service, %ip, "another is asked for");
                let back = Return::One(ip.to_string());
                self.release(&query.pool, &query.service, &back).await?;
                let keep = Query {
                    service: stranger(),
                    sharing_key: None,
                    want: Want::Explicit(vec![ip]),
                    ..query.clone()
                };
                self.ask(&keep).await?;
            }
            let given = self.ask(query).await?;
            unwanted = self::unwanted(query, &given);
            if unwanted.is_empty() {
                return Ok(given);
            }
        }
        Err(Problem::Exhausted("none but those of other hosts".into()))
    }

    async fn ask(&self, query: &Query) -> Result<Vec<String>, Problem> {
        let want = match &query.want {
            Want::Explicit(addresses) => Wanted::Explicit(Explicit {
                ips: addresses.iter().map(ToString::to_string).collect(),
            }),
            Want::Families(families) => Wanted::Families(Families {
                want_ipv4: families.contains(&Family::V4),
                want_ipv6: families.contains(&Family::V6),
            }),
        };
        let request = AllocateRequest {
            pool: query.pool.clone(),
            service: query.service.to_string(),
            sharing_key: query.sharing_key.clone().unwrap_or_default(),
            want: Some(want),
        };
        let mut client = self.channel.clone();
        let answered = self
            .call("/purelb.ipam.v1.IPAM/Allocate", client.allocate(request))
            .await;
        let answer = answered.map_err(|status| self.problem(&status))?;
        Ok(answer.ips.into_iter().map(|address| address.ip).collect())
    }

    /// Gives addresses back.
    ///
    /// # Errors
    /// What it answered instead.
    pub async fn release(&self, pool: &str, service: &ServiceKey, what: &Return) -> Result<(), Problem> {
        let request = ReleaseRequest {
            pool: pool.to_owned(),
            service: service.to_string(),
            what: Some(match what {
                Return::All => What::All(true),
                Return::One(ip) => What::Ip(ip.clone()),
            }),
        };
        let mut client = self.channel.clone();
        match self.call("/purelb.ipam.v1.IPAM/Release", client.release(request)).await {
            Ok(_) => Ok(()),
            // It knows nothing of it: then it is not reserved.
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(self.problem(&status)),
        }
    }

    /// Asks how full a pool is.
    ///
    /// # Errors
    /// What it answered instead.
    pub async fn stats(&self, pool: &str) -> Result<Stats, Problem> {
        self.tidy_up(pool).await;
        let request = StatsRequest { pool: pool.to_owned() };
        let mut client = self.channel.clone();
        let answered = self.call("/purelb.ipam.v1.IPAM/Stats", client.stats(request)).await;
        let stats = answered.map_err(|status| self.problem(&status))?;
        Ok(Stats {
            in_use: [stats.in_use_v4, stats.in_use_v6],
            size: stats.has_known_capacity.then_some([stats.size_v4, stats.size_v6]),
            ranges: stats.display_addresses.iter().take(64).map(|text| cut(text)).collect(),
        })
    }

    /// Gives back what an allocator before this one may have left in the name of [`stranger`].
    async fn tidy_up(&self, pool: &str) {
        let mut clear = self.clear.lock().await;
        if !clear.contains(pool) && self.release(pool, &stranger(), &Return::All).await.is_ok() {
            clear.insert(pool.to_owned());
        }
    }

    /// Waits for an answer for as long as is reasonable, and counts it.
    async fn call<T>(
        &self,
        method: &'static str,
        work: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let begun = Instant::now();
        let answered = tokio::time::timeout(PATIENCE, work).await;
        let answered = answered.unwrap_or_else(|_| Err(Status::deadline_exceeded("")));
        let code = match &answered {
            Ok(_) => "OK".to_owned(),
            Err(status) => format!("{:?}", status.code()),
        };
        self.calls.done(&self.socket, method, code, begun.elapsed());
        answered.map(Response::into_inner)
    }

    fn problem(&self, status: &Status) -> Problem {
        let text = if status.message().is_empty() {
            status.code().description().to_owned()
        } else {
            cut(status.message())
        };
        match status.code() {
            Code::ResourceExhausted => Problem::Exhausted(text),
            Code::DeadlineExceeded => Problem::Slow,
            Code::Unavailable => Problem::Unreachable {
                at: self.socket.clone(),
                cause: root(status).unwrap_or(text),
                field: "spec.external.socket",
            },
            // Of our own making, when it does not speak the protocol.
            Code::Internal | Code::Unimplemented | Code::Unknown if status.source().is_some() => {
                Problem::Unreadable(root(status).unwrap_or(text))
            }
            _ => Problem::Refused(text),
        }
    }
}

/// What of an answer is an address of a host outside the cluster, where the Service does not insist on it.
fn unwanted(query: &Query, given: &[String]) -> Vec<IpAddr> {
    if matches!(query.want, Want::Explicit(_)) {
        return Vec::new();
    }
    let given = given.iter().filter_map(|text| text.parse().ok());
    given.filter(|ip| query.avoid.contains(ip)).collect()
}

/// What was at the bottom of an error: the layers above say that there was one.
fn root(status: &Status) -> Option<String> {
    let mut error = status.source()?;
    while let Some(source) = error.source() {
        error = source;
    }
    Some(cut(&error.to_string()))
}

//! A provider as it is asked, whichever kind it is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crds::ServiceKey;
use crds::servicegroup::Source;
use tokio::sync::Semaphore;

use super::{Access, Answer, Calls, PATIENCE, Problem, Query, Return, Stats, Want, grpc, netbox};

/// Requests to one provider at once.
const AT_ONCE: usize = 8;

/// Where a group's addresses come from.
#[derive(Debug)]
pub struct Provider {
    kind: Kind,
    /// So that a slow provider is not asked ever more.
    slots: Semaphore,
    /// How messages name it.
    name: String,
}

#[derive(Debug)]
enum Kind {
    Grpc(Box<grpc::Client>),
    Netbox(Box<netbox::Client>),
}

impl Provider {
    /// The provider of a group; `None` for one with pools of its own. `access` is what Netbox wants to see, `calls`
    /// counts requests to others.
    pub fn new(source: &Source, access: &Access, calls: &Calls) -> Option<Self> {
        let (kind, name) = match source {
            Source::Pools(_) => return None,
            Source::External(external) => {
                let socket = external.socket.as_deref().unwrap_or(::ipam::SOCKET);
                (
                    Kind::Grpc(Box::new(grpc::Client::new(socket, calls.clone()))),
                    external.provider.clone(),
                )
            }
            Source::Netbox(netbox) => (
                Kind::Netbox(Box::new(netbox::Client::new(&netbox.url, &netbox.tenant, access))),
                "Netbox".to_owned(),
            ),
        };
        // Netbox knows no way to take an address that nobody else can take meanwhile: one at a time.
        let at_once = if matches!(kind, Kind::Netbox(_)) { 1 } else { AT_ONCE };
        Some(Self {
            kind,
            slots: Semaphore::new(at_once),
            name,
        })
    }

    /// How messages name it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks for addresses. What a wrong answer brought is given back before this returns, except what is among
    /// `kept`, the addresses the Service has from this provider already.
    ///
    /// # Errors
    /// What is wrong with the provider or its answer.
    pub async fn allocate(&self, query: &Query, kept: &[IpAddr]) -> Result<Answer, Problem> {
        let _slot = self.slots.acquire().await;
        let whole = self.ask(query, kept).await;
        let families = match (&query.want, &whole) {
            (Want::Families(families), Err(problem))
                if query.may_degrade && families.len() > 1 && !problem.is_silence() =>
            {
                families
            }
            _ => return whole,
        };
        // Both families are not to be had: one may be.
        let mut part = Answer {
            addresses: Vec::new(),
            missing: None,
        };
        for family in families {
            let query = Query {
                want: Want::Families(vec![*family]),
                ..query.clone()
            };
            match self.ask(&query, kept).await {
                Ok(answer) => part.addresses.extend(answer.addresses),
                Err(problem) => part.missing = Some(problem),
            }
        }
        if part.addresses.is_empty() { whole } else { Ok(part) }
    }

    async fn ask(&self, query: &Query, kept: &[IpAddr]) -> Result<Answer, Problem> {
        let texts = match &self.kind {
            Kind::Grpc(client) => client.allocate(query).await?,
            Kind::Netbox(client) => in_time(client.allocate(query)).await?,
        };
        let checked = query.check(&texts);
        if let Err(problem) = &checked {
            tracing::warn!(pool = query.pool, service = %query.service, provider = self.name, %problem, "the provider answered what was not asked for");
            for back in back(&texts, kept) {
                if let Err(problem) = self.send_back(&query.pool, &query.service, &back).await {
                    tracing::warn!(pool = query.pool, service = %query.service, %problem, "an address could not be given back");
                }
            }
        }
        checked
    }

    /// Gives addresses back.
    ///
    /// # Errors
    /// What is wrong with the provider.
    pub async fn release(&self, pool: &str, service: &ServiceKey, what: &Return) -> Result<(), Problem> {
        let _slot = self.slots.acquire().await;
        self.send_back(pool, service, what).await
    }

    async fn send_back(&self, pool: &str, service: &ServiceKey, what: &Return) -> Result<(), Problem> {
        match &self.kind {
            Kind::Grpc(client) => client.release(pool, service, what).await,
            Kind::Netbox(client) => in_time(client.release(service, what)).await,
        }
    }

    /// Asks how full it is; `None` where it cannot tell.
    ///
    /// # Errors
    /// What is wrong with the provider.
    pub async fn stats(&self, pool: &str) -> Result<Option<Stats>, Problem> {
        match &self.kind {
            Kind::Grpc(client) => client.stats(pool).await.map(Some),
            Kind::Netbox(_) => Ok(None),
        }
    }
}

/// What of a wrong answer goes back: all that the provider has for the Service, unless some of it is in use.
pub(super) fn back(texts: &[String], kept: &[IpAddr]) -> Vec<Return> {
    if kept.is_empty() {
        return vec![Return::All];
    }
    let texts: BTreeSet<&String> = texts.iter().take(4 * ::ipam::MOST_ADDRESSES).collect();
    let is_kept = |text: &str| text.parse::<IpAddr>().is_ok_and(|ip| kept.contains(&ip));
    let unwanted = texts.into_iter().filter(|text| !is_kept(text));
    unwanted.map(|text| Return::One(text.clone())).collect()
}

async fn in_time<T>(work: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or(Err(Problem::Slow))
}

//! A reference for whoever writes a provider of addresses: `purelb.ipam.v1` with a ledger in a file.
//!
//! It keeps what the protocol promises: the same question has the same answer, an address is on two Services
//! only when their sharing keys are equal, and what was answered is on the disk before the answer is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use crds::{AddressRange, Family};
use ipam::allocate_request::Want;
use ipam::ipam_server::{Ipam, IpamServer};
use ipam::release_request::What;
use ipam::{Address, AllocateRequest, AllocateResponse, ReleaseRequest, ReleaseResponse, StatsRequest, StatsResponse};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tonic::{Request, Response, Status};

/// Who has an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The key its Services share it with; empty: there is one Service.
    pub sharing_key: String,
    /// The Services, as namespace/name.
    pub services: BTreeSet<String>,
}

/// Who has what, by pool.
pub type Ledger = BTreeMap<String, BTreeMap<IpAddr, Holding>>;

/// Reads a ledger; one that was never written is empty.
pub fn read_ledger(path: &Path) -> Result<Ledger> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Ledger::new()),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// A provider of the addresses of some pools.
#[derive(Debug)]
pub struct Reference {
    pools: BTreeMap<String, Vec<AddressRange>>,
    path: PathBuf,
    ledger: Mutex<Ledger>,
}

impl Reference {
    /// A provider whose ledger is kept in the file `path`.
    pub fn new(pools: BTreeMap<String, Vec<AddressRange>>, path: &Path) -> Result<Self> {
        Ok(Self {
            pools,
            path: path.to_owned(),
            ledger: Mutex::new(read_ledger(path)?),
        })
    }

    fn ranges(&self, pool: &str) -> Result<&[AddressRange], Status> {
        let ranges = self.pools.get(pool).map(Vec::as_slice);
        ranges.ok_or_else(|| Status::not_found(format!("there is no pool \"{pool}\" here")))
    }

    /// Changes a pool's ledger; what `change` returns with an error leaves no trace.
    fn change<T>(
        &self,
        pool: &str,
        change: impl FnOnce(&mut BTreeMap<IpAddr, Holding>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = ledger.clone();
        let result = change(next.entry(pool.to_owned()).or_default())?;
        if next != *ledger {
            // A rename is all or nothing: a reader, or this program after a crash, sees one whole ledger.
            let text = serde_json::to_vec_pretty(&next).map_err(|error| Status::internal(error.to_string()))?;
            let draft = self.path.with_extension("draft");
            let written = std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, &self.path));
            written.map_err(|error| Status::internal(format!("the ledger cannot be written: {error}")))?;
            *ledger = next;
        }
        Ok(result)
    }

    fn allocate_now(&self, asked: &AllocateRequest) -> Result<Vec<IpAddr>, Status> {
        let ranges = self.ranges(&asked.pool)?;
        let want = asked.want.as_ref();
        let want = want.ok_or_else(|| Status::invalid_argument("neither addresses nor families are asked for"))?;
        self.change(&asked.pool, |held| {
            let given = match want {
                Want::Explicit(explicit) => {
                    let addresses = explicit.ips.iter().map(|text| {
                        let ip: Option<IpAddr> = text.parse().ok();
                        let ip = ip.filter(|ip| ranges.iter().any(|range| range.contains(*ip)));
                        ip.ok_or_else(|| Status::invalid_argument(format!("{text} is in no range of this pool")))
                    });
                    addresses.collect::<Result<Vec<_>, _>>()?
                }
                Want::Families(families) => {
                    let wanted = [(families.want_ipv4, Family::V4), (families.want_ipv6, Family::V6)];
                    let wanted = wanted.into_iter().filter(|(is_wanted, _)| *is_wanted);
                    let addresses = wanted.map(|(_, family)| {
                        let found = choose(ranges, held, asked, family);
                        found.ok_or_else(|| Status::resource_exhausted(format!("all {family} addresses are in use")))
                    });
                    addresses.collect::<Result<Vec<_>, _>>()?
                }
            };
            for ip in &given {
                let holding = held.entry(*ip).or_default();
                let is_shared = !asked.sharing_key.is_empty() && holding.sharing_key == asked.sharing_key;
                let others = holding.services.iter().any(|service| *service != asked.service);
                if others && !is_shared {
                    return Err(Status::already_exists(format!("{ip} is in use")));
                }
                holding.sharing_key.clone_from(&asked.sharing_key);
                holding.services.insert(asked.service.clone());
            }
            Ok(given)
        })
    }
}

/// The address a Service has, or else that of its sharing key, or else the lowest that nobody has.
fn choose(
    ranges: &[AddressRange],
    held: &BTreeMap<IpAddr, Holding>,
    asked: &AllocateRequest,
    family: Family,
) -> Option<IpAddr> {
    let of_family = || held.iter().filter(|(ip, _)| Family::of(**ip) == family);
    let own = of_family().find(|(_, holding)| holding.services.contains(&asked.service));
    let shared =
        || of_family().find(|(_, holding)| !asked.sharing_key.is_empty() && holding.sharing_key == asked.sharing_key);
    if let Some((ip, _)) = own.or_else(shared) {
        return Some(*ip);
    }
    let ranges = ranges.iter().filter(|range| range.family() == family);
    let mut all = ranges.flat_map(addresses);
    all.find(|ip| !held.contains_key(ip))
}

fn addresses(range: &AddressRange) -> impl Iterator<Item = IpAddr> + use<> {
    let number = |ip| match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    };
    let family = range.family();
    (number(range.first())..=number(range.last())).map(move |n| match family {
        Family::V4 => IpAddr::V4(u32::try_from(n).unwrap_or_default().into()),
        Family::V6 => IpAddr::V6(n.into()),
    })
}

#[tonic::async_trait]
impl Ipam for Reference {
    async fn allocate(&self, request: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        let given = self.allocate_now(request.get_ref())?;
        let ips = given.into_iter().map(|ip| Address { ip: ip.to_string() }).collect();
        Ok(Response::new(AllocateResponse { ips }))
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let asked = request.into_inner();
        self.change(&asked.pool, |held| {
            held.retain(|ip, holding| {
                let is_meant = match &asked.what {
                    Some(What::All(all)) => *all,
                    Some(What::Ip(text)) => text.parse() == Ok(*ip),
                    None => false,
                };
                if is_meant {
                    holding.services.remove(&asked.service);
                }
                !holding.services.is_empty()
            });
            Ok(())
        })?;
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let pool = &request.get_ref().pool;
        let ranges = self.ranges(pool)?;
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let in_use = |family| {
            let held = ledger.get(pool).into_iter().flat_map(BTreeMap::keys);
            held.filter(|ip| Family::of(**ip) == family).count() as u64
        };
        let size = |family| {
            let ranges = ranges.iter().filter(|range| range.family() == family);
            ranges.map(|range| addresses(range).count() as u64).sum()
        };
        Ok(Response::new(StatsResponse {
            in_use_v4: in_use(Family::V4),
            in_use_v6: in_use(Family::V6),
            size_v4: size(Family::V4),
            size_v6: size(Family::V6),
            has_known_capacity: true,
            display_addresses: ranges.iter().map(ToString::to_string).collect(),
        }))
    }
}

/// Serves a provider, whichever it is, on a Unix socket, which is made anew.
pub async fn serve(provider: impl Ipam, socket: &Path) -> Result<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error)?,
        _ => {}
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("listening on {}", socket.display()))?;
    let connections = futures::stream::try_unfold(listener, async |listener| {
        let (connection, _) = listener.accept().await?;
        std::io::Result::Ok(Some((connection, listener)))
    });
    let server = tonic::transport::Server::builder().add_service(IpamServer::new(provider));
    server.serve_with_incoming(connections).await.context("serving")
}

//! Asking other people's address books: what is asked, what may be answered, and what can be wrong.
//!
//! [`grpc`] and [`netbox`] carry it there. Neither is trusted: an answer counts once [`Query::check`] and the
//! allocator (`decide::offered`) find nothing wrong with it, and what was answered wrongly is given back.

mod calls;
pub mod grpc;
pub mod netbox;
mod provider;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use crds::servicegroup::Source;
use crds::{Family, ServiceKey};

pub use calls::Calls;
pub use netbox::Access;
pub use provider::Provider;

use crate::sentence::Others;
use crate::strangers::Stranger;

/// How long a provider may take for one answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What is asked of a provider for a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Name of the ServiceGroup.
    pub pool: String,
    /// Who asks.
    pub service: ServiceKey,
    /// The key with which the Service shares addresses.
    pub sharing_key: Option<String>,
    /// The addresses that other Services of that key have from this provider.
    pub shared: Vec<IpAddr>,
    /// What is asked for.
    pub want: Want,
    /// Whether a part is better than nothing.
    pub may_degrade: bool,
    /// Addresses that hosts outside the cluster have: others are wanted.
    pub avoid: BTreeSet<IpAddr>,
}

/// Which addresses are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// These and no others.
    Explicit(Vec<IpAddr>),
    /// At least one of each of these families.
    Families(Vec<Family>),
}

/// What a provider gave, found good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The addresses, in the order of the answer.
    pub addresses: Vec<IpAddr>,
    /// Why a part is missing, where a part is better than nothing.
    pub missing: Option<Problem>,
}

/// What is given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Return {
    /// All that the Service has.
    All,
    /// One address, as the provider wrote it.
    One(String),
}

impl Return {
    /// Whether an address is given back.
    pub fn is_of(&self, ip: IpAddr) -> bool {
        match self {
            Self::All => true,
            Self::One(text) => ip.to_string() == *text,
        }
    }
}

/// How full a provider says it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Addresses in use, IPv4 and IPv6, by whomever.
    pub in_use: [u64; 2],
    /// All there are, where that is known.
    pub size: Option<[u64; 2]>,
    /// The ranges, for display.
    pub ranges: Vec<String>,
}

/// What is wrong with a provider or with its answer: how a sentence ends that begins with its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Nobody is there.
    #[error("cannot be reached at {at} ({cause}); start it, or correct {field}")]
    Unreachable {
        /// The socket or URL.
        at: String,
        /// What the attempt ended with.
        cause: String,
        /// The field with that address.
        field: &'static str,
    },
    /// It is somebody else, or its certificate is of an authority that is not known here.
    #[error(
        "has a certificate at {at} that is not trusted ({cause}); put the certificate of its authority into the Secret netbox-client, key ca.crt, and restart the allocator"
    )]
    Untrusted {
        /// The URL.
        at: String,
        /// What is wrong with it.
        cause: String,
    },
    /// It takes too long.
    #[error("did not answer within {} s; it is asked again", PATIENCE.as_secs())]
    Slow,
    /// It has no address left.
    #[error("has no address left ({0}); add some there or delete a Service")]
    Exhausted(String),
    /// It says no.
    #[error("refused ({0}); see its log")]
    Refused(String),
    /// It answered something that is no answer.
    #[error("gave an answer that cannot be read ({0}); see whether it is the version it should be")]
    Unreadable(String),
    /// No address, or more than a Service can have.
    #[error("answered with {0} addresses where 1 to {most} are allowed", most = ::ipam::MOST_ADDRESSES)]
    Count(usize),
    /// Something that is no address.
    #[error("answered with \"{0}\", which is no address")]
    NoAddress(String),
    /// The same address more than once.
    #[error("answered with {0} twice")]
    Twice(IpAddr),
    /// An address of a family nobody asked for.
    #[error("answered with {ip}, an {family} address, which was not asked for", ip = .0, family = Family::of(*.0))]
    WrongFamily(IpAddr),
    /// Another address than the one asked for.
    #[error("answered with {0}, which is none of the addresses asked for")]
    NotAsked(IpAddr),
    /// An address asked for is missing.
    #[error("did not give {0}, which was asked for")]
    Withheld(IpAddr),
    /// A family asked for is missing.
    #[error("gave no {0} address; change spec.ipFamilyPolicy or spec.ipFamilies, or add some there")]
    Lacks(Family),
    /// An address another Service has.
    #[error("gave {0}, which is in use by {1}; correct its records")]
    Taken(IpAddr, Others),
    /// An address that a host outside the cluster has.
    #[error("gave {0}, which is in use by {1}; take it off that host, or correct its records")]
    Strangers(IpAddr, Stranger),
    /// An address that another group gives out.
    #[error("gave {0}, which is in a range of ServiceGroup \"{1}\"; take it out of one of them")]
    InPoolOf(IpAddr, String),
}

impl Problem {
    /// Whether there was no answer.
    pub const fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Slow)
    }

    /// Whether it may be over in a moment, without anybody doing anything.
    pub const fn is_passing(&self) -> bool {
        self.is_silence() || matches!(self, Self::Exhausted(_))
    }

    /// How the sentence begins that tells this problem from others; what follows may change without being news.
    pub fn cause(&self) -> String {
        match self {
            Self::Unreachable { at, .. } => format!("cannot be reached at {at}"),
            Self::Untrusted { at, .. } => format!("has a certificate at {at} that is not trusted"),
            Self::Exhausted(_) => "has no address left".to_owned(),
            Self::Refused(_) => "refused".to_owned(),
            Self::Strangers(ip, stranger) => {
                format!(
                    "gave {ip}, which is in use by a host outside the cluster, MAC {}",
                    stranger.mac
                )
            }
            Self::Unreadable(_) => "gave an answer that cannot be read".to_owned(),
            other => other.to_string(),
        }
    }
}

impl Query {
    /// Reads an answer and sees whether it is one to this query.
    ///
    /// # Errors
    /// The first thing wrong with it.
    pub fn check(&self, texts: &[String]) -> Result<Answer, Problem> {
        if texts.is_empty() || texts.len() > ::ipam::MOST_ADDRESSES {
            return Err(Problem::Count(texts.len()));
        }
        let mut addresses: Vec<IpAddr> = Vec::new();
        for text in texts {
            let ip: IpAddr = text.parse().map_err(|_| Problem::NoAddress(cut(text)))?;
            if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
                return Err(Problem::NoAddress(cut(text)));
            }
            if addresses.contains(&ip) {
                return Err(Problem::Twice(ip));
            }
            match &self.want {
                Want::Explicit(asked) if !asked.contains(&ip) => return Err(Problem::NotAsked(ip)),
                Want::Families(asked) if !asked.contains(&Family::of(ip)) => return Err(Problem::WrongFamily(ip)),
                _ => addresses.push(ip),
            }
        }
        let missing = match &self.want {
            Want::Explicit(asked) => asked
                .iter()
                .find(|ip| !addresses.contains(ip))
                .map(|ip| Problem::Withheld(*ip)),
            Want::Families(asked) => asked
                .iter()
                .find(|family| !addresses.iter().any(|ip| Family::of(*ip) == **family))
                .map(|family| Problem::Lacks(*family)),
        };
        match missing {
            Some(problem) if !self.may_degrade => Err(problem),
            missing => Ok(Answer { addresses, missing }),
        }
    }
}

/// As much of a text as fits into a sentence.
fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// How messages name where addresses come from.
pub fn name(source: &Source) -> &str {
    match source {
        Source::External(external) => &external.provider,
        Source::Netbox(_) => "Netbox",
        Source::Pools(_) => "its provider",
    }
}

/// Whether two groups have one provider.
pub fn is_same(one: &Source, other: &Source) -> bool {
    match (one, other) {
        (Source::External(one), Source::External(other)) => {
            one.socket == other.socket && one.provider == other.provider
        }
        (Source::Netbox(one), Source::Netbox(other)) => one.url == other.url && one.tenant == other.tenant,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::provider::back;
    use super::*;
    use crate::ledger::tests::{ip, service};
    use Family::{V4, V6};

    fn query(want: Want) -> Query {
        Query {
            pool: "ext".into(),
            service: service("a"),
            sharing_key: None,
            shared: Vec::new(),
            want,
            may_degrade: false,
            avoid: BTreeSet::new(),
        }
    }

    fn check(query: &Query, texts: &[&str]) -> Result<Vec<String>, String> {
        let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
        let answer = query.check(&texts).map_err(|problem| problem.to_string())?;
        Ok(answer.addresses.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn an_answer_is_what_was_asked_for_or_it_is_none() {
        let four = Want::Families(vec![V4]);
        let both = Want::Families(vec![V4, V6]);
        let this = Want::Explicit(vec![ip("10.0.0.1")]);
        let many: Vec<String> = (1..=17).map(|n| format!("10.0.0.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (name, want, texts, expected) in [
            ("one", &four, &["10.0.0.1"][..], Ok(1)),
            ("sixteen", &four, &many[..16], Ok(16)),
            ("both", &both, &["fd00::1", "10.0.0.1"], Ok(2)),
            ("the one", &this, &["10.0.0.1"], Ok(1)),
            (
                "none",
                &four,
                &[],
                Err("answered with 0 addresses where 1 to 16 are allowed"),
            ),
            (
                "seventeen",
                &four,
                &many,
                Err("answered with 17 addresses where 1 to 16 are allowed"),
            ),
            (
                "no address",
                &four,
                &["10.0.0.1/24"],
                Err("answered with \"10.0.0.1/24\", which is no address"),
            ),
            (
                "nowhere",
                &four,
                &["0.0.0.0"],
                Err("answered with \"0.0.0.0\", which is no address"),
            ),
            (
                "twice",
                &four,
                &["10.0.0.1", "10.0.0.1"],
                Err("answered with 10.0.0.1 twice"),
            ),
            (
                "other family",
                &four,
                &["fd00::1"],
                Err("answered with fd00::1, an IPv6 address, which was not asked for"),
            ),
            (
                "half",
                &both,
                &["10.0.0.1"],
                Err("gave no IPv6 address; change spec.ipFamilyPolicy or spec.ipFamilies, or add some there"),
            ),
            (
                "other address",
                &this,
                &["10.0.0.2"],
                Err("answered with 10.0.0.2, which is none of the addresses asked for"),
            ),
        ] {
            let got = check(&query(want.clone()), texts).map(|ips| ips.len());
            assert_eq!(got, expected.map_err(str::to_owned), "{name}");
        }
    }

    #[test]
    fn half_an_answer_is_one_where_half_is_better_than_nothing() {
        let query = Query {
            may_degrade: true,
            ..query(Want::Families(vec![V4, V6]))
        };
        let answer = query.check(&["fd00::1".into()]).unwrap();
        assert_eq!((answer.addresses.len(), answer.missing), (1, Some(Problem::Lacks(V4))));
    }

    #[test]
    fn a_wrong_answer_goes_back_without_what_is_in_use() {
        let texts = ["10.0.0.1".to_owned(), "nonsense".to_owned()];
        assert_eq!(back(&texts, &[]), [Return::All]);
        assert_eq!(back(&texts, &[ip("10.0.0.1")]), [Return::One("nonsense".into())]);
    }
}

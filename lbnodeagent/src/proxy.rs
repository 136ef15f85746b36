//! Whether kube-proxy, or what stands in for it, works on this node: without it an address that the node announces leads nowhere.
//!
//! It is asked at its health port (`healthzBindAddress` of kube-proxy, `kubeProxyReplacementHealthzBindAddr` of Cilium). Whether there
//! is to be any is known by its rules in the kernel, which outlive it: nothing is said of a node that has none and where nobody has
//! answered since the agent's start. [`Health`] is the decision, on injected time.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crds::Family;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::bypass::nft::masquerade;

/// Its health port as it comes.
pub const PORT: u16 = 10256;

/// How often it is asked, and how long it has to answer.
const INTERVAL: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(3);
/// How long it must not work until that is a problem: it is restarted within seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest status line that is read.
const STATUS_LINE: usize = 64;

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It works.
    Well,
    /// It says that it does not.
    Ill,
    /// Nobody answers.
    Silence,
    /// Something else listens there.
    Stranger,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ailment {
    /// It answered before, and does not any more.
    Silent,
    /// Its rules are in the kernel, and it has not answered since the agent's start.
    Absent,
    /// It says that it does not work.
    Ill,
}

impl Ailment {
    /// What that means, and the way out.
    pub fn sentence(self, node: &str, port: u16) -> String {
        let what = match self {
            Self::Silent => format!("does not answer on port {port} any more"),
            Self::Absent => format!("has left its rules in the kernel and does not answer on port {port}"),
            Self::Ill => format!("says on port {port} that it does not work (503)"),
        };
        let port_elsewhere = match self {
            Self::Absent => {
                ". If its health port is another one, or none, set kubeProxyHealthPort of the chart to that, or to 0"
            }
            Self::Silent | Self::Ill => "",
        };
        format!(
            "{WORDS} {what}: addresses that this node announces may be answered by nobody. Look at its Pod and its log: kubectl get pods \
             -n kube-system -o wide --field-selector spec.nodeName={node}{port_elsewhere}"
        )
    }
}

/// By these words in a problem of a node it is known that it is this one.
pub const WORDS: &str = "kube-proxy of this node";

/// What is known of it.
#[derive(Debug, Default)]
struct Health {
    /// Its rules were in the kernel when the agent started.
    has_run: bool,
    has_answered: bool,
    /// Since when it does not work.
    since: Option<Duration>,
}

impl Health {
    fn hear(&mut self, now: Duration, answer: Answer) -> Option<Ailment> {
        let ailment = match answer {
            Answer::Well => None,
            Answer::Ill => Some(Ailment::Ill),
            Answer::Silence if self.has_answered => Some(Ailment::Silent),
            Answer::Silence => self.has_run.then_some(Ailment::Absent),
            Answer::Stranger => {
                *self = Self::default();
                return None;
            }
        };
        self.has_answered |= answer != Answer::Silence;
        if ailment.is_none() {
            self.since = None;
        }
        // An agent that starts again says at once what the one before it said, so that nobody is told meanwhile that all is well.
        ailment.filter(|ailment| {
            let lasts = now.saturating_sub(*self.since.get_or_insert(now));
            *ailment == Ailment::Absent || lasts >= PATIENCE
        })
    }
}

/// Asks again and again, and publishes what is wrong when that becomes something else. Never returns.
pub async fn keep_asking(port: u16, ailment: watch::Sender<Option<Ailment>>) {
    let started = Instant::now();
    let mut health = Health {
        has_run: tokio::task::spawn_blocking(has_rules).await.unwrap_or(false),
        ..Health::default()
    };
    loop {
        let answer = ask(port).await;
        let now = health.hear(started.elapsed(), answer);
        ailment.send_if_modified(|known| std::mem::replace(known, now) != now);
        sleep(INTERVAL).await;
    }
}

/// Whether rules of kube-proxy are in the kernel.
fn has_rules() -> bool {
    [Family::V4, Family::V6]
        .into_iter()
        .any(|family| masquerade(family).is_some())
}

/// Asks it once.
async fn ask(port: u16) -> Answer {
    match status(port, "/healthz").await {
        None => Answer::Silence,
        Some(200) => Answer::Well,
        // It says so on a node that is about to go, too (KEP-3836), where it works.
        Some(503) if status(port, "/livez").await == Some(200) => Answer::Well,
        Some(503) => Answer::Ill,
        Some(_) => Answer::Stranger,
    }
}

/// The status with which a path is answered over loopback.
async fn status(port: u16, path: &str) -> Option<u16> {
    for host in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        if let Ok(Ok(line)) = timeout(TIMEOUT, get(host, port, path)).await {
            return Some(status_in(&line).unwrap_or_default());
        }
    }
    None
}

/// The first bytes of an answer.
async fn get(host: IpAddr, port: u16, path: &str) -> io::Result<Vec<u8>> {
    let mut socket = TcpStream::connect((host, port)).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut line = Vec::new();
    let mut bytes = [0; STATUS_LINE];
    while line.len() < STATUS_LINE && !line.contains(&b'\n') {
        let count = socket.read(&mut bytes).await?;
        if count == 0 {
            break;
        }
        line.extend_from_slice(bytes.get(..count).unwrap_or_default());
    }
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line)
}

/// The status in the first line of an answer (RFC 9112 section 4).
fn status_in(line: &[u8]) -> Option<u16> {
    let line = line.strip_prefix(b"HTTP/1.")?;
    let digits = line.get(2..5)?;
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Seconds in which what is wrong becomes something else, when the answers change in these seconds.
    fn told(has_run: bool, changes: &[(u64, Answer)]) -> Vec<(u64, Option<Ailment>)> {
        let mut health = Health {
            has_run,
            ..Health::default()
        };
        let (mut answer, mut before) = (Answer::Silence, None);
        let mut told = Vec::new();
        for now in (0..200).step_by(10) {
            answer = changes
                .iter()
                .rfind(|(at, _)| *at <= now)
                .map_or(answer, |change| change.1);
            let ailment = health.hear(Duration::from_secs(now), answer);
            if ailment != before {
                told.push((now, ailment));
            }
            before = ailment;
        }
        told
    }

    #[test]
    fn one_that_answered_and_does_not_work_for_half_a_minute_is_told_until_it_does() {
        use Answer::{Ill, Silence, Stranger, Well};
        let (silent, ill) = (Some(Ailment::Silent), Some(Ailment::Ill));
        for (name, changes, expected) in [
            ("nobody ever answered", vec![], vec![]),
            ("well all the time", vec![(0, Well)], vec![]),
            (
                "it dies, and is back",
                vec![(0, Well), (20, Silence), (100, Well)],
                vec![(50, silent), (100, None)],
            ),
            ("it is restarted", vec![(0, Well), (20, Silence), (40, Well)], vec![]),
            (
                "it works no more, and dies",
                vec![(0, Well), (20, Ill), (80, Silence)],
                vec![(50, ill), (80, silent)],
            ),
            ("it does not work from the start", vec![(0, Ill)], vec![(30, ill)]),
            (
                "it starts, and says so",
                vec![(20, Ill), (40, Well), (60, Ill), (80, Well)],
                vec![],
            ),
            (
                "something else listens there",
                vec![(0, Stranger), (40, Silence)],
                vec![],
            ),
            (
                "something else has its port now",
                vec![(0, Well), (20, Silence), (100, Stranger)],
                vec![(50, silent), (100, None)],
            ),
        ] {
            assert_eq!(told(false, &changes), expected, "{name}");
        }
        let absent = Some(Ailment::Absent);
        for (name, changes, expected) in [
            ("it died before the agent started", vec![], vec![(0, absent)]),
            ("and is back", vec![(100, Well)], vec![(0, absent), (100, None)]),
            (
                "it starts with the agent",
                vec![(20, Well), (60, Silence)],
                vec![(0, absent), (20, None), (90, silent)],
            ),
            (
                "something else listens there",
                vec![(0, Stranger), (40, Silence)],
                vec![],
            ),
        ] {
            assert_eq!(told(true, &changes), expected, "{name}");
        }
    }

    /// What is found out of one that answers each path so.
    async fn asked(answers: &[(&'static str, &'static [u8])]) -> Answer {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serve = async {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = [0; 512];
                let count = socket.read(&mut request).await.unwrap();
                let request = str::from_utf8(&request[..count]).unwrap();
                let answer = answers
                    .iter()
                    .find(|(path, _)| request.starts_with(&format!("GET {path} HTTP/1.")));
                socket.write_all(answer.map_or(b"", |(_, bytes)| bytes)).await.unwrap();
            }
        };
        tokio::select! {
            answer = ask(port) => answer,
            () = serve => unreachable!(),
        }
    }

    #[tokio::test]
    async fn it_is_asked_over_http() {
        let (ok, no) = (
            b"HTTP/1.0 200 OK\r\n\r\n{}".as_slice(),
            b"HTTP/1.1 503 Service Unavailable\r\n".as_slice(),
        );
        for (name, answers, expected) in [
            ("well", vec![("/healthz", ok)], Answer::Well),
            ("ill", vec![("/healthz", no), ("/livez", no)], Answer::Ill),
            ("ill, and without livez", vec![("/healthz", no)], Answer::Ill),
            (
                "well on a node that is about to go",
                vec![("/healthz", no), ("/livez", ok)],
                Answer::Well,
            ),
            (
                "another program",
                vec![("/healthz", b"HTTP/1.1 404 Not Found\r\n".as_slice())],
                Answer::Stranger,
            ),
            (
                "no HTTP",
                vec![("/healthz", b"SSH-2.0-OpenSSH_9.9\r\n".as_slice())],
                Answer::Stranger,
            ),
            ("closes at once", vec![], Answer::Silence),
        ] {
            assert_eq!(asked(&answers).await, expected, "{name}");
        }
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        assert_eq!(ask(port).await, Answer::Silence, "nobody listens");
    }

    #[test]
    fn it_says_what_is_wrong_and_where_to_look() {
        assert_eq!(
            Ailment::Silent.sentence("w1", PORT),
            "kube-proxy of this node does not answer on port 10256 any more: addresses that this node announces may be answered by \
             nobody. Look at its Pod and its log: kubectl get pods -n kube-system -o wide --field-selector spec.nodeName=w1"
        );
        assert!(
            Ailment::Ill
                .sentence("w1", 1)
                .contains("says on port 1 that it does not work (503)")
        );
    }
}

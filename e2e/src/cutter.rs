//! A proxy in front of the API server that counts what a client sends and cuts it off at a chosen point.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// On which side of the API server the client is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What it was sending did not arrive.
    Before,
    /// What it was sending arrived; the answer did not.
    After,
}

/// A running proxy. It takes TLS apart into records without reading them: a request is one or two.
#[derive(Debug, Clone)]
pub struct Cutter {
    address: SocketAddr,
    plan: Arc<Mutex<Plan>>,
    is_cut: watch::Sender<bool>,
}

#[derive(Debug)]
struct Plan {
    sent: usize,
    cut: Option<(usize, Side)>,
}

/// What becomes of a record.
enum Verdict {
    Forward,
    ForwardAndCut,
    Cut,
}

impl Cutter {
    /// Serves `listener`, which may be of any network namespace, in front of `server`.
    pub fn start(listener: std::net::TcpListener, server: SocketAddr) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let cutter = Self {
            address: listener.local_addr()?,
            plan: Arc::new(Mutex::new(Plan { sent: 0, cut: None })),
            is_cut: watch::Sender::new(false),
        };
        let serving = cutter.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let serving = serving.clone();
                tokio::spawn(async move { serving.serve(client, server).await });
            }
        });
        Ok(cutter)
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets everything through again, up to the record `cut` counted from now.
    pub fn arm(&self, cut: Option<(usize, Side)>) {
        *self.plan() = Plan { sent: 0, cut };
        self.is_cut.send_replace(false);
    }

    /// Waits until the client has been cut off.
    pub async fn cut(&self) {
        let _ = self.is_cut.subscribe().wait_for(|is_cut| *is_cut).await;
    }

    /// How many records the client has sent since [`Cutter::arm`].
    pub fn sent(&self) -> usize {
        self.plan().sent
    }

    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) -> Verdict {
        let mut plan = self.plan();
        plan.sent += 1;
        match plan.cut {
            Some((at, Side::Before)) if plan.sent >= at => Verdict::Cut,
            Some((at, Side::After)) if plan.sent == at => Verdict::ForwardAndCut,
            Some((at, Side::After)) if plan.sent > at => Verdict::Cut,
            _ => Verdict::Forward,
        }
    }

    async fn serve(&self, client: TcpStream, server: SocketAddr) {
        if *self.is_cut.borrow() {
            return;
        }
        let Ok(server) = TcpStream::connect(server).await else {
            return;
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let forward = async {
            loop {
                let mut record = vec![0; 5];
                from_client.read_exact(&mut record).await?;
                let [kind, _, _, high, low] = record[..] else { break };
                let length = usize::from(u16::from_be_bytes([high, low]));
                record.resize(5 + length, 0);
                from_client.read_exact(&mut record[5..]).await?;
                // 23: application data.
                let verdict = if kind == 23 { self.count() } else { Verdict::Forward };
                if !matches!(verdict, Verdict::Cut) {
                    to_server.write_all(&record).await?;
                }
                if !matches!(verdict, Verdict::Forward) {
                    self.is_cut.send_replace(true);
                    break;
                }
            }
            std::io::Result::Ok(())
        };
        let mut is_cut = self.is_cut.subscribe();
        tokio::select! {
            _ = forward => {}
            _ = copy(&mut from_server, &mut to_client) => {}
            _ = is_cut.wait_for(|is_cut| *is_cut) => {}
        }
    }
}

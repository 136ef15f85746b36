//! Requests to providers, counted.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    socket: String,
    method: &'static str,
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    socket: String,
    method: &'static str,
}

/// Requests to providers behind a socket.
#[derive(Clone, Debug)]
pub struct Calls {
    count: Family<Call, Counter>,
    seconds: Family<Method, Histogram, fn() -> Histogram>,
}

impl Default for Calls {
    fn default() -> Self {
        Self {
            count: Family::default(),
            // From a millisecond to as long as is waited.
            seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 14))),
        }
    }
}

impl Calls {
    /// A request was answered, or was not. `code` is gRPC's word for how it ended.
    pub fn done(&self, socket: &str, method: &'static str, code: String, took: Duration) {
        let labels = Call {
            socket: socket.to_owned(),
            method,
            code,
        };
        self.count.get_or_create(&labels).inc();
        let labels = Method {
            socket: socket.to_owned(),
            method,
        };
        self.seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Shows them to Prometheus.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "sidecar_rpc",
            "Requests to programs that give out addresses, by how they ended",
            self.count.clone(),
        );
        registry.register(
            "sidecar_rpc_duration_seconds",
            "How long these took",
            self.seconds.clone(),
        );
    }
}

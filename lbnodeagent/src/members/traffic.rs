//! What gossip costs, and what it could not read: counted where memberlist tells it.
//!
//! memberlist counts bytes by way of the crate `metrics`, and says what it cannot read in its log, one event each. The
//! log is not for anybody's disk: whoever reaches the port could fill it. So the events are counted, and the first is told
//! from here.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use metrics::{CounterFn, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Where memberlist says what it could not read.
const READING: &str = "memberlist_core::network";

/// By direction and protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Way {
    direction: &'static str,
    over: &'static str,
}

/// memberlist's names, and ours.
const WAYS: [(&str, Way); 3] = [
    (
        "memberlist.packet.sent",
        Way {
            direction: "sent",
            over: "udp",
        },
    ),
    (
        "memberlist.packet.received",
        Way {
            direction: "received",
            over: "udp",
        },
    ),
    (
        "memberlist.stream.sent",
        Way {
            direction: "sent",
            over: "tcp",
        },
    ),
];

/// Counts of one process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    bytes: Family<Way, Counter>,
    refused: Counter,
    /// Streams that were not let in.
    pub streams_refused: Counter,
    first_refused: Arc<Notify>,
}

impl Traffic {
    /// Has memberlist count here, once per process.
    pub fn record(&self) {
        // Another recorder of the same process has been there first: a test's.
        let _ = metrics::set_global_recorder(self.clone());
    }

    /// A part of the log that counts what memberlist could not read.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
        Refused(self.clone()).with_filter(Targets::new().with_target(READING, LevelFilter::WARN))
    }

    /// How many bytes of packets came from others. Each member hears some every second.
    pub fn received(&self) -> u64 {
        let received = WAYS.iter().filter(|(_, way)| way.direction == "received");
        received.map(|(_, way)| self.bytes.get_or_create(way).get()).sum()
    }

    /// Resolves when the first packet or stream could not be read.
    pub async fn refused(&self) {
        self.first_refused.notified().await;
    }

    /// Registers the counters.
    pub fn register(&self, registry: &mut Registry) {
        for (_, way) in &WAYS {
            drop(self.bytes.get_or_create(way));
        }
        registry.register("bytes", "Gossip sent and received, in bytes", self.bytes.clone());
        registry.register(
            "refused",
            "Packets and streams on the gossip's port that are of another key or nobody's",
            self.refused.clone(),
        );
        registry.register(
            "streams_refused",
            "Streams from addresses of no Node, or more than may be open at once",
            self.streams_refused.clone(),
        );
    }
}

struct Refused(Traffic);

impl<S: Subscriber> Layer<S> for Refused {
    fn on_event(&self, _: &tracing::Event<'_>, _: Context<'_, S>) {
        if self.0.refused.inc() == 0 {
            self.0.first_refused.notify_one();
        }
    }
}

/// A counter of ours, fed by memberlist.
struct Fed(Counter<u64, AtomicU64>);

impl CounterFn for Fed {
    fn increment(&self, value: u64) {
        self.0.inc_by(value);
    }

    fn absolute(&self, _: u64) {}
}

impl Recorder for Traffic {
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> metrics::Counter {
        match WAYS.iter().find(|(name, _)| *name == key.name()) {
            Some((_, way)) => metrics::Counter::from_arc(Arc::new(Fed(self.bytes.get_or_create(way).clone()))),
            None => metrics::Counter::noop(),
        }
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }

    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
}

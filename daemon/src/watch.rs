//! A kind of object, mirrored: watch events in, what changed out.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::marker::PhantomData;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use smol_str::SmolStr;
use tokio::sync::{Semaphore, mpsc};

/// Objects in a page of a listing. An object may have 1.5 MiB, a page is in memory twice while it is read, and who
/// writes objects decides how large they are: with this many a page stays below 50 MiB.
const PAGE: u32 = 16;

/// One listing at a time: the pages of several would be in memory together.
static LISTING: Semaphore = Semaphore::const_new(1);

/// Which objects of a kind are watched; all by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection {
    /// A field selector, as the API server knows them.
    pub fields: Option<&'static str>,
    /// A label selector.
    pub labels: Option<&'static str>,
}

impl Selection {
    /// Services of type LoadBalancer (the API server selects by type from Kubernetes 1.31 on). Quotas limit these;
    /// Services of other types anybody has.
    pub const LOAD_BALANCERS: Self = Self {
        fields: Some("spec.type=LoadBalancer"),
        labels: None,
    };

    fn config(self) -> watcher::Config {
        watcher::Config {
            field_selector: self.fields.map(ToOwned::to_owned),
            label_selector: self.labels.map(ToOwned::to_owned),
            page_size: Some(PAGE),
            ..watcher::Config::default()
        }
    }
}

/// Watches a kind and sends its events, wrapped, for as long as someone listens. It recovers by itself;
/// the parts of objects that nothing here reads are dropped. An object that is selected no longer is deleted to it.
pub fn watch<K, Input>(
    api: Api<K>,
    selection: Selection,
    inputs: &mpsc::UnboundedSender<Input>,
    wrap: fn(watcher::Event<K>) -> Input,
) where
    K: Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
    Input: Send + 'static,
{
    let events = watcher(api, selection.config())
        .modify(|object| object.managed_fields_mut().clear())
        .default_backoff();
    tokio::spawn(forward(events, &LISTING, inputs.clone(), wrap));
}

async fn forward<K, Input>(
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>>,
    listing: &Semaphore,
    inputs: mpsc::UnboundedSender<Input>,
    wrap: fn(watcher::Event<K>) -> Input,
) {
    let mut events = std::pin::pin!(events);
    let mut is_interrupted = false;
    let mut turn = None;
    while let Some(event) = events.next().await {
        // The first page is asked for when the stream is looked at again after `Init`. A listing that fails begins
        // anew.
        match event {
            Ok(watcher::Event::Init) => turn = listing.acquire().await.ok(),
            Ok(watcher::Event::InitApply(_)) => {}
            Ok(_) | Err(_) => drop(turn.take()),
        }
        match event {
            Ok(event) => {
                is_interrupted = false;
                if inputs.send(wrap(event)).is_err() {
                    return;
                }
            }
            // One line per interruption, however long it lasts.
            Err(error) if is_interrupted => tracing::debug!(%error, "watch still interrupted"),
            Err(error) => {
                is_interrupted = true;
                tracing::warn!(%error, "watch interrupted, will go on");
            }
        }
    }
}

/// Namespace and name of an object; the namespace is empty for kinds without.
pub type Key = (SmolStr, SmolStr);

/// What is kept of an object of kind `K`: the object itself, or what takes less room. Cloning it is cheap.
pub trait Keep<K>: From<K> + Clone {
    /// The object's [`version`].
    fn version(&self) -> u64;

    /// The object's [`identity`], where it is kept: else all objects of a name are one.
    fn identity(&self) -> Option<u64> {
        None
    }
}

impl<K: Resource> Keep<K> for Arc<K> {
    fn version(&self) -> u64 {
        version(self.as_ref())
    }

    fn identity(&self) -> Option<u64> {
        Some(identity(self.as_ref()))
    }
}

/// What a watch event changed.
#[derive(Debug)]
pub enum Change<Kept> {
    /// An object is new or different.
    Set(Key, Kept),
    /// An object is gone.
    Gone(Key, Kept),
    /// The first listing is complete.
    Ready,
}

/// All objects of a kind, as far as the watch has told.
#[derive(Debug)]
pub struct Mirror<K, Kept = Arc<K>> {
    objects: BTreeMap<Key, Kept>,
    /// Keys seen by a listing under way: what it does not see is gone.
    listed: Option<BTreeSet<Key>>,
    is_ready: bool,
    kind: PhantomData<fn(K)>,
}

impl<K, Kept> Default for Mirror<K, Kept> {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            listed: None,
            is_ready: false,
            kind: PhantomData,
        }
    }
}

impl<K: Resource<DynamicType = ()>, Kept: Keep<K>> Mirror<K, Kept> {
    /// Whether the first listing is complete.
    pub const fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// An object by key.
    pub fn get(&self, key: &Key) -> Option<&Kept> {
        self.objects.get(key)
    }

    /// All objects, by key.
    pub const fn objects(&self) -> &BTreeMap<Key, Kept> {
        &self.objects
    }

    /// Applies a watch event and returns what it changed.
    pub fn apply(&mut self, event: watcher::Event<K>) -> Vec<Change<Kept>> {
        match event {
            watcher::Event::Init => {
                self.listed = Some(BTreeSet::new());
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(key_of(&object));
                }
                self.put(object)
            }
            watcher::Event::InitDone => {
                let listed = self.listed.take().unwrap_or_default();
                let gone: Vec<Key> = self
                    .objects
                    .keys()
                    .filter(|key| !listed.contains(*key))
                    .cloned()
                    .collect();
                let mut changes: Vec<Change<Kept>> = gone.into_iter().filter_map(|key| self.remove(key)).collect();
                if !self.is_ready {
                    self.is_ready = true;
                    changes.push(Change::Ready);
                }
                changes
            }
            watcher::Event::Apply(object) => self.put(object),
            watcher::Event::Delete(object) => self.remove(key_of(&object)).into_iter().collect(),
        }
    }

    /// Stores what a watch says. An object of the same name may have gone and come anew while the watch was interrupted.
    fn put(&mut self, object: K) -> Vec<Change<Kept>> {
        let key = key_of(&object);
        let is_another = |known: &Kept| known.identity().is_some_and(|known| known != identity(&object));
        let gone = if self.objects.get(&key).is_some_and(is_another) {
            self.remove(key)
        } else {
            None
        };
        gone.into_iter().chain(self.set(object)).collect()
    }

    /// Stores an object, unless a newer version of it is known: a watch may still deliver what was true
    /// before our own write of the same object.
    pub fn set(&mut self, object: K) -> Option<Change<Kept>> {
        let key = key_of(&object);
        if self
            .objects
            .get(&key)
            .is_some_and(|known| known.version() > version(&object))
        {
            return None;
        }
        let kept = Kept::from(object);
        self.objects.insert(key.clone(), kept.clone());
        Some(Change::Set(key, kept))
    }

    fn remove(&mut self, key: Key) -> Option<Change<Kept>> {
        self.objects.remove(&key).map(|object| Change::Gone(key, object))
    }
}

fn key_of<K: Resource>(object: &K) -> Key {
    let namespace = object.namespace().unwrap_or_default();
    (namespace.into(), object.name_any().into())
}

/// The resourceVersion as a number: those of one kind are comparable (KEP-5504), whether of one object or of several; 0
/// where it is none.
pub fn version<K: Resource>(object: &K) -> u64 {
    object
        .meta()
        .resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or(0)
}

/// Tells an object from another one of the same name: a digest of its uid.
pub fn identity<K: Resource>(object: &K) -> u64 {
    let mut digest = DefaultHasher::new();
    object.meta().uid.hash(&mut digest);
    digest.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};

    fn object(name: &str, version: u64) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("ns".into());
        object.metadata.name = Some(name.into());
        object.metadata.uid = Some(name.into());
        object.metadata.resource_version = Some(version.to_string());
        object
    }

    fn told(changes: Vec<Change<Arc<ConfigMap>>>) -> Vec<String> {
        changes
            .into_iter()
            .map(|change| match change {
                Change::Set(key, _) => format!("set {}", key.1),
                Change::Gone(key, _) => format!("gone {}", key.1),
                Change::Ready => "ready".into(),
            })
            .collect()
    }

    #[test]
    fn what_a_second_listing_does_not_see_is_gone() {
        let mut mirror = Mirror::<ConfigMap>::default();
        let mut apply = |event| told(mirror.apply(event));
        apply(Init);
        assert_eq!(apply(InitApply(object("a", 1))), ["set a"]);
        assert_eq!(apply(InitApply(object("b", 2))), ["set b"]);
        assert_eq!(apply(InitDone), ["ready"]);
        assert_eq!(apply(Apply(object("c", 3))), ["set c"]);
        apply(Init);
        apply(InitApply(object("b", 2)));
        assert_eq!(apply(InitDone), ["gone a", "gone c"]);
    }

    #[test]
    fn an_object_that_came_anew_under_its_name_is_another() {
        let mut mirror = Mirror::<ConfigMap>::default();
        let mut apply = |event| told(mirror.apply(event));
        apply(Apply(object("a", 1)));
        let mut other = object("a", 5);
        other.metadata.uid = Some("other".into());
        assert_eq!(apply(Apply(other.clone())), ["gone a", "set a"]);
        assert_eq!(apply(Apply(other)), ["set a"]);
    }

    #[tokio::test]
    async fn one_kind_is_listed_after_the_other_and_one_whose_listing_fails_lets_the_other_go_first() {
        let listing: &'static Semaphore = Box::leak(Box::new(Semaphore::new(1)));
        let (sender, mut seen) = mpsc::unbounded_channel();
        let kind = |name: &'static str, wrap: fn(watcher::Event<ConfigMap>) -> (&'static str, bool)| {
            let (events, source) = mpsc::unbounded_channel();
            let source = futures::stream::unfold(source, async |mut source| Some((source.recv().await?, source)));
            tokio::spawn(forward(source, listing, sender.clone(), wrap));
            move |event| events.send(event).unwrap_or_else(|_| panic!("{name} has ended"))
        };
        let first = kind("first", |event| ("first", matches!(event, Init)));
        let second = kind("second", |event| ("second", matches!(event, Init)));
        first(Ok(Init));
        assert_eq!(seen.recv().await, Some(("first", true)));
        second(Ok(Init));
        first(Ok(InitApply(object("a", 1))));
        assert_eq!(seen.recv().await, Some(("first", false)));
        tokio::task::yield_now().await;
        assert!(seen.try_recv().is_err(), "the second waits");
        first(Err(watcher::Error::NoResourceVersion));
        first(Ok(Init));
        assert_eq!(seen.recv().await, Some(("second", true)));
        second(Ok(InitDone));
        assert_eq!(seen.recv().await, Some(("second", false)));
        assert_eq!(seen.recv().await, Some(("first", true)));
        second(Ok(Apply(object("b", 2))));
        assert_eq!(seen.recv().await, Some(("second", false)), "what is listed goes on");
    }

    #[test]
    fn an_older_version_does_not_overwrite_a_newer_one() {
        let mut mirror = Mirror::<ConfigMap>::default();
        mirror.set(object("a", 5));
        assert!(mirror.set(object("a", 4)).is_none());
        assert_eq!(told(mirror.apply(Delete(object("a", 6)))), ["gone a"]);
        assert!(
            mirror.set(object("a", 4)).is_some(),
            "another object of the name may come later"
        );
    }
}

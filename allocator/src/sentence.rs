//! Parts of sentences for people, of bounded length: an event has room for 1 KiB, and whoever writes objects decides how many there
//! are and what they say.

use std::fmt;

use crds::ServiceKey;
use crds::event::cut;
use crds::lbnode::MOST_TEXT;

/// At most this many names are listed.
pub const LISTED: usize = 8;

/// Some of a list, with a dot or three where there are more than [`LISTED`].
pub(crate) fn list<T: ToString>(items: &[T], separator: &str) -> String {
    let more = items.len() > LISTED;
    let names = items.iter().take(LISTED).map(ToString::to_string);
    let names: Vec<String> = names.chain(more.then(|| "…".to_owned())).collect();
    names.join(separator)
}

/// What a node says for people: of bounded length, on one line.
pub(crate) fn sentence(text: &str) -> String {
    sentence_of(text, MOST_TEXT)
}

/// The same, of at most so many bytes.
pub(crate) fn sentence_of(text: &str, most: usize) -> String {
    cut(&text.replace(|letter: char| letter.is_control(), " "), most)
}

/// Other Services, as the author of one is told of them: those of its own namespace by name, all others by their number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Others {
    named: Box<[ServiceKey]>,
    elsewhere: usize,
    has_more: bool,
}

impl Others {
    /// Those that the author of `service` is told of. Of many it is the first [`LISTED`].
    pub fn seen_by<'a>(service: &ServiceKey, all: impl IntoIterator<Item = &'a ServiceKey>) -> Self {
        let mut all = all.into_iter();
        let first: Vec<&ServiceKey> = all.by_ref().take(LISTED).collect();
        let is_own = |other: &&&ServiceKey| other.namespace == service.namespace;
        let named: Box<[ServiceKey]> = first.iter().filter(is_own).copied().cloned().collect();
        Self {
            elsewhere: first.len() - named.len(),
            named,
            has_more: all.next().is_some(),
        }
    }

    /// Those that are named.
    pub fn named(&self) -> &[ServiceKey] {
        &self.named
    }

    pub(crate) fn joined(&self, separator: &str) -> String {
        let elsewhere = match self.elsewhere {
            0 => None,
            1 => Some("a Service of another namespace".to_owned()),
            count => Some(format!("{count} Services of other namespaces")),
        };
        let mut parts: Vec<String> = self.named.iter().map(ToString::to_string).collect();
        if self.has_more {
            parts.extend(elsewhere);
            parts.push("…".to_owned());
            return parts.join(separator);
        }
        let named = (!parts.is_empty()).then(|| parts.join(separator));
        let parts: Vec<String> = named.into_iter().chain(elsewhere).collect();
        parts.join(" and ")
    }
}

impl fmt::Display for Others {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.joined(", "))
    }
}

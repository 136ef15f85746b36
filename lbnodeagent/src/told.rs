//! What was said of an object, so that it is said once, and again when it comes back.

use std::collections::HashMap;

use crds::event::{Notice, Reason};

/// What was last said, by what it is about and the reason.
#[derive(Debug, Default)]
pub struct Told(HashMap<(String, Reason), Said>);

#[derive(Debug, PartialEq)]
struct Said {
    /// Of the object. One that is made anew under the same name was told nothing.
    uid: Option<String>,
    notice: Notice,
}

impl Told {
    /// Whether a notice is news about an object with this uid; it is none from now on.
    pub fn is_news(&mut self, about: &str, uid: Option<&str>, notice: &Notice) -> bool {
        let slot = (about.to_owned(), notice.reason);
        let said = Said {
            uid: uid.map(ToOwned::to_owned),
            notice: notice.clone(),
        };
        if self.0.get(&slot) == Some(&said) {
            return false;
        }
        self.0.insert(slot, said);
        true
    }

    /// Forgets what is not so any more, and returns what each was about.
    pub fn retain(&mut self, is_so: impl Fn(&str, Reason) -> bool) -> Vec<String> {
        let over = self.0.extract_if(|(about, reason), _| !is_so(about, *reason));
        over.map(|((about, _), _)| about).collect()
    }

    /// Whether nothing was said, as nearly always.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(message: &str) -> Notice {
        Notice::warning(Reason::AddressConflict, message.to_owned())
    }

    #[test]
    fn the_same_is_said_once_of_one_object_and_again_of_one_that_is_made_anew() {
        let mut told = Told::default();
        let mut is_news = |about, uid, message| told.is_news(about, Some(uid), &notice(message));
        assert!(is_news("default/web 10.0.0.1", "1", "taken"));
        assert!(!is_news("default/web 10.0.0.1", "1", "taken"));
        assert!(is_news("default/web 10.0.0.1", "1", "taken by another"));
        assert!(is_news("default/web 10.0.0.2", "1", "taken"));
        assert!(is_news("default/web 10.0.0.2", "2", "taken"));
        assert!(!is_news("default/web 10.0.0.2", "2", "taken"));
    }

    #[test]
    fn what_was_over_is_said_again_when_it_comes_back() {
        let mut told = Told::default();
        assert!(told.is_news("default/web 10.0.0.1", None, &notice("taken")));
        assert!(told.retain(|_, _| true).is_empty());
        assert_eq!(
            told.retain(|_, reason| reason != Reason::AddressConflict),
            ["default/web 10.0.0.1"]
        );
        assert!(told.is_empty());
        assert!(told.is_news("default/web 10.0.0.1", None, &notice("taken")));
    }
}

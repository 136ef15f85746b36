//! Who may read metrics: the API server says whose a bearer token is, and whether that user may get `/metrics`.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

/// How long a yes holds, as with other controllers.
const TRUSTED: Duration = Duration::from_mins(1);
/// Tokens whose yes is remembered.
const MOST_TRUSTED: usize = 32;
/// Wait after a no, with which strangers who guess cannot keep the API server busy.
const GUESSING: Duration = Duration::from_millis(100);

/// What the API server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// This user may.
    Yes,
    /// This user may not.
    No,
    /// No token, or nobody's.
    Who,
    /// Nothing.
    Later,
}

/// Asks the API server, about one token at a time.
pub(crate) struct Reviewer {
    client: Client,
    turn: Semaphore,
    trusted: Mutex<HashMap<String, Instant>>,
}

impl Reviewer {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            client,
            turn: Semaphore::new(1),
            trusted: Mutex::default(),
        }
    }

    /// Whether whoever sent these headers may get `/metrics`.
    pub(crate) async fn ask(&self, headers: &HeaderMap) -> Answer {
        let Some(token) = bearer(headers) else {
            return Answer::Who;
        };
        if self.is_trusted(token) {
            return Answer::Yes;
        }
        let Ok(_turn) = self.turn.acquire().await else {
            return Answer::Later;
        };
        // Somebody before may have asked about the same.
        if self.is_trusted(token) {
            return Answer::Yes;
        }
        let answer = self.review(token).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "the API server was asked who may read metrics and did not say");
            Answer::Later
        });
        if answer == Answer::Yes {
            self.trust(token);
        } else {
            sleep(GUESSING).await;
        }
        answer
    }

    fn is_trusted(&self, token: &str) -> bool {
        let trusted = self.trusted.lock().unwrap_or_else(PoisonError::into_inner);
        trusted.get(token).is_some_and(|since| since.elapsed() < TRUSTED)
    }

    fn trust(&self, token: &str) {
        let mut trusted = self.trusted.lock().unwrap_or_else(PoisonError::into_inner);
        trusted.retain(|_, since| since.elapsed() < TRUSTED);
        if trusted.len() < MOST_TRUSTED {
            trusted.insert(token.to_owned(), Instant::now());
        }
    }

    async fn review(&self, token: &str) -> kube::Result<Answer> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                ..TokenReviewSpec::default()
            },
            ..TokenReview::default()
        };
        let review = Api::all(self.client.clone())
            .create(&PostParams::default(), &review)
            .await?;
        let status = review.status.unwrap_or_default();
        let Some(user) = status.user.filter(|_| status.authenticated == Some(true)) else {
            return Ok(Answer::Who);
        };
        let review = SubjectAccessReview {
            spec: may_get_metrics(user),
            ..SubjectAccessReview::default()
        };
        let review = Api::all(self.client.clone())
            .create(&PostParams::default(), &review)
            .await?;
        let is_allowed = review.status.is_some_and(|status| status.allowed);
        Ok(if is_allowed { Answer::Yes } else { Answer::No })
    }
}

fn may_get_metrics(user: UserInfo) -> SubjectAccessReviewSpec {
    SubjectAccessReviewSpec {
        user: user.username,
        uid: user.uid,
        groups: user.groups,
        extra: user.extra,
        non_resource_attributes: Some(NonResourceAttributes {
            path: Some("/metrics".into()),
            verb: Some("get".into()),
        }),
        resource_attributes: None,
    }
}

/// The token of `Authorization: Bearer …` (RFC 6750 section 2.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    #[test]
    fn a_bearer_token_is_read_and_nothing_else() {
        for (header, expected) in [
            (Some("Bearer abc"), Some("abc")),
            (Some("bearer  abc "), Some("abc")),
            (Some("Basic abc"), None),
            (Some("Bearer "), None),
            (Some("Bearer"), None),
            (None, None),
        ] {
            let headers = header.map(|text| (AUTHORIZATION, HeaderValue::from_static(text)));
            let headers: HeaderMap = headers.into_iter().collect();
            assert_eq!(bearer(&headers), expected, "{header:?}");
        }
    }
}

//! One request that writes, and what became of it.

use std::time::Duration;

use kube::Client;
use kube::client::Body;
use kube::core::Status;
use serde::de::DeserializeOwned;

/// How long a write may take. The API server ends requests of its own accord after a minute.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why a write failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The API server was not reached, or did not answer.
    #[error("the API server does not answer: {0}")]
    Away(String),
    /// It refused.
    #[error("the API server refuses with {code}: {message}")]
    Refused {
        /// The HTTP status (RFC 9110).
        code: u16,
        /// Why, in its words.
        message: String,
        /// How long it asks to be left alone.
        retry_after: Option<Duration>,
    },
}

impl WriteError {
    /// The HTTP status with which it was refused.
    pub const fn code(&self) -> Option<u16> {
        match self {
            Self::Away(_) => None,
            Self::Refused { code, .. } => Some(*code),
        }
    }

    /// Whether the same request may succeed later without anybody having changed something: the server is away, has too much
    /// to do, or is in trouble itself.
    pub const fn is_passing(&self) -> bool {
        matches!(self.code(), None | Some(408 | 429 | 500..))
    }

    /// How long the server asks to be left alone.
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Away(_) => None,
            Self::Refused { retry_after, .. } => *retry_after,
        }
    }
}

/// Sends a request, once, and reads the object that comes back. The client must not try again by itself: see
/// [`crate::Common::bare_client_and_server`].
///
/// # Errors
/// What became of it instead.
pub async fn send<T: DeserializeOwned>(
    client: &Client,
    request: Result<::http::Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<T, WriteError> {
    let away = |error: &dyn std::fmt::Display| WriteError::Away(error.to_string());
    let request = request.map_err(|error| away(&error))?.map(Body::from);
    let answer = async {
        let response = client.send(request).await.map_err(|error| away(&error))?;
        let code = response.status().as_u16();
        let retry_after = response.headers().get("retry-after");
        let retry_after = retry_after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let body = response
            .into_body()
            .collect_bytes()
            .await
            .map_err(|error| away(&error))?;
        if (200..300).contains(&code) {
            return serde_json::from_slice(&body).map_err(|error| away(&error));
        }
        // Not all refusals come from the API server's own code.
        let status = serde_json::from_slice::<Status>(&body).ok();
        let said = status.as_ref().and_then(|status| status.details.as_ref());
        let said = said
            .map(|details| u64::from(details.retry_after_seconds))
            .filter(|seconds| *seconds > 0);
        Err(WriteError::Refused {
            code,
            message: status.map_or_else(
                || String::from_utf8_lossy(&body).trim().to_owned(),
                |status| status.message,
            ),
            retry_after: retry_after.or(said).map(Duration::from_secs),
        })
    };
    let answer = tokio::time::timeout(TIMEOUT, answer).await;
    answer.unwrap_or_else(|_| {
        Err(WriteError::Away(format!(
            "no answer within {} seconds",
            TIMEOUT.as_secs()
        )))
    })
}

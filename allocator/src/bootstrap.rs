//! What an installation needs besides its manifest, made once.
//!
//! `kubectl apply` cannot create an object of a kind whose CRD is in the same file, and a manifest cannot
//! hold a random key. So the allocator makes both where they are missing, and one apply is enough.

use std::collections::BTreeMap;

use crds::LBNodeAgent;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, ListParams, ObjectMeta, PostParams};
use serde_json::json;

/// Name of the Secret with the gossip key, under [`KEY`].
pub const SECRET: &str = "purelb-memberlist";
/// Where in the Secret the key is: 32 characters, so that it can be an environment variable.
pub const KEY: &str = "secretkey";

/// Creates the Secret with the gossip key where it is missing. Reading Secrets is no right of ours: that it exists is known from the refusal.
///
/// # Errors
/// What the API server answered, other than that it is there already.
pub async fn gossip_key(client: &Client, namespace: &str) -> anyhow::Result<()> {
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.into()),
            ..ObjectMeta::default()
        },
        string_data: Some(BTreeMap::from([(KEY.to_owned(), random_key()?)])),
        ..Secret::default()
    };
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    match api.create(&PostParams::default(), &secret).await {
        Ok(_) => tracing::info!(namespace, secret = SECRET, "gossip key generated"),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// 32 letters and digits from the kernel's random numbers: 190 bits.
fn random_key() -> anyhow::Result<String> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut key = String::new();
    while key.len() < 32 {
        let mut byte = [0];
        getrandom::fill(&mut byte)?;
        // Bytes beyond the last whole multiple of the alphabet would favour its beginning.
        let [byte] = byte;
        if usize::from(byte) < 256 / LETTERS.len() * LETTERS.len()
            && let Some(letter) = LETTERS.get(usize::from(byte) % LETTERS.len())
        {
            key.push(char::from(*letter));
        }
    }
    Ok(key)
}

/// Creates the LBNodeAgent `default` where the namespace has none.
///
/// # Errors
/// What the API server answered.
pub async fn default_agent(client: &Client, namespace: &str) -> anyhow::Result<()> {
    let api: Api<LBNodeAgent> = Api::namespaced(client.clone(), namespace);
    if !api.list(&ListParams::default().limit(1)).await?.items.is_empty() {
        return Ok(());
    }
    // As v1, so that it reads as users of v1 know it: localint and extlbint with their defaults.
    let v1 = kube::core::ApiResource {
        version: "v1".into(),
        api_version: format!("{}/v1", crds::API_GROUP),
        ..kube::core::ApiResource::erase::<LBNodeAgent>(&())
    };
    let api: Api<kube::core::DynamicObject> = Api::namespaced_with(client.clone(), namespace, &v1);
    let agent =
        kube::core::DynamicObject::new("default", &v1).data(json!({"spec": {"local": {"localint": "default"}}}));
    match api.create(&PostParams::default(), &agent).await {
        Ok(_) => tracing::info!(namespace, lbnodeagent = "default", "default LBNodeAgent created"),
        Err(kube::Error::Api(status)) if status.is_already_exists() => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

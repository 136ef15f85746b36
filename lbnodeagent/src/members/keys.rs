//! The gossip keys: parsed once, never shown.

use std::fmt;

use memberlist::proto::{SecretKey, SecretKeys};

/// A key of a length AES does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the gossip key ML_GROUP must have 16, 24 or 32 bytes (AES-128, -192 or -256), this one has {0}")]
pub struct KeyError(
    /// Its length in bytes.
    pub usize,
);

/// The key this node encrypts with, and those it accepts besides while keys are changed.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    pub(super) primary: SecretKey,
    pub(super) secondary: SecretKeys,
}

impl Keys {
    /// Keys from their raw bytes. To change the key of a running cluster give the new one as secondary to all nodes,
    /// then as primary with the old one as secondary, then alone.
    pub fn new<'a>(primary: &[u8], secondary: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, KeyError> {
        let parse = |bytes: &[u8]| SecretKey::try_from(bytes).map_err(|_| KeyError(bytes.len()));
        let mut keys = Self {
            primary: parse(primary)?,
            secondary: SecretKeys::new(),
        };
        for bytes in secondary {
            keys.secondary.push(parse(bytes)?);
        }
        Ok(keys)
    }

    /// The raw bytes, the primary key first: to derive keys for other purposes from.
    pub(crate) fn bytes(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.primary).chain(&self.secondary).map(AsRef::as_ref)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys(1 primary, {} secondary)", self.secondary.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_16_24_or_32_bytes_and_an_error_names_the_setting() {
        for length in 0..40 {
            let key = vec![7; length];
            let result = Keys::new(&key, []);
            if matches!(length, 16 | 24 | 32) {
                result.unwrap();
                continue;
            }
            let error = result.unwrap_err();
            assert_eq!(error, KeyError(length));
            assert!(error.to_string().contains("ML_GROUP"));
            assert!(
                Keys::new(&[7; 16], [key.as_slice()]).is_err(),
                "secondary keys are checked too"
            );
        }
    }

    #[test]
    fn keys_are_not_shown() {
        let keys = Keys::new(b"8sb7ikA5qHwQQqxc", [[9_u8; 32].as_slice()]).unwrap();
        assert_eq!(format!("{keys:?}"), "Keys(1 primary, 1 secondary)");
    }
}

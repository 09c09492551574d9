//! Signatures after Standard Webhooks, "Signature scheme": symmetric, `v1`.

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose},
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// What a secret begins with.
const PREFIX: &str = "whsec_";

/// How long a key may be, in bytes ("Signature scheme").
const LENGTH: std::ops::RangeInclusive<usize> = 24..=64;

/// Some write secrets without the `=` at their end.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why a text is no signing secret. None of them repeats it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// There is nothing in it.
    #[error("is empty; write a secret as whsec_ and the base64 of 24 to 64 random bytes")]
    Empty,
    /// It begins otherwise.
    #[error(
        "secret {number} does not begin with whsec_; write it as whsec_ and the base64 of 24 to \
         64 random bytes"
    )]
    Prefix {
        /// Which of them, from 1.
        number: usize,
    },
    /// It is the private key of an asymmetric signature.
    #[error(
        "secret {number} is the key of an asymmetric signature (whsk_), which is not in this \
         version; use a symmetric one, whsec_…"
    )]
    Asymmetric {
        /// Which of them, from 1.
        number: usize,
    },
    /// What follows the prefix is no base64.
    #[error("secret {number} is not base64 behind whsec_; copy it again")]
    Encoding {
        /// Which of them, from 1.
        number: usize,
    },
    /// It is too short to be safe, or longer than receivers take.
    #[error(
        "secret {number} is {length} bytes long; Standard Webhooks wants 24 to 64 random bytes"
    )]
    Length {
        /// Which of them, from 1.
        number: usize,
        /// How long it is, decoded.
        length: usize,
    },
}

/// Finds what is wrong with the text of a signing secret: one `whsec_…`, or several separated
/// by blanks or line breaks, while they are being changed.
///
/// # Errors
/// See [`SecretError`].
pub fn check_secret(text: &str) -> Result<(), SecretError> {
    Keys::parse(text).map(|_| ())
}

/// The keys that sign, at least one.
#[derive(Clone)]
pub(super) struct Keys(Vec<Hmac<Sha256>>);

impl Keys {
    pub(super) fn parse(text: &str) -> Result<Self, SecretError> {
        let mut keys = Vec::new();
        for (number, secret) in (1..).zip(text.split_whitespace()) {
            let encoded = secret.strip_prefix(PREFIX).ok_or(if secret.starts_with("whsk_") {
                SecretError::Asymmetric { number }
            } else {
                SecretError::Prefix { number }
            })?;
            let key = BASE64.decode(encoded).map_err(|_| SecretError::Encoding { number })?;
            let length = SecretError::Length { number, length: key.len() };
            if !LENGTH.contains(&key.len()) {
                return Err(length);
            }
            // Of any length it takes; said all the same, rather than believed.
            keys.push(Hmac::new_from_slice(&key).map_err(|_| length)?);
        }
        if keys.is_empty() {
            return Err(SecretError::Empty);
        }
        Ok(Self(keys))
    }

    /// The value of `webhook-signature`: a signature of each key.
    pub(super) fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        let mut signatures = String::new();
        for key in &self.0 {
            let mut mac = key.clone();
            mac.update(format!("{id}.{timestamp}.").as_bytes());
            mac.update(body);
            if !signatures.is_empty() {
                signatures.push(' ');
            }
            signatures.push_str("v1,");
            general_purpose::STANDARD.encode_string(mac.finalize().into_bytes(), &mut signatures);
        }
        signatures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;

    #[test]
    fn the_example_of_the_specification() {
        let keys = Keys::parse(SECRET).unwrap();
        let signature = keys.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, BODY);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn each_of_several_secrets_signs() {
        let other = format!("whsec_{}", general_purpose::STANDARD.encode([7; 64]));
        let one = Keys::parse(SECRET).unwrap().sign("a", 1, BODY);
        let two = Keys::parse(&other).unwrap().sign("a", 1, BODY);
        let both = Keys::parse(&format!(" {SECRET}\n{other}\r\n")).unwrap().sign("a", 1, BODY);
        assert_eq!(both, format!("{one} {two}"));
        assert_ne!(one, two);
    }

    #[test]
    fn what_is_no_secret_is_named_and_not_repeated() {
        let secret =
            |length| format!("whsec_{}", general_purpose::STANDARD.encode(vec![1; length]));
        for length in [24, 25, 64] {
            assert_eq!(check_secret(&secret(length)), Ok(()));
            assert_eq!(check_secret(secret(length).trim_end_matches('=')), Ok(()));
        }
        let number = 1;
        for (text, error) in [
            (String::new(), SecretError::Empty),
            (" \n".to_owned(), SecretError::Empty),
            (secret(23), SecretError::Length { number, length: 23 }),
            (secret(65), SecretError::Length { number, length: 65 }),
            ("whsec_".to_owned(), SecretError::Length { number, length: 0 }),
            ("whsec_not*base64".to_owned(), SecretError::Encoding { number }),
            ("whsk_AAAA".to_owned(), SecretError::Asymmetric { number }),
            ("hunter2".to_owned(), SecretError::Prefix { number }),
            (format!("{SECRET} hunter2"), SecretError::Prefix { number: 2 }),
        ] {
            assert_eq!(check_secret(&text), Err(error.clone()));
            assert!(!error.to_string().contains("hunter2"));
        }
    }
}

//! Values that are written as text: durations, sizes, secrets.

use std::{borrow::Cow, fmt, marker::PhantomData, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};

/// A length of time: `200ms`, `30s`, `5m`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span(pub(super) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text.trim()).map(Self).map_err(|_| {
            "not a length of time: write a number and its unit, as in \"200ms\", \"30s\", \"5m\""
                .to_owned()
        })
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Text::<Self>::new(
            "a length of time as text, with its unit, as in \"30s\"",
        ))
    }
}

impl JsonSchema for Span {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A length of time: a number and its unit, as in 200ms, 30s, 5m, 1h 30m.",
            "examples": ["200ms", "30s", "5m"],
        })
    }
}

/// A number of bytes: `1048576`, `64MiB`, `10MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            "not a size: write bytes as a number, or a number with KiB, MiB, GiB, kB, MB or GB"
                .to_owned()
        };
        let text = text.trim();
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(Self).ok_or_else(wrong)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or text such as \"64MiB\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes).map(Size).map_err(|_| E::custom("a size is not negative"))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["integer", "string"],
            "minimum": 0,
            "description": "Bytes: a number, or text with KiB, MiB, GiB, kB, MB or GB.",
            "examples": ["64MiB", 1_048_576],
        })
    }
}

/// A number that may have a fraction. Figment reads short ones from text with 24 bits, which
/// makes 0.2 into 0.20000000298; here text is read as it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ratio(pub(super) f64);

impl<'de> Deserialize<'de> for Ratio {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RatioVisitor;
        impl Visitor<'_> for RatioVisitor {
            type Value = Ratio;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Ratio, E> {
                Ok(Ratio(number))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Ratio, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Ratio, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Ratio, E> {
                text.trim().parse().map(Ratio).map_err(|_| E::custom("not a number"))
            }
        }
        deserializer.deserialize_any(RatioVisitor)
    }
}

impl JsonSchema for Ratio {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Ratio".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number" })
    }
}

/// A secret in place. A password such as `12345` is a number to TOML; it is taken all the same.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct SecretText(pub(super) String);

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SecretVisitor;
        impl Visitor<'_> for SecretVisitor {
            type Value = SecretText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<SecretText, E> {
                Ok(SecretText(text.to_owned()))
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<SecretText, E> {
                Ok(SecretText(value.to_string()))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<SecretText, E> {
                Ok(SecretText(value.to_string()))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<SecretText, E> {
                Ok(SecretText(value.to_string()))
            }
        }
        deserializer.deserialize_any(SecretVisitor)
    }
}

impl JsonSchema for SecretText {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "writeOnly": true,
            "description": "A secret in place. Better: in a file, by the key with `_file` behind it, \
                            or as a systemd credential.",
        })
    }
}

/// Takes text and nothing else, and never repeats it in an error.
struct Text<T> {
    expecting: &'static str,
    target: PhantomData<T>,
}

impl<T> Text<T> {
    const fn new(expecting: &'static str) -> Self {
        Self { expecting, target: PhantomData }
    }
}

impl<T: FromStr<Err = String>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

/// A duration as it is written: `30s`, `200ms`.
pub(super) fn span(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

/// A size as it is written: with the largest unit that leaves no rest.
pub(super) fn size(bytes: u64) -> String {
    for (factor, unit) in [(1_u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
        if bytes >= factor && bytes.is_multiple_of(factor) {
            return format!("{}{unit}", bytes / factor);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sizes_come_back_as_they_were_written(bytes: u64) {
            prop_assert_eq!(size(bytes).parse::<Size>().unwrap(), Size(bytes));
        }

        #[test]
        fn spans_come_back_as_they_were_written(millis in 0..u64::from(u32::MAX)) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(span(duration).parse::<Span>().unwrap(), Span(duration));
        }

        #[test]
        fn any_text_is_a_size_or_an_error(text: String) {
            let _ = text.parse::<Size>();
            let _ = text.parse::<Span>();
        }
    }

    #[test]
    fn a_size_has_a_known_unit_and_fits() {
        assert_eq!("64MiB".parse(), Ok(Size(64 << 20)));
        assert_eq!("10 MB".parse(), Ok(Size(10_000_000)));
        for wrong in ["", "MiB", "1.5MiB", "-1", "64 Mb/s", "99999999999999GiB"] {
            assert!(wrong.parse::<Size>().unwrap_err().contains("MiB"), "{wrong}");
        }
        assert!("30".parse::<Span>().unwrap_err().contains("unit"));
    }
}

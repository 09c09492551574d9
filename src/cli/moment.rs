//! Moments, as a person writes them: a date and time, or how long ago.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// A moment as the API wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Moment(String);

impl Moment {
    pub(super) fn to_json(&self) -> serde_json::Value {
        self.0.clone().into()
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Parses RFC 3339, or a duration back from now such as `2h` or `1day 6h`.
///
/// # Errors
/// What to write, for where it is neither.
pub(super) fn moment(text: &str) -> Result<Moment, String> {
    before(OffsetDateTime::now_utc(), text)
}

fn before(now: OffsetDateTime, text: &str) -> Result<Moment, String> {
    let how = "write it as in 2026-01-31T08:00:00Z, or as how long ago: 90s, 2h, 3days";
    if OffsetDateTime::parse(text, &Rfc3339).is_ok() {
        // Kept as written: it is what the person will look for.
        return Ok(Moment(text.to_owned()));
    }
    let ago = humantime::parse_duration(text).map_err(|_| how.to_owned())?;
    let ago = time::Duration::try_from(ago).ok();
    let at = ago.and_then(|ago| now.checked_sub(ago)).filter(|at| at.year() >= 0);
    let at = at.ok_or_else(|| format!("{text} ago is before time began; {how}"))?;
    at.format(&Rfc3339).map(Moment).map_err(|_| how.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_how_long_ago() {
        let now = OffsetDateTime::from_unix_timestamp(1_769_846_400).unwrap();
        for (text, moment) in [
            ("2026-01-31T08:00:00Z", "2026-01-31T08:00:00Z"),
            ("2026-01-31T08:00:00.5+02:00", "2026-01-31T08:00:00.5+02:00"),
            ("2h", "2026-01-31T06:00:00Z"),
            ("1day 30m", "2026-01-30T07:30:00Z"),
            ("0s", "2026-01-31T08:00:00Z"),
        ] {
            assert_eq!(before(now, text), Ok(Moment(moment.to_owned())), "{text}");
        }
        for text in
            ["", "yesterday", "2026-01-31", "5", "-2h", "99999years", "2026-13-31T00:00:00Z"]
        {
            let error = before(now, text).unwrap_err();
            assert!(error.contains("2h"), "{text}: {error}");
        }
    }
}

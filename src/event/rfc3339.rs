//! RFC 3339 times, as CloudEvents and native events carry them.

use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time, UtcOffset};

/// Reads an RFC 3339 time: UTC, truncated to microseconds.
///
/// Letters may be small and a blank may stand for the `T` (section 5.6). A leap second becomes
/// the last microsecond before it, since no store here has a place for it.
pub(super) fn parse(text: &str) -> Option<OffsetDateTime> {
    let bytes = text.as_bytes();
    let (head, rest) = bytes.split_first_chunk::<19>()?;
    let marks = [head[4], head[7], head[13], head[16]];
    if marks != *b"--::" || !matches!(head[10], b'T' | b't' | b' ') {
        return None;
    }
    let year = i32::try_from(number(&head[0..4])?).ok()?;
    let month = Month::try_from(u8::try_from(number(&head[5..7])?).ok()?).ok()?;
    let two = |at: usize| u8::try_from(number(&head[at..at + 2])?).ok();
    let date = Date::from_calendar_date(year, month, two(8)?).ok()?;

    let (micros, zone) = fraction(rest)?;
    let (second, micros) = if two(17)? == 60 { (59, 999_999) } else { (two(17)?, micros) };
    let time = Time::from_hms_micro(two(11)?, two(14)?, second, micros).ok()?;
    PrimitiveDateTime::new(date, time)
        .assume_offset(offset(zone)?)
        .checked_to_offset(UtcOffset::UTC)
}

/// A time so many milliseconds after 1970 began.
pub(super) fn from_millis(millis: i64) -> Option<OffsetDateTime> {
    super::UnixTimestamp(millis).try_into().ok()
}

/// A time so many seconds after 1970 began, as RFC 3339.
pub(super) fn from_seconds(seconds: u64) -> Option<String> {
    let at = OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).ok()?).ok()?;
    at.format(&time::format_description::well_known::Rfc3339).ok()
}

/// The microseconds of `.123456789…`, and what follows.
fn fraction(rest: &[u8]) -> Option<(u32, &[u8])> {
    let Some(digits) = rest.strip_prefix(b".") else {
        return Some((0, rest));
    };
    let len = digits.iter().take_while(|b| b.is_ascii_digit()).count();
    if len == 0 {
        return None;
    }
    let kept = len.min(6);
    let scale = 10_u32.pow(u32::try_from(6 - kept).ok()?);
    Some((number(&digits[..kept])? * scale, &digits[len..]))
}

/// `Z` or `±HH:MM`.
fn offset(zone: &[u8]) -> Option<UtcOffset> {
    match *zone {
        [b'Z' | b'z'] => Some(UtcOffset::UTC),
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let hours = i8::try_from(number(&[h1, h2])?).ok().filter(|h| *h < 24)?;
            let minutes = i8::try_from(number(&[m1, m2])?).ok()?;
            let sign = if sign == b'-' { -1 } else { 1 };
            UtcOffset::from_hms(sign * hours, sign * minutes, 0).ok()
        }
        _ => None,
    }
}

fn number(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |sum, b| b.is_ascii_digit().then(|| sum * 10 + u32::from(*b - b'0')))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::{format_description::well_known::Rfc3339, macros::datetime};

    use super::*;

    #[test]
    fn times_of_every_shape() {
        let expected = datetime!(2024-02-29 12:30:45.123456 UTC);
        for text in [
            "2024-02-29T12:30:45.123456Z",
            "2024-02-29t12:30:45.123456z",
            "2024-02-29 12:30:45.123456+00:00",
            "2024-02-29T12:30:45.123456-00:00",
            "2024-02-29T12:30:45.123456999999999999999Z",
            "2024-02-29T18:00:45.123456+05:30",
            "2024-02-28T12:31:45.123456-23:59",
        ] {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
        assert_eq!(parse("2016-12-31T23:59:60Z"), Some(datetime!(2016-12-31 23:59:59.999999 UTC)));
        assert_eq!(parse("2024-01-01T00:00:00.5Z"), Some(datetime!(2024-01-01 00:00:00.5 UTC)));
        assert_eq!(parse("0000-01-01T00:00:00Z"), Some(datetime!(0000-01-01 00:00 UTC)));
    }

    #[test]
    fn what_is_no_time() {
        for text in [
            "",
            "now",
            "2024-02-29",
            "2024-02-29T12:30Z",
            "2024-02-29T12:30:45",
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:60:00Z",
            "2024-01-01T00:00:61Z",
            "2024-01-01T00:00:00.Z",
            "2024-01-01T00:00:00+24:00",
            "2024-01-01T00:00:00+0000",
            "2024-01-01T00:00:00Zx",
            "2024-01-01T00:00:00+00:60",
            "+024-01-01T00:00:00Z",
            "2024-01-01_00:00:00Z",
            "9999-12-31T23:59:59-00:01",
            "Mon, 01 Jan 2024 00:00:00 GMT",
            "１０２４-01-01T00:00:00Z",
            "2024-01-01T00:00:0éZ",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn reads_what_the_time_crate_writes(seconds in -62_135_596_800_i64..253_402_300_800, micros in 0..1_000_000_i64, offset in -1439..1440_i32) {
            let at = OffsetDateTime::from_unix_timestamp(seconds).unwrap() + time::Duration::microseconds(micros);
            let zone = UtcOffset::from_whole_seconds(offset * 60).unwrap();
            if let Some(Ok(text)) = at.checked_to_offset(zone).map(|at| at.format(&Rfc3339)) {
                prop_assert_eq!(parse(&text), Some(at));
            }
        }

        #[test]
        fn no_text_panics(text in "[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{0,12})?(Z|z|[+-][0-9]{2}:[0-9]{2})?.{0,2}") {
            let _ = parse(&text);
        }
    }
}

//! Values as text: JSON for many rows at once, and times.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::store::{AttemptError, StoreError, row};

/// A JSON array of these.
pub(super) fn array<T>(
    items: impl Iterator<Item = T>,
    write: impl Fn(T, &mut Vec<u8>) -> Result<(), AttemptError>,
) -> Result<String, AttemptError> {
    let mut out = vec![b'['];
    for item in items {
        if out.len() > 1 {
            out.push(b',');
        }
        write(item, &mut out)?;
    }
    out.push(b']');
    String::from_utf8(out).map_err(|error| AttemptError::Refused(error.to_string()))
}

/// A JSON array of numbers.
pub(super) fn numbers(all: impl Iterator<Item = u64>) -> String {
    let mut out = String::from("[");
    for number in all {
        if out.len() > 1 {
            out.push(',');
        }
        out.push_str(&row::signed(number).to_string());
    }
    out.push(']');
    out
}

/// RFC 3339, UTC, always six digits: the text sorts as the times do.
pub(super) fn text_time(at: OffsetDateTime) -> Result<String, AttemptError> {
    let at = at.to_offset(time::UtcOffset::UTC);
    if !(0..=9999).contains(&at.year()) {
        return Err(AttemptError::Refused(format!("the year {} is out of range", at.year())));
    }
    let (date, time) = (at.date(), at.time());
    Ok(format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.microsecond(),
    ))
}

pub(super) fn parse_time(text: &str) -> Result<OffsetDateTime, StoreError> {
    OffsetDateTime::parse(text, &Rfc3339).map_err(|error| {
        StoreError::fatal(format_args!("`{text}` in the database is no time: {error}"))
    })
}

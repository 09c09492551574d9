//! W3C Trace Context: which trace an event belongs to.
//!
//! Follows the W3C recommendation "Trace Context", sections 3.2 (`traceparent`) and 3.3
//! (`tracestate`). What is not valid by it is nobody's trace: it is kept and forwarded like any
//! other header, and never repaired.

use std::fmt::{self, Write as _};

use super::{Event, Headers};

/// The header, and the CloudEvents extension attribute, that says which trace an event is in.
pub const TRACEPARENT: &str = "traceparent";
/// The one that holds what tracing systems want to say besides.
pub const TRACESTATE: &str = "tracestate";

/// Flag: the one who began the trace may have recorded it, so whoever continues it should.
const SAMPLED: u8 = 0x01;
/// Flag: the trace id was made at random (level 2 of the recommendation).
const RANDOM: u8 = 0x02;

/// A place in a trace: what a `traceparent` says.
///
/// ```
/// use pulsebus::event::TraceContext;
///
/// let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
/// let context = TraceContext::parse(text).ok_or("not valid")?;
/// assert!(context.is_sampled());
/// assert_eq!(context.to_string(), text);
/// # Ok::<(), &str>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    trace: u128,
    span: u64,
    flags: u8,
}

impl TraceContext {
    /// One of these ids; `None` where one of them is zero, which stands for none. The trace id
    /// counts as made at random.
    #[must_use]
    pub const fn new(trace: u128, span: u64, sampled: bool) -> Option<Self> {
        if trace == 0 || span == 0 {
            return None;
        }
        Some(Self { trace, span, flags: RANDOM | if sampled { SAMPLED } else { 0 } })
    }

    /// Reads a `traceparent`, of version 00 or as much of a later one as is known. `None` where
    /// it is not valid.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_matches([' ', '\t']);
        let bytes = text.as_bytes();
        let version = hex(bytes.get(..2)?)?;
        // Later versions may add fields; of 00 the length is fixed, and ff is forbidden.
        let complete = match version {
            0 => bytes.len() == 55,
            0xff => false,
            _ => bytes.len() == 55 || bytes.get(55) == Some(&b'-'),
        };
        if !complete || [2, 35, 52].iter().any(|at| bytes.get(*at) != Some(&b'-')) {
            return None;
        }
        let trace = hex(bytes.get(3..35)?)?;
        let span = u64::try_from(hex(bytes.get(36..52)?)?).ok()?;
        let flags = u8::try_from(hex(bytes.get(53..55)?)?).ok()?;
        // Flags nobody has given a meaning are not passed on.
        let known = Self { trace, span, flags: flags & (SAMPLED | RANDOM) };
        (trace != 0 && span != 0).then_some(known)
    }

    /// The trace: 16 bytes, big endian.
    #[must_use]
    pub const fn trace_id(&self) -> u128 {
        self.trace
    }

    /// The span in it that comes next before what carries this: 8 bytes, big endian.
    #[must_use]
    pub const fn span_id(&self) -> u64 {
        self.span
    }

    /// Whether spans of this trace are to be recorded.
    #[must_use]
    pub const fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// The flags as they are sent.
    #[must_use]
    pub const fn flags(&self) -> u8 {
        self.flags
    }

    /// Another span of the same trace.
    #[must_use]
    pub const fn with_span(self, span: u64) -> Self {
        Self { span, ..self }
    }

    /// The trace an event is in: by the header `traceparent` of the message it came as, which is
    /// the last hop's; else by the CloudEvents extension of that name, which is the trace it was
    /// made in. `None` where there is none or it is not valid; two headers of the name are not.
    #[must_use]
    pub fn of(event: &Event) -> Option<Self> {
        match said(event.headers(), TRACEPARENT) {
            Said::Once(text) => Self::parse(text),
            Said::Otherwise => None,
            Said::Nothing => Self::parse(&event.attribute(TRACEPARENT)?),
        }
    }

    /// Whether an event says anything at all about a trace, valid or not.
    #[must_use]
    pub fn is_said_by(event: &Event) -> bool {
        !matches!(said(event.headers(), TRACEPARENT), Said::Nothing)
            || event.attribute(TRACEPARENT).is_some()
    }
}

/// As it is sent: version 00.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trace, span, flags } = self;
        write!(f, "00-{trace:032x}-{span:016x}-{flags:02x}")
    }
}

/// The `tracestate` beside an event's [`TraceContext`]: valid, or left out.
#[must_use]
pub fn tracestate(event: &Event) -> Option<String> {
    let mut all = String::new();
    for (name, value) in event.headers().iter() {
        if name.eq_ignore_ascii_case(TRACESTATE) {
            let separator = if all.is_empty() { "" } else { "," };
            let _ = write!(all, "{separator}{}", value.as_str()?);
        }
    }
    if all.is_empty() && matches!(said(event.headers(), TRACEPARENT), Said::Nothing) {
        all = event.attribute(TRACESTATE)?;
    }
    let members = || all.split(',').map(|m| m.trim_matches([' ', '\t'])).filter(|m| !m.is_empty());
    let valid = members().count() <= 32
        && members().all(is_member)
        && members().enumerate().all(|(at, member)| {
            let key = |member: &str| member.split('=').next().unwrap_or_default().to_owned();
            members().skip(at + 1).all(|other| key(other) != key(member))
        });
    (valid && members().next().is_some()).then(|| members().collect::<Vec<_>>().join(","))
}

/// `key=value`, section 3.3.1.3.
fn is_member(member: &str) -> bool {
    let Some((key, value)) = member.split_once('=') else { return false };
    let first = key.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let rest = key.bytes().all(|b| {
        b.is_ascii_lowercase()
            || b.is_ascii_digit()
            || matches!(b, b'_' | b'-' | b'*' | b'/' | b'@')
    });
    let printable = value.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=' && b != b',');
    first
        && rest
        && key.len() <= 256
        && key.matches('@').count() <= 1
        && printable
        && (1..=256).contains(&value.len())
}

enum Said<'a> {
    Nothing,
    Once(&'a str),
    /// Several times, or as something else than text.
    Otherwise,
}

fn said<'a>(headers: &'a Headers, wanted: &str) -> Said<'a> {
    let mut said = Said::Nothing;
    for (name, value) in headers.iter() {
        if name.eq_ignore_ascii_case(wanted) {
            said = match (said, value.as_str()) {
                (Said::Nothing, Some(text)) => Said::Once(text),
                _ => return Said::Otherwise,
            };
        }
    }
    said
}

/// A number in lower-case hexadecimal digits.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number: u128, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some((number << 4) | u128::from(value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Decoder, Message, Origin};

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn event(headers: &[(&str, &str)], body: &'static str) -> Event {
        let mut all = Headers::new();
        for (name, value) in headers {
            all.push(*name, *value);
        }
        let origin = Origin { transport: "nats".into(), ..Origin::default() };
        let message = Message { body: body.into(), headers: all, origin };
        Decoder::default().decode(message).unwrap()
    }

    #[test]
    fn a_traceparent_is_valid_by_the_recommendation_or_nobodys() {
        for valid in [
            VALID.to_owned(),
            VALID.replace("-01", "-00"),
            format!(" {VALID}\t"),
            VALID.replacen("00", "01", 1),
            format!("cc{}-what-comes-later", &VALID[2..]),
        ] {
            assert!(TraceContext::parse(&valid).is_some(), "{valid}");
        }
        for wrong in [
            "",
            "00-1",
            &VALID[..54],
            &format!("{VALID}-"),
            &format!("{VALID}0"),
            &VALID.to_uppercase(),
            &VALID.replacen("00", "ff", 1),
            &format!("cc{}.what", &VALID[2..]),
            &VALID.replace("0af7651916cd43dd8448eb211c80319c", "00000000000000000000000000000000"),
            &VALID.replace("b7ad6b7169203331", "0000000000000000"),
            &VALID.replace("-b7", "_b7"),
            &VALID.replace("0af7", "0ag7"),
            &VALID.replace("0af7", "0éf"),
        ] {
            assert_eq!(TraceContext::parse(wrong), None, "{wrong}");
        }
        let all_flags = TraceContext::parse(&VALID.replace("-01", "-ff")).unwrap();
        assert_eq!(all_flags.flags(), 3, "flags without a meaning are not passed on");
        assert!(!TraceContext::parse(&VALID.replace("-01", "-fe")).unwrap().is_sampled());
    }

    #[test]
    fn the_last_hop_counts_before_the_trace_an_event_was_made_in() {
        const MADE: &str = "00-11111111111111111111111111111111-2222222222222222-01";
        let structured = r#"{"specversion":"1.0","id":"1","source":"/","type":"T",
            "traceparent":"00-11111111111111111111111111111111-2222222222222222-01"}"#;
        let of = |headers: &[(&str, &str)], body| {
            TraceContext::of(&event(headers, body)).map(|context| context.to_string())
        };
        assert_eq!(of(&[], structured).as_deref(), Some(MADE));
        assert_eq!(of(&[("Traceparent", VALID)], structured).as_deref(), Some(VALID));
        assert_eq!(of(&[("traceparent", VALID)], "[1]").as_deref(), Some(VALID));
        let binary = [
            ("ce-specversion", "1.0"),
            ("ce-id", "1"),
            ("ce-source", "/"),
            ("ce-type", "T"),
            ("ce-traceparent", MADE),
        ];
        assert_eq!(of(&binary, "[1]").as_deref(), Some(MADE));
        assert_eq!(of(&[("traceparent", VALID), ("TraceParent", VALID)], "[1]"), None);
        assert_eq!(of(&[("traceparent", "00-1")], structured), None);
        assert!(TraceContext::is_said_by(&event(&[("traceparent", "00-1")], "[1]")));
        assert!(!TraceContext::is_said_by(&event(&[("traceparents", VALID)], "[1]")));
    }

    #[test]
    fn a_tracestate_is_valid_or_left_out() {
        let of = |states: &[&str]| {
            let headers: Vec<_> = std::iter::once(("traceparent", VALID))
                .chain(states.iter().map(|state| ("tracestate", *state)))
                .collect();
            tracestate(&event(&headers, "[1]"))
        };
        assert_eq!(of(&["a=1, b@c=2 ,,", "d=x y"]).as_deref(), Some("a=1,b@c=2,d=x y"));
        assert_eq!(of(&[]), None);
        for wrong in ["a", "a=", "A=1", "=1", "a=1,a=2", "a=b=c", "a=\u{7f}", "a@b@c=1"] {
            assert_eq!(of(&[wrong]), None, "{wrong}");
        }
        let many = (0..33).map(|n| format!("k{n}=1")).collect::<Vec<_>>().join(",");
        assert_eq!(of(&[&many]), None);
    }
}

//! Templates for destinations: `mirror.{type}`, `lesson.{/author_id}`.

use std::{borrow::Cow, fmt, fmt::Write as _, str::FromStr};

use super::pointer::{Pointer, scalar};
use crate::event::StoredEvent;

/// The longest NATS subject rendered, in bytes; the server ends a connection that sends a
/// longer control line than 4 KiB.
const MAX_SUBJECT_BYTES: usize = 1_024;
/// An AMQP short string, in bytes.
const MAX_SHORT_STRING_BYTES: usize = 255;
/// The longest URL path rendered, in bytes.
const MAX_PATH_BYTES: usize = 2_048;

/// Text with values of the event in it.
///
/// In braces: `type`, `key`, `source`, `subject`, `id` (the event's attributes), `handler` (the
/// handler's name) or a JSON pointer into `data()`, e.g. `{/author/id}`. `{{` and `}}` stand for
/// the braces themselves. Parsed once; [`Display`](fmt::Display) gives the text back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    Field(Field),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Field {
    Type,
    Key,
    Source,
    Subject,
    Id,
    Handler,
    Pointer(Pointer),
}

/// Where a rendered text is used, which decides how values are escaped in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Place {
    /// A NATS subject. A value is one token: `%`, `.`, `*`, `>`, `$`, blanks and control
    /// characters are percent-encoded. At most 1,024 bytes.
    NatsSubject,
    /// An AMQP routing key or exchange. Values as they are, dots too. At most 255 bytes.
    Amqp,
    /// The path of a URL. A value is one segment, percent-encoded. At most 2,048 bytes.
    UrlPath,
    /// A header of NATS. In a value `%` and control characters are percent-encoded.
    NatsHeader,
    /// A header of HTTP. In a value `%`, control characters and what is not ASCII are
    /// percent-encoded.
    HttpHeader,
    /// Anything else. Values as they are.
    #[default]
    Plain,
}

impl Place {
    /// The place of an address of this kind of [`Transport`](crate::transport::Transport).
    #[must_use]
    pub fn of(transport_kind: &str) -> Self {
        match transport_kind {
            "nats" => Self::NatsSubject,
            "amqp" => Self::Amqp,
            "http" => Self::UrlPath,
            _ => Self::Plain,
        }
    }

    /// The place of the headers of a message whose address is this place.
    #[must_use]
    pub const fn of_headers(self) -> Self {
        match self {
            Self::NatsSubject | Self::NatsHeader => Self::NatsHeader,
            Self::UrlPath | Self::HttpHeader => Self::HttpHeader,
            Self::Amqp | Self::Plain => Self::Plain,
        }
    }
}

/// Why a text is no template, or not one for its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseTemplateError {
    /// A brace without its other half.
    #[error("template `{0}` has a single brace: write {{{{ or }}}} for the brace itself")]
    Brace(String),
    /// What is in braces is none of the names.
    #[error(
        "template `{template}` has {{{name}}}: there is {{type}}, {{key}}, {{source}}, \
         {{subject}}, {{id}}, {{handler}} and JSON pointers such as {{/author_id}}"
    )]
    Name {
        /// The template.
        template: String,
        /// What is in braces.
        name: String,
    },
    /// A header that no message there can be given.
    #[error("header `{name}` {problem}")]
    Header {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Whatever the values, it renders to nothing that fits its place.
    #[error("template `{template}` {problem}")]
    Place {
        /// The template.
        template: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Why a template has no text for an event. It never will.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// The event has no such value.
    #[error("{{{field}}} has no value in event {id}, so no message can be made of it")]
    Missing {
        /// What is in braces.
        field: String,
        /// The event's id.
        id: String,
    },
    /// The event has one that cannot be part of an address here.
    #[error("{{{field}}} of event {id} is {problem}, so no message can be made of it")]
    Value {
        /// What is in braces.
        field: String,
        /// The event's id.
        id: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The whole is longer than its place takes.
    #[error(
        "what a template makes of event {id} is {length} bytes long; at most {limit} are possible"
    )]
    TooLong {
        /// The event's id.
        id: String,
        /// How long it is, in bytes.
        length: usize,
        /// How long it may be, in bytes.
        limit: usize,
    },
}

impl FromStr for Template {
    type Err = ParseTemplateError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

impl Template {
    /// Parses a template.
    ///
    /// # Errors
    /// Where braces do not pair, or hold what is no value of an event.
    pub fn parse(text: &str) -> Result<Self, ParseTemplateError> {
        let single = || ParseTemplateError::Brace(text.to_owned());
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal.push_str(&rest[..at]);
            let (brace, behind) = rest[at..].split_at(1);
            if let Some(behind) = behind.strip_prefix(brace) {
                literal.push_str(brace);
                rest = behind;
                continue;
            }
            if brace == "}" {
                return Err(single());
            }
            let (name, behind) = behind.split_once('}').ok_or_else(single)?;
            let field = Field::parse(name).ok_or_else(|| ParseTemplateError::Name {
                template: text.to_owned(),
                name: name.to_owned(),
            })?;
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal)));
            }
            parts.push(Part::Field(field));
            rest = behind;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Ok(Self { parts })
    }

    /// Whether what it renders to fits the place, whatever the values.
    ///
    /// # Errors
    /// Where it does not: a wildcard in a subject, an empty token, a text that is too long.
    pub fn check(&self, place: Place) -> Result<(), ParseTemplateError> {
        let sample = self.fill(|_| Ok::<_, ParseTemplateError>(Cow::Borrowed("x")))?;
        let problem = match place {
            Place::NatsSubject => subject_problem(&sample),
            Place::Amqp => (sample.len() > MAX_SHORT_STRING_BYTES)
                .then_some("is longer than the 255 bytes that AMQP allows"),
            Place::UrlPath => path_problem(&sample),
            Place::NatsHeader | Place::HttpHeader => header_problem(&sample, place),
            Place::Plain => None,
        };
        match problem {
            None => Ok(()),
            Some(problem) => Err(ParseTemplateError::Place { template: self.to_string(), problem }),
        }
    }

    /// The text for this event.
    ///
    /// # Errors
    /// Where a value is missing or empty, or the text does not fit the place. It is never the
    /// text with something left out.
    pub fn render(
        &self,
        event: &StoredEvent,
        handler: &str,
        place: Place,
    ) -> Result<String, RenderError> {
        let text = self.fill(|field| {
            let missing =
                || RenderError::Missing { field: field.to_string(), id: event.id().to_owned() };
            let wrong = |problem| RenderError::Value {
                field: field.to_string(),
                id: event.id().to_owned(),
                problem,
            };
            let value = field.value(event, handler).ok_or_else(missing)?;
            if value.is_empty() {
                return Err(wrong("empty"));
            }
            match place {
                Place::NatsSubject => Ok(encode(value, keeps_token)),
                Place::UrlPath if matches!(&*value, "." | "..") => Err(wrong("a step in a path")),
                Place::UrlPath => Ok(encode(value, keeps_segment)),
                Place::NatsHeader => Ok(encode(value, keeps_nats_header)),
                Place::HttpHeader => Ok(encode(value, keeps_http_header)),
                Place::Amqp | Place::Plain => Ok(value),
            }
        })?;
        let limit = match place {
            Place::NatsSubject => MAX_SUBJECT_BYTES,
            Place::Amqp => MAX_SHORT_STRING_BYTES,
            Place::UrlPath => MAX_PATH_BYTES,
            Place::NatsHeader | Place::HttpHeader | Place::Plain => usize::MAX,
        };
        if text.len() > limit {
            let (id, length) = (event.id().to_owned(), text.len());
            return Err(RenderError::TooLong { id, length, limit });
        }
        Ok(text)
    }

    /// Its pieces in order; `None` stands for a value that differs from event to event.
    pub(crate) fn pieces(&self, handler: &str) -> Vec<Option<String>> {
        let piece = |part: &Part| match part {
            Part::Literal(text) => Some(text.clone()),
            Part::Field(Field::Handler) => Some(handler.to_owned()),
            Part::Field(_) => None,
        };
        self.parts.iter().map(piece).collect()
    }

    /// The text, where it is the same for every event.
    pub(super) fn fixed(&self) -> Option<&str> {
        match &self.parts[..] {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    fn fill<'a, E>(
        &'a self,
        mut value: impl FnMut(&'a Field) -> Result<Cow<'a, str>, E>,
    ) -> Result<String, E> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Field(field) => text.push_str(&value(field)?),
            }
        }
        Ok(text)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.parts {
            match part {
                Part::Literal(literal) => {
                    f.write_str(&literal.replace('{', "{{").replace('}', "}}"))?;
                }
                Part::Field(field) => write!(f, "{{{field}}}")?,
            }
        }
        Ok(())
    }
}

impl Field {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "type" => Self::Type,
            "key" => Self::Key,
            "source" => Self::Source,
            "subject" => Self::Subject,
            "id" => Self::Id,
            "handler" => Self::Handler,
            pointer if pointer.starts_with('/') => Self::Pointer(pointer.parse().ok()?),
            _ => return None,
        })
    }

    fn value<'a>(&self, event: &'a StoredEvent, handler: &'a str) -> Option<Cow<'a, str>> {
        match self {
            Self::Type => Some(event.kind().into()),
            Self::Key => Some(event.key().into()),
            Self::Source => Some(event.source().into()),
            Self::Subject => event.subject().map(Cow::from),
            Self::Id => Some(event.id().into()),
            Self::Handler => Some(handler.into()),
            Self::Pointer(pointer) => scalar(pointer.find(event.data())?),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Type => f.write_str("type"),
            Self::Key => f.write_str("key"),
            Self::Source => f.write_str("source"),
            Self::Subject => f.write_str("subject"),
            Self::Id => f.write_str("id"),
            Self::Handler => f.write_str("handler"),
            Self::Pointer(pointer) => pointer.fmt(f),
        }
    }
}

/// What stands for itself in a token of a subject. `%` does not, so that the value can be had
/// back and two values never become one; `$` does not, as subjects that begin with it are the
/// server's own.
fn keeps_token(c: char) -> bool {
    !matches!(c, '%' | '.' | '*' | '>' | '$') && !c.is_whitespace() && !c.is_control()
}

/// RFC 3986, "unreserved".
fn keeps_segment(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~')
}

fn keeps_nats_header(c: char) -> bool {
    c != '%' && !c.is_control()
}

fn keeps_http_header(c: char) -> bool {
    keeps_nats_header(c) && c.is_ascii()
}

fn encode(value: Cow<'_, str>, keeps: fn(char) -> bool) -> Cow<'_, str> {
    if value.chars().all(keeps) {
        return value;
    }
    let mut encoded = String::with_capacity(value.len() + 8);
    let mut utf8 = [0; 4];
    for c in value.chars() {
        if keeps(c) {
            encoded.push(c);
        } else {
            for byte in c.encode_utf8(&mut utf8).bytes() {
                // Writing to a string does not fail.
                let _ = write!(encoded, "%{byte:02X}");
            }
        }
    }
    encoded.into()
}

fn subject_problem(subject: &str) -> Option<&'static str> {
    if subject.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Some("has blanks or control characters, which no NATS subject has");
    }
    if subject.contains(['*', '>']) {
        return Some("has a wildcard, which one cannot publish to");
    }
    if subject.split('.').any(str::is_empty) {
        return Some("has an empty token: a NATS subject neither begins nor ends with a dot");
    }
    if subject.starts_with('$') {
        return Some("begins with $, which is reserved for the NATS server");
    }
    (subject.len() > MAX_SUBJECT_BYTES).then_some("is longer than 1,024 bytes")
}

fn path_problem(path: &str) -> Option<&'static str> {
    if path.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Some("has blanks or control characters, which no URL has");
    }
    if path.contains(['?', '#', '\\']) {
        return Some("is no path: it has a ?, # or \\; a query stands in the transport's url");
    }
    let step =
        |segment: &str| matches!(&*segment.to_ascii_lowercase().replace("%2e", "."), "." | "..");
    if path.split('/').any(step) {
        return Some("has a step to another folder; it only adds to the transport's url");
    }
    (path.len() > MAX_PATH_BYTES).then_some("is longer than 2,048 bytes")
}

fn header_problem(value: &str, place: Place) -> Option<&'static str> {
    if value.chars().any(char::is_control) {
        return Some("has control characters, which no header has");
    }
    if place == Place::HttpHeader && !value.is_ascii() {
        return Some("has other characters than ASCII, which no HTTP header has");
    }
    None
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::event::{Event, EventParts, Format, Headers, Origin, Position};

    fn event(kind: &str, key: &str, subject: Option<&str>, data: &str) -> StoredEvent {
        StoredEvent {
            position: Position(1),
            recorded_at: crate::event::now(),
            event: Event::from_parts(EventParts {
                id: "e1".into(),
                source: "/lms".into(),
                kind: kind.into(),
                subject: subject.map(Into::into),
                time: None,
                key: key.into(),
                format: Format::Raw,
                headers: Headers::new(),
                origin: Origin::default(),
                body: Bytes::from(data.to_owned()),
            }),
        }
    }

    fn render(template: &str, event: &StoredEvent, place: Place) -> Result<String, RenderError> {
        Template::parse(template).unwrap().render(event, "mirror", place)
    }

    #[test]
    fn values_are_escaped_for_their_place() {
        let event = event("com.edu Lesson", "a/b.*>é%", Some("$s"), r#"{"n": {"id": 7}}"#);
        let all = "x.{type}.{key}.{subject}.{id}.{handler}.{/n/id}";
        assert_eq!(
            render(all, &event, Place::NatsSubject).unwrap(),
            "x.com%2Eedu%20Lesson.a/b%2E%2A%3Eé%25.%24s.e1.mirror.7"
        );
        assert_eq!(
            render(all, &event, Place::Amqp).unwrap(),
            "x.com.edu Lesson.a/b.*>é%.$s.e1.mirror.7"
        );
        assert_eq!(
            render("/in/{key}/{source}", &event, Place::UrlPath).unwrap(),
            "/in/a%2Fb.%2A%3E%C3%A9%25/%2Flms"
        );
        assert_eq!(render("a{{b}}{id}", &event, Place::Plain).unwrap(), "a{b}e1");
    }

    #[test]
    fn what_has_no_value_has_no_address() {
        let event = event("T", "", None, r#"{"a": null, "b": [], "c": ""}"#);
        for (template, says) in [
            ("x.{subject}", "{subject} has no value in event e1"),
            ("x.{key}", "{key} of event e1 is empty"),
            ("x.{/a}", "{/a} has no value"),
            ("x.{/b}", "{/b} has no value"),
            ("x.{/c}", "{/c} of event e1 is empty"),
            ("x.{/d}", "{/d} has no value"),
        ] {
            for place in [Place::NatsSubject, Place::Amqp, Place::UrlPath, Place::Plain] {
                let error = render(template, &event, place).unwrap_err().to_string();
                assert!(error.starts_with(says), "{template}: {error}");
            }
        }
        let event = self::event("..", &"k".repeat(300), None, "{}");
        assert!(render("/{type}", &event, Place::UrlPath).is_err());
        let error = render("{key}", &event, Place::Amqp).unwrap_err().to_string();
        assert!(error.contains("300 bytes long; at most 255"), "{error}");
        let event = self::event("T", &".".repeat(400), None, "{}");
        assert!(matches!(
            render("{key}", &event, Place::NatsSubject),
            Err(RenderError::TooLong { length: 1_200, .. })
        ));
    }

    #[test]
    fn mistakes_are_found_when_it_is_parsed() {
        for (template, says) in [
            ("a{", "single brace"),
            ("a}", "single brace"),
            ("a{type", "single brace"),
            ("{}", "there is {type}"),
            ("{Type}", "{Type}"),
            ("{type }", "there is {type}"),
            ("{/a~2}", "{/a~2}"),
        ] {
            let error = Template::parse(template).unwrap_err().to_string();
            assert!(error.contains(says), "{template}: {error}");
        }
        for template in
            ["", "a.", ".{type}", "a..b", "a b", "a.*", "a.>", "{type}.", "$JS.{type}", "a\tb"]
        {
            let parsed = Template::parse(template).unwrap();
            assert!(parsed.check(Place::NatsSubject).is_err(), "{template}");
        }
        for template in ["{type}", "a.{type}-{key}", "a{type}", "é.{/x}", "{key}.$x"] {
            Template::parse(template).unwrap().check(Place::NatsSubject).unwrap();
        }
        let long = Template::parse(&"x".repeat(256)).unwrap();
        assert!(long.check(Place::Amqp).is_err() && long.check(Place::Plain).is_ok());
        // The empty routing key is a valid one: fanout exchanges have no other.
        Template::parse("").unwrap().check(Place::Amqp).unwrap();
    }

    fn part() -> impl Strategy<Value = String> {
        prop_oneof![
            "[^{}]{0,6}",
            Just("{{".to_owned()),
            Just("}}".to_owned()),
            prop::sample::select(vec!["type", "key", "source", "subject", "id", "handler"])
                .prop_map(|name| format!("{{{name}}}")),
            "(/([a-z.*> ]|~0|~1){0,3}){1,3}".prop_map(|pointer| format!("{{{pointer}}}")),
        ]
    }

    proptest! {
        #[test]
        fn a_template_is_displayed_as_it_was_written(parts in prop::collection::vec(part(), 0..6)) {
            let text = parts.concat();
            let template = Template::parse(&text).unwrap();
            prop_assert_eq!(template.to_string(), text);
            prop_assert_eq!(Template::parse(&template.to_string()), Ok(template));
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            if let Ok(template) = Template::parse(&text) {
                prop_assert_eq!(template.to_string(), text);
            }
        }

        #[test]
        fn a_rendered_subject_is_one_that_nats_takes(
            template in "[a-z{}$.]{0,5}(\\{type\\}|\\{key\\}|\\{/x\\})[a-z.]{0,4}(\\{key\\})?",
            kind in any::<String>(),
            key in "\\PC{0,8}|[ .*>%\r\n\t\u{85}\u{2028}]{0,6}",
            x in any::<String>(),
        ) {
            let Ok(template) = Template::parse(&template) else { return Ok(()) };
            prop_assume!(template.check(Place::NatsSubject).is_ok());
            let data = serde_json::json!({ "x": x }).to_string();
            let event = event(&kind, &key, None, &data);
            if let Ok(subject) = template.render(&event, "h", Place::NatsSubject) {
                let tokens: Vec<_> = subject.split('.').collect();
                prop_assert!(tokens.iter().all(|token| !token.is_empty()), "{subject:?}");
                prop_assert!(!subject.starts_with('$'), "{subject:?}");
                prop_assert!(!subject.contains(['*', '>', ' ', '\r', '\n', '\t']), "{subject:?}");
                prop_assert!(!subject.chars().any(|c| c.is_whitespace() || c.is_control()));
                // As many tokens as the template has, whatever the values.
                let sample = template.to_string().matches('.').count();
                prop_assert_eq!(tokens.len(), sample + 1);
            }
        }
    }
}

//! Finding members in JSON text without building a tree.
//!
//! One loop, no recursion and no allocation: it accepts exactly the JSON that
//! `serde_json::value::RawValue` accepts, and a nesting of at most [`MAX_DEPTH`]. Numbers stay
//! text (`1e400` is one), escapes are checked for form only (half of a surrogate pair passes),
//! and of a repeated name the last value counts.

use std::borrow::Cow;

use super::MAX_DEPTH;

/// What is wrong with a text, and at which byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is no JSON.
    Syntax { what: &'static str, at: usize },
    /// It is nested deeper than [`MAX_DEPTH`].
    Depth,
}

/// The raw text of the top-level members that are attributes of some format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Members<'a> {
    /// Whether the text is an object at all.
    pub(super) object: bool,
    pub(super) specversion: Option<&'a str>,
    pub(super) id: Option<&'a str>,
    pub(super) source: Option<&'a str>,
    pub(super) kind: Option<&'a str>,
    pub(super) subject: Option<&'a str>,
    pub(super) time: Option<&'a str>,
    pub(super) partitionkey: Option<&'a str>,
    pub(super) key: Option<&'a str>,
    pub(super) data: Option<&'a str>,
}

impl<'a> Members<'a> {
    fn slot(&mut self, name: &str) -> Option<&mut Option<&'a str>> {
        Some(match name {
            "specversion" => &mut self.specversion,
            "id" => &mut self.id,
            "source" => &mut self.source,
            "type" => &mut self.kind,
            "subject" => &mut self.subject,
            "time" => &mut self.time,
            "partitionkey" => &mut self.partitionkey,
            "key" => &mut self.key,
            "data" => &mut self.data,
            _ => return None,
        })
    }
}

/// Checks that a text is one JSON value and gathers its top-level members, in one pass.
pub(super) fn members(json: &str) -> Result<Members<'_>, Fault> {
    let mut scanner = Scanner::new(json);
    let mut found = Members::default();
    scanner.space();
    if scanner.peek() == Some(b'{') {
        found.object = true;
        scanner.object(|name, value| {
            if let Some(slot) = found.slot(&name.text()) {
                *slot = Some(value);
            }
        })?;
    } else {
        scanner.value(0)?;
    }
    scanner.end()?;
    Ok(found)
}

/// The raw text of a top-level member; the last one where it repeats.
pub(crate) fn member<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let mut scanner = Scanner::new(json);
    let mut found = None;
    scanner.space();
    if scanner.peek() != Some(b'{') {
        return None;
    }
    let walk = scanner.object(|key, value| {
        if key.is(name) {
            found = Some(value);
        }
    });
    walk.ok().and(found)
}

/// The top-level members of an object in order, repeated ones each time: names unescaped, raw
/// values. Names that are no Unicode text are left out.
pub(super) fn all_members(json: &str) -> Vec<(Cow<'_, str>, &str)> {
    let mut scanner = Scanner::new(json);
    let mut found = Vec::new();
    scanner.space();
    if scanner.peek() == Some(b'{') {
        let walk = scanner.object(|name, value| {
            if let Some(text) = unescape(name.raw) {
                found.push((text, value));
            }
        });
        if walk.is_err() {
            found.clear();
        }
    }
    found
}

/// The raw text an RFC 6901 pointer points at; the last one where a member repeats.
pub(crate) fn pointer<'a>(json: &'a str, pointer: &str) -> Option<&'a str> {
    let mut here = json.trim_ascii();
    if pointer.is_empty() {
        return Some(here);
    }
    for token in pointer.strip_prefix('/')?.split('/') {
        let mut scanner = Scanner::new(here);
        scanner.space();
        here = match scanner.peek()? {
            b'{' if token.contains('~') => {
                member(here, &token.replace("~1", "/").replace("~0", "~"))?
            }
            b'{' => member(here, token)?,
            b'[' => scanner.element(index(token)?)?,
            _ => return None,
        };
    }
    Some(here)
}

/// An array index of RFC 6901: digits without a leading zero.
fn index(token: &str) -> Option<usize> {
    let digits = token.bytes().all(|b| b.is_ascii_digit());
    if !digits || (token.len() > 1 && token.starts_with('0')) {
        return None;
    }
    token.parse().ok()
}

/// What a raw value is, as far as an attribute can be made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scalar<'a> {
    /// A string, unescaped.
    Text(Cow<'a, str>),
    /// A number, as written.
    Number(&'a str),
    /// `true` or `false`.
    Bool(&'a str),
    /// `null`.
    Null,
    /// An object or array.
    Nested,
    /// A string holding half of a surrogate pair: JSON, but no Unicode text.
    NotUnicode,
}

impl<'a> Scalar<'a> {
    /// Looks at a raw value, which must be JSON.
    pub(crate) fn of(raw: &'a str) -> Self {
        match raw.as_bytes().first() {
            Some(b'"') => {
                let inner = raw.strip_prefix('"').and_then(|raw| raw.strip_suffix('"'));
                unescape(inner.unwrap_or_default()).map_or(Self::NotUnicode, Self::Text)
            }
            Some(b'{' | b'[') => Self::Nested,
            Some(b't' | b'f') => Self::Bool(raw),
            Some(b'n') | None => Self::Null,
            Some(_) => Self::Number(raw),
        }
    }

    /// Strings, numbers (as written) and booleans have a text.
    pub(crate) fn into_text(self) -> Option<Cow<'a, str>> {
        match self {
            Self::Text(text) => Some(text),
            Self::Number(raw) | Self::Bool(raw) => Some(Cow::Borrowed(raw)),
            Self::Null | Self::Nested | Self::NotUnicode => None,
        }
    }
}

/// The text between a JSON string's quotes, unescaped; `None` where it is no Unicode.
fn unescape(inner: &str) -> Option<Cow<'_, str>> {
    if !inner.contains('\\') {
        return Some(Cow::Borrowed(inner));
    }
    serde_json::from_str(&format!("\"{inner}\"")).ok().map(Cow::Owned)
}

/// A member's name: the text between its quotes, as written.
#[derive(Clone, Copy)]
struct Name<'a> {
    raw: &'a str,
    escaped: bool,
}

impl<'a> Name<'a> {
    /// The name unescaped. One that is no Unicode equals no name anybody can ask for.
    fn text(self) -> Cow<'a, str> {
        if self.escaped { unescape(self.raw).unwrap_or_default() } else { Cow::Borrowed(self.raw) }
    }

    fn is(self, name: &str) -> bool {
        if self.escaped {
            unescape(self.raw).is_some_and(|text| text == name)
        } else {
            self.raw == name
        }
    }
}

struct Scanner<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    const fn new(text: &'a str) -> Self {
        Self { text, bytes: text.as_bytes(), at: 0 }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn fail<T>(&self, what: &'static str) -> Result<T, Fault> {
        let what = if self.at >= self.bytes.len() { "it ends too early" } else { what };
        Err(Fault::Syntax { what, at: self.at })
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    /// Nothing but whitespace may be left.
    fn end(&mut self) -> Result<(), Fault> {
        self.space();
        if self.at < self.bytes.len() {
            return self.fail("something follows the first JSON value");
        }
        Ok(())
    }

    /// Walks the object that begins here, member by member.
    fn object(&mut self, mut each: impl FnMut(Name<'a>, &'a str)) -> Result<(), Fault> {
        self.at += 1;
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            let name = self.name()?;
            let from = self.at;
            self.value(1)?;
            each(name, &self.text[from..self.at]);
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return self.fail("expected `,` or `}` after a member"),
            }
            self.space();
        }
    }

    /// The nth element of the array that begins here.
    fn element(&mut self, index: usize) -> Option<&'a str> {
        self.at += 1;
        self.space();
        if self.peek() == Some(b']') {
            return None;
        }
        for nth in 0.. {
            let from = self.at;
            self.value(1).ok()?;
            if nth == index {
                return Some(&self.text[from..self.at]);
            }
            self.space();
            if self.peek() != Some(b',') {
                return None;
            }
            self.at += 1;
            self.space();
        }
        None
    }

    /// Steps over the value that begins here, `outer` containers deep.
    fn value(&mut self, outer: usize) -> Result<(), Fault> {
        // The open containers, innermost in the lowest bit: 1 an object, 0 an array. A u128
        // holds MAX_DEPTH of them.
        let mut open: u128 = 0;
        let mut depth = 0;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.string()?;
                }
                Some(byte @ (b'{' | b'[')) => {
                    if outer + depth >= MAX_DEPTH {
                        return Err(Fault::Depth);
                    }
                    let object = byte == b'{';
                    self.at += 1;
                    self.space();
                    if self.peek() == Some(if object { b'}' } else { b']' }) {
                        self.at += 1;
                    } else {
                        open = (open << 1) | u128::from(object);
                        depth += 1;
                        if object {
                            self.name()?;
                        }
                        continue;
                    }
                }
                Some(b'-' | b'0'..=b'9') => self.number()?,
                Some(b't') => self.literal("true")?,
                Some(b'f') => self.literal("false")?,
                Some(b'n') => self.literal("null")?,
                Some(b',' | b']' | b'}') => return self.fail("a value is missing (extra comma?)"),
                Some(b'\'') => return self.fail("strings need double quotes"),
                Some(b'/' | b'#') => return self.fail("comments are not JSON"),
                _ => return self.fail("expected a value"),
            }
            // A value is complete: so may be what it stands in.
            loop {
                if depth == 0 {
                    return Ok(());
                }
                self.space();
                match (self.peek(), open & 1 == 1) {
                    (Some(b','), object) => {
                        self.at += 1;
                        self.space();
                        if object {
                            self.name()?;
                        }
                        break;
                    }
                    (Some(b'}'), true) | (Some(b']'), false) => {
                        self.at += 1;
                        open >>= 1;
                        depth -= 1;
                    }
                    (_, true) => return self.fail("expected `,` or `}` after a member"),
                    (_, false) => return self.fail("expected `,` or `]` after an element"),
                }
            }
        }
    }

    /// Steps over a member's name and colon, up to its value.
    fn name(&mut self) -> Result<Name<'a>, Fault> {
        match self.peek() {
            Some(b'"') => {}
            Some(b'}') => return self.fail("a member is missing (extra comma?)"),
            Some(b'\'') => return self.fail("names need double quotes"),
            Some(b'/' | b'#') => return self.fail("comments are not JSON"),
            _ => return self.fail("expected a name in double quotes"),
        }
        let from = self.at + 1;
        let escaped = self.string()?;
        let name = Name { raw: &self.text[from..self.at - 1], escaped };
        self.space();
        if self.peek() != Some(b':') {
            return self.fail("expected `:` after a name");
        }
        self.at += 1;
        self.space();
        Ok(name)
    }

    /// Steps over the string that begins here; whether it holds an escape.
    fn string(&mut self) -> Result<bool, Fault> {
        let mut escaped = false;
        self.at += 1;
        loop {
            self.plain();
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(escaped);
                }
                Some(b'\\') => {
                    escaped = true;
                    self.at += 1;
                    match self.peek() {
                        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                            self.at += 1;
                        }
                        Some(b'u') => {
                            self.at += 1;
                            for _ in 0..4 {
                                if !self.peek().is_some_and(|b| b.is_ascii_hexdigit()) {
                                    return self.fail("`\\u` needs four hexadecimal digits");
                                }
                                self.at += 1;
                            }
                        }
                        _ => return self.fail("no such escape in a string"),
                    }
                }
                Some(_) => {
                    return self.fail("a control character in a string is not escaped");
                }
                None => return self.fail(""),
            }
        }
    }

    /// Steps over what stands for itself in a string, eight bytes at a time.
    fn plain(&mut self) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGH: u64 = 0x8080_8080_8080_8080;
        while let Some(chunk) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk::<8>) {
            let word = u64::from_le_bytes(*chunk);
            // The high bit of each byte that is below 0x20, a quote or a backslash. A borrow
            // can only mark bytes above the first true one, so the first mark is always right.
            let control = word.wrapping_sub(ONES * 0x20) & !word;
            let quote = word ^ (ONES * b'"' as u64);
            let slash = word ^ (ONES * b'\\' as u64);
            let quote = quote.wrapping_sub(ONES) & !quote;
            let slash = slash.wrapping_sub(ONES) & !slash;
            let marks = (control | quote | slash) & HIGH;
            if marks != 0 {
                self.at += marks.trailing_zeros() as usize / 8;
                return;
            }
            self.at += 8;
        }
        while let Some(byte) = self.peek() {
            if byte < 0x20 || byte == b'"' || byte == b'\\' {
                return;
            }
            self.at += 1;
        }
    }

    fn number(&mut self) -> Result<(), Fault> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => {
                self.at += 1;
                if self.peek().is_some_and(|b| b.is_ascii_digit()) {
                    return self.fail("a number must not begin with 0");
                }
            }
            Some(b'1'..=b'9') => self.digits()?,
            _ => return self.fail("a number needs a digit here"),
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Fault> {
        let from = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == from {
            return self.fail("a number needs a digit here");
        }
        Ok(())
    }

    fn literal(&mut self, word: &'static str) -> Result<(), Fault> {
        for expected in word.bytes() {
            if self.peek() != Some(expected) {
                return self.fail("expected a value");
            }
            self.at += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;

    /// Text that is often JSON, and often nearly.
    fn nearly_json() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"",
            "\"a\"",
            "\"data\"",
            "\\",
            "\\u",
            "00e9",
            "\\n",
            "0",
            "1",
            "-",
            ".",
            "e",
            "E+",
            "400",
            "true",
            "false",
            "null",
            "tru",
            " ",
            "\n",
            "\t",
            "\r",
            "é",
            "😀",
            "\u{0}",
            "\u{1f}",
            "\u{7f}",
            "\u{feff}",
            "\u{a0}",
            "'",
            "/",
            "\"\"",
            "{}",
            "[]",
            "\"k\":1",
            "\"long enough for a word\"",
        ]);
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    fn agrees(text: &str) {
        let theirs = serde_json::from_str::<&RawValue>(text);
        match members(text) {
            Ok(_) => assert!(theirs.is_ok(), "{text:?}: {theirs:?}"),
            Err(Fault::Depth) => {}
            Err(fault) => assert!(theirs.is_err(), "{text:?}: {fault:?}"),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

        #[test]
        fn accepts_what_serde_json_accepts(text in nearly_json()) {
            agrees(&text);
        }

        #[test]
        fn accepts_what_serde_json_accepts_in_strings(text in "\"([ -~]|\\\\[\"nu0-9a-f\\\\]|é|\u{1}){0,24}\"?") {
            agrees(&text);
        }

        #[test]
        fn accepts_what_serde_json_accepts_as_numbers(text in "-?[0-9]{0,3}(\\.[0-9]{0,2})?([eE][+-]?[0-9]{0,3})?") {
            agrees(&text);
        }
    }

    #[test]
    fn every_character_is_judged_alike_wherever_it_stands() {
        for byte in 0..=0x7f_u8 {
            for before in 0..17 {
                let text = format!("\"{}{}\"", "x".repeat(before), char::from(byte));
                agrees(&text);
                agrees(&format!("{text}xxxxxxxxx\""));
            }
        }
    }

    #[test]
    fn depth_is_counted_exactly() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let nested = |n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
            assert!(members(&nested(MAX_DEPTH)).is_ok());
            assert_eq!(members(&nested(MAX_DEPTH + 1)), Err(Fault::Depth));
            assert_eq!(members(&nested(100_000)), Err(Fault::Depth));
        }
        let mixed = format!("{}{}", "[{\"a\":".repeat(64), "[]");
        assert_eq!(members(&mixed), Err(Fault::Depth), "an empty array is a level too");
        let wide = format!("[{}[]]", "[],".repeat(1000));
        assert!(members(&wide).is_ok(), "depth is not the number of brackets");
    }

    #[test]
    fn members_are_raw_and_the_last_one_counts() {
        let json = " { \"data\" : [1, 2] , \"id\":1e400, \"d\\u0061ta\": {\"id\":\"inner\"}\n} ";
        let found = members(json).unwrap();
        assert!(found.object);
        assert_eq!(found.data, Some("{\"id\":\"inner\"}"));
        assert_eq!(found.id, Some("1e400"));
        assert_eq!(found.kind, None);
        assert_eq!(member(json, "data"), found.data);
        assert_eq!(member(json, "id"), found.id);
        assert_eq!(member("[1]", "id"), None);
        assert!(!members("\"{\\\"id\\\":1}\"").unwrap().object);
    }

    #[test]
    fn a_name_that_is_no_unicode_is_no_members_name() {
        let json = r#"{"\ud800": 1, "id": 2}"#;
        assert_eq!(members(json).unwrap().id, Some("2"));
        assert_eq!(member(json, ""), None);
    }

    #[test]
    fn pointers_follow_rfc_6901() {
        // The document of RFC 6901 section 5.
        let json = r#"{"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4,
            "i\\j": 5, "k\"l": 6, " ": 7, "m~n": 8}"#;
        for (path, expected) in [
            ("", Some(json)),
            ("/foo", Some(r#"["bar", "baz"]"#)),
            ("/foo/0", Some("\"bar\"")),
            ("/foo/1", Some("\"baz\"")),
            ("/", Some("0")),
            ("/a~1b", Some("1")),
            ("/c%d", Some("2")),
            ("/e^f", Some("3")),
            ("/g|h", Some("4")),
            ("/i\\j", Some("5")),
            ("/k\"l", Some("6")),
            ("/ ", Some("7")),
            ("/m~0n", Some("8")),
            ("/foo/2", None),
            ("/foo/-", None),
            ("/foo/00", None),
            ("/foo/+1", None),
            ("/foo/99999999999999999999999", None),
            ("/foo/0/x", None),
            ("/nope", None),
            ("foo", None),
        ] {
            assert_eq!(pointer(json, path), expected, "{path}");
        }
        assert_eq!(pointer("[[], [ 1 , {\"a\":2}]]", "/1/1/a"), Some("2"));
        assert_eq!(pointer("[]", "/0"), None);
        assert_eq!(pointer(r#"{"a":1,"a":{"b":2}}"#, "/a/b"), Some("2"));
        assert_eq!(pointer("{\"~1\":1}", "/~01"), Some("1"), "RFC 6901 section 4");
    }

    #[test]
    fn scalars_have_the_text_they_were_written_with() {
        assert_eq!(Scalar::of("\"a\\u00e9\"").into_text().as_deref(), Some("aé"));
        assert_eq!(Scalar::of("1.50").into_text().as_deref(), Some("1.50"));
        assert_eq!(Scalar::of("true").into_text().as_deref(), Some("true"));
        assert_eq!(Scalar::of("null"), Scalar::Null);
        assert_eq!(Scalar::of("{}"), Scalar::Nested);
        assert_eq!(Scalar::of(r#""\ud800""#), Scalar::NotUnicode);
        assert_eq!(Scalar::of(r#""\ud83d\ude00""#).into_text().as_deref(), Some("😀"));
        assert_eq!(Scalar::of(r#""\"""#).into_text().as_deref(), Some("\""));
    }
}

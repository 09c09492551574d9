//! Bad and odd input, with what must become of it: either an event or quarantine with a reason.
//!
//! The same cases go through every way in. What a way in cannot carry, or takes apart before an
//! event is decoded, the methods of [`Case`] tell.

/// What must become of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is an event.
    Event,
    /// It goes to quarantine; the reason contains this text.
    Quarantined(&'static str),
}

/// One message.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Unique, and says what is odd.
    pub(crate) name: &'static str,
    /// The body.
    pub(crate) body: Vec<u8>,
    /// Text headers, in order.
    pub(crate) headers: Vec<(String, String)>,
    /// What must become of it with a decoder's default options.
    pub(crate) verdict: Verdict,
}

impl Case {
    /// Whether every way in can carry the headers: at most 50, names of letters, digits and
    /// hyphens up to 64 bytes, values of visible ASCII up to 1,000.
    pub(crate) fn headers_fit_everywhere(&self) -> bool {
        self.headers.len() <= 50
            && self.headers.iter().all(|(name, value)| {
                (1..=64).contains(&name.len())
                    && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                    && value.len() <= 1000
                    && value.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
            })
    }

    /// Whether `POST /v1/events` may see several events in it, or none: an array, several
    /// lines (NDJSON), a CloudEvents batch. The verdict is that of the message as a whole.
    pub(crate) fn http_may_split(&self) -> bool {
        let begins = self.body.iter().find(|b| !b.is_ascii_whitespace());
        begins == Some(&b'[')
            || self.body.contains(&b'\n')
            || self.headers.iter().any(|(_, value)| value.contains("batch"))
    }
}

/// Every case but those of [`large`]; about half a megabyte.
pub(crate) fn corpus() -> Vec<Case> {
    let mut all = bytes();
    all.extend(texts());
    all.extend(natives());
    all.extend(cloudevents());
    all.extend(headers());
    all
}

/// Bodies around and far beyond the limit of 1 MiB, each made when it is asked for.
pub(crate) fn large() -> impl Iterator<Item = Case> {
    const LIMIT: usize = 1024 * 1024;
    let too_large = Verdict::Quarantined("the limit is 1048576");
    [
        ("exactly 1 MiB", LIMIT, Verdict::Event),
        ("1 MiB and a byte", LIMIT + 1, too_large),
        ("2 MiB", 2 * LIMIT, too_large),
        ("8 MiB", 8 * LIMIT, too_large),
        ("64 MiB", 64 * LIMIT, too_large),
    ]
    .into_iter()
    .map(|(name, size, verdict)| {
        let mut body = br#"{"type":"Large","data":""#.to_vec();
        body.resize(size - 2, b'x');
        body.extend(b"\"}");
        Case { name, body, headers: Vec::new(), verdict }
    })
}

fn case(name: &'static str, body: impl Into<Vec<u8>>, verdict: Verdict) -> Case {
    Case { name, body: body.into(), headers: Vec::new(), verdict }
}

fn with(mut case: Case, headers: &[(&str, &str)]) -> Case {
    case.headers.extend(headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())));
    case
}

/// What is wrong or odd below the level of text.
fn bytes() -> Vec<Case> {
    use Verdict::{Event, Quarantined};
    let utf16 = |text: &str, bom: &[u16], big: bool| -> Vec<u8> {
        let units = bom.iter().copied().chain(text.encode_utf16());
        units.flat_map(|u| if big { u.to_be_bytes() } else { u.to_le_bytes() }).collect()
    };
    let native = r#"{"type":"T","data":1}"#;
    vec![
        case("empty body", "", Quarantined("empty")),
        case("one zero byte", "\0", Quarantined("not JSON")),
        case(
            "a bad UTF-8 byte in a string",
            b"{\"type\":\"T\",\"data\":\"\xff\"}",
            Quarantined("byte 20"),
        ),
        case("overlong UTF-8", b"\"\xc0\xaf\"", Quarantined("not UTF-8")),
        case("UTF-8 cut in a character", b"\"\xe2\x82", Quarantined("not UTF-8")),
        case("a surrogate as UTF-8 (CESU-8)", b"\"\xed\xa0\x80\"", Quarantined("not UTF-8")),
        case("beyond U+10FFFF", b"\"\xf4\x90\x80\x80\"", Quarantined("not UTF-8")),
        case("Latin-1", b"{\"type\":\"T\",\"data\":\"caf\xe9\"}", Quarantined("not UTF-8")),
        case("UTF-8 byte order mark", format!("\u{feff}{native}"), Quarantined("byte order mark")),
        case("UTF-16 LE with its mark", utf16(native, &[0xfeff], false), Quarantined("UTF-16")),
        case("UTF-16 BE with its mark", utf16(native, &[0xfeff], true), Quarantined("UTF-16")),
        case("UTF-16 LE without a mark", utf16(native, &[], false), Quarantined("UTF-16")),
        case("UTF-16 BE without a mark", utf16(native, &[], true), Quarantined("UTF-16")),
        case(
            "gzip",
            b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xab\x56\x2a\xa9\x2c\x48\x55",
            Quarantined("gzip"),
        ),
        case("zstd", b"\x28\xb5\x2f\xfd\x20\x15\xa9", Quarantined("zstd")),
        case("MessagePack", b"\x82\xa4type\xa1T\xa4data\x01", Quarantined("not UTF-8")),
        case("CBOR", b"\xa2\x64type\x61T\x64data\x01", Quarantined("not UTF-8")),
        case("Protocol Buffers", b"\x0a\x01T\x10\x01", Quarantined("not JSON")),
        case(
            "noncharacters and astral planes",
            "{\"type\":\"T\",\"data\":\"\u{fffe}\u{ffff}\u{10ffff}😀\"}",
            Event,
        ),
    ]
}

/// What is wrong or odd as JSON.
fn texts() -> Vec<Case> {
    use Verdict::{Event, Quarantined};
    let not_json = Quarantined("not JSON");
    let nested =
        |open: &str, close: &str, n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
    vec![
        case("whitespace only", " \t\r\n", Quarantined("too early")),
        case("plain text", "hello", not_json),
        case("XML", "<event type=\"T\"/>", not_json),
        case("YAML", "type: T\ndata: 1\n", not_json),
        case("a form", "type=T&data=1", not_json),
        case("truncated object", r#"{"type":"T","data":{"a":1"#, Quarantined("too early")),
        case("truncated string", r#"{"type":"T","data":"abc"#, Quarantined("too early")),
        case("truncated escape", r#"{"type":"T","data":"\u00"#, Quarantined("too early")),
        case("truncated literal", r#"{"type":"T","data":tru"#, Quarantined("too early")),
        case("truncated number", r#"{"type":"T","data":-"#, Quarantined("too early")),
        case("trailing comma in an object", r#"{"type":"T","data":1,}"#, Quarantined("comma")),
        case("trailing comma in an array", r#"{"type":"T","data":[1,]}"#, Quarantined("comma")),
        case("leading comma", r#"{,"type":"T"}"#, not_json),
        case("two commas", r#"{"type":"T","data":[1,,2]}"#, Quarantined("comma")),
        case("missing comma", r#"{"type":"T" "data":1}"#, Quarantined("expected `,` or `}`")),
        case("missing colon", r#"{"type" "T"}"#, Quarantined("expected `:`")),
        case("missing value", r#"{"type":}"#, Quarantined("a value is missing")),
        case(
            "mismatched brackets",
            r#"{"type":"T","data":[1}}"#,
            Quarantined("expected `,` or `]`"),
        ),
        case("a bracket too many", r#"{"type":"T","data":1}}"#, Quarantined("follows")),
        case("trailing garbage", r#"{"type":"T","data":1} x"#, Quarantined("follows")),
        case("trailing zero byte", "{\"type\":\"T\",\"data\":1}\0", Quarantined("follows")),
        case(
            "two values in a line",
            r#"{"type":"T","data":1}{"type":"T","data":2}"#,
            Quarantined("follows"),
        ),
        case(
            "two lines (NDJSON)",
            "{\"type\":\"T\",\"data\":1}\n{\"type\":\"T\",\"data\":2}\n",
            Quarantined("line 2, column 1"),
        ),
        case("single quotes", "{'type':'T','data':1}", Quarantined("double quotes")),
        case("single-quoted value", r#"{"type":'T'}"#, Quarantined("double quotes")),
        case("unquoted names", "{type:\"T\",data:1}", Quarantined("name in double quotes")),
        case("line comment", "{\"type\":\"T\", // why\n\"data\":1}", Quarantined("comments")),
        case("block comment", r#"/* why */{"type":"T"}"#, Quarantined("comments")),
        case("hash comment", "# why\n{\"type\":\"T\"}", Quarantined("comments")),
        case("NaN", r#"{"type":"T","data":NaN}"#, Quarantined("expected a value")),
        case("Infinity", r#"{"type":"T","data":Infinity}"#, Quarantined("expected a value")),
        case("-Infinity", r#"{"type":"T","data":-Infinity}"#, Quarantined("needs a digit")),
        case("undefined", r#"{"type":"T","data":undefined}"#, Quarantined("expected a value")),
        case("Python's None", r#"{"type":"T","data":None}"#, Quarantined("expected a value")),
        case("True with a capital", r#"{"type":"T","data":True}"#, Quarantined("expected a value")),
        case("hexadecimal number", r#"{"type":"T","data":0x10}"#, not_json),
        case(
            "number with a leading zero",
            r#"{"type":"T","data":007}"#,
            Quarantined("begin with 0"),
        ),
        case("number with a plus", r#"{"type":"T","data":+1}"#, not_json),
        case("number without a whole part", r#"{"type":"T","data":.5}"#, not_json),
        case(
            "number without a fraction",
            r#"{"type":"T","data":1.}"#,
            Quarantined("needs a digit"),
        ),
        case(
            "number without an exponent",
            r#"{"type":"T","data":1e}"#,
            Quarantined("needs a digit"),
        ),
        case("unknown escape", r#"{"type":"T","data":"\x41"}"#, Quarantined("no such escape")),
        case("bad \\u escape", r#"{"type":"T","data":"\u12G4"}"#, Quarantined("hexadecimal")),
        case(
            "raw newline in a string",
            "{\"type\":\"T\",\"data\":\"a\nb\"}",
            Quarantined("control character"),
        ),
        case(
            "raw tab in a string",
            "{\"type\":\"T\",\"data\":\"a\tb\"}",
            Quarantined("control character"),
        ),
        case(
            "raw zero byte in a string",
            "{\"type\":\"T\",\"data\":\"a\0b\"}",
            Quarantined("control character"),
        ),
        case("no-break space between", "{\u{a0}\"type\":\"T\",\"data\":1}", not_json),
        case("form feed between", "{\u{c}\"type\":\"T\",\"data\":1}", not_json),
        case(
            "depth 100,000 of arrays",
            nested("[", "]", 100_000),
            Quarantined("nested deeper than 128"),
        ),
        case(
            "depth 50,000 of objects",
            nested("{\"a\":", "}", 50_000),
            Quarantined("nested deeper than 128"),
        ),
        case(
            "100,000 brackets never closed",
            "[".repeat(100_000),
            Quarantined("nested deeper than 128"),
        ),
        case(
            "depth 129 in data",
            format!(r#"{{"type":"T","data":{}}}"#, nested("[", "]", 128)),
            Quarantined("nested deeper"),
        ),
        case(
            "depth 128 in data",
            format!(r#"{{"type":"T","data":{}}}"#, nested("[", "]", 127)),
            Event,
        ),
        case("1e400", r#"{"type":"T","data":[1e400,-1e400,1e-400]}"#, Event),
        case("1,000 digits", format!(r#"{{"type":"T","data":{}}}"#, "9".repeat(1000)), Event),
        case("-0 and 0.10", r#"{"type":"T","data":[-0,-0.0,0.10,1E+2]}"#, Event),
        case("a zero character in data", r#"{"type":"T","data":"a\u0000b"}"#, Event),
        case(
            "lone surrogates in data",
            r#"{"type":"T","data":["\ud800","\udc00\ud800","\ud800x"]}"#,
            Event,
        ),
        case("a lone surrogate in a name", r#"{"type":"T","data":1,"\ud800":2}"#, Event),
        case("every escape", r#"{"type":"T","data":"\"\\\/\b\f\n\r\t\u00e9\uD83D\uDE00"}"#, Event),
        case("every whitespace", "\r\n\t {\t\"type\"\r:\n\"T\" ,\"data\" : [ ] } \n", Event),
        case("duplicate names in data", r#"{"type":"T","data":{"a":1,"a":2}}"#, Event),
        case(
            "duplicate id, type and data",
            r#"{"id":"1","id":"2","type":"A","type":"B","data":1,"data":2}"#,
            Event,
        ),
        case("escaped names", r#"{"\u0074ype":"T","d\u0061ta":1}"#, Event),
        case("empty name", r#"{"type":"T","data":{"":1},"":2}"#, Event),
        case(
            "a name of 10,000 bytes",
            format!(r#"{{"type":"T","data":{{"{}":1}}}}"#, "n".repeat(10_000)),
            Event,
        ),
        case(
            "10,000 members",
            format!(r#"{{"type":"T","data":{{{}"z":0}}}}"#, r#""a":1,"#.repeat(10_000)),
            Event,
        ),
        case(
            "DEL and line separators in a string",
            "{\"type\":\"T\",\"data\":\"\u{7f}\u{2028}\u{2029}\"}",
            Event,
        ),
    ]
}

/// What is odd about native and raw events.
fn natives() -> Vec<Case> {
    use Verdict::{Event, Quarantined};
    vec![
        case("no type", r#"{"data":1}"#, Event),
        case("type without data", r#"{"type":"T"}"#, Event),
        case("type is a number", r#"{"type":5,"data":1}"#, Event),
        case("null", "null", Event),
        case("a number", "-12.5e3", Event),
        case("a string", "\"hello\"", Event),
        case("false", "false", Event),
        case("empty object", "{}", Event),
        case("empty array", "[]", Event),
        case("array of events", r#"[{"type":"T","data":1},{"type":"T","data":2}]"#, Event),
        case("raw: id is an object", r#"{"id":{},"source":[],"key":true,"time":"soon"}"#, Event),
        case("data is null", r#"{"type":"T","data":null}"#, Event),
        case(
            "empty type",
            r#"{"type":"","data":1}"#,
            Quarantined("`type` of the native event is empty"),
        ),
        case("control character in type", r#"{"type":"a\u0000b","data":1}"#, Quarantined("U+0000")),
        case("lone surrogate in type", r#"{"type":"\ud800","data":1}"#, Quarantined("surrogate")),
        case(
            "zero character in id",
            r#"{"id":"a\u0000b","type":"T","data":1}"#,
            Quarantined("`id` contains the control character U+0000"),
        ),
        case("zero character in a raw id", r#"{"id":"\u0000"}"#, Quarantined("`id` contains")),
        case(
            "newline in source",
            r#"{"source":"a\nb","type":"T","data":1}"#,
            Quarantined("`source` contains"),
        ),
        case(
            "escape character in subject",
            r#"{"subject":"\u001b[2J","type":"T","data":1}"#,
            Quarantined("`subject` contains"),
        ),
        case("DEL in key", r#"{"key":"\u007f","type":"T","data":1}"#, Quarantined("U+007F")),
        case(
            "lone surrogate in id",
            r#"{"id":"\udc00","type":"T","data":1}"#,
            Quarantined("`id` is no Unicode"),
        ),
        case("id is a number", r#"{"id":42,"type":"T","data":1}"#, Event),
        case("id is 1e400", r#"{"id":1e400,"type":"T","data":1}"#, Event),
        case("id is null", r#"{"id":null,"type":"T","data":1}"#, Event),
        case("id is empty", r#"{"id":"","type":"T","data":1}"#, Event),
        case(
            "id is an object",
            r#"{"id":{"$oid":"x"},"type":"T","data":1}"#,
            Quarantined("`id` of the native event must be a string or a number"),
        ),
        case("id is a boolean", r#"{"id":true,"type":"T","data":1}"#, Quarantined("a boolean")),
        case("source is an array", r#"{"source":[],"type":"T","data":1}"#, Quarantined("`source`")),
        case(
            "id of 5,000 bytes",
            format!(r#"{{"id":"{}","type":"T","data":1}}"#, "i".repeat(5000)),
            Event,
        ),
        case(
            "type of 5,000 bytes",
            format!(r#"{{"type":"{}","data":1}}"#, "t".repeat(5000)),
            Event,
        ),
        case("type of emoji", r#"{"type":"🎓📚","data":1}"#, Event),
        case(
            "time of a person",
            r#"{"time":"yesterday","type":"T","data":1}"#,
            Quarantined("RFC 3339"),
        ),
        case(
            "time without a zone",
            r#"{"time":"2024-01-01T00:00:00","type":"T","data":1}"#,
            Quarantined("RFC 3339"),
        ),
        case(
            "time of 30 February",
            r#"{"time":"2024-02-30T00:00:00Z","type":"T","data":1}"#,
            Quarantined("RFC 3339"),
        ),
        case(
            "time with a fraction of milliseconds",
            r#"{"time":1.5,"type":"T","data":1}"#,
            Quarantined("milliseconds"),
        ),
        case(
            "time beyond every calendar",
            r#"{"time":9223372036854775807,"type":"T","data":1}"#,
            Quarantined("milliseconds"),
        ),
        case("time is an object", r#"{"time":{},"type":"T","data":1}"#, Quarantined("`time`")),
        case("time in milliseconds", r#"{"time":1700000000000,"type":"T","data":1}"#, Event),
        case("time before 1970", r#"{"time":-1,"type":"T","data":1}"#, Event),
        case(
            "time in a leap second",
            r#"{"time":"2016-12-31t23:59:60.5z","type":"T","data":1}"#,
            Event,
        ),
    ]
}

/// What is wrong or odd about CloudEvents.
fn cloudevents() -> Vec<Case> {
    use Verdict::{Event, Quarantined};
    const STRUCTURED: &str = "application/cloudevents+json";
    let typed = |name, body: &str, content_type, verdict| {
        with(case(name, body, verdict), &[("Content-Type", content_type)])
    };
    let whole = r#"{"specversion":"1.0","id":"1","source":"/s","type":"T"}"#;
    vec![
        case("CloudEvent without data", whole, Event),
        case(
            "CloudEvent without id",
            r#"{"specversion":"1.0","source":"/s","type":"T"}"#,
            Quarantined("no `id`"),
        ),
        case(
            "CloudEvent without source",
            r#"{"specversion":"1.0","id":"1","type":"T"}"#,
            Quarantined("no `source`"),
        ),
        case(
            "CloudEvent without type",
            r#"{"specversion":"1.0","id":"1","source":"/s"}"#,
            Quarantined("no `type`"),
        ),
        case(
            "CloudEvent with a null id",
            r#"{"specversion":"1.0","id":null,"source":"/s","type":"T"}"#,
            Quarantined("no `id`"),
        ),
        case(
            "CloudEvent with an empty id",
            r#"{"specversion":"1.0","id":"","source":"/s","type":"T"}"#,
            Quarantined("`id` of the cloudevents-structured event is empty"),
        ),
        case(
            "CloudEvent with a number for id",
            r#"{"specversion":"1.0","id":1,"source":"/s","type":"T"}"#,
            Quarantined("must be a string, and is a number"),
        ),
        case(
            "CloudEvent with an array for type",
            r#"{"specversion":"1.0","id":"1","source":"/s","type":["T"]}"#,
            Quarantined("`type`"),
        ),
        case(
            "CloudEvents 0.3",
            r#"{"specversion":"0.3","id":"1","source":"/s","type":"T"}"#,
            Quarantined("`specversion` is \"0.3\""),
        ),
        case(
            "specversion is a number",
            r#"{"specversion":1.0,"id":"1","source":"/s","type":"T"}"#,
            Quarantined("`specversion`"),
        ),
        case(
            "CloudEvent with a bad time",
            r#"{"specversion":"1.0","id":"1","source":"/s","type":"T","time":"now"}"#,
            Quarantined("RFC 3339"),
        ),
        case(
            "CloudEvent with time in milliseconds",
            r#"{"specversion":"1.0","id":"1","source":"/s","type":"T","time":5}"#,
            Quarantined("`time`"),
        ),
        case(
            "CloudEvent with a zero character in id",
            r#"{"specversion":"1.0","id":"\u0000","source":"/s","type":"T"}"#,
            Quarantined("U+0000"),
        ),
        case(
            "CloudEvent with base64 data",
            r#"{"specversion":"1.0","id":"b64","source":"/s","type":"T","data_base64":"AAE="}"#,
            Event,
        ),
        typed(
            "content type says CloudEvent, no specversion",
            r#"{"id":"1"}"#,
            STRUCTURED,
            Quarantined("no `specversion`"),
        ),
        typed(
            "content type says CloudEvent, an array",
            "[]",
            STRUCTURED,
            Quarantined("must be a JSON object"),
        ),
        typed(
            "content type in capitals with parameters",
            whole,
            "Application/CloudEvents+JSON ; charset=UTF-8",
            Event,
        ),
        typed(
            "CloudEvents batch",
            "[]",
            "application/cloudevents-batch+json; charset=utf-8",
            Quarantined("batch"),
        ),
        typed(
            "CloudEvents in XML",
            "<event/>",
            "application/cloudevents+xml",
            Quarantined("`application/cloudevents+xml` is not supported"),
        ),
        typed(
            "CloudEvents in Avro",
            "\0",
            "application/cloudevents+avro",
            Quarantined("not supported"),
        ),
        typed(
            "content type says XML, the body is JSON",
            r#"{"type":"T","data":1}"#,
            "application/xml",
            Event,
        ),
        typed("content type is no content type", r#"{"type":"T","data":1}"#, ";;;", Event),
    ]
}

/// What is wrong or odd in headers.
fn headers() -> Vec<Case> {
    use Verdict::{Event, Quarantined};
    const NATIVE: &str = r#"{"type":"T","data":1}"#;
    const BINARY: [(&str, &str); 4] =
        [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "T")];
    let binary = |name, body: &str, more: &[(&str, &str)], verdict| {
        with(with(case(name, body, verdict), more), &BINARY)
    };
    let long = "x".repeat(300);
    let mut many = case("10,000 headers", NATIVE, Event);
    many.headers = (0..10_000).map(|n| (format!("x-{n}"), n.to_string())).collect();
    vec![
        binary("binary CloudEvent", "[1]", &[], Event),
        binary(
            "binary CloudEvent that says its data is XML",
            "[1]",
            &[("Content-Type", "text/xml")],
            Event,
        ),
        binary(
            "binary CloudEvent whose data is XML",
            "<a/>",
            &[("Content-Type", "text/xml")],
            Quarantined("not JSON"),
        ),
        binary("binary CloudEvent without data", "", &[], Quarantined("empty")),
        binary(
            "binary CloudEvent with a bad time",
            "1",
            &[("ce-time", "now")],
            Quarantined("RFC 3339"),
        ),
        binary("binary CloudEvent with a repeated id", "1", &[("CE-ID", "first")], Event),
        binary(
            "binary CloudEvent, percent-encoded",
            "1",
            &[("ce-subject", "Euro%20%E2%82%AC")],
            Event,
        ),
        with(case("ce-type alone", "1", Quarantined("no `specversion`")), &[("ce-type", "T")]),
        with(
            case("binary CloudEvent without id", "1", Quarantined("no `id`")),
            &[BINARY[0], BINARY[2], BINARY[3]],
        ),
        with(
            case("binary CloudEvent 0.3", "1", Quarantined("only \"1.0\"")),
            &[("ce-specversion", "0.3")],
        ),
        with(
            case("binary CloudEvent with an empty id", "1", Quarantined("`id`")),
            &[BINARY[0], ("ce-id", ""), BINARY[2], BINARY[3]],
        ),
        with(case("an extension alone", NATIVE, Event), &[("ce-traceparent", "00-1")]),
        with(case("an id from a header", NATIVE, Event), &[("Nats-Msg-Id", "header-id")]),
        with(case("a header value of 300 bytes", NATIVE, Event), &[("x-long", long.as_str())]),
        with(case("a header name of 300 bytes", NATIVE, Event), &[(long.as_str(), "v")]),
        with(
            case("an id of 300 bytes from a header", NATIVE, Event),
            &[("Nats-Msg-Id", long.as_str())],
        ),
        with(case("a repeated header", NATIVE, Event), &[("x-a", "1"), ("X-A", "2"), ("x-a", "")]),
        with(
            case("odd header names", NATIVE, Event),
            &[("", "v"), ("a b", "v"), ("é😀", "v"), (":x", "v"), ("ce-", "v"), ("c\u{e9}-", "v")],
        ),
        with(case("CR and LF in a header", NATIVE, Event), &[("x-inject", "a\r\nX-Other: b")]),
        with(case("a zero character in a header", NATIVE, Event), &[("x-zero", "a\0b")]),
        with(
            case(
                "CR and LF in the id header",
                NATIVE,
                Quarantined("`id` contains the control character U+000D"),
            ),
            &[("Nats-Msg-Id", "a\r\nb")],
        ),
        many,
    ]
}

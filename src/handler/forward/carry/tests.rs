use proptest::{collection, prelude::*};

use super::*;

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z0-9 ]{0,8}",
        1 => "\\PC{0,12}",
        1 => "[\\x00-\\x20a%\"é]{0,6}",
        1 => Just("5".to_owned()),
        1 => Just("true".to_owned()),
        1 => Just("v".repeat(300)),
    ]
}

/// Mostly names that may meet: properties and what stands for them, attributes in every
/// binding's spelling, our own, the same in another case.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-cA-C]{1,2}",
        2 => prop::sample::select(vec![
            "Content-Type", "content-type", "Amqp-Priority", "amqp-priority", "Amqp-Type",
            "Amqp-Content-Encoding", "cloudEvents:id", "cloudEvents:ID", "cloudEvents_id", "ce-id",
            "CE-time", "cloudEvents:time", "cloudEvents:", "ce-", "traceparent", TYPED_HEADER,
            "Pulsebus-Typed", MESSAGE_ID_HEADER, "origin", "host", "authorization", "from", "te",
            "X-Forwarded-For", "webhook-x", "::type", "::", "Nats-Msg-Id", "nats-x",
        ]).prop_map(str::to_owned),
        1 => "\\PC{0,6}".prop_map(|name| name.replace(':', "")),
    ]
}

fn value() -> impl Strategy<Value = HeaderValue> {
    let leaf = prop_oneof![
        6 => text().prop_map(HeaderValue::Text),
        1 => any::<bool>().prop_map(HeaderValue::Bool),
        1 => any::<i8>().prop_map(HeaderValue::Int8),
        1 => any::<u8>().prop_map(HeaderValue::Uint8),
        1 => any::<i16>().prop_map(HeaderValue::Int16),
        1 => any::<u16>().prop_map(HeaderValue::Uint16),
        1 => any::<i32>().prop_map(HeaderValue::Int32),
        1 => any::<u32>().prop_map(HeaderValue::Uint32),
        1 => any::<i64>().prop_map(HeaderValue::Int64),
        1 => any::<u32>().prop_map(HeaderValue::Float32),
        1 => any::<u64>().prop_map(HeaderValue::Float64),
        1 => any::<(u8, u32)>().prop_map(|(s, v)| HeaderValue::Decimal(s, v)),
        1 => any::<u64>().prop_map(HeaderValue::Timestamp),
        1 => any::<Vec<u8>>().prop_map(HeaderValue::Bytes),
        1 => Just(HeaderValue::Binary(vec![0xff, 0])),
        1 => Just(HeaderValue::Void),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| {
        prop_oneof![
            collection::vec(inner.clone(), 0..4).prop_map(HeaderValue::Array),
            collection::btree_map("[a-c:]{0,3}", inner, 0..4).prop_map(|table| {
                HeaderValue::Table(table.into_iter().map(|(n, v)| (n.into(), v)).collect())
            }),
        ]
    })
}

/// What a consumer of RabbitMQ hands over: properties, and a table that has each name once.
fn from_amqp() -> impl Strategy<Value = Headers> {
    let property = |name: &'static str| {
        let value = match Property::of(name).map(|property| &property.kind) {
            Some(Kind::Byte) => any::<u8>().prop_map(HeaderValue::Uint8).boxed(),
            Some(Kind::Seconds) => any::<u64>().prop_map(HeaderValue::Timestamp).boxed(),
            _ => text()
                .prop_filter("short", |t| t.len() <= SHORT)
                .prop_map(HeaderValue::Text)
                .boxed(),
        };
        proptest::option::weighted(0.3, value.prop_map(move |value| (name.to_owned(), value)))
    };
    let properties: Vec<_> = PROPERTIES
        .iter()
        .map(|property| property.name)
        .chain([":message_id", ":expiration"])
        .map(property)
        .collect();
    (properties, collection::btree_map(name(), value(), 0..8)).prop_map(|(properties, table)| {
        let all = properties.into_iter().flatten().chain(table);
        all.map(|(name, value)| (name.into(), value)).collect()
    })
}

/// What a consumer of NATS hands over: texts on one line, names repeated.
fn from_nats() -> impl Strategy<Value = Headers> {
    let name = name().prop_filter("a name", |name| is_name(name, false));
    let text = text().prop_filter("a line", |text| is_text(text, false));
    collection::vec((name, text), 0..8).prop_map(|all| {
        all.into_iter().map(|(name, text)| (name.into(), HeaderValue::Text(text))).collect()
    })
}

/// In an order that does not depend on the broker's, each name's values together.
fn sorted(headers: &Headers) -> Vec<(String, String)> {
    let mut all: Vec<_> =
        headers.iter().map(|(name, value)| (name.to_owned(), format!("{value:?}"))).collect();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all
}

/// As RabbitMQ keeps them: a name once, with an array where it was repeated.
fn as_table(headers: &Headers) -> Headers {
    by_name(headers.iter())
        .into_iter()
        .map(|(name, values)| {
            let value = match values.as_slice() {
                [value] => (*value).clone(),
                many => HeaderValue::Array(many.iter().map(|value| (*value).clone()).collect()),
            };
            (name.into(), value)
        })
        .collect()
}

/// As HTTP keeps them: small letters.
fn as_http(headers: &Headers) -> Headers {
    headers.iter().map(|(n, v)| (n.to_ascii_lowercase().into(), v.clone())).collect()
}

fn kept(headers: &Headers, from: &str, to: Place) -> Headers {
    let kept = headers.iter().filter(|(name, _)| !stays_behind(name, from, to));
    kept.map(|(name, value)| (name.into(), value.clone())).collect()
}

fn fits(headers: &Headers, http: bool) -> Result<(), TestCaseError> {
    for (name, value) in headers.iter() {
        prop_assert!(is_name(name, http), "{name:?}");
        // The publisher leaves these out, whoever says them.
        prop_assert!(!http || is_content_type(name) || !hop::is_of_a_request(name), "{name:?}");
        let HeaderValue::Text(text) = value else { panic!("{name}: {value:?}") };
        prop_assert!(is_text(text, http), "{name:?}: {text:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn G9_amqp_to_amqp_is_identical(headers in from_amqp()) {
        let out = carry(&headers, "amqp", Place::Amqp);
        prop_assert_eq!(sorted(&out), sorted(&kept(&headers, "amqp", Place::Amqp)));
    }

    #[test]
    fn G9_amqp_through_nats_comes_back_typed(headers in from_amqp()) {
        let there = carry(&headers, "amqp", Place::NatsSubject);
        fits(&there, false)?;
        let back = as_table(&carry(&there, "nats", Place::Amqp));
        prop_assert_eq!(sorted(&back), sorted(&kept(&headers, "amqp", Place::Amqp)), "{:#?}", there);
    }

    #[test]
    fn G9_amqp_through_http_comes_back_typed(headers in from_amqp()) {
        // Plain names are small letters on the other side; what meets that way is one header.
        let headers: Headers = {
            let mut seen = std::collections::BTreeSet::new();
            headers
                .iter()
                .map(|(name, value)| (name.to_ascii_lowercase(), value))
                .map(|(name, value)| (name.replace("cloudevents:", "cloudEvents:"), value))
                .filter(|(name, _)| seen.insert(name.clone()))
                .map(|(name, value)| (name.into(), value.clone()))
                .collect()
        };
        let there = carry(&headers, "amqp", Place::UrlPath);
        fits(&there, true)?;
        // What says who somebody is goes to no webhook.
        let expected = kept(&kept(&headers, "amqp", Place::UrlPath), "amqp", Place::Amqp);
        let back = as_table(&carry(&as_http(&there), "http", Place::Amqp));
        prop_assert_eq!(sorted(&back), sorted(&expected), "{:#?}", there);
    }

    #[test]
    fn G9_nats_to_nats_is_identical(headers in from_nats()) {
        let out = carry(&headers, "nats", Place::NatsSubject);
        prop_assert_eq!(sorted(&out), sorted(&kept(&headers, "nats", Place::NatsSubject)));
    }

    #[test]
    fn G9_nats_through_amqp_comes_back(headers in from_nats()) {
        // What looks like ours is read as such; attributes are spelled as the binding says.
        let plain = |name: &str| {
            !name.eq_ignore_ascii_case(TYPED_HEADER) && attribute_in(name).is_none()
        };
        let headers: Headers = headers
            .iter()
            .filter(|(name, _)| plain(name))
            .map(|(name, value)| (name.into(), value.clone()))
            .collect();
        // A property has one value; a header that stands for one and is repeated keeps the
        // others in the table.
        let single = |name: &str| {
            Property::of_text(name).is_none()
                || headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).count() == 1
        };
        let headers: Headers = headers
            .iter()
            .filter(|(name, _)| single(name))
            .map(|(name, value)| (name.into(), value.clone()))
            .collect();
        let there = as_table(&carry(&headers, "nats", Place::Amqp));
        let back = carry(&there, "amqp", Place::NatsSubject);
        fits(&back, false)?;
        prop_assert_eq!(sorted(&back), sorted(&kept(&headers, "nats", Place::Amqp)), "{:#?}", there);
    }

    #[test]
    fn G9_nats_through_http_comes_back(headers in from_nats()) {
        let mut seen = std::collections::BTreeSet::new();
        // Names in small letters, each once where it stands for a property.
        let headers: Headers = headers
            .iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value))
            .filter(|(name, _)| name != TYPED_HEADER && attribute_in(name).is_none())
            .filter(|(name, _)| Property::of_text(name).is_none() || seen.insert(name.clone()))
            .map(|(name, value)| (name.into(), value.clone()))
            .collect();
        let there = carry(&headers, "nats", Place::UrlPath);
        fits(&there, true)?;
        let back = carry(&as_http(&there), "http", Place::NatsSubject);
        fits(&back, false)?;
        let expected = kept(&kept(&headers, "nats", Place::UrlPath), "nats", Place::NatsSubject);
        // The names of what stands for a property are written as ours are.
        let (back, expected) = (as_http(&back), as_http(&expected));
        prop_assert_eq!(sorted(&back), sorted(&expected), "{:#?}", there);
    }

    #[test]
    fn whatever_comes_has_a_form_everywhere(headers in from_amqp(), from in "amqp|nats|http|mine") {
        for (place, http) in [(Place::NatsSubject, false), (Place::UrlPath, true)] {
            let own = matches!((&*from, http), ("nats", false) | ("http", true));
            if !own {
                fits(&carry(&headers, &from, place), http)?;
            }
        }
    }
}

#[test]
fn a_person_can_read_what_text_can_say() {
    let mut headers = Headers::new();
    headers.push(":content_type", "application/json");
    headers.push(":priority", HeaderValue::Uint8(5));
    headers.push(":correlation_id", "c-1");
    headers.push(":timestamp", HeaderValue::Timestamp(1_700_000_000));
    headers.push("x-count", HeaderValue::Int32(7));
    headers.push("x-list", HeaderValue::Array(vec!["a".into(), "b".into()]));
    headers.push("cloudEvents:source", "/a b");
    headers.push(
        "x-table",
        HeaderValue::Table([("n".into(), HeaderValue::Void)].into_iter().collect()),
    );
    let there = carry(&headers, "amqp", Place::NatsSubject);
    let found: Vec<_> = there.iter().map(|(n, v)| (n, v.as_str().unwrap())).collect();
    assert_eq!(
        found,
        [
            ("Content-Type", "application/json"),
            ("Amqp-Priority", "5"),
            ("Amqp-Correlation-Id", "c-1"),
            ("Amqp-Timestamp", "1700000000"),
            ("x-count", "7"),
            ("x-list", "a"),
            ("x-list", "b"),
            ("ce-source", "/a%20b"),
            (TYPED_HEADER, r#"{"x-count":{"int32":7},"x-table":{"table":{"n":{"void":null}}}}"#),
        ]
    );
}

#[test]
fn what_is_told_of_a_broker_does_not_command_the_next_one() {
    let mut headers = Headers::new();
    headers.push(TYPED_HEADER, r#"{"CC":{"array":["elsewhere"]},":user_id":"root","x-death":"1"}"#);
    assert!(carry(&headers, "nats", Place::Amqp).is_empty());
    // What is no such JSON is a header like any other.
    let mut headers = Headers::new();
    headers.push(TYPED_HEADER, "{");
    assert_eq!(carry(&headers, "nats", Place::Amqp), headers);
}

#[test]
fn the_table_in_the_documentation_is_what_happens() {
    let page = include_str!("../../../../docs/bridging.md");
    let mut rows = 0;
    for line in page.lines().filter(|line| line.starts_with("| `{")) {
        let cells: Vec<&str> = line.split('`').collect();
        let [_, amqp, _, text, _] = cells.as_slice() else { panic!("{line}") };
        let read = |json: &str| Headers::from_json(json).unwrap();
        let (amqp, text) = (read(amqp), read(text));
        for (place, from) in [(Place::NatsSubject, "nats"), (Place::UrlPath, "http")] {
            let there = carry(&amqp, "amqp", place);
            assert_eq!(sorted(&there), sorted(&text), "{line}");
            let arrived = if from == "http" { as_http(&there) } else { there };
            let back = as_table(&carry(&arrived, from, Place::Amqp));
            assert_eq!(sorted(&back), sorted(&amqp), "{line}");
        }
        rows += 1;
    }
    assert!(rows > 20, "{rows}");
    for property in &PROPERTIES {
        let named = format!("`{{\"{}\":", property.name);
        assert!(page.contains(&named), "{} is not in the table", property.name);
    }
    // What stays behind, by the other table.
    let row = |from: &str| {
        let start = format!("| {from} | ");
        page.lines().find(|line| line.starts_with(&start)).unwrap()
    };
    for (from, kind) in [("AMQP", "amqp"), ("HTTP", "http"), ("NATS", "nats"), ("any", "amqp")] {
        for name in row(from).split('`').skip(1).step_by(2) {
            let name = match name.strip_suffix('…') {
                Some(prefix) => format!("{prefix}x"),
                None => name.to_owned(),
            };
            let property = format!(":{name}");
            let one: Headers = [&name, &property]
                .into_iter()
                .map(|name| (name.as_str().into(), HeaderValue::from("v")))
                .collect();
            let left = carry(&one, kind, Place::Amqp);
            let gone = [&name, &property].iter().any(|name| left.get(name).is_none());
            assert!(gone, "{from}: {name} is forwarded");
        }
    }
}

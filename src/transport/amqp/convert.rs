//! Properties and field tables of AMQP, and [`Headers`]: each way without loss.
//!
//! The fourteen properties of `basic` are headers whose names begin with a colon; the table
//! entries follow under their own names, one that itself begins with a colon under a second.

use std::collections::BTreeMap;

use lapin::{
    BasicProperties,
    types::{AMQPValue, ByteArray, DecimalValue, FieldArray, FieldTable, ShortString},
};

use crate::{
    event::{HeaderValue, Headers},
    transport::Outbound,
};

/// Marks a property, and escapes a table entry of that look.
const MARK: char = ':';

/// Longest short string of AMQP: names, ids, addresses. Bytes.
const SHORT: usize = 255;

/// What a message may be published with besides its properties: names that the broker owns or
/// acts upon. `CC` and `BCC` would route a forwarded message where its first publisher said.
fn broker_owned(name: &str) -> bool {
    matches!(
        name,
        "CC" | "BCC" | "x-death" | "x-delivery-count" | "x-acquired-count" | "x-received-from"
    ) || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
}

/// The headers of a delivery.
pub(super) fn headers_in(properties: &BasicProperties) -> Headers {
    let mut headers = Headers::new();
    let mut text = |name: &str, value: &Option<ShortString>| {
        if let Some(value) = value {
            headers.push(name, value.as_str());
        }
    };
    text(":content_type", properties.content_type());
    text(":content_encoding", properties.content_encoding());
    text(":correlation_id", properties.correlation_id());
    text(":reply_to", properties.reply_to());
    text(":expiration", properties.expiration());
    text(":message_id", properties.message_id());
    text(":type", properties.kind());
    text(":user_id", properties.user_id());
    text(":app_id", properties.app_id());
    text(":cluster_id", properties.cluster_id());
    if let Some(value) = *properties.delivery_mode() {
        headers.push(":delivery_mode", HeaderValue::Uint8(value));
    }
    if let Some(value) = *properties.priority() {
        headers.push(":priority", HeaderValue::Uint8(value));
    }
    if let Some(value) = *properties.timestamp() {
        headers.push(":timestamp", HeaderValue::Timestamp(value));
    }
    if let Some(table) = properties.headers() {
        for (name, value) in table {
            let name = name.as_str();
            if name.starts_with(MARK) {
                headers.push(format!("{MARK}{name}"), value_in(value));
            } else {
                headers.push(name, value_in(value));
            }
        }
    }
    headers
}

fn value_in(value: &AMQPValue) -> HeaderValue {
    match value {
        AMQPValue::Boolean(v) => HeaderValue::Bool(*v),
        AMQPValue::ShortShortInt(v) => HeaderValue::Int8(*v),
        AMQPValue::ShortShortUInt(v) => HeaderValue::Uint8(*v),
        AMQPValue::ShortInt(v) => HeaderValue::Int16(*v),
        AMQPValue::ShortUInt(v) => HeaderValue::Uint16(*v),
        AMQPValue::LongInt(v) => HeaderValue::Int32(*v),
        AMQPValue::LongUInt(v) => HeaderValue::Uint32(*v),
        AMQPValue::LongLongInt(v) => HeaderValue::Int64(*v),
        AMQPValue::Float(v) => HeaderValue::Float32(v.to_bits()),
        AMQPValue::Double(v) => HeaderValue::Float64(v.to_bits()),
        AMQPValue::DecimalValue(v) => HeaderValue::Decimal(v.scale, v.value),
        AMQPValue::ShortString(v) => HeaderValue::Short(v.as_str().to_owned()),
        AMQPValue::LongString(v) => match std::str::from_utf8(v.as_bytes()) {
            Ok(text) => HeaderValue::Text(text.to_owned()),
            Err(_) => HeaderValue::Binary(v.as_bytes().to_vec()),
        },
        AMQPValue::FieldArray(v) => HeaderValue::Array(v.as_slice().iter().map(value_in).collect()),
        AMQPValue::Timestamp(v) => HeaderValue::Timestamp(*v),
        AMQPValue::FieldTable(v) => HeaderValue::Table(
            v.into_iter().map(|(name, value)| (name.as_str().into(), value_in(value))).collect(),
        ),
        AMQPValue::ByteArray(v) => HeaderValue::Bytes(v.as_slice().to_vec()),
        AMQPValue::Void => HeaderValue::Void,
    }
}

/// The properties of a message to publish: its id as `message_id`, persistent, its headers.
///
/// Left behind: `user_id` (the broker refuses another's), `expiration` (a copy would vanish
/// again), and what is [`broker_owned`].
///
/// # Errors
/// What does not fit AMQP, in words for a person.
pub(super) fn properties_out(message: &Outbound) -> Result<BasicProperties, String> {
    let properties = properties_of(&message.headers)?;
    Ok(properties.with_message_id(short("event id", &message.id)?).with_delivery_mode(2))
}

fn properties_of(headers: &Headers) -> Result<BasicProperties, String> {
    let mut properties = BasicProperties::default();
    let mut table = FieldTable::default();
    // A table has each name once: a repeated header (NATS, HTTP) becomes an array of its values.
    let mut repeated: BTreeMap<&str, Vec<AMQPValue>> = BTreeMap::new();
    for (name, value) in headers.iter() {
        let text = || {
            let text = value
                .to_text()
                .ok_or_else(|| format!("the property {name} has to be text, not {value:?}"))?;
            short(name, &text)
        };
        let byte = || {
            value.to_text().and_then(|text| text.parse::<u8>().ok()).ok_or_else(|| {
                format!("the property {name} has to be a number from 0 to 255, not {value:?}")
            })
        };
        properties = match name {
            ":content_type" => properties.with_content_type(text()?),
            ":content_encoding" => properties.with_content_encoding(text()?),
            ":delivery_mode" | ":message_id" | ":expiration" | ":user_id" => properties,
            ":priority" => properties.with_priority(byte()?),
            ":correlation_id" => properties.with_correlation_id(text()?),
            // Direct reply-to is an address within its own channel; the broker closes another
            // one that uses it.
            ":reply_to" if value.as_str() == Some("amq.rabbitmq.reply-to") => properties,
            ":reply_to" => properties.with_reply_to(text()?),
            ":timestamp" => properties.with_timestamp(
                value.to_text().and_then(|text| text.parse().ok()).ok_or_else(|| {
                    format!("the property {name} has to be seconds since 1970, not {value:?}")
                })?,
            ),
            ":type" => properties.with_type(text()?),
            ":app_id" => properties.with_app_id(text()?),
            ":cluster_id" => properties.with_cluster_id(text()?),
            _ => {
                let own = match name.strip_prefix(MARK) {
                    Some(own) if own.starts_with(MARK) => own,
                    _ => name,
                };
                if !broker_owned(own) {
                    let value = value_out(value)?;
                    match table.inner().get(own) {
                        None => {
                            table.insert(short("header name", own)?, value);
                        }
                        Some(first) => {
                            let first = || vec![first.clone()];
                            repeated.entry(own).or_insert_with(first).push(value);
                        }
                    }
                }
                properties
            }
        };
    }
    for (name, values) in repeated {
        table.insert(short("header name", name)?, AMQPValue::FieldArray(FieldArray::from(values)));
    }
    if !table.inner().is_empty() {
        properties = properties.with_headers(table);
    }
    Ok(properties)
}

fn value_out(value: &HeaderValue) -> Result<AMQPValue, String> {
    Ok(match value {
        // RabbitMQ's tables know no short strings: it would close the connection.
        HeaderValue::Text(v) | HeaderValue::Short(v) => AMQPValue::LongString(v.as_bytes().into()),
        HeaderValue::Bool(v) => AMQPValue::Boolean(*v),
        HeaderValue::Int8(v) => AMQPValue::ShortShortInt(*v),
        HeaderValue::Uint8(v) => AMQPValue::ShortShortUInt(*v),
        HeaderValue::Int16(v) => AMQPValue::ShortInt(*v),
        HeaderValue::Uint16(v) => AMQPValue::ShortUInt(*v),
        HeaderValue::Int32(v) => AMQPValue::LongInt(*v),
        HeaderValue::Uint32(v) => AMQPValue::LongUInt(*v),
        HeaderValue::Int64(v) => AMQPValue::LongLongInt(*v),
        HeaderValue::Float32(v) => AMQPValue::Float(f32::from_bits(*v)),
        HeaderValue::Float64(v) => AMQPValue::Double(f64::from_bits(*v)),
        HeaderValue::Decimal(scale, value) => {
            AMQPValue::DecimalValue(DecimalValue { scale: *scale, value: *value })
        }
        HeaderValue::Timestamp(v) => AMQPValue::Timestamp(*v),
        HeaderValue::Bytes(v) => AMQPValue::ByteArray(ByteArray::from(v.as_slice())),
        HeaderValue::Binary(v) => AMQPValue::LongString(v.as_slice().into()),
        HeaderValue::Array(v) => AMQPValue::FieldArray(FieldArray::from(
            v.iter().map(value_out).collect::<Result<Vec<_>, _>>()?,
        )),
        HeaderValue::Table(v) => {
            let mut table = FieldTable::default();
            for (name, value) in v.iter() {
                table.insert(short("header name", name)?, value_out(value)?);
            }
            AMQPValue::FieldTable(table)
        }
        HeaderValue::Void => AMQPValue::Void,
    })
}

/// A short string, which AMQP limits to 255 bytes.
pub(super) fn short(what: &str, text: &str) -> Result<ShortString, String> {
    ShortString::try_new(text).map_err(|_| {
        let start: String = text.chars().take(40).collect();
        format!("the {what} `{start}…` has {} bytes; AMQP takes {SHORT} at most", text.len())
    })
}

/// A queue argument from configuration.
pub(super) fn argument(value: &serde_json::Value) -> Result<AMQPValue, String> {
    use serde_json::Value;
    Ok(match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(v) => AMQPValue::Boolean(*v),
        Value::Number(v) => match (v.as_i64(), v.as_f64()) {
            (Some(v), _) => AMQPValue::LongLongInt(v),
            (None, Some(v)) => AMQPValue::Double(v),
            (None, None) => return Err(format!("the number {v} is too large")),
        },
        Value::String(v) => AMQPValue::LongString(v.as_bytes().into()),
        Value::Array(v) => AMQPValue::FieldArray(FieldArray::from(
            v.iter().map(argument).collect::<Result<Vec<_>, _>>()?,
        )),
        Value::Object(v) => {
            let mut table = FieldTable::default();
            for (name, value) in v {
                table.insert(short("argument name", name)?, argument(value)?);
            }
            AMQPValue::FieldTable(table)
        }
    })
}

/// How many bytes the properties take on the wire, at most: they travel in one frame, and a
/// larger one costs the connection.
pub(super) fn wire_size(properties: &BasicProperties) -> usize {
    let texts = [
        properties.content_type(),
        properties.content_encoding(),
        properties.correlation_id(),
        properties.reply_to(),
        properties.message_id(),
        properties.kind(),
        properties.app_id(),
        properties.cluster_id(),
    ];
    let texts: usize = texts.into_iter().flatten().map(|text| 1 + text.as_str().len()).sum();
    // Frame, class, weight, body size, flags, delivery mode, priority, timestamp.
    64 + texts + properties.headers().as_ref().map_or(0, table_size)
}

fn table_size(table: &FieldTable) -> usize {
    4 + table.into_iter().map(|(n, v)| 1 + n.as_str().len() + value_size(v)).sum::<usize>()
}

fn value_size(value: &AMQPValue) -> usize {
    1 + match value {
        AMQPValue::ShortString(v) => 1 + v.as_str().len(),
        AMQPValue::LongString(v) => 4 + v.len(),
        AMQPValue::ByteArray(v) => 4 + v.len(),
        AMQPValue::FieldArray(v) => 4 + v.as_slice().iter().map(value_size).sum::<usize>(),
        AMQPValue::FieldTable(v) => table_size(v),
        AMQPValue::Boolean(_)
        | AMQPValue::ShortShortInt(_)
        | AMQPValue::ShortShortUInt(_)
        | AMQPValue::ShortInt(_)
        | AMQPValue::ShortUInt(_)
        | AMQPValue::LongInt(_)
        | AMQPValue::LongUInt(_)
        | AMQPValue::LongLongInt(_)
        | AMQPValue::Float(_)
        | AMQPValue::Double(_)
        | AMQPValue::DecimalValue(_)
        | AMQPValue::Timestamp(_)
        | AMQPValue::Void => 8,
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection, option, prelude::*};

    use super::*;

    fn outbound(headers: Headers) -> Outbound {
        Outbound {
            id: "id".into(),
            address: "key".into(),
            exchange: None,
            headers,
            body: bytes::Bytes::new(),
        }
    }

    fn name() -> impl Strategy<Value = ShortString> {
        // Mostly colons, letters of either case and the names of properties: what may collide.
        prop_oneof![
            "[:a-cA-C]{0,4}".prop_map(|s| ShortString::try_new(s).unwrap()),
            Just(ShortString::from(":type")),
            Just(ShortString::from("::type")),
            "\\PC{0,40}".prop_map(|s| ShortString::try_new(s).unwrap()),
        ]
        .prop_filter("left behind on purpose", |name| !broker_owned(name.as_str()))
    }

    fn value() -> impl Strategy<Value = AMQPValue> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(AMQPValue::Boolean),
            any::<i8>().prop_map(AMQPValue::ShortShortInt),
            any::<u8>().prop_map(AMQPValue::ShortShortUInt),
            any::<i16>().prop_map(AMQPValue::ShortInt),
            any::<u16>().prop_map(AMQPValue::ShortUInt),
            any::<i32>().prop_map(AMQPValue::LongInt),
            any::<u32>().prop_map(AMQPValue::LongUInt),
            any::<i64>().prop_map(AMQPValue::LongLongInt),
            any::<f32>().prop_map(AMQPValue::Float),
            any::<f64>().prop_map(AMQPValue::Double),
            (any::<u8>(), any::<u32>())
                .prop_map(|(scale, value)| AMQPValue::DecimalValue(DecimalValue { scale, value })),
            any::<u64>().prop_map(AMQPValue::Timestamp),
            collection::vec(any::<u8>(), 0..20).prop_map(|v| AMQPValue::LongString(v.into())),
            "\\PC{0,20}".prop_map(|v: String| AMQPValue::LongString(v.into_bytes().into())),
            collection::vec(any::<u8>(), 0..20).prop_map(|v| AMQPValue::ByteArray(v.into())),
            Just(AMQPValue::Void),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                collection::vec(inner.clone(), 0..4)
                    .prop_map(|v| AMQPValue::FieldArray(FieldArray::from(v))),
                collection::btree_map(name(), inner, 0..4)
                    .prop_map(|v| AMQPValue::FieldTable(FieldTable::from(v))),
            ]
        })
    }

    fn short_text() -> impl Strategy<Value = Option<ShortString>> {
        option::of("\\PC{0,60}".prop_map(|s| ShortString::try_new(s).unwrap()))
    }

    fn properties() -> impl Strategy<Value = BasicProperties> {
        let texts = collection::vec(short_text(), 7);
        let table = option::of(collection::btree_map(name(), value(), 1..6));
        (texts, table, option::of(any::<u8>()), option::of(any::<u64>())).prop_map(
            |(texts, table, priority, timestamp)| {
                let setters: [fn(BasicProperties, ShortString) -> BasicProperties; 7] = [
                    BasicProperties::with_content_type,
                    BasicProperties::with_content_encoding,
                    BasicProperties::with_correlation_id,
                    BasicProperties::with_reply_to,
                    BasicProperties::with_type,
                    BasicProperties::with_app_id,
                    BasicProperties::with_cluster_id,
                ];
                let mut properties =
                    BasicProperties::default().with_message_id("id".into()).with_delivery_mode(2);
                for (set, text) in setters.into_iter().zip(texts) {
                    if let Some(text) = text {
                        properties = set(properties, text);
                    }
                }
                if let Some(table) = table {
                    properties = properties.with_headers(FieldTable::from(table));
                }
                if let Some(priority) = priority {
                    properties = properties.with_priority(priority);
                }
                if let Some(timestamp) = timestamp {
                    properties = properties.with_timestamp(timestamp);
                }
                properties
            },
        )
    }

    /// NaN is not equal to itself, so values are compared by what they print.
    fn same(a: &BasicProperties, b: &BasicProperties) -> bool {
        format!("{a:?}") == format!("{b:?}")
    }

    proptest! {
        #[test]
        fn G9_properties_survive_headers(properties in properties()) {
            let headers = headers_in(&properties);
            let back = properties_out(&outbound(headers)).unwrap();
            prop_assert!(same(&properties, &back), "{properties:?}\n{back:?}");
        }

        #[test]
        fn G9_properties_survive_the_log(properties in properties()) {
            let json = headers_in(&properties).to_json().into_owned();
            let back = properties_out(&outbound(Headers::from_json(&json).unwrap())).unwrap();
            prop_assert!(same(&properties, &back), "{properties:?}\n{json}\n{back:?}");
        }

        #[test]
        fn any_headers_are_taken_or_refused(names in collection::vec("\\PC{0,300}", 0..5)) {
            let mut headers = Headers::new();
            for name in names {
                headers.push(name.clone(), name);
            }
            let _ = properties_out(&outbound(headers));
        }

        #[test]
        fn the_wire_size_is_an_upper_bound(table in collection::btree_map(name(), value(), 0..6)) {
            let table = FieldTable::from(table);
            // The encoder is the driver's; what it writes for the table must fit our estimate.
            let write = lapin::types::generation::gen_field_table::<Vec<u8>>(&table);
            let written = write(Vec::new().into()).unwrap().write.len();
            prop_assert!(written <= table_size(&table), "{written} {}", table_size(&table));
        }
    }

    #[test]
    fn what_the_broker_owns_stays_behind() {
        let mut headers = Headers::new();
        for name in
            ["x-death", "x-first-death-queue", "x-delivery-count", "CC", ":user_id", ":expiration"]
        {
            headers.push(name, "1");
        }
        headers.push("x-mine", "1");
        let properties = properties_out(&outbound(headers)).unwrap();
        let names: Vec<_> =
            properties.headers().as_ref().unwrap().inner().keys().cloned().collect();
        assert_eq!(names, ["x-mine".into()]);
        assert!(properties.user_id().is_none() && properties.expiration().is_none());
    }

    #[test]
    fn a_repeated_header_becomes_an_array() {
        let mut headers = Headers::new();
        headers.push("trace", "a");
        headers.push("trace", "b");
        let properties = properties_out(&outbound(headers)).unwrap();
        let table = properties.headers().as_ref().unwrap();
        let AMQPValue::FieldArray(all) = &table.inner()["trace"] else { panic!("{table:?}") };
        assert_eq!(all.as_slice().len(), 2);
    }

    #[test]
    fn what_is_too_long_is_named() {
        let mut headers = Headers::new();
        headers.push("n".repeat(256), "1");
        let error = properties_out(&outbound(headers)).unwrap_err();
        assert!(error.contains("header name") && error.contains("256 bytes"), "{error}");
        let message = Outbound { id: "é".repeat(200).into(), ..outbound(Headers::new()) };
        let error = properties_out(&message).unwrap_err();
        assert!(error.contains("event id") && error.contains("400 bytes"), "{error}");
    }
}

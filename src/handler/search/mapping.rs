//! From an event to a document: which fields there are, and where their values come from.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::atomic::{AtomicBool, Ordering},
};

use tantivy::{
    DateTime, TantivyDocument, Term,
    schema::{
        DateOptions, DateTimePrecision, FAST, Field, INDEXED, IndexRecordOption, STORED, STRING,
        Schema, TextFieldIndexing, TextOptions,
    },
    tokenizer::{
        Language, LowerCaser, RemoveLongFilter, SimpleTokenizer, Stemmer, TextAnalyzer,
        TokenizerManager,
    },
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{DocumentMapping, SearchError};
use crate::{
    event::StoredEvent,
    handler::{
        HandlerError,
        pointer::{Pointer, elements, scalar},
    },
};

/// The longest document id, in bytes: far below what Tantivy can keep in a term.
const MAX_ID_BYTES: usize = 4_096;

/// Longer words are not indexed, in bytes. A text without spaces (Chinese, Japanese) is one word
/// up to its next punctuation mark.
const MAX_WORD_BYTES: usize = 255;

const TOKENIZER: &str = "pulsebus";

/// How the values of a field are indexed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Keyword,
    Date,
    Number,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Keyword => "keyword",
            Self::Date => "date",
            Self::Number => "number",
        }
    }
}

/// The configured documents, checked, with the schema that follows from them.
pub(super) struct Mapping {
    pub(super) schema: Schema,
    pub(super) id: Field,
    pub(super) kind: Field,
    pub(super) position: Field,
    /// Every configured field, by name.
    pub(super) fields: BTreeMap<String, (Field, Kind)>,
    /// Changes when an index built before cannot be carried on.
    pub(super) fingerprint: String,
    actions: HashMap<String, Action>,
    language: Option<Language>,
}

/// What events of one type do.
enum Action {
    Upsert { id: Pointer, values: Vec<FieldValue> },
    Delete { id: Pointer },
}

/// Where a field's value comes from.
struct FieldValue {
    name: String,
    field: Field,
    kind: Kind,
    pointer: Pointer,
    /// Whether it was said already that a value did not fit.
    said: AtomicBool,
}

/// What an event does to the index.
#[derive(Debug)]
pub(super) enum Operation {
    /// Nothing: its type has no mapping.
    None,
    /// Takes out the document of this id.
    Delete(Term),
    /// Puts this document in the place of the one of this id.
    Upsert(Term, TantivyDocument),
}

impl Mapping {
    pub(super) fn compile(
        documents: &BTreeMap<String, DocumentMapping>,
        language: Option<&str>,
    ) -> Result<Self, SearchError> {
        let language = language.map(parse_language).transpose()?;
        let mut schema = Schema::builder();
        let id = schema.add_text_field("_id", STRING | STORED);
        let kind = schema.add_text_field("_type", STRING | STORED);
        let position = schema.add_u64_field("_position", INDEXED | STORED | FAST);
        let mut fields: BTreeMap<String, (Field, Kind)> = BTreeMap::new();
        let mut actions = HashMap::new();
        for (event_type, document) in documents {
            let id = pointer(event_type, "id", &document.id)?;
            let mut values = Vec::new();
            for (kind, members) in [
                (Kind::Text, &document.text),
                (Kind::Keyword, &document.keyword),
                (Kind::Date, &document.date),
                (Kind::Number, &document.number),
            ] {
                for (name, at) in members {
                    let field = match fields.get(name) {
                        Some(&(field, known)) if known == kind => field,
                        Some(&(_, known)) => {
                            return Err(SearchError::FieldKinds {
                                field: name.clone(),
                                one: known.as_str(),
                                other: kind.as_str(),
                            });
                        }
                        None => {
                            check_name(name)?;
                            let field = match kind {
                                Kind::Text => schema.add_text_field(name, text_options()),
                                Kind::Keyword => {
                                    schema.add_text_field(name, STRING | STORED | FAST)
                                }
                                Kind::Date => schema.add_date_field(name, date_options()),
                                Kind::Number => schema.add_f64_field(name, INDEXED | STORED | FAST),
                            };
                            fields.insert(name.clone(), (field, kind));
                            field
                        }
                    };
                    values.push(FieldValue {
                        name: name.clone(),
                        field,
                        kind,
                        pointer: pointer(event_type, name, at)?,
                        said: AtomicBool::new(false),
                    });
                }
            }
            for deleting in &document.delete {
                insert(&mut actions, deleting, Action::Delete { id: id.clone() })?;
            }
            insert(&mut actions, event_type, Action::Upsert { id, values })?;
        }
        let schema = schema.build();
        let fields_as_json = serde_json::to_string(&schema)
            .map_err(|error| SearchError::Schema(error.to_string()))?;
        // The leading number counts changes to how documents are made of the same mapping.
        let described = format!("1 {documents:?} {language:?} {fields_as_json}");
        let fingerprint = format!("{:016x}", fnv_1a(described.as_bytes()));
        Ok(Self { schema, id, kind, position, fields, fingerprint, actions, language })
    }

    /// Makes the words of text fields the same in the index and in queries.
    pub(super) fn register_tokenizer(&self, tokenizers: &TokenizerManager) {
        let words = TextAnalyzer::builder(SimpleTokenizer::default())
            .filter(RemoveLongFilter::limit(MAX_WORD_BYTES))
            .filter(LowerCaser);
        match self.language {
            Some(language) => {
                tokenizers.register(TOKENIZER, words.filter(Stemmer::new(language)).build());
            }
            None => tokenizers.register(TOKENIZER, words.build()),
        }
    }

    /// The fields searched by words that name none: the text fields, or the keyword fields
    /// where there is no text.
    pub(super) fn default_fields(&self) -> Vec<Field> {
        let of = |wanted: Kind| {
            self.fields
                .values()
                .filter(move |(_, kind)| *kind == wanted)
                .map(|(field, _)| *field)
                .collect::<Vec<_>>()
        };
        let text = of(Kind::Text);
        if !text.is_empty() {
            return text;
        }
        let keyword = of(Kind::Keyword);
        if keyword.is_empty() { vec![self.id] } else { keyword }
    }

    /// The id of the document an event is about; `None` where it is about none, or has none.
    pub(super) fn document<'a>(&self, event: &'a StoredEvent) -> Option<Cow<'a, str>> {
        let (Action::Upsert { id, .. } | Action::Delete { id }) = self.actions.get(event.kind())?;
        document_id(id, event.data(), event).ok()
    }

    /// What an event does to the index.
    ///
    /// # Errors
    /// Where the event has no document id: it will never have one.
    pub(super) fn operation(&self, event: &StoredEvent) -> Result<Operation, HandlerError> {
        let Some(action) = self.actions.get(event.kind()) else {
            return Ok(Operation::None);
        };
        let data = event.data();
        let (Action::Upsert { id: at, .. } | Action::Delete { id: at }) = action;
        let id = document_id(at, data, event)?;
        let term = Term::from_field_text(self.id, &id);
        let values = match action {
            Action::Delete { .. } => return Ok(Operation::Delete(term)),
            Action::Upsert { values, .. } => values,
        };
        let mut document = TantivyDocument::new();
        document.add_text(self.id, &*id);
        document.add_text(self.kind, event.kind());
        document.add_u64(self.position, event.position.0);
        for value in values {
            let Some(raw) = value.pointer.find(data) else { continue };
            if !value.add(raw, &mut document) && !value.said.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    position = event.position.0,
                    r#type = event.kind(),
                    field = value.name,
                    pointer = %value.pointer,
                    "value does not fit a {} field and is left out of the document; \
                     said once for this field",
                    value.kind.as_str(),
                );
            }
        }
        Ok(Operation::Upsert(term, document))
    }
}

impl FieldValue {
    /// Adds a value, or each element of an array; whether all of them fit.
    fn add(&self, raw: &str, document: &mut TantivyDocument) -> bool {
        match elements(raw) {
            // One level: an array in an array is no list of values any more.
            Some(all) => {
                let mut fit = true;
                for each in all {
                    fit &= self.add_one(each, document);
                }
                fit
            }
            None => self.add_one(raw, document),
        }
    }

    fn add_one(&self, raw: &str, document: &mut TantivyDocument) -> bool {
        if raw == "null" {
            return true;
        }
        match self.kind {
            Kind::Text | Kind::Keyword => match scalar(raw) {
                Some(text) => document.add_text(self.field, &*text),
                None => return false,
            },
            Kind::Date => match date(raw) {
                Some(date) => document.add_date(self.field, date),
                None => return false,
            },
            Kind::Number => match number(raw) {
                Some(number) => document.add_f64(self.field, number),
                None => return false,
            },
        }
        true
    }
}

fn document_id<'a>(
    at: &Pointer,
    data: &'a str,
    event: &StoredEvent,
) -> Result<Cow<'a, str>, HandlerError> {
    let wrong = |what: &str| {
        HandlerError::new(format!(
            "document id {at} {what} in event {} ({}, id {}); it needs a string, number or boolean",
            event.position,
            event.kind(),
            event.id(),
        ))
    };
    let raw = at.find(data).ok_or_else(|| wrong("is missing"))?;
    let id = scalar(raw).ok_or_else(|| wrong("is null, an object, an array or no text"))?;
    if id.is_empty() {
        return Err(wrong("is empty"));
    }
    if id.len() > MAX_ID_BYTES {
        return Err(wrong(&format!("is longer than {MAX_ID_BYTES} bytes")));
    }
    Ok(id)
}

/// RFC 3339 text, or milliseconds since 1970.
fn date(raw: &str) -> Option<DateTime> {
    let at = if raw.starts_with('"') {
        OffsetDateTime::parse(&scalar(raw)?, &Rfc3339).ok()?
    } else {
        let millis: i64 = raw.parse().ok()?;
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000).ok()?
    };
    DateTime::try_from_utc(at)
}

/// A number, also one that a publisher wrote as text to keep its digits.
fn number(raw: &str) -> Option<f64> {
    if raw.starts_with(['t', 'f']) {
        return None;
    }
    scalar(raw)?.trim().parse().ok().filter(|number: &f64| number.is_finite())
}

fn text_options() -> TextOptions {
    TextOptions::default().set_stored().set_indexing_options(
        TextFieldIndexing::default()
            .set_tokenizer(TOKENIZER)
            .set_index_option(IndexRecordOption::WithFreqsAndPositions),
    )
}

fn date_options() -> DateOptions {
    DateOptions::from(INDEXED | STORED | FAST).set_precision(DateTimePrecision::Milliseconds)
}

fn pointer(event_type: &str, field: &str, text: &str) -> Result<Pointer, SearchError> {
    text.parse().map_err(|source| SearchError::Pointer {
        event_type: event_type.to_owned(),
        field: field.to_owned(),
        source,
    })
}

fn insert(
    actions: &mut HashMap<String, Action>,
    event_type: &str,
    action: Action,
) -> Result<(), SearchError> {
    match actions.insert(event_type.to_owned(), action) {
        None => Ok(()),
        Some(_) => Err(SearchError::TwoMappings { event_type: event_type.to_owned() }),
    }
}

/// Names that a query can spell without escaping; `_` in front is for the index's own fields.
fn check_name(name: &str) -> Result<(), SearchError> {
    let mut chars = name.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic());
    if first && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
        Ok(())
    } else {
        Err(SearchError::FieldName { field: name.to_owned() })
    }
}

fn parse_language(name: &str) -> Result<Language, SearchError> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "arabic" => Language::Arabic,
        "danish" => Language::Danish,
        "dutch" => Language::Dutch,
        "english" => Language::English,
        "finnish" => Language::Finnish,
        "french" => Language::French,
        "german" => Language::German,
        "greek" => Language::Greek,
        "hungarian" => Language::Hungarian,
        "italian" => Language::Italian,
        "norwegian" => Language::Norwegian,
        "portuguese" => Language::Portuguese,
        "romanian" => Language::Romanian,
        "russian" => Language::Russian,
        "spanish" => Language::Spanish,
        "swedish" => Language::Swedish,
        "tamil" => Language::Tamil,
        "turkish" => Language::Turkish,
        _ => return Err(SearchError::Language { language: name.to_owned() }),
    })
}

/// FNV-1a, 64 bits: must be the same in every version of the program, which the standard
/// library's hasher does not promise.
pub(super) fn fnv_1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_text_or_milliseconds() {
        let expected = DateTime::from_timestamp_millis(1_700_000_000_123);
        assert_eq!(date("1700000000123"), Some(expected));
        assert_eq!(date(r#""2023-11-14T22:13:20.123Z""#), Some(expected));
        assert_eq!(date(r#""2023-11-14T23:13:20.123+01:00""#), Some(expected));
        for wrong in ["1.5", "9223372036854775807", r#""yesterday""#, "true", "{}", "1e3"] {
            assert_eq!(date(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn numbers_are_finite() {
        assert_eq!(number("1.5"), Some(1.5));
        assert_eq!(number(r#"" 12 ""#), Some(12.0));
        for wrong in ["1e400", "true", r#""NaN""#, r#""inf""#, r#""""#, "[]"] {
            assert_eq!(number(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(fnv_1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv_1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn one_name_has_one_kind() {
        let lesson = DocumentMapping {
            id: "/id".into(),
            text: BTreeMap::from([("title".into(), "/title".into())]),
            ..Default::default()
        };
        let quiz = DocumentMapping {
            id: "/id".into(),
            keyword: BTreeMap::from([("title".into(), "/name".into())]),
            ..Default::default()
        };
        let both = BTreeMap::from([("Lesson".into(), lesson.clone()), ("Quiz".into(), quiz)]);
        let error = Mapping::compile(&both, None).err().unwrap().to_string();
        assert!(error.contains("`title`") && error.contains("keyword"), "{error}");
        let removing = DocumentMapping { delete: vec!["Lesson".into()], ..lesson };
        let both = BTreeMap::from([("Lesson".into(), removing)]);
        let error = Mapping::compile(&both, None).err().unwrap().to_string();
        assert!(error.contains("`Lesson`"), "{error}");
    }

    #[test]
    fn names_languages_and_pointers_are_checked() {
        let with = |name: &str, at: &str| DocumentMapping {
            id: "/id".into(),
            text: BTreeMap::from([(name.into(), at.into())]),
            ..Default::default()
        };
        for (mapping, language, names) in [
            (with("_id", "/a"), None, "_id"),
            (with("a.b", "/a"), None, "a.b"),
            (with("a", "title"), None, "title"),
            (with("a", "/a"), Some("klingon"), "klingon"),
        ] {
            let documents = BTreeMap::from([("T".into(), mapping)]);
            let error = Mapping::compile(&documents, language).err().unwrap();
            let text = format!("{}", crate::handler::HandlerError::from(error));
            assert!(text.contains(names), "{text}");
        }
    }
}

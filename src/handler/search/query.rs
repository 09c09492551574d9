//! Queries: parsed leniently, answered with scores, stored fields and highlighted snippets.

use std::{borrow::Cow, collections::BTreeMap};

use serde::Serialize;
use serde_json::{Map, Number, Value};
use tantivy::{
    Index, Searcher, TantivyDocument, TantivyError, Term,
    collector::{Count, TopDocs},
    query::{AllQuery, BooleanQuery, ConstScoreQuery, Query, QueryParser, TermSetQuery},
    schema::{Field, Value as _},
    snippet::SnippetGenerator,
};
use time::format_description::well_known::Rfc3339;

use super::{
    SearchError,
    mapping::{Kind, Mapping},
};
use crate::event::Position;

/// The longest query, in bytes.
pub const MAX_QUERY_BYTES: usize = 2_048;
/// The most hits one search returns.
pub const MAX_LIMIT: usize = 1_000;
/// How far behind the best hit a search may begin.
pub const MAX_OFFSET: usize = 10_000;
/// Brackets nested deeper are read as blanks: the parser recurses.
const MAX_NESTING: usize = 16;

/// What to search for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchQuery {
    /// Words, `"a phrase"`, `field:word`, `+must`, `-must_not`, `AND`, `OR`, brackets, ranges
    /// such as `published_at:[2026-01-01T00:00:00Z TO *]`. Words that name no field search all
    /// text fields; a hit needs one of them, and scores higher for each. What cannot be read
    /// as syntax is searched for as words. Empty: every document.
    pub q: String,
    /// At most this many hits, from 0 (only count them) to [`MAX_LIMIT`]. Default 10.
    pub limit: usize,
    /// Leave out this many of the best, at most [`MAX_OFFSET`]. Default 0.
    pub offset: usize,
    /// Documents of these event types only; empty: of all.
    pub types: Vec<String>,
}

impl SearchQuery {
    /// The ten best of all types.
    #[must_use]
    pub fn new(q: impl Into<String>) -> Self {
        Self { q: q.into(), limit: 10, offset: 0, types: Vec::new() }
    }
}

/// What was found: the body of `GET /v1/search/{handler}`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SearchPage {
    /// How many documents match, also those not on this page.
    pub total: usize,
    /// The best of them, best first.
    pub hits: Vec<Hit>,
}

/// A document that matches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hit {
    /// The document's id.
    pub id: String,
    /// The type of the event that wrote it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The position of the event that wrote it.
    pub position: Position,
    /// BM25; comparable within one answer only.
    pub score: f32,
    /// Its fields: text as published, numbers as numbers, dates as RFC 3339 in UTC; an array
    /// where there are several values.
    pub fields: Map<String, Value>,
    /// For each text field that matches, its best part as HTML: escaped, matches in `<b>`.
    pub snippets: BTreeMap<String, String>,
}

/// Searches. Blocks: reads files.
pub(super) fn run(
    index: &Index,
    searcher: &Searcher,
    mapping: &Mapping,
    query: &SearchQuery,
) -> Result<SearchPage, SearchError> {
    if query.q.len() > MAX_QUERY_BYTES {
        return Err(SearchError::Query(format!("longer than {MAX_QUERY_BYTES} bytes")));
    }
    if query.limit > MAX_LIMIT {
        return Err(SearchError::Query(format!("limit is {MAX_LIMIT} at most")));
    }
    if query.offset > MAX_OFFSET {
        return Err(SearchError::Query(format!("offset is {MAX_OFFSET} at most")));
    }
    let words = parse(index, mapping, &query.q);
    let filtered = filter(mapping, &words, &query.types);
    if query.limit == 0 {
        let total = searcher.search(&*filtered, &Count).map_err(failed)?;
        return Ok(SearchPage { total, hits: Vec::new() });
    }
    let best = TopDocs::with_limit(query.limit).and_offset(query.offset).order_by_score();
    let (total, found) = searcher.search(&*filtered, &(Count, best)).map_err(failed)?;
    let mut highlights = Vec::new();
    for (name, &(field, kind)) in &mapping.fields {
        if kind == Kind::Text {
            let generator = SnippetGenerator::create(searcher, &*words, field);
            highlights.push((name, generator.map_err(failed)?));
        }
    }
    let mut hits = Vec::with_capacity(found.len());
    for (score, address) in found {
        let document: TantivyDocument = searcher.doc(address).map_err(failed)?;
        let snippets = highlights
            .iter()
            .map(|(name, generator)| (name, generator.snippet_from_doc(&document)))
            .filter(|(_, snippet)| !snippet.is_empty())
            .map(|(name, snippet)| ((*name).clone(), snippet.to_html()))
            .collect();
        hits.push(Hit {
            id: text(&document, mapping.id),
            kind: text(&document, mapping.kind),
            position: Position(
                document.get_first(mapping.position).and_then(|v| v.as_u64()).unwrap_or_default(),
            ),
            score,
            fields: fields(mapping, &document),
            snippets,
        });
    }
    Ok(SearchPage { total, hits })
}

/// Some queries are understood and cannot be answered, e.g. `title:*` on a text field.
fn failed(error: TantivyError) -> SearchError {
    match error {
        TantivyError::SchemaError(why) | TantivyError::InvalidArgument(why) => {
            SearchError::Query(why)
        }
        other => SearchError::Search(other),
    }
}

fn parse(index: &Index, mapping: &Mapping, q: &str) -> Box<dyn Query> {
    if q.trim().is_empty() {
        return Box::new(AllQuery);
    }
    let parser = QueryParser::for_index(index, mapping.default_fields());
    parser.parse_query_lenient(&flatten(q)).0
}

/// The query without its brackets where they nest too deep for a parser that recurses.
fn flatten(q: &str) -> Cow<'_, str> {
    let mut depth = 0_usize;
    let mut deepest = 0;
    for c in q.chars() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_NESTING { q.replace(['(', ')'], " ").into() } else { q.into() }
}

fn filter(mapping: &Mapping, words: &dyn Query, types: &[String]) -> Box<dyn Query> {
    if types.is_empty() {
        return words.box_clone();
    }
    let terms = types.iter().map(|kind| Term::from_field_text(mapping.kind, kind));
    // Scores stay those of the words.
    let types = ConstScoreQuery::new(Box::new(TermSetQuery::new(terms)), 0.0);
    Box::new(BooleanQuery::intersection(vec![words.box_clone(), Box::new(types)]))
}

fn text(document: &TantivyDocument, field: Field) -> String {
    document.get_first(field).and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn fields(mapping: &Mapping, document: &TantivyDocument) -> Map<String, Value> {
    let mut fields = Map::new();
    for (name, &(field, kind)) in &mapping.fields {
        let mut values: Vec<Value> = document
            .get_all(field)
            .filter_map(|value| match kind {
                Kind::Text | Kind::Keyword => value.as_str().map(Value::from),
                Kind::Date => {
                    value.as_datetime()?.into_utc().format(&Rfc3339).ok().map(Value::from)
                }
                Kind::Number => value.as_f64().and_then(number),
            })
            .collect();
        let value = match values.len() {
            0 => continue,
            1 => values.swap_remove(0),
            _ => Value::Array(values),
        };
        fields.insert(name.clone(), value);
    }
    fields
}

/// A whole number without its `.0`, as it was most likely published.
fn number(value: f64) -> Option<Value> {
    /// Up to here every whole number has an `f64` of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() < EXACT {
        #[expect(clippy::cast_possible_truncation, reason = "whole and within ±2^53")]
        return Some(Value::from(value as i64));
    }
    Number::from_f64(value).map(Value::Number)
}

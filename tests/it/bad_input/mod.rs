//! Bad and odd input through every way in, into the real daemon: each message ends as an event
//! or in quarantine, its neighbours are unharmed, the flow goes on, and memory stays flat.
//!
//! Each test publishes the corpus case by case, good events in between, with a client that is
//! not ours; waits until the broker says that all is acked; publishes the same again; and then,
//! the daemon drained, compares its store with what the corpus says must be there.

mod amqp;
mod http;
mod nats;

use std::{collections::BTreeMap, sync::Arc};

use pulsebus::{
    event::{Headers, Position, StoredEvent},
    store::{
        EventStore, Limit,
        sqlite::{SqliteOptions, SqliteStore},
    },
};

use crate::{
    corpus::{Case, Verdict, corpus, large},
    support::daemon::Daemon,
};

/// Marks a message; also the id of an event that brings none.
const MARK: &str = "webhook-id";

/// What becomes of an event whose id another one has.
const CONFLICT: Verdict = Verdict::Quarantined("conflicts with the event at position");

/// A case as it is published.
#[derive(Clone)]
struct Marked {
    mark: String,
    case: Case,
}

impl Marked {
    /// The mark, and the case's own headers.
    fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let own = self.case.headers.iter().map(|(name, value)| (&**name, &**value));
        std::iter::once((MARK, &*self.mark)).chain(own)
    }
}

/// The whole corpus, and what only goes wrong beside other events.
fn cases() -> Vec<Marked> {
    let mut cases = Vec::new();
    for case in corpus().into_iter().chain(large()) {
        // A client may refuse one of several headers; what it takes is still to be sent.
        if case.name == "odd header names" {
            for header in &case.headers {
                cases.push(Case { headers: vec![header.clone()], ..case.clone() });
            }
        } else {
            cases.push(case);
        }
    }
    let beside =
        |name, body: &str, verdict| Case { name, body: body.into(), headers: Vec::new(), verdict };
    cases.extend([
        beside("same id, other data", r#"{"id":"good-0","type":"Good","data":1}"#, CONFLICT),
        beside("same id, other type", r#"{"id":"good-0","type":"Bad","data":{"n":0}}"#, CONFLICT),
        beside("same id, other format", r#"{"id":"good-0","x":1}"#, CONFLICT),
    ]);
    let marked = |(n, case)| Marked { mark: format!("case-{n}"), case: distinct(case, n) };
    cases.into_iter().enumerate().map(marked).collect()
}

/// Cases share ids, and here they meet in one log.
fn distinct(mut case: Case, n: usize) -> Case {
    if case.verdict == Verdict::Event {
        if let Ok(text) = std::str::from_utf8(&case.body)
            && text.starts_with(r#"{"specversion":"1.0","id":"1""#)
        {
            case.body = text.replacen(r#""id":"1""#, &format!(r#""id":"case-{n}""#), 1).into();
        }
        for (name, value) in &mut case.headers {
            if name.eq_ignore_ascii_case("ce-id") {
                value.push_str(&format!("-{n}"));
            }
        }
    }
    case
}

/// A good event, published behind the case of that number.
fn neighbour(n: usize) -> Vec<u8> {
    format!(r#"{{"id":"good-{n}","type":"Good","key":"one","data":{{"n":{n}}}}}"#).into()
}

/// That a client refuses nothing it should be able to send.
fn only_odd_headers(cases: &[Marked], refused: &[String]) {
    let refused = cases.iter().filter(|marked| refused.contains(&marked.mark));
    let plain: Vec<_> = refused.filter(|marked| marked.case.headers_fit_everywhere()).collect();
    assert!(plain.is_empty(), "{:?}", plain.iter().map(|m| m.case.name).collect::<Vec<_>>());
}

/// What a store must hold after everything was published, twice.
struct Expected {
    /// What was published, and how often each of those that are no events is in quarantine.
    cases: Vec<Marked>,
    neighbours: usize,
    quarantined: usize,
}

/// Compares the store of a daemon that has ended with what must be in it.
async fn audit_sqlite(daemon: &Daemon, expected: &Expected) {
    let store = open(daemon).await;
    audit(&*store, expected).await;
    store.close().await;
}

async fn open(daemon: &Daemon) -> Box<dyn EventStore> {
    Box::new(SqliteStore::open(SqliteOptions::new(daemon.database())).await.unwrap())
}

async fn audit(store: &dyn EventStore, expected: &Expected) {
    let events = events(store).await;
    let mut by_mark: BTreeMap<&str, Vec<&StoredEvent>> = BTreeMap::new();
    let mut good = Vec::new();
    for (n, event) in events.iter().enumerate() {
        assert_eq!(event.position.0, n as u64 + 1, "positions have no gap");
        match mark_of(event.headers()) {
            Some(mark) => by_mark.entry(mark).or_default().push(event),
            None => good.push(event),
        }
    }
    let sent: Vec<_> = (0..expected.neighbours).map(|n| format!("good-{n}")).collect();
    let kept: Vec<_> = good.iter().map(|event| event.id()).collect();
    assert_eq!(kept, sent, "every neighbour is there, once, in order");
    let whole = good.iter().enumerate().all(|(n, e)| e.body_str().as_bytes() == neighbour(n));
    assert!(whole, "every neighbour is as it was");

    let mut bad: BTreeMap<String, Vec<(Vec<u8>, String)>> = BTreeMap::new();
    let mut after = 0;
    while let [entry] = store.quarantine(after, 1).await.unwrap().as_slice() {
        let (_, body) = store.quarantine_entry(entry.number).await.unwrap().unwrap();
        after = entry.number;
        let mark = mark_of(&entry.headers).unwrap_or_else(|| panic!("{entry:?}"));
        bad.entry(mark.to_owned()).or_default().push((body.to_vec(), entry.reason.clone()));
    }

    let mut wrong = Vec::new();
    for Marked { mark, case } in &expected.cases {
        let as_event = by_mark.remove(&**mark).unwrap_or_default();
        let as_bad = bad.remove(mark).unwrap_or_default();
        let bodies = |all: &[(Vec<u8>, String)]| all.iter().all(|(body, _)| *body == case.body);
        let right = match case.verdict {
            Verdict::Event => {
                as_bad.is_empty()
                    && as_event.len() == 1
                    && as_event[0].body_str().as_bytes() == case.body
            }
            Verdict::Quarantined(words) => {
                as_event.is_empty()
                    && as_bad.len() == expected.quarantined
                    && bodies(&as_bad)
                    && as_bad.iter().all(|(_, reason)| reason.contains(words))
            }
        };
        if !right {
            let reasons: Vec<_> = as_bad.iter().map(|(body, why)| (body.len(), why)).collect();
            wrong.push(format!(
                "{} ({mark}, {} bytes): {:?}; as events {}, in quarantine {reasons:?}",
                case.name,
                case.body.len(),
                case.verdict,
                as_event.len()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(by_mark.is_empty(), "nobody published {:?}", by_mark.keys());
    assert!(bad.is_empty(), "nobody published {:?}", bad.keys());
}

async fn events(store: &dyn EventStore) -> Vec<Arc<StoredEvent>> {
    let mut all: Vec<Arc<StoredEvent>> = Vec::new();
    loop {
        let after = all.last().map_or(Position::START, |event| event.position);
        let page = store.read(after, Limit::default()).await.unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

/// The mark: a header, or where AMQP has it.
fn mark_of(headers: &Headers) -> Option<&str> {
    headers.get_str(MARK)
}

#[test]
fn G6_there_are_at_least_64_kinds() {
    let cases = cases();
    let names: std::collections::BTreeSet<_> =
        cases.iter().map(|marked| marked.case.name).collect();
    assert!(names.len() >= 64, "{}", names.len());
    let bad = cases.iter().filter(|marked| marked.case.verdict != Verdict::Event).count();
    assert!(bad >= 64, "{bad}");
}

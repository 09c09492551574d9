//! A destination: does a stream take what is published there, and may this user publish it?

use serde_json::{Value, json};

use super::{
    super::{
        NatsSource,
        api::{Api, Said},
        connect::Fault,
    },
    info::{Names, Stream},
    permission::{Try, refused},
    stream::{self, covered, overlap},
};
use crate::{
    finding::Findings,
    transport::{Address, ExaminedDestination, ExaminedSource},
};

pub(super) async fn examine(
    found: &mut Findings,
    api: &Api,
    destination: &ExaminedDestination,
    sources: &[ExaminedSource],
    max_event_bytes: usize,
) -> Result<(), Fault> {
    let (carries, filter) = (destination.carries, filter(&destination.address));
    let names = api.ask::<Names>("STREAM.NAMES", &json!({"subject": filter})).await;
    let streams = match names {
        Ok(Said::Yes(names)) => names.streams.unwrap_or_default(),
        Ok(Said::No { description, .. }) => return Err(Fault::Away(description)),
        Err(Fault::Misconfigured(reason)) => {
            found.note(
                "nats-destination-unseen",
                format!("which stream takes {carries} at `{filter}` is not known: {reason}"),
                "doctor cannot tell whether a publish there is ever confirmed",
                "allow $JS.API.STREAM.NAMES and $JS.API.STREAM.INFO.* to this user, or see that a \
                 stream has that subject",
            );
            return publishing(found, api, destination).await;
        }
        Err(fault) => return Err(fault),
    };
    if streams.is_empty() {
        found.error(
            "nats-no-stream",
            format!("no stream takes `{filter}`, where {carries} go"),
            "nothing keeps what is published there, and nothing confirms it: each is tried again, \
             and then a dead letter",
            format!(
                "add `{filter}` to a stream's subjects (nats stream add, nats stream edit), or \
                 correct `subject`"
            ),
        );
        return Ok(());
    }
    let mut subjects = Some(Vec::new());
    for name in &streams {
        match api.ask::<Stream>(&format!("STREAM.INFO.{name}"), &Value::Null).await {
            Ok(Said::Yes(stream)) => {
                stream::of_destination(found, &stream, carries, max_event_bytes);
                if let Some(subjects) = &mut subjects {
                    subjects.extend(stream.config.subjects);
                }
            }
            // Publishing needs no permission to look.
            Ok(Said::No { .. }) | Err(Fault::Misconfigured(_)) => subjects = None,
            Err(fault) => return Err(fault),
        }
    }
    if let Some(subjects) = subjects
        && !covered(&subjects, &filter)
    {
        found.warning(
            "nats-part-stream",
            format!(
                "of `{filter}`, where {carries} go, streams take only `{}`",
                subjects.join("`, `")
            ),
            "events whose subject no stream takes are tried again, and then become dead letters",
            format!(
                "add `{filter}` to the subjects of a stream, or narrow `events` of the handler"
            ),
        );
    }
    comes_back(found, &filter, &streams, carries, sources);
    publishing(found, api, destination).await
}

async fn publishing(
    found: &mut Findings,
    api: &Api,
    destination: &ExaminedDestination,
) -> Result<(), Fault> {
    let sample = destination.address.with("pulsebus-doctor");
    if !refused(api, vec![Try::publish(sample.clone())]).await?.is_empty() {
        found.error(
            "nats-publish-denied",
            format!("no permission to publish {} to `{sample}`", destination.carries),
            "every publish there fails, until it may",
            format!(
                "add `{}` to the user's `publish` permissions in the server's configuration",
                filter(&destination.address)
            ),
        );
    }
    Ok(())
}

/// Sources that take what is published here: the log knows each as a copy.
fn comes_back(
    found: &mut Findings,
    filter: &str,
    streams: &[String],
    carries: &str,
    sources: &[ExaminedSource],
) {
    for asked in sources {
        let Ok(source) = serde_json::from_value::<NatsSource>(asked.params.clone()) else {
            continue;
        };
        let taken = source.subject.as_deref().unwrap_or(">");
        if streams.contains(&source.stream) && overlap(filter, taken) {
            found.note(
                "nats-comes-back",
                format!("{carries} that go to `{filter}` come back through {}", asked.subject),
                "each is recognised as a copy and stored once, but makes the way twice",
                "publish to subjects that no source takes, where that is not meant",
            );
        }
    }
}

/// All that the address can be: a value of the event is within one token.
fn filter(address: &Address) -> String {
    let address = address.with("*");
    let tokens = address.split('.').map(|token| if token.contains('*') { "*" } else { token });
    tokens.collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_stands_for_one_token() {
        let text = |text: &str| Some(text.to_owned());
        let address = Address::new(vec![text("a."), None, text("-x."), None, text(".b")]);
        assert_eq!(filter(&address), "a.*.*.b");
        assert_eq!(filter(&Address::new(vec![text("a.b")])), "a.b");
    }
}

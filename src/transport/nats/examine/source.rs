//! A source: its stream, its consumer, and what this user needs to consume.

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{
    super::{
        NatsSource,
        api::{Api, CONSUMER_NOT_FOUND, Said},
        connect::Fault,
    },
    backlog, consumer, denied,
    info::{Consumer, Consumers, Got, GotMessage, Names, Stream},
    permission::{Try, refused},
    stream::{self, covered, overlap},
    version,
};
use crate::{
    finding::{Finding, Findings, Severity},
    transport::ExaminedSource,
};

pub(super) async fn examine(
    found: &mut Findings,
    api: &Api,
    asked: &ExaminedSource,
    max_event_bytes: usize,
) -> Result<(), Fault> {
    let source = match readable(asked) {
        Ok(source) => source,
        Err(reason) => {
            found.error(
                "nats-source",
                reason,
                "the source cannot be opened",
                "correct its settings; pulsebus check shows where they stand",
            );
            return Ok(());
        }
    };
    let Some(known) = api.stream(&source.stream).await? else {
        return no_stream(found, api, &source).await;
    };
    if let Some(create) = &source.create
        && let Some(difference) = known.config.difference(create)
    {
        found.error(
            "nats-stream-differs",
            format!(
                "stream `{}` exists and is not as `create` asks for: {difference}",
                source.stream
            ),
            "the daemon changes nothing that exists, and consumes nothing until they agree",
            "change one of the two, or take `create` out",
        );
    }
    let info = format!("STREAM.INFO.{}", source.stream);
    let stream = match api.ask::<Stream>(&info, &Value::Null).await? {
        Said::Yes(stream) => stream,
        Said::No { description, .. } => return Err(Fault::Away(description)),
    };
    stream::of_source(found, &stream, &source, max_event_bytes);

    let info = format!("CONSUMER.INFO.{}.{}", source.stream, source.consumer);
    let mut tries = vec![Try::ack(&source)];
    match api.ask::<Consumer>(&info, &Value::Null).await? {
        Said::Yes(consumer) => {
            exists(found, api, &source, &stream, &consumer, asked.competing).await?;
            // One that is to be made anew is not asked to deliver.
            if consumer.config.deliver_subject.is_empty() {
                tries.push(Try::pull(api, &source));
            }
        }
        Said::No { code: CONSUMER_NOT_FOUND, .. } => {
            no_consumer(found, api, &source, &stream).await?;
            tries.extend([Try::create_consumer(api, &source), Try::pull(api, &source)]);
        }
        Said::No { description, .. } => return Err(Fault::Away(description)),
    }
    if !asked.competing {
        tries.push(Try::read(api, &source));
    }
    permissions(found, api, tries).await
}

fn readable(asked: &ExaminedSource) -> Result<NatsSource, String> {
    let source: NatsSource =
        serde_json::from_value(asked.params.clone()).map_err(|error| error.to_string())?;
    source.check()?;
    Ok(source)
}

async fn permissions(found: &mut Findings, api: &Api, tries: Vec<Try>) -> Result<(), Fault> {
    let subjects = refused(api, tries).await?;
    if !subjects.is_empty() {
        let subjects = subjects.join("`, `");
        denied(found, format!("no permission to publish to `{subjects}`"));
    }
    Ok(())
}

async fn no_stream(found: &mut Findings, api: &Api, source: &NatsSource) -> Result<(), Fault> {
    let Some(create) = &source.create else {
        found.error(
            "nats-stream-missing",
            format!("stream `{}` does not exist, and the source has no `create`", source.stream),
            "nothing keeps what is published, and nothing is consumed",
            format!(
                "create it (nats stream add {}), correct `stream`, or give the source \
                 create = {{ subjects = [\"…\"] }}",
                source.stream
            ),
        );
        return Ok(());
    };
    for subject in &create.subjects {
        let names = api.ask::<Names>("STREAM.NAMES", &json!({"subject": subject})).await;
        if let Ok(Said::Yes(Names { streams: Some(streams) })) = names
            && !streams.is_empty()
        {
            found.error(
                "nats-subject-taken",
                format!("`{subject}` is taken by stream `{}`", streams.join("`, `")),
                format!(
                    "no two streams take the same subject, so `{}` cannot be created",
                    source.stream
                ),
                "consume from that stream, or give one of the two other subjects",
            );
        }
    }
    found.note(
        "nats-stream-missing",
        format!("stream `{}` does not exist yet", source.stream),
        "what is published before it does is not kept",
        "start the daemon, which creates it, before the publishers",
    );
    let tries = vec![
        Try::create_stream(api, source),
        Try::create_consumer(api, source),
        Try::pull(api, source),
        Try::ack(source),
    ];
    permissions(found, api, tries).await
}

async fn no_consumer(
    found: &mut Findings,
    api: &Api,
    source: &NatsSource,
    stream: &Stream,
) -> Result<(), Fault> {
    let name = &source.stream;
    let start = "start the daemon, which creates it";
    if stream.config.retention == "interest" {
        found.error(
            "nats-consumer-missing",
            format!("consumer `{}` of stream `{name}` does not exist yet", source.consumer),
            "the stream keeps messages only for consumers that exist (interest retention): what is \
             published now is lost",
            start,
        );
    } else {
        found.note(
            "nats-consumer-missing",
            format!("consumer `{}` of stream `{name}` does not exist yet", source.consumer),
            "nothing is lost by it: it begins with the first message that the stream has",
            start,
        );
    }
    let filter = source.subject.as_deref().unwrap_or(">");
    let old = version(&api.live.client.server_info().version) < Some((2, 10));
    let subjects = &stream.config.subjects;
    if old
        && source.subject.is_some()
        && subjects.iter().any(|has| overlap(has, filter))
        && !covered(subjects, filter)
    {
        found.error(
            "nats-stream-subjects",
            format!("`{filter}` is more than stream `{name}` takes: `{}`", subjects.join("`, `")),
            "a server before 2.10 refuses to make such a consumer",
            "narrow `subject` of the source",
        );
    }
    if stream.config.retention != "workqueue" {
        return Ok(());
    }
    let list = api.ask::<Consumers>(&format!("CONSUMER.LIST.{name}"), &json!({"offset": 0})).await;
    let Ok(Said::Yes(Consumers { consumers: Some(consumers) })) = list else { return Ok(()) };
    let shares = |consumer: &&Consumer| match &consumer.config.filters()[..] {
        [] => true,
        filters => filters.iter().any(|has| overlap(has, filter)),
    };
    let others: Vec<_> = consumers.iter().filter(shares).map(|other| &*other.name).collect();
    if !others.is_empty() {
        found.error(
            "nats-workqueue-taken",
            format!(
                "stream `{name}` is a work queue, and consumer `{}` takes from it already",
                others.join("`, `")
            ),
            "each message of a work queue goes to one consumer: the server refuses to make another \
             for the same subjects",
            "consume with that consumer, delete it, or give the stream limits retention",
        );
    }
    Ok(())
}

async fn exists(
    found: &mut Findings,
    api: &Api,
    source: &NatsSource,
    stream: &Stream,
    consumer: &Consumer,
    competing: bool,
) -> Result<(), Fault> {
    let mut judged = Findings::about("");
    consumer::judge(&mut judged, consumer, stream, source, competing);
    let mut refused = false;
    for Finding { severity, check, what, why, mend, .. } in judged.into_vec() {
        refused |= severity == Severity::Error;
        found.add(severity, check, what, why, mend);
    }
    if !refused
        && let Some(info) = api.consumer(source).await?
        && let Some(difference) = info.config.difference(source, competing)
    {
        // The daemon's own comparison has the last word.
        found.error(
            "nats-consumer-differs",
            format!("consumer `{}` is not as configured: {difference}", source.consumer),
            "the daemon refuses to use it, and consumes nothing",
            "change one of the two",
        );
    }
    let oldest = oldest(api, source, stream, consumer).await?;
    backlog::judge(found, stream, consumer, oldest.as_ref(), OffsetDateTime::now_utc());
    Ok(())
}

/// The first message that is still to be consumed, where the stream has limits and this user may
/// read it.
async fn oldest(
    api: &Api,
    source: &NatsSource,
    stream: &Stream,
    consumer: &Consumer,
) -> Result<Option<GotMessage>, Fault> {
    let config = &stream.config;
    if config.max_age == 0 && config.max_msgs <= 0 && config.max_bytes <= 0 {
        return Ok(None);
    }
    let next = (consumer.ack_floor.stream_seq + 1).max(stream.state.first_seq).max(1);
    let request = json!({"seq": next, "next_by_subj": source.subject.as_deref().unwrap_or(">")});
    match api.ask::<Got>(&format!("STREAM.MSG.GET.{}", source.stream), &request).await {
        Ok(Said::Yes(got)) => Ok(Some(got.message)),
        // There is none; or the permission is found out below.
        Ok(Said::No { .. }) | Err(Fault::Misconfigured(_)) => Ok(None),
        Err(fault) => Err(fault),
    }
}

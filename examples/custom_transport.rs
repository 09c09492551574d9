//! A transport of your own: folders. A file in a folder is a message; publishing writes one.
//!
//! ```text
//! cargo run --example custom_transport
//! ```
//!
//! Clauses C1-C11 and P1-P6 are those of `pulsebus::transport`; each stands where it is kept.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use pulsebus::{
    bus::EventBus,
    dispatch::HandlerOptions,
    event::{DecoderOptions, Headers, Message, Origin},
    handler::forward::{ForwardHandler, ForwardOptions},
    ingest::{IngestOptions, Source},
    transport::{
        Consumer, Deliveries, Outbound, PublishError, Publisher, Reporter, Room, Settle,
        Settlement, SourceSpec, SourceState, Transport, TransportError,
    },
};
use tokio::{fs, time::Instant};

/// Folders below a root.
struct Folders(PathBuf);

#[async_trait]
impl Transport for Folders {
    fn kind(&self) -> &'static str {
        "folders"
    }

    async fn consumer(&self, source: SourceSpec) -> Result<Box<dyn Consumer>, TransportError> {
        // A member nobody knows, or none at all, is a person's mistake: no use in trying again.
        let folder = source.params["folder"].as_str().ok_or_else(|| {
            TransportError::Misconfigured("folders source: name a `folder`".to_owned())
        })?;
        let folder = self.0.join(folder);
        fs::create_dir_all(&folder).await.map_err(|error| {
            TransportError::Unavailable(format!("{}: {error}", folder.display()))
        })?;
        source.reporter.report(SourceState::Consuming);
        let held = Arc::new(Mutex::new(Held::default()));
        Ok(Box::new(Inbox { folder, name: source.name, reporter: source.reporter, held }))
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError> {
        Ok(Box::new(Outbox(self.0.clone())))
    }
}

/// What has been handed over and not settled, and what is to come again later.
#[derive(Default)]
struct Held {
    out: HashSet<PathBuf>,
    later: HashMap<PathBuf, Instant>,
}

struct Inbox {
    folder: PathBuf,
    name: Arc<str>,
    reporter: Reporter,
    held: Arc<Mutex<Held>>,
}

impl Inbox {
    /// What is there and nobody has, in the order of names (C3), as far as there is room (C7).
    async fn look(&self, room: Room) -> io::Result<(Vec<Message>, Vec<PathBuf>)> {
        let mut paths = Vec::new();
        let mut folder = fs::read_dir(&self.folder).await?;
        while let Some(entry) = folder.next_entry().await? {
            let path = entry.path();
            // Others are being written.
            if path.extension().is_some_and(|extension| extension == "json") {
                paths.push(path);
            }
        }
        paths.sort();
        let (mut messages, mut taken, mut bytes) = (Vec::new(), Vec::new(), 0);
        for path in paths {
            if messages.len() >= room.messages || bytes >= room.bytes {
                break;
            }
            {
                let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                if held.out.contains(&path) {
                    continue;
                }
                // What comes later holds up what is behind it, or the order were lost (C3, C6).
                if held.later.get(&path).is_some_and(|due| *due > Instant::now()) {
                    break;
                }
            }
            let body = fs::read(&path).await?;
            bytes += body.len();
            let subject = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            messages.push(Message {
                headers: Headers::new(),
                body: body.into(),
                origin: Origin {
                    source: Arc::clone(&self.name),
                    transport: "folders".into(),
                    subject: subject.into(),
                    ..Origin::default()
                },
            });
            taken.push(path);
        }
        Ok((messages, taken))
    }
}

#[async_trait]
impl Consumer for Inbox {
    async fn next(&mut self, room: Room) -> Option<Deliveries> {
        loop {
            if !room.is_none() {
                match self.look(room).await {
                    Ok((messages, taken)) if !messages.is_empty() => {
                        self.reporter.report(SourceState::Consuming);
                        // Nothing is awaited from here on: whoever drops this future before has
                        // lost nothing (C10).
                        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                        held.out.extend(taken.iter().cloned());
                        drop(held);
                        let settle = Box::new(Taken { paths: taken, held: Arc::clone(&self.held) });
                        return Some(Deliveries { messages, mark: None, redelivered: 0, settle });
                    }
                    Ok(_) => self.reporter.report(SourceState::Consuming),
                    // A disk that was unplugged comes back (C9).
                    Err(error) => self.reporter.report(SourceState::Reconnecting(format!(
                        "{}: {error}",
                        self.folder.display()
                    ))),
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    // What was handed over can still be settled (C11).
    async fn close(&mut self) {}
}

struct Taken {
    paths: Vec<PathBuf>,
    held: Arc<Mutex<Held>>,
}

#[async_trait]
impl Settle for Taken {
    async fn settle(mut self: Box<Self>, settlements: Vec<Settlement>) {
        for (path, settlement) in std::mem::take(&mut self.paths).into_iter().zip(settlements) {
            let later = match settlement {
                // A file that cannot be removed comes again, and is known as a copy (C5).
                Settlement::Ack(_) | Settlement::Reject => {
                    let _ = fs::remove_file(&path).await;
                    None
                }
                Settlement::Retry(delay) => Some(Instant::now() + delay),
            };
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            held.out.remove(&path);
            held.later.remove(&path);
            held.later.extend(later.map(|due| (path, due)));
        }
    }
}

impl Drop for Taken {
    /// What was not settled is there for the next one who asks (C4).
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for path in &self.paths {
            held.out.remove(path);
        }
    }
}

/// Writes each message into the folder that its address names.
struct Outbox(PathBuf);

#[async_trait]
impl Publisher for Outbox {
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>> {
        let mut results = Vec::with_capacity(messages.len());
        for message in messages {
            // One after the other (P2); one that is bad fails alone (P3).
            results.push(self.write(&message).await);
        }
        results
    }

    async fn close(&self) {}
}

impl Outbox {
    async fn write(&self, message: &Outbound) -> Result<(), PublishError> {
        let plain = |text: &str| !text.is_empty() && !text.contains(['/', '\0']) && text != "..";
        if !plain(&message.address) || !plain(&message.id) {
            let what = format!("`{}/{}` names no file", message.address, message.id);
            return Err(PublishError::Refused(what));
        }
        let folder = self.0.join(&*message.address);
        // Whatever it is, it may be over later (P6).
        write_durably(&folder, &message.id, &message.body)
            .await
            .map_err(|error| PublishError::Unavailable(format!("{}: {error}", folder.display())))
    }
}

/// When this returns the file is whole and on the disk (P1). Written again, it is the same file.
async fn write_durably(folder: &Path, id: &str, body: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder).await?;
    let (part, whole) = (folder.join(format!("{id}.part")), folder.join(format!("{id}.json")));
    fs::write(&part, body).await?;
    fs::File::open(&part).await?.sync_all().await?;
    fs::rename(&part, &whole).await?;
    fs::File::open(folder).await?.sync_all().await
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let root = tempfile::tempdir()?;
    let transport = Arc::new(Folders(root.path().to_owned()));
    let bus = EventBus::builder().build().await?;

    let options = ForwardOptions::new(transport.kind(), "done-{type}");
    let publisher = transport.publisher().await?;
    let forward = ForwardHandler::new("forward", publisher.into(), options)?;
    bus.register_handler_with(Arc::new(forward), HandlerOptions::default()).await?;
    bus.start_worker_pool(1);
    bus.add_source(Source {
        name: "inbox".into(),
        transport: Arc::clone(&transport) as _,
        params: serde_json::json!({ "folder": "inbox" }),
        competing: false,
        decoder: DecoderOptions::default(),
        options: IngestOptions::default(),
    });

    for n in 1..=3 {
        let event = format!(r#"{{"id":"e{n}","type":"LessonPublished","data":{{"n":{n}}}}}"#);
        write_durably(&root.path().join("inbox"), &format!("{n:04}"), event.as_bytes()).await?;
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while bus.log().head().0 < 3 {
        anyhow::ensure!(Instant::now() < deadline, "nothing was taken: {:?}", bus.components());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bus.handled("forward", bus.log().head()).await?;
    bus.drain(Duration::from_secs(5)).await?;

    let mut names = Vec::new();
    for folder in ["inbox", "done-LessonPublished"] {
        let mut entries = fs::read_dir(root.path().join(folder)).await?;
        while let Some(entry) = entries.next_entry().await? {
            names.push(format!("{folder}/{}", entry.file_name().display()));
        }
    }
    names.sort();
    println!("{names:?}");
    // Taken out of the inbox, and written by the handler.
    anyhow::ensure!(names.len() == 3 && names.iter().all(|name| name.starts_with("done-")));
    Ok(())
}

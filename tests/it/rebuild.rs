//! Rebuilding the search index beside the one that serves.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use pulsebus::{
    bus::{EventBus, HandlerAccessError},
    dispatch::HandlerOptions,
    event::{NewEvent, Position},
    handler::{
        EventHandler, Outcome,
        search::{DocumentMapping, SearchHandler, SearchOptions, SearchQuery},
    },
    store::{EventStore, memory::MemoryStore},
};
use serde_json::json;

use crate::support::{PATIENCE, process, wait_until};

const NAME: &str = "search";

fn open(folder: &Path) -> Arc<SearchHandler> {
    let lesson = DocumentMapping {
        id: "/id".to_owned(),
        text: BTreeMap::from([("title".to_owned(), "/title".to_owned())]),
        ..DocumentMapping::default()
    };
    let options = SearchOptions {
        documents: BTreeMap::from([("Lesson".to_owned(), lesson)]),
        ..SearchOptions::new(folder)
    };
    Arc::new(SearchHandler::open(NAME, options).unwrap())
}

async fn sit_down(store: &Arc<dyn EventStore>, folder: &Path) -> (EventBus, Arc<SearchHandler>) {
    let bus = EventBus::builder().shared_store(Arc::clone(store)).build().await.unwrap();
    let search = open(folder);
    let options = HandlerOptions {
        checkpoint_interval: Duration::from_millis(50),
        ..HandlerOptions::default()
    };
    bus.register_handler_with(Arc::clone(&search) as _, options).await.unwrap();
    bus.start_worker_pool(1);
    (bus, search)
}

/// `n` lessons, each of another document, from `first` on.
async fn emit(bus: &EventBus, first: usize, n: usize) -> Position {
    let messages = (first..first + n)
        .map(|id| {
            let data = json!({ "id": id, "title": format!("lesson of photosynthesis {id}") });
            NewEvent::new("Lesson", &data).unwrap().key(id.to_string()).into_message()
        })
        .collect();
    bus.append(messages).await.unwrap();
    bus.log().head()
}

async fn total(search: &SearchHandler) -> usize {
    search.search(&SearchQuery::new("photosynthesis")).await.unwrap().total
}

async fn rebuilt(bus: &EventBus) {
    wait_until("it is rebuilt", async || bus.rebuilding(NAME).is_none().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_index_serves_until_the_new_one_is_whole() {
    let folder = process::folder("rebuild").join("index");
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (bus, search) = sit_down(&store, &folder).await;
    let last = emit(&bus, 0, 5_000).await;
    bus.handled(NAME, last).await.unwrap();
    assert_eq!(total(&search).await, 5_000);

    bus.rebuild(NAME, "ann").await.unwrap();
    let again = bus.rebuild(NAME, "ann").await.unwrap_err();
    assert!(matches!(again, HandlerAccessError::Refused(_)), "{again}");
    let mut emitted = 5_000;
    while bus.rebuilding(NAME).is_some() {
        let found = total(&search).await;
        assert!(found >= 5_000, "searches find only {found}");
        emit(&bus, emitted, 20).await;
        emitted += 20;
    }
    let last = emit(&bus, emitted, 1).await;
    bus.handled(NAME, last).await.unwrap();
    assert_eq!(total(&search).await, emitted + 1);
    assert!(!folder.join("next").exists());
    let audit = store.audits(0, 10).await.unwrap();
    assert_eq!((&*audit[0].action, &*audit[0].by), ("rebuild", "ann"));
    assert_eq!(store.cursor("search~rebuild").await.unwrap(), None);
    assert_eq!(store.cursor(NAME).await.unwrap(), Some(last));
    bus.drain(PATIENCE).await.unwrap();
    drop((bus, search));

    // What took its place is what the next start finds.
    let (bus, search) = sit_down(&store, &folder).await;
    assert_eq!(total(&search).await, emitted + 1);
    bus.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_goes_on_after_a_crash_wherever_that_was() {
    let folder = process::folder("rebuild").join("index");
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (mut bus, mut search) = sit_down(&store, &folder).await;
    let last = emit(&bus, 0, 3_000).await;
    bus.handled(NAME, last).await.unwrap();
    bus.rebuild(NAME, "ann").await.unwrap();
    let mut crashes = 0;
    for after in [0, 5, 20, 40, 60, 80, 100, 120, 150, 200, 300] {
        let ended = wait_until("some time has passed", {
            let started = std::time::Instant::now();
            let bus = &bus;
            async move || {
                let ended = bus.rebuilding(NAME).is_none();
                (ended || started.elapsed() >= Duration::from_millis(after)).then_some(ended)
            }
        });
        if ended.await {
            break;
        }
        crashes += 1;
        // Cut off where it is; whoever holds the index lets go of it.
        let _ = bus.drain(Duration::ZERO).await;
        drop((bus, search));
        wait_until("the index is free", async || {
            let lock = std::fs::File::open(folder.join("lock")).ok()?;
            lock.try_lock().ok()
        })
        .await;
        (bus, search) = sit_down(&store, &folder).await;
        assert_eq!(total(&search).await, 3_000, "after {crashes} crashes");
    }
    assert!(crashes > 0);
    rebuilt(&bus).await;
    let last = emit(&bus, 3_000, 10).await;
    bus.handled(NAME, last).await.unwrap();
    assert_eq!(total(&search).await, 3_010);
    assert_eq!(store.cursor("search~rebuild").await.unwrap(), None);
    bus.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_can_be_cancelled_and_what_keeps_nothing_cannot_be_rebuilt() {
    struct Plain;
    #[async_trait::async_trait]
    impl EventHandler for Plain {
        fn name(&self) -> &str {
            "plain"
        }
        async fn handle(&self, _: &pulsebus::event::StoredEvent) -> Outcome {
            Outcome::Done
        }
    }
    let folder = process::folder("rebuild").join("index");
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (bus, search) = sit_down(&store, &folder).await;
    bus.register_handler(Plain).await.unwrap();
    let refused = bus.rebuild("plain", "ann").await.unwrap_err().to_string();
    assert!(refused.contains("nothing that could be rebuilt"), "{refused}");
    assert!(bus.rebuild("nobody", "ann").await.is_err());
    assert!(bus.cancel_rebuild(NAME, "ann").await.is_err());

    let last = emit(&bus, 0, 20_000).await;
    bus.handled(NAME, last).await.unwrap();
    bus.rebuild(NAME, "ann").await.unwrap();
    bus.cancel_rebuild(NAME, "ann").await.unwrap();
    assert_eq!(bus.rebuilding(NAME), None);
    assert!(!folder.join("next").exists());
    assert_eq!(store.cursor("search~rebuild").await.unwrap(), None);
    assert_eq!(total(&search).await, 20_000);
    bus.drain(PATIENCE).await.unwrap();
}

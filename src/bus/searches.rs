//! The search indexes that queries can look at, while handlers come and go.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use crate::handler::search::SearchHandler;

type Map = BTreeMap<Arc<str>, Arc<SearchHandler>>;

/// The search indexes by handler name. Cheap to clone; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Searches(Arc<RwLock<Map>>);

impl Searches {
    /// The index of a handler.
    #[must_use]
    pub fn get(&self, handler: &str) -> Option<Arc<SearchHandler>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(handler).cloned()
    }

    /// The handlers that have one.
    #[must_use]
    pub fn names(&self) -> Vec<Arc<str>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// From now on these are what there is.
    pub(super) fn set(&self, searches: Map) {
        let former = {
            let mut here = self.0.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *here, searches)
        };
        // After the lock: an index that is dropped waits for its thread.
        drop(former);
    }
}

//! The progress of handlers, in memory.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use time::OffsetDateTime;

use super::MemoryStore;
use crate::{
    event::{Position, now},
    store::{
        HeldBy, StoreError,
        progress::{
            self, AuditEntry, Change, Checkpoint, Claim, Claimed, DeadLetter, DeadLetterFilter,
            Epoch, Failure, NewRedrive, ProgressStore, QuarantineFilter, Redrive, RedriveAction,
            RedriveState, Redriven, RedrivenEntry, Selection, SettledEntry, Standing, Tenure,
            Unfinished,
        },
    },
};

#[derive(Debug, Default)]
pub(super) struct Progress {
    handlers: BTreeMap<Arc<str>, Handler>,
    /// The last epoch of any handler: each is given once, also when a handler is forgotten.
    epoch: u64,
    redrives: BTreeMap<u64, Redrive>,
    /// Quarantine entries that a redrive has taken up.
    taken: BTreeMap<u64, u64>,
    audit: Vec<AuditEntry>,
}

#[derive(Debug, Default)]
struct Handler {
    epoch: u64,
    cursor: Position,
    paused: bool,
    rows: BTreeMap<Position, Row>,
}

#[derive(Debug)]
struct Row {
    event: Unfinished,
    redrive: Option<u64>,
}

impl Handler {
    fn keep(&mut self, new: &Unfinished) {
        match self.rows.entry(new.position) {
            Entry::Vacant(vacant) => {
                vacant.insert(Row { event: new.clone(), redrive: None });
            }
            Entry::Occupied(mut occupied) => {
                let row = occupied.get_mut();
                let before = row.event.failure.take();
                let failure = match (before, new.failure.clone()) {
                    (Some(before), Some(new)) => Some(Failure {
                        first_error: before.first_error,
                        first_failed_at: before.first_failed_at,
                        ..new
                    }),
                    (before, new) => new.or(before),
                };
                *row = Row { event: Unfinished { failure, ..new.clone() }, redrive: None };
            }
        }
    }

    fn followers(&self, of: &Unfinished) -> u64 {
        let behind = self.rows.range(of.position.next()..);
        behind
            .filter(|(_, row)| {
                row.event.key == of.key && matches!(row.event.standing, Standing::Parked)
            })
            .count() as u64
    }
}

impl Progress {
    fn held(&mut self, handler: &str, epoch: Epoch) -> Result<&mut Handler, StoreError> {
        match self.handlers.get_mut(handler) {
            Some(state) if state.epoch == epoch.0 => Ok(state),
            _ => Err(StoreError::fenced(handler)),
        }
    }

    /// What each handler needs: everything behind a position.
    pub(super) fn needs(&self) -> impl Iterator<Item = (&Arc<str>, Position, HeldBy)> {
        let handlers = self.handlers.iter().filter(|(name, _)| !name.starts_with(progress::SOURCE));
        handlers.flat_map(|(name, handler)| {
            let row = handler.rows.keys().next();
            let row = row.map(|at| (name, Position(at.0.saturating_sub(1)), HeldBy::Unfinished));
            std::iter::once((name, handler.cursor, HeldBy::Cursor)).chain(row)
        })
    }

    fn dead(&self) -> impl Iterator<Item = (&Arc<str>, &Handler, &Row)> {
        self.handlers.iter().flat_map(|(name, handler)| {
            let dead = |row: &&Row| matches!(row.event.standing, Standing::Dead { .. });
            handler.rows.values().filter(dead).map(move |row| (name, handler, row))
        })
    }

    fn left(&self, redrive: u64) -> u64 {
        let rows = self.handlers.values().flat_map(|handler| handler.rows.values());
        let letters = rows.filter(|row| row.redrive == Some(redrive)).count();
        (letters + self.taken.values().filter(|taken| **taken == redrive).count()) as u64
    }

    fn shown(&self, redrive: &Redrive) -> Redrive {
        let left = match redrive.state {
            RedriveState::Running => self.left(redrive.number),
            RedriveState::Done | RedriveState::Cancelled => redrive.left,
        };
        Redrive { left, ..redrive.clone() }
    }

    fn write_down(&mut self, entry: &AuditEntry) {
        let number = self.audit.last().map_or(0, |last| last.number) + 1;
        self.audit.push(AuditEntry { number, ..entry.clone() });
    }
}

fn matches(filter: &DeadLetterFilter, handler: &str, event: &Unfinished) -> bool {
    let DeadLetterFilter { handler: of, handlers, positions, kind, key, error, since, until } =
        filter;
    let failure = event.failure.as_ref();
    of.as_deref().is_none_or(|of| of == handler)
        && (handlers.is_empty() || handlers.iter().any(|of| of == handler))
        && (positions.is_empty() || positions.contains(&event.position.0))
        && kind.as_deref().is_none_or(|kind| kind == &*event.kind)
        && key.as_deref().is_none_or(|key| key == &*event.key)
        && error.as_deref().is_none_or(|text| failure.is_some_and(|f| f.last_error.contains(text)))
        && since.is_none_or(|since| failure.is_some_and(|f| f.last_failed_at >= since))
        && until.is_none_or(|until| failure.is_some_and(|f| f.last_failed_at < until))
}

fn letter(name: &Arc<str>, handler: &Handler, row: &Row) -> DeadLetter {
    let event = &row.event;
    DeadLetter {
        handler: Arc::clone(name),
        position: event.position,
        id: Arc::clone(&event.id),
        kind: Arc::clone(&event.kind),
        key: Arc::clone(&event.key),
        attempts: event.attempts,
        // A dead letter has failed; one kept without saying how says nothing.
        failure: event.failure.clone().unwrap_or_else(|| Failure {
            first_error: "".into(),
            last_error: "".into(),
            first_failed_at: time::OffsetDateTime::UNIX_EPOCH,
            last_failed_at: time::OffsetDateTime::UNIX_EPOCH,
        }),
        followers: handler.followers(event),
        redrive: row.redrive,
    }
}

#[async_trait]
impl ProgressStore for MemoryStore {
    fn is_shared(&self) -> bool {
        false
    }

    async fn claim(&self, claim: Claim<'_>) -> Result<Claimed, StoreError> {
        let mut state = self.state_mut();
        let removed = Position(state.removed);
        let Progress { handlers, epoch, .. } = &mut state.progress;
        *epoch += 1;
        let fresh = !handlers.contains_key(claim.handler);
        let handler = handlers.entry(claim.handler.into()).or_default();
        if fresh {
            handler.cursor = claim.start.max(removed);
        }
        handler.epoch = *epoch;
        Ok(Claimed::Taken(Tenure {
            epoch: Epoch(handler.epoch),
            cursor: handler.cursor,
            fresh,
            paused: handler.paused,
        }))
    }

    async fn renew(&self, handler: &str, epoch: Epoch, _: Duration) -> Result<bool, StoreError> {
        Ok(self.state_mut().progress.held(handler, epoch)?.paused)
    }

    async fn release(&self, _: &str, _: Epoch) -> Result<(), StoreError> {
        Ok(())
    }

    async fn cursor(&self, handler: &str) -> Result<Option<Position>, StoreError> {
        Ok(self.state().progress.handlers.get(handler).map(|handler| handler.cursor))
    }

    async fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let mut state = self.state_mut();
        let handler = state.progress.held(&checkpoint.handler, checkpoint.epoch)?;
        handler.cursor = checkpoint.cursor;
        for change in &checkpoint.changes {
            match change {
                Change::Keep(unfinished) => handler.keep(unfinished),
                Change::Finish(position) => {
                    handler.rows.remove(position);
                }
            }
        }
        Ok(())
    }

    async fn rewind(
        &self,
        handler: &str,
        epoch: Epoch,
        to: Position,
        audit: Option<&AuditEntry>,
    ) -> Result<Position, StoreError> {
        let mut state = self.state_mut();
        let to = to.max(Position(state.removed));
        let held = state.progress.held(handler, epoch)?;
        held.cursor = to;
        held.rows.split_off(&to.next());
        if let Some(entry) = audit {
            state.progress.write_down(entry);
        }
        Ok(to)
    }

    async fn adopt(&self, from: (&str, Epoch), to: (&str, Epoch)) -> Result<(), StoreError> {
        let mut state = self.state_mut();
        let progress = &mut state.progress;
        progress.held(to.0, to.1)?;
        progress.held(from.0, from.1)?;
        let Some(new) = progress.handlers.remove(from.0) else { return Ok(()) };
        let handler = progress.held(to.0, to.1)?;
        handler.cursor = new.cursor;
        handler.rows = new.rows;
        Ok(())
    }

    async fn forget(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError> {
        let mut state = self.state_mut();
        state.progress.held(handler, epoch)?;
        state.progress.handlers.remove(handler);
        Ok(())
    }

    async fn set_paused(
        &self,
        handler: &str,
        paused: bool,
        audit: &AuditEntry,
    ) -> Result<bool, StoreError> {
        let mut state = self.state_mut();
        let Some(handler) = state.progress.handlers.get_mut(handler) else { return Ok(false) };
        handler.paused = paused;
        state.progress.write_down(audit);
        Ok(true)
    }

    async fn unfinished(
        &self,
        handler: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Unfinished>, StoreError> {
        let state = self.state();
        let Some(handler) = state.progress.handlers.get(handler) else { return Ok(Vec::new()) };
        let rows = handler.rows.range(after.next()..).take(limit);
        Ok(rows.map(|(_, row)| Unfinished { failure: None, ..row.event.clone() }).collect())
    }

    async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        after: Option<(&str, Position)>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let state = self.state();
        let behind =
            |name: &str, row: &Row| after.is_none_or(|after| (name, row.event.position) > after);
        let found = state
            .progress
            .dead()
            .filter(|(name, _, row)| behind(name, row) && matches(filter, name, &row.event));
        Ok(found.take(limit).map(|(name, handler, row)| letter(name, handler, row)).collect())
    }

    async fn unfinished_at(
        &self,
        handler: &str,
        positions: &[Position],
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let state = self.state();
        let Some((name, handler)) = state.progress.handlers.get_key_value(handler) else {
            return Ok(Vec::new());
        };
        let rows = positions.iter().filter_map(|position| handler.rows.get(position));
        Ok(rows.map(|row| letter(name, handler, row)).collect())
    }

    async fn count_dead_letters(&self, filter: &DeadLetterFilter) -> Result<u64, StoreError> {
        let state = self.state();
        let dead = state.progress.dead();
        let free = dead.filter(|(_, _, row)| row.redrive.is_none());
        Ok(free.filter(|(name, _, row)| matches(filter, name, &row.event)).count() as u64)
    }

    async fn count_quarantine(&self, filter: &QuarantineFilter) -> Result<u64, StoreError> {
        let state = self.state();
        let taken = &state.progress.taken;
        let entries = state.quarantine.iter().map(|(entry, _)| entry);
        let free = entries.filter(|entry| !taken.contains_key(&entry.number));
        Ok(free.filter(|entry| filter.matches(entry)).count() as u64)
    }

    async fn unpublished(
        &self,
        handler: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let state = self.state();
        let found = state.progress.dead().filter(|(name, _, row)| {
            &***name == handler && row.event.standing == (Standing::Dead { unpublished: true })
        });
        Ok(found.take(limit).map(|(name, handler, row)| letter(name, handler, row)).collect())
    }

    async fn mark_published(
        &self,
        handler: &str,
        letters: &[(Position, OffsetDateTime)],
    ) -> Result<(), StoreError> {
        let mut state = self.state_mut();
        let Some(handler) = state.progress.handlers.get_mut(handler) else { return Ok(()) };
        for (position, failed_at) in letters {
            if let Some(row) = handler.rows.get_mut(position)
                && row.event.failure.as_ref().is_some_and(|f| f.last_failed_at == *failed_at)
                && let Standing::Dead { unpublished } = &mut row.event.standing
            {
                *unpublished = false;
            }
        }
        Ok(())
    }

    async fn start_redrive(&self, what: &NewRedrive) -> Result<Redrive, StoreError> {
        let mut state = self.state_mut();
        let state = &mut *state;
        let progress = &mut state.progress;
        let number = progress.redrives.last_key_value().map_or(0, |(number, _)| *number) + 1;
        let mut total = 0;
        match &what.selection {
            Selection::DeadLetters(filter) => {
                for (name, handler) in &mut progress.handlers {
                    for row in handler.rows.values_mut() {
                        let free = row.redrive.is_none()
                            && matches!(row.event.standing, Standing::Dead { .. });
                        if free && matches(filter, name, &row.event) {
                            row.redrive = Some(number);
                            total += 1;
                        }
                    }
                }
            }
            Selection::Quarantine(filter) => {
                for (entry, _) in &state.quarantine {
                    if !progress.taken.contains_key(&entry.number) && filter.matches(entry) {
                        progress.taken.insert(entry.number, number);
                        total += 1;
                    }
                }
            }
        }
        let started_at = now();
        let redrive = Redrive {
            number,
            what: what.clone(),
            state: if total == 0 { RedriveState::Done } else { RedriveState::Running },
            total,
            left: total,
            started_at,
            ended_at: (total == 0).then_some(started_at),
        };
        progress.redrives.insert(number, redrive.clone());
        progress.write_down(&redrive.audit());
        Ok(redrive)
    }

    async fn redrives(&self, after: u64, limit: usize) -> Result<Vec<Redrive>, StoreError> {
        let state = self.state();
        let progress = &state.progress;
        let found = progress.redrives.range(after.saturating_add(1)..).take(limit);
        Ok(found.map(|(_, redrive)| progress.shown(redrive)).collect())
    }

    async fn redrive(&self, number: u64) -> Result<Option<Redrive>, StoreError> {
        let state = self.state();
        let progress = &state.progress;
        Ok(progress.redrives.get(&number).map(|redrive| progress.shown(redrive)))
    }

    async fn cancel_redrive(
        &self,
        number: u64,
        audit: &AuditEntry,
    ) -> Result<Option<Redrive>, StoreError> {
        let mut state = self.state_mut();
        let progress = &mut state.progress;
        let left = progress.left(number);
        let Some(redrive) = progress.redrives.get_mut(&number) else { return Ok(None) };
        if redrive.state == RedriveState::Running {
            redrive.left = left;
            redrive.state = RedriveState::Cancelled;
            redrive.ended_at = Some(now());
            progress.write_down(audit);
            let rows = progress.handlers.values_mut().flat_map(|h| h.rows.values_mut());
            for row in rows.filter(|row| row.redrive == Some(number)) {
                row.redrive = None;
            }
            progress.taken.retain(|_, taken| *taken != number);
        }
        Ok(progress.redrives.get(&number).map(|redrive| progress.shown(redrive)))
    }

    async fn redriven(
        &self,
        handler: &str,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<Redriven>, StoreError> {
        let state = self.state();
        let progress = &state.progress;
        let Some(handler) = progress.handlers.get(handler) else { return Ok(Vec::new()) };
        let taken = handler.rows.values().filter_map(|row| {
            let number = row.redrive.filter(|number| !except.contains(number))?;
            let redrive = progress.redrives.get(&number)?;
            Some(Redriven {
                redrive: redrive.number,
                action: redrive.what.action,
                rate: redrive.what.rate,
                event: Unfinished { failure: None, ..row.event.clone() },
            })
        });
        Ok(taken.take(limit).collect())
    }

    async fn redriven_quarantine(
        &self,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<RedrivenEntry>, StoreError> {
        let state = self.state();
        let progress = &state.progress;
        let wanted = progress.taken.iter().filter(|(_, redrive)| !except.contains(redrive));
        let taken = wanted.filter_map(|(&number, redrive)| {
            let redrive = progress.redrives.get(redrive)?;
            let (action, rate) = (redrive.what.action, redrive.what.rate);
            Some(RedrivenEntry { number, redrive: redrive.number, action, rate })
        });
        Ok(taken.take(limit).collect())
    }

    async fn settle_quarantine(&self, settled: &[SettledEntry]) -> Result<(), StoreError> {
        let mut state = self.state_mut();
        let state = &mut *state;
        for settled in settled {
            match settled {
                SettledEntry::Gone(number) => {
                    state.progress.taken.remove(number);
                    state.quarantine.retain(|(entry, _)| entry.number != *number);
                }
                SettledEntry::Stays { number, reason } => {
                    state.progress.taken.remove(number);
                    let mut entries = state.quarantine.iter_mut();
                    if let Some((entry, _)) = entries.find(|(entry, _)| entry.number == *number) {
                        entry.reason.clone_from(reason);
                    }
                }
            }
        }
        Ok(())
    }

    async fn discard_orphans(&self, registered: &[String]) -> Result<(), StoreError> {
        let mut state = self.state_mut();
        let Progress { handlers, redrives, .. } = &mut state.progress;
        for (name, handler) in handlers {
            if registered.iter().any(|registered| **registered == **name) {
                continue;
            }
            handler.rows.retain(|_, row| {
                let redrive = row.redrive.and_then(|number| redrives.get(&number));
                redrive.is_none_or(|redrive| redrive.what.action != RedriveAction::Discard)
            });
        }
        Ok(())
    }

    async fn end_redrives(&self) -> Result<(), StoreError> {
        let mut state = self.state_mut();
        let progress = &mut state.progress;
        let running: Vec<u64> = progress
            .redrives
            .values()
            .filter(|redrive| redrive.state == RedriveState::Running)
            .map(|redrive| redrive.number)
            .collect();
        for number in running {
            if progress.left(number) == 0
                && let Some(redrive) = progress.redrives.get_mut(&number)
            {
                redrive.left = 0;
                redrive.state = RedriveState::Done;
                redrive.ended_at = Some(now());
            }
        }
        Ok(())
    }

    async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        self.state_mut().progress.write_down(entry);
        Ok(())
    }

    async fn audits(&self, before: u64, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        let state = self.state();
        let older = state.progress.audit.iter().rev();
        let older = older.filter(|entry| before == 0 || entry.number < before);
        Ok(older.take(limit).cloned().collect())
    }
}

impl QuarantineFilter {
    fn matches(&self, entry: &crate::store::QuarantineEntry) -> bool {
        let Self { numbers, source, reason, since, until } = self;
        (numbers.is_empty() || numbers.contains(&entry.number))
            && source.as_deref().is_none_or(|source| source == &*entry.origin.source)
            && reason.as_deref().is_none_or(|text| entry.reason.contains(text))
            && since.is_none_or(|since| entry.received_at >= since)
            && until.is_none_or(|until| entry.received_at < until)
    }
}

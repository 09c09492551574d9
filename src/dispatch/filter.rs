//! Which event types a handler gets.

use globset::{Glob, GlobSet, GlobSetBuilder};
use rustc_hash::FxHashMap;

/// Globs over event types: `Lesson*`, `*.created`, `{A,B}`.
#[derive(Debug, Clone)]
pub struct Filter {
    globs: Option<GlobSet>,
    patterns: Vec<String>,
}

/// A pattern that is no glob.
#[derive(Debug, thiserror::Error)]
#[error("`{pattern}` is not a glob over event types: {reason}")]
pub struct FilterError {
    pattern: String,
    reason: String,
}

impl Filter {
    /// Every event.
    #[must_use]
    pub const fn all() -> Self {
        Self { globs: None, patterns: Vec::new() }
    }

    /// Events whose type matches one of the patterns; no pattern at all means every event.
    ///
    /// # Errors
    /// Names the first pattern that is no glob.
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Self, FilterError> {
        if patterns.is_empty() {
            return Ok(Self::all());
        }
        let refuse = |pattern: &str, error: &globset::Error| FilterError {
            pattern: pattern.to_owned(),
            reason: error.kind().to_string(),
        };
        let mut builder = GlobSetBuilder::new();
        for pattern in patterns {
            let pattern = pattern.as_ref();
            builder.add(Glob::new(pattern).map_err(|error| refuse(pattern, &error))?);
        }
        let globs = builder.build().map_err(|error| refuse("", &error))?;
        Ok(Self {
            globs: Some(globs),
            patterns: patterns.iter().map(|p| p.as_ref().to_owned()).collect(),
        })
    }

    /// Whether events of this type get through.
    #[must_use]
    pub fn matches(&self, kind: &str) -> bool {
        self.globs.as_ref().is_none_or(|globs| globs.is_match(kind))
    }

    /// The patterns; empty: every event.
    #[must_use]
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }
}

/// A filter that remembers its verdicts: types are few and events many.
pub(super) struct CachedFilter {
    filter: Filter,
    verdicts: FxHashMap<Box<str>, bool>,
}

/// Types remembered at most; a publisher that invents types must not grow memory (G7).
const REMEMBERED: usize = 4_096;

impl CachedFilter {
    pub(super) fn new(filter: Filter) -> Self {
        Self { filter, verdicts: FxHashMap::default() }
    }

    pub(super) fn matches(&mut self, kind: &str) -> bool {
        if self.filter.globs.is_none() {
            return true;
        }
        if let Some(&verdict) = self.verdicts.get(kind) {
            return verdict;
        }
        let verdict = self.filter.matches(kind);
        if self.verdicts.len() >= REMEMBERED {
            self.verdicts.clear();
        }
        self.verdicts.insert(kind.into(), verdict);
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_choose_types() {
        let filter = Filter::new(&["Lesson*", "QuizSubmitted"]).unwrap();
        assert!(filter.matches("LessonPublished"));
        assert!(filter.matches("QuizSubmitted"));
        assert!(!filter.matches("QuizSubmittedLate"));
        assert!(Filter::all().matches("anything"));
        assert!(Filter::new::<&str>(&[]).unwrap().matches("anything"));
        let error = Filter::new(&["a[b"]).unwrap_err().to_string();
        assert!(error.contains("a[b"), "{error}");
    }

    #[test]
    fn G7_remembered_types_are_bounded() {
        let mut filter = CachedFilter::new(Filter::new(&["T1*"]).unwrap());
        for i in 0..3 * REMEMBERED {
            let kind = format!("T{i}");
            assert_eq!(filter.matches(&kind), kind.starts_with("T1"));
        }
        assert!(filter.verdicts.len() <= REMEMBERED);
    }
}

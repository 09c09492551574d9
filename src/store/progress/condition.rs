//! The conditions of filters, as SQL: what both databases share.
//!
//! A statement has a condition for each thing that is asked for, and no other, so that the
//! database finds the index that fits. The text never contains a value.

use std::fmt::Write as _;

use time::OffsetDateTime;

use super::{DeadLetterFilter, QuarantineFilter, Selection, row::clean};
use crate::{event::Position, store::row::signed};

/// Whose SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Dialect {
    Sqlite,
    Postgres,
}

/// A value to bind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum Value {
    Text(String),
    Number(i64),
    Numbers(Vec<i64>),
    Texts(Vec<String>),
    Time(OffsetDateTime),
}

/// Conditions that must all hold, and their values in the order of the numbers `$n`.
#[derive(Debug)]
struct Conditions {
    dialect: Dialect,
    /// How many values the statement binds before these.
    before: usize,
    /// `AND …`, once for each.
    text: String,
    values: Vec<Value>,
}

impl Conditions {
    /// The dead letters that a filter asks for, in `unfinished`.
    fn dead_letters(filter: &DeadLetterFilter, dialect: Dialect, before: usize) -> Self {
        let DeadLetterFilter { handler, handlers, positions, kind, key, error, since, until } =
            filter;
        let mut all = Self { dialect, before, text: String::new(), values: Vec::new() };
        if let Some(handler) = handler {
            all.add("handler = $", Value::Text(clean(handler).into_owned()));
        }
        if !handlers.is_empty() {
            let names = handlers.iter().map(|name| clean(name).into_owned()).collect();
            all.among("handler", Value::Texts(names));
        }
        all.one_of("position", positions);
        all.long_text("type", kind.as_deref());
        all.long_text("key", key.as_deref());
        all.contains("last_error", error.as_deref());
        all.between("last_failed_at", *since, *until);
        all
    }

    /// The entries that a filter asks for, in `quarantine`.
    fn quarantine(filter: &QuarantineFilter, dialect: Dialect, before: usize) -> Self {
        let QuarantineFilter { numbers, source, reason, since, until } = filter;
        let mut all = Self { dialect, before, text: String::new(), values: Vec::new() };
        all.one_of("number", numbers);
        if let Some(source) = source {
            all.add("source = $", Value::Text(clean(source).into_owned()));
        }
        all.contains("reason", reason.as_deref());
        all.between("received_at", *since, *until);
        all
    }

    /// Only those behind this one, by handler and position.
    fn behind(mut self, filter: &DeadLetterFilter, after: Option<(&str, Position)>) -> Self {
        let Some((handler, position)) = after else { return self };
        let position = Value::Number(signed(position.0));
        if filter.handler.as_deref() == Some(handler) {
            self.add("position > $", position);
        } else {
            let first = self.bind(Value::Text(clean(handler).into_owned()));
            let second = self.bind(position);
            self.push(format_args!("(handler, position) > (${first}, ${second})"));
        }
        self
    }

    fn bind(&mut self, value: Value) -> usize {
        self.values.push(value);
        self.before + self.values.len()
    }

    fn push(&mut self, condition: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = write!(self.text, " AND {condition}");
    }

    /// A condition that ends in `$`.
    fn add(&mut self, condition: &'static str, value: Value) {
        let number = self.bind(value);
        self.push(format_args!("{condition}{number}"));
    }

    fn one_of(&mut self, column: &'static str, numbers: &[u64]) {
        if numbers.is_empty() {
            return;
        }
        self.among(column, Value::Numbers(numbers.iter().map(|n| signed(*n)).collect()));
    }

    /// The value is a list, and the column has one of it.
    fn among(&mut self, column: &'static str, list: Value) {
        let number = self.bind(list);
        match self.dialect {
            Dialect::Sqlite => {
                self.push(format_args!("{column} IN (SELECT value FROM json_each(${number}))"));
            }
            Dialect::Postgres => self.push(format_args!("{column} = ANY(${number})")),
        }
    }

    /// Text that may be longer than what Postgres takes into an index: see its schema.
    fn long_text(&mut self, column: &'static str, wanted: Option<&str>) {
        let Some(wanted) = wanted else { return };
        let number = self.bind(Value::Text(clean(wanted).into_owned()));
        if self.dialect == Dialect::Postgres {
            self.push(format_args!("left({column}, 200) = left(${number}, 200)"));
        }
        self.push(format_args!("{column} = ${number}"));
    }

    /// With this in it; no character has a meaning of its own.
    fn contains(&mut self, column: &'static str, wanted: Option<&str>) {
        let Some(wanted) = wanted else { return };
        let number = self.bind(Value::Text(clean(wanted).into_owned()));
        let function = match self.dialect {
            Dialect::Sqlite => "instr",
            Dialect::Postgres => "strpos",
        };
        self.push(format_args!("{function}({column}, ${number}) > 0"));
    }

    fn between(
        &mut self,
        column: &'static str,
        since: Option<OffsetDateTime>,
        until: Option<OffsetDateTime>,
    ) {
        for (operator, at) in [(">=", since), ("<", until)] {
            let Some(at) = at else { continue };
            let number = self.bind(Value::Time(at));
            self.push(format_args!("{column} {operator} ${number}"));
        }
    }
}

/// A statement, and its values behind `$1`.
pub(in crate::store) type Filtered = (String, Vec<Value>);

/// The table, and for SQLite the index. Its planner knows nothing of how many rows are dead, and
/// would walk all that a handler has not finished; that of Postgres looks.
fn table(filter: &DeadLetterFilter, dialect: Dialect) -> &'static str {
    let DeadLetterFilter { handler, positions, kind, key, .. } = filter;
    match (dialect, handler) {
        (Dialect::Postgres, _) => "unfinished",
        (Dialect::Sqlite, Some(_)) if !positions.is_empty() => "unfinished",
        (Dialect::Sqlite, Some(_)) if key.is_some() => "unfinished INDEXED BY unfinished_key",
        (Dialect::Sqlite, Some(_)) if kind.is_some() => {
            "unfinished INDEXED BY unfinished_dead_type"
        }
        (Dialect::Sqlite, _) => "unfinished INDEXED BY unfinished_dead",
    }
}

/// The dead letters for which this holds, the first `$1` of them, and what waits behind each.
fn letters(table: &str, conditions: &str, dialect: Dialect) -> String {
    failed(table, &format!("state = 'dead'{conditions}"), dialect)
}

/// The rows for which this holds, the first `$1` of them, and what waits behind each.
fn failed(table: &str, conditions: &str, dialect: Dialect) -> String {
    let same_key = match dialect {
        Dialect::Sqlite => "behind.key = unfinished.key",
        Dialect::Postgres => {
            "left(behind.key, 200) = left(unfinished.key, 200) AND behind.key = unfinished.key"
        }
    };
    format!(
        "SELECT handler, position, id, type, key, attempts, first_error, last_error,
             first_failed_at, last_failed_at, redrive,
             (SELECT count(*) FROM unfinished AS behind
              WHERE behind.handler = unfinished.handler AND {same_key}
                AND behind.state = 'parked' AND behind.position > unfinished.position)
         FROM {table} WHERE {conditions} ORDER BY handler, position LIMIT $1"
    )
}

/// The dead letters that a filter asks for, behind this one; the first `$1` of them.
pub(in crate::store) fn list_letters(
    filter: &DeadLetterFilter,
    after: Option<(&str, Position)>,
    dialect: Dialect,
) -> Filtered {
    let found = Conditions::dead_letters(filter, dialect, 1).behind(filter, after);
    (letters(table(filter, dialect), &found.text, dialect), found.values)
}

/// The rows of the handler `$2` at the positions `$3`, whatever their state; the first `$1` of them.
pub(in crate::store) fn list_at(dialect: Dialect) -> String {
    let among = match dialect {
        Dialect::Sqlite => "handler = $2 AND position IN (SELECT value FROM json_each($3))",
        Dialect::Postgres => "handler = $2 AND position = ANY($3)",
    };
    failed("unfinished", among, dialect)
}

/// The dead letters of the handler `$2` that are still to be published, the first `$1` of them.
pub(in crate::store) fn list_unpublished(dialect: Dialect) -> String {
    let table = match dialect {
        Dialect::Sqlite => "unfinished INDEXED BY unfinished_unpublished",
        Dialect::Postgres => "unfinished",
    };
    letters(table, " AND handler = $2 AND unpublished", dialect)
}

/// How many dead letters a filter asks for; there is no `$1`.
pub(in crate::store) fn count_letters(filter: &DeadLetterFilter, dialect: Dialect) -> Filtered {
    let Conditions { text, values, .. } = Conditions::dead_letters(filter, dialect, 0);
    let table = table(filter, dialect);
    let sql =
        format!("SELECT count(*) FROM {table} WHERE state = 'dead' AND redrive IS NULL{text}");
    (sql, values)
}

/// How many quarantine entries a filter asks for; there is no `$1`.
pub(in crate::store) fn count_quarantine(filter: &QuarantineFilter, dialect: Dialect) -> Filtered {
    let Conditions { text, values, .. } = Conditions::quarantine(filter, dialect, 0);
    (format!("SELECT count(*) FROM quarantine WHERE redrive IS NULL{text}"), values)
}

/// Gives what is selected, and no redrive has yet, to the redrive `$1`.
pub(in crate::store) fn take_up(selection: &Selection, dialect: Dialect) -> Filtered {
    let (table, Conditions { text, values, .. }, dead) = match selection {
        Selection::DeadLetters(filter) => {
            let found = Conditions::dead_letters(filter, dialect, 1);
            (table(filter, dialect), found, " AND state = 'dead'")
        }
        Selection::Quarantine(filter) => {
            ("quarantine", Conditions::quarantine(filter, dialect, 1), "")
        }
    };
    (format!("UPDATE {table} SET redrive = $1 WHERE redrive IS NULL{dead}{text}"), values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_for_each_thing_asked_for() {
        let none = Conditions::dead_letters(&DeadLetterFilter::default(), Dialect::Sqlite, 1);
        assert_eq!((none.text.as_str(), none.values.len()), ("", 0));
        let filter = DeadLetterFilter {
            handler: Some("search".to_owned()),
            positions: vec![7, 9],
            error: Some("50%".to_owned()),
            ..DeadLetterFilter::default()
        };
        let some = Conditions::dead_letters(&filter, Dialect::Sqlite, 1);
        let some = some.behind(&filter, Some(("search", Position(7))));
        assert_eq!(
            some.text,
            " AND handler = $2 AND position IN (SELECT value FROM json_each($3)) \
             AND instr(last_error, $4) > 0 AND position > $5"
        );
        assert_eq!(
            some.values,
            [
                Value::Text("search".to_owned()),
                Value::Numbers(vec![7, 9]),
                Value::Text("50%".to_owned()),
                Value::Number(7),
            ]
        );
        let filter = DeadLetterFilter { kind: Some("T\0".to_owned()), ..filter };
        let other = Conditions::dead_letters(&filter, Dialect::Postgres, 0);
        let other = other.behind(&filter, Some(("mail", Position(7))));
        assert_eq!(
            other.text,
            " AND handler = $1 AND position = ANY($2) AND left(type, 200) = left($3, 200) \
             AND type = $3 AND strpos(last_error, $4) > 0 AND (handler, position) > ($5, $6)"
        );
        assert_eq!(other.values[2], Value::Text("T\u{fffd}".to_owned()));
    }
}

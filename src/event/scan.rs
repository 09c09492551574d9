//! Finding members in JSON text without building a tree.

/// The raw text of a top-level member; the last one where it repeats.
pub(crate) fn member<'a>(json: &'a str, name: &str) -> Option<&'a str> {
    let map: std::collections::HashMap<String, &'a serde_json::value::RawValue> =
        serde_json::from_str(json).ok()?;
    map.get(name).map(|raw| raw.get())
}

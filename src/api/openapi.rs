//! `/openapi.json`: this API, described for programs. A test holds it to the routes and to what
//! they answer.

use std::sync::LazyLock;

use axum::{http::header, response::IntoResponse};

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let version = concat!("\"version\": \"", env!("CARGO_PKG_VERSION"), "\"");
    include_str!("openapi.json").replacen("\"version\": \"0\"", version, 1)
});

pub(super) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let document: Value = serde_json::from_str(&DOCUMENT).unwrap();
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        let described: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().unwrap();
                methods.keys().map(move |method| (path.clone(), method.clone()))
            })
            .collect();

        // The routes as they are written down.
        let mut routes = BTreeSet::new();
        for route in include_str!("mod.rs").split(".route(").skip(1) {
            let mut parts = route.split('"');
            let path = parts.nth(1).unwrap().to_owned();
            let calls = route.split(".layer(").next().unwrap().split(".fallback(").next().unwrap();
            for method in ["get", "post", "put", "patch", "delete"] {
                let call = format!("{method}(");
                let called = |(at, _): (usize, &str)| calls[..at].ends_with([' ', '.', ',', '\n']);
                if calls.match_indices(&call).any(called) {
                    routes.insert((path.clone(), method.to_owned()));
                }
            }
        }
        assert!(routes.len() > 25, "{routes:?}");
        assert_eq!(routes, described);
    }
}

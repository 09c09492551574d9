//! The two text formats that scrapers read: OpenMetrics 1.0, and the Prometheus format 0.0.4
//! before it.

use std::fmt::Write as _;

/// A format of `/metrics`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TextFormat {
    /// OpenMetrics 1.0: what is sent unless something else is asked for.
    #[default]
    OpenMetrics,
    /// The Prometheus text format 0.0.4.
    Prometheus,
}

impl TextFormat {
    /// Its content type.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// What an `Accept` header (RFC 9110, section 12.5.1) prefers; OpenMetrics where it has no
    /// preference, and where it wants neither.
    #[must_use]
    pub fn preferred(accept: &str) -> Self {
        let (mut open, mut plain) = (0.0_f32, 0.0_f32);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut quality, mut version) = (1.0, None);
            for parameter in parts {
                match parameter.split_once('=') {
                    Some((name, value)) if name.eq_ignore_ascii_case("q") => {
                        quality = value.trim().parse().unwrap_or(0.0);
                    }
                    Some((name, value)) if name.eq_ignore_ascii_case("version") => {
                        version = Some(value.trim_matches('"').to_owned());
                    }
                    _ => {}
                }
            }
            match (&*kind, version.as_deref()) {
                ("application/openmetrics-text", None | Some("1.0.0")) => open = open.max(quality),
                ("text/plain", None | Some("0.0.4")) | ("text/*", None) => {
                    plain = plain.max(quality);
                }
                _ => {}
            }
        }
        if plain > open { Self::Prometheus } else { Self::OpenMetrics }
    }

    /// What was written as OpenMetrics, in this format.
    pub(super) fn written(self, open: String) -> String {
        match self {
            Self::OpenMetrics => open,
            Self::Prometheus => prometheus(&open),
        }
    }
}

/// There a counter's samples are of its family's name (OpenMetrics leaves `_total` off it), an
/// info is a gauge, and neither units nor an end are written down.
fn prometheus(open: &str) -> String {
    let mut text = String::with_capacity(open.len());
    let mut help = None;
    for line in open.lines() {
        let mut words = line.splitn(4, ' ');
        let rest = match (words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name)) => {
                help = Some((name, words.next().unwrap_or_default()));
                continue;
            }
            (Some("#"), Some("TYPE"), Some(name)) => (name, words.next().unwrap_or_default()),
            (Some("#"), ..) => continue,
            _ => {
                text.push_str(line);
                text.push('\n');
                continue;
            }
        };
        let (name, suffix, kind) = match rest {
            (name, "counter") => (name, "_total", "counter"),
            (name, "info") => (name, "_info", "gauge"),
            (name, "unknown") => (name, "", "untyped"),
            (name, kind) => (name, "", kind),
        };
        // Writing to a string does not fail.
        if let Some((of, help)) = help.take()
            && of == name
        {
            // In a help text only quotes are written another way.
            let _ = writeln!(text, "# HELP {name}{suffix} {}", help.replace("\\\"", "\""));
        }
        let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_sent() {
        let (open, plain) = (TextFormat::OpenMetrics, TextFormat::Prometheus);
        for (accept, wanted) in [
            ("", open),
            ("*/*", open),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", open),
            // Prometheus 2.42 and 3.
            (
                "application/openmetrics-text;version=1.0.0,application/openmetrics-text;\
                 version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                open,
            ),
            (
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                 application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;\
                 escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,/;q=0.1",
                open,
            ),
            ("text/plain", plain),
            ("text/plain;version=0.0.4", plain),
            ("text/plain; version=\"0.0.4\"; q=0.5, */*;q=0.1", plain),
            ("text/*", plain),
            ("application/openmetrics-text;q=0.1, text/plain", plain),
            ("application/openmetrics-text;version=2.0.0, text/plain;q=0.2", plain),
            ("application/json", open),
        ] {
            assert_eq!(TextFormat::preferred(accept), wanted, "{accept}");
        }
    }

    #[test]
    fn the_older_format_has_its_own_names() {
        let open = "# HELP a Things \"done\".\n# TYPE a counter\n# UNIT a bytes\n\
                    a_total{x=\"# TYPE y\"} 7\n# HELP b Runs.\n# TYPE b info\n\
                    b_info{version=\"1\"} 1\n# TYPE c histogram\nc_bucket{le=\"+Inf\"} 1\n# EOF\n";
        assert_eq!(
            TextFormat::Prometheus.written(open.to_owned()),
            "# HELP a_total Things \"done\".\n# TYPE a_total counter\na_total{x=\"# TYPE y\"} 7\n\
             # HELP b_info Runs.\n# TYPE b_info gauge\nb_info{version=\"1\"} 1\n\
             # TYPE c histogram\nc_bucket{le=\"+Inf\"} 1\n"
        );
    }
}

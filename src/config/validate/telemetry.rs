//! `[telemetry]`.

use std::time::Duration;

use url::Url;

use super::Check;
use crate::{
    config::raw::{RawOtlp, RawTelemetry},
    telemetry::OtlpSettings,
};

/// The path of the table.
const OTLP: [&str; 2] = ["telemetry", "otlp"];

impl Check<'_> {
    pub(super) fn otlp(&mut self, raw: Option<&RawTelemetry>) -> Option<OtlpSettings> {
        let raw = raw?.otlp.as_ref()?;
        if !cfg!(feature = "otlp") {
            self.wrong(
                &OTLP,
                "this binary was built without the cargo feature `otlp`: build it with \
                 `--features otlp`, or take the section out",
            );
            return None;
        }
        let key = |name| [OTLP[0], OTLP[1], name];
        let endpoint = self.endpoint(raw);
        let headers =
            self.secret(&OTLP, "headers", raw.headers.as_ref(), raw.headers_file.as_ref());
        #[cfg(feature = "otlp")]
        if let Some(Ok(text)) = headers.as_ref().map(crate::secret::Secret::read)
            && let Err(problem) = crate::telemetry::parse_headers(&text)
        {
            self.wrong(&key("headers"), format!("{problem}; write name=value,name=value"));
        }
        let service_name = raw.service_name.clone().unwrap_or_else(|| "pulsebus".to_owned());
        if service_name.trim().is_empty() {
            self.wrong(&key("service_name"), "is empty; set it, or take the key out");
        }
        let sample_ratio = raw.sample_ratio.map(|ratio| ratio.0);
        let settings = OtlpSettings {
            endpoint: endpoint?,
            ca_file: self.existing_file(&key("ca_file"), raw.ca_file.as_ref()),
            headers,
            sample_ratio: self.number(&key("sample_ratio"), sample_ratio, 1.0, 0.0..=1.0),
            timeout: self.span(&key("timeout"), raw.timeout, Duration::from_secs(10)),
            queue: self.number(&key("queue"), raw.queue, 8_192, 1..=1_000_000),
            service_name,
            resource: raw.resource.clone().unwrap_or_default(),
        };
        Some(settings)
    }

    fn endpoint(&mut self, raw: &RawOtlp) -> Option<Url> {
        let path = [OTLP[0], OTLP[1], "endpoint"];
        let Some(text) = &raw.endpoint else {
            self.missing(
                &path,
                "set it to where the collector takes spans, as in http://127.0.0.1:4318/v1/traces",
            );
            return None;
        };
        match Url::parse(text.trim()) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => {
                if url.path() == "/" {
                    self.doubt(&path, "has no path; collectors take spans at /v1/traces");
                }
                // What is in them is a secret, and would be shown.
                let login = !url.username().is_empty() || url.password().is_some();
                if login || url.query().is_some() {
                    self.wrong(
                        &path,
                        "holds a login or a query; put the key into `headers` or `headers_file`",
                    );
                    return None;
                }
                Some(url)
            }
            _ => {
                self.wrong(&path, "not an http:// or https:// URL");
                None
            }
        }
    }
}

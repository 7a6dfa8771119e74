//! Log lines and traces of the control plane's processes: one trace goes from a request of the API to
//! what a daemon did for it.
//!
//! A trace is carried by the W3C header `traceparent`, in metadata between processes and in the task
//! that works ([`scope`]); what outlives a task, such as an operation, keeps [`trace_parent`]'s text.
//! Spans go to an OpenTelemetry collector where one is named; trace ids are there anyway, so that log
//! lines of all processes can be told apart by them.

use std::future::Future;
use std::io::IsTerminal as _;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{
    SpanBuilder, SpanContext, SpanId, SpanKind, TraceContextExt as _, TraceId, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use thiserror::Error;
use tonic::codegen::http::HeaderMap;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

mod served;

pub use served::{Traced, serve};

/// Metadata that carries a trace, as W3C Trace Context has it.
pub const TRACE_PARENT: &str = "traceparent";
/// Variable with what to log.
const LOG: &str = "MORTISE_LOG";
/// A collector that takes longer loses spans, not time.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

tokio::task_local! {
    static CURRENT: String;
}

/// Sends what is left when it is shut down.
#[derive(Debug)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Logs to stderr, and sends spans to the OTLP collector at `collector` (`http://HOST:PORT`, gRPC).
/// Call it on a tokio runtime, once.
///
/// # Errors
/// When the collector's address is none, or somebody else logs already.
pub fn init(service: &'static str, collector: Option<&str>) -> Result<Telemetry, TelemetryError> {
    let filter = EnvFilter::try_from_env(LOG).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let provider = collector
        .map(|collector| provider(service, collector))
        .transpose()?;
    let spans = provider.as_ref().map(|provider| {
        global::set_tracer_provider(provider.clone());
        // What is logged says nothing about what is traced.
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("mortise"))
            .with_filter(LevelFilter::INFO)
    });
    tracing_subscriber::registry()
        .with(spans)
        .with(lines.with_filter(filter))
        .try_init()
        .map_err(|_| TelemetryError::Twice)?;
    Ok(Telemetry { provider })
}

fn provider(service: &'static str, collector: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let failed = |reason: String| TelemetryError::Collector {
        address: collector.to_owned(),
        reason,
    };
    if !collector.starts_with("http://") && !collector.starts_with("https://") {
        return Err(failed("it must be http://HOST:PORT".to_owned()));
    }
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(collector)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|error| failed(error.to_string()))?;
    let resource = Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.name", service),
            KeyValue::new("service.namespace", "mortise"),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ])
        .build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build())
}

impl Telemetry {
    /// Sends what is left, for a few seconds at most. Blocks: call it where that may be.
    pub fn shutdown(self) {
        if let Some(provider) = self.provider {
            let _ = provider.shutdown_with_timeout(EXPORT_TIMEOUT);
        }
    }
}

/// Makes `span` go on with the trace in a request's headers, or begin one; answers the text that
/// carries it on.
pub fn continue_trace(span: &Span, headers: &HeaderMap) -> String {
    let given = headers
        .get(TRACE_PARENT)
        .and_then(|value| value.to_str().ok())
        .filter(|text| is_trace_parent(text));
    resume_trace(span, given.unwrap_or_default())
}

/// As [`continue_trace`], from a text that was kept; an empty one begins a new trace.
pub fn resume_trace(span: &Span, trace_parent: &str) -> String {
    if !trace_parent.is_empty() {
        // Fails where nobody collects spans.
        let _ = span.set_parent(context(trace_parent));
    }
    text_of(&span.context()).unwrap_or_else(|| match trace_parent {
        "" => fresh(),
        given => given.to_owned(),
    })
}

/// Runs `work` as part of a trace.
pub async fn scope<T>(trace_parent: String, work: impl Future<Output = T>) -> T {
    CURRENT.scope(trace_parent, work).await
}

/// The trace that this task works for; empty for none.
pub fn trace_parent() -> String {
    text_of(&Span::current().context())
        .or_else(|| CURRENT.try_with(String::clone).ok())
        .unwrap_or_default()
}

/// The 32 hexadecimal digits that all log lines and spans of a trace share.
pub fn trace_id(trace_parent: &str) -> &str {
    trace_parent.split('-').nth(1).unwrap_or_default()
}

/// Carries this task's trace on in a request's metadata.
pub fn inject(metadata: &mut MetadataMap) {
    if let Ok(value) = trace_parent().parse()
        && !metadata.contains_key(TRACE_PARENT)
    {
        metadata.insert(TRACE_PARENT, value);
    }
}

/// A span that another process, which reaches no collector, has measured: a child of this task's.
pub fn relay(name: String, process: &str, begun: SystemTime, ended: SystemTime) {
    let parent = context(&trace_parent());
    if !parent.span().span_context().is_valid() {
        return;
    }
    let tracer = global::tracer("mortise");
    let span = SpanBuilder::from_name(name)
        .with_kind(SpanKind::Server)
        .with_start_time(begun)
        .with_attributes([KeyValue::new("process", process.to_owned())]);
    let mut span = tracer.build_with_context(span, &parent);
    opentelemetry::trace::Span::end_with_timestamp(&mut span, ended);
}

fn context(trace_parent: &str) -> Context {
    TraceContextPropagator::new().extract(&Header(trace_parent))
}

struct Header<'a>(&'a str);

impl Extractor for Header<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == TRACE_PARENT).then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACE_PARENT]
    }
}

fn text_of(context: &Context) -> Option<String> {
    let span = context.span();
    let span: &SpanContext = span.span_context();
    let flags = span.trace_flags().to_u8();
    let ids: (TraceId, SpanId) = (span.trace_id(), span.span_id());
    span.is_valid()
        .then(|| format!("00-{}-{}-{flags:02x}", ids.0, ids.1))
}

fn fresh() -> String {
    let (trace, span) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
    format!(
        "00-{}-{}-01",
        trace.simple(),
        &span.simple().to_string()[..16]
    )
}

/// `00-` 32 digits `-` 16 digits `-` 2 digits.
fn is_trace_parent(text: &str) -> bool {
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    let digits = |c: u8| c == b'-' || c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    lengths == [2, 32, 16, 2] && text.bytes().all(digits)
}

/// Why nothing is logged.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// No collector there, as far as can be told.
    #[error("cannot send traces to {address}: {reason}")]
    Collector {
        /// As given.
        address: String,
        /// Why.
        reason: String,
    },
    /// A program's mistake.
    #[error("log lines go somewhere already")]
    Twice,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn trace_goes_on_in_the_task_and_its_requests() {
        let given = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01";
        let mut headers = HeaderMap::new();
        headers.insert(TRACE_PARENT, given.parse().unwrap());
        let text = continue_trace(&Span::none(), &headers);
        assert_eq!(
            text, given,
            "nobody collects: the trace is passed on as it is"
        );
        scope(text, async {
            let mut metadata = MetadataMap::new();
            inject(&mut metadata);
            assert_eq!(metadata.get(TRACE_PARENT).unwrap(), given);
            assert_eq!(trace_id(&trace_parent()), &given[3..35]);
        })
        .await;
        assert_eq!(trace_parent(), "");
    }

    #[test]
    fn nonsense_begins_a_new_trace() {
        for text in [
            "",
            "00-xyz",
            "00-0123456789ABCDEF0123456789abcdef-0123456789abcdef-01",
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(TRACE_PARENT, text.parse().unwrap());
            let fresh = continue_trace(&Span::none(), &headers);
            assert!(is_trace_parent(&fresh) && fresh != text, "{fresh}");
        }
    }
}

//! Services whose requests go on with their callers' traces.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tower::Service;
use tracing::Instrument as _;

/// Wraps a service: each request is a span of its caller's trace, with the trace's id in log lines.
pub fn serve<S>(service: S) -> Traced<S> {
    Traced { service }
}

/// See [`serve`].
#[derive(Debug, Clone)]
pub struct Traced<S> {
    service: S,
}

impl<S: NamedService> NamedService for Traced<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Traced<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // A request that belongs to no trace begins none: agents are asked for news all the time.
        if !request.headers().contains_key(crate::TRACE_PARENT) {
            return Box::pin(self.service.call(request));
        }
        let method = request.uri().path().trim_start_matches('/').to_owned();
        let span = tracing::info_span!(
            "request",
            trace = tracing::field::Empty,
            otel.name = %method,
            otel.kind = "server",
        );
        let trace_parent = crate::continue_trace(&span, request.headers());
        span.record("trace", crate::trace_id(&trace_parent));
        let answer = self.service.call(request);
        Box::pin(crate::scope(trace_parent, answer).instrument(span))
    }
}

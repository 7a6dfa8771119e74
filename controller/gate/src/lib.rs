//! What every request passes before its handler: who asks, whether they may, how often they did; then
//! what came of it goes into the audit log. A request's id is in all log lines about it and in the
//! answer's metadata `x-request-id`.
//!
//! [`Gate::guard`] wraps a service. It works on the HTTP request, so it sees every method alike; of the
//! message it reads only the name of what the request is about ([`target`]).

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use ::api::controller as pb;
use ::api::errors;
use sha2::{Digest as _, Sha256};
use tonic::body::Body;
use tonic::codegen::http::{HeaderValue, Request, Response};
use tonic::server::NamedService;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use tower::Service;
use tracing::Instrument as _;

use crate::auth::methods::{self, Need};
use crate::auth::{AuthError, Authenticator, Credentials, Principal};
pub mod audit;
pub mod auth;
mod first_message;
mod rate;
mod target;

pub use audit::Audit;
pub use rate::Rate;

/// Metadata with a request's id.
pub const REQUEST_ID: &str = "x-request-id";
/// A client that has not sent its first message by then is told so.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Ids that clients choose.
const MAX_REQUEST_ID_BYTES: usize = 64;

/// In a request's extensions: the id that its log lines have.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// What requests pass. Cheap to clone.
#[derive(Clone)]
pub struct Gate {
    inner: Arc<Inner>,
}

struct Inner {
    authenticator: Authenticator,
    rate: Rate,
    audit: Audit,
}

impl Gate {
    /// Lets pass whom `authenticator` knows, as often as `rate` says, and tells `audit`.
    pub fn new(authenticator: Authenticator, rate: Rate, audit: Audit) -> Self {
        Self {
            inner: Arc::new(Inner {
                authenticator,
                rate,
                audit,
            }),
        }
    }

    /// Whether callers have to say who they are.
    pub fn authenticates(&self) -> bool {
        self.inner.authenticator.is_on()
    }

    /// Puts the gate before a service.
    pub fn guard<S>(&self, service: S) -> Guarded<S> {
        Guarded {
            gate: self.clone(),
            service,
        }
    }

    /// Who asks, if they may.
    fn admit(
        &self,
        method: &str,
        credentials: &Credentials,
        peer: &str,
    ) -> Result<Principal, Refusal> {
        let need = methods::need(method).ok_or_else(|| {
            let message = format!("{method} is not among the methods that anybody may call");
            let metadata = [("method", method)];
            let status =
                errors::status(Code::PermissionDenied, "UNKNOWN_METHOD", message, &metadata);
            Refusal::of(None, status)
        })?;
        let principal = match (self.inner.authenticator.authenticate(credentials), need) {
            (Ok(principal), _) => principal,
            (Err(_), Need::Open) => anybody(),
            (Err(error), _) => {
                // Whoever guesses has one allowance for each address.
                let address = peer.rsplit_once(':').map_or(peer, |(address, _)| address);
                self.limit(&format!("?{address}"))
                    .map_err(|status| Refusal {
                        caller: None,
                        status: Box::new(status),
                        noted: false,
                    })?;
                return Err(Refusal::of(None, unauthenticated(method, &error)));
            }
        };
        if principal != Principal::local() {
            // Those without a name have an allowance each, by what tells them apart: one that floods
            // takes nothing from the others.
            let unnamed = || match &credentials.certificate {
                Some(certificate) => format!("!{:x?}", Sha256::digest(certificate)),
                None => format!("?{}", peer.rsplit_once(':').map_or(peer, |(host, _)| host)),
            };
            let limited = match principal.name.is_empty() {
                true => self.limit(&unnamed()),
                false => self.limit(&principal.name),
            };
            limited.map_err(|status| Refusal {
                caller: Some(principal.clone()),
                status: Box::new(status),
                noted: false,
            })?;
        }
        if let Need::AnyOf(roles) = need
            && !roles.iter().any(|role| principal.has(*role))
        {
            let wanted: Vec<&str> = roles.iter().map(|role| role.word()).collect();
            let wanted = wanted.join(" or ");
            let held = principal.roles_in_words();
            let message = format!(
                "{method} needs the role {wanted}, and {} has {held}; ask whoever gives out tokens and certificates",
                principal.name
            );
            let metadata = [
                ("method", method),
                ("role", &wanted),
                ("caller", &principal.name),
            ];
            let status = errors::status(Code::PermissionDenied, "ROLE_MISSING", message, &metadata);
            return Err(Refusal::of(Some(principal), status));
        }
        Ok(principal)
    }

    fn limit(&self, caller: &str) -> Result<(), Status> {
        let Err(wait) = self.inner.rate.take(caller, Instant::now()) else {
            return Ok(());
        };
        let message = format!(
            "too many requests: no more than {} a second are taken of one caller; try again in {} ms",
            self.inner.rate.per_second(),
            wait.as_millis()
        );
        let mut details = ErrorDetails::with_retry_info(Some(wait));
        let metadata = [(
            "per_second".to_owned(),
            self.inner.rate.per_second().to_string(),
        )];
        let metadata: std::collections::HashMap<String, String> = metadata.into();
        details.set_error_info("RATE_LIMITED", errors::DOMAIN, metadata);
        Err(Status::with_error_details(
            Code::ResourceExhausted,
            message,
            details,
        ))
    }
}

/// Whoever calls what is open to all.
fn anybody() -> Principal {
    Principal {
        name: String::new(),
        roles: [].into(),
        projects: Some([].into()),
    }
}

/// A request that goes no further.
struct Refusal {
    caller: Option<Principal>,
    status: Box<Status>,
    /// Worth an entry in the audit log. What comes too often is not: that would fill it.
    noted: bool,
}

impl Refusal {
    fn of(caller: Option<Principal>, status: Status) -> Self {
        Self {
            caller,
            status: Box::new(status),
            noted: true,
        }
    }
}

fn unauthenticated(method: &str, error: &AuthError) -> Status {
    let reason = match error {
        AuthError::Nothing => "NO_CREDENTIALS",
        AuthError::NotBearer => "NOT_BEARER",
        AuthError::UnknownToken => "UNKNOWN_TOKEN",
        AuthError::BadToken { .. } => "BAD_TOKEN",
        AuthError::NoUser | AuthError::BadRole { .. } => "BAD_CERTIFICATE",
    };
    let message = format!("{method}: {}", crate::with_source(error));
    errors::status(
        Code::Unauthenticated,
        reason,
        message,
        &[("method", method)],
    )
}

/// A service behind the gate.
#[derive(Clone)]
pub struct Guarded<S> {
    gate: Gate,
    service: S,
}

impl<S: NamedService> NamedService for Guarded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Guarded<S>
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
        // The one that is ready; its clone need not be.
        let fresh = self.service.clone();
        let service = std::mem::replace(&mut self.service, fresh);
        Box::pin(self.gate.clone().pass(service, request))
    }
}

impl Gate {
    async fn pass<S>(
        self,
        mut service: S,
        request: Request<Body>,
    ) -> Result<Response<Body>, Infallible>
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    {
        let method = request.uri().path().trim_start_matches('/').to_owned();
        let request_id = request_id(&request);
        let peer = peer(&request);
        let span = tracing::info_span!(
            "request",
            id = %request_id,
            otel.name = %method,
            otel.kind = "server",
            caller = tracing::field::Empty,
            resource = tracing::field::Empty,
        );
        let trace_parent = telemetry::continue_trace(&span, request.headers());
        let mut entry = audit::Pending::begin(
            &self.inner.audit,
            pb::AuditEntry {
                time: Some(SystemTime::now().into()),
                method: method.clone(),
                request_id: request_id.clone(),
                peer: peer.clone(),
                ..Default::default()
            },
        );
        let passed = async {
            let admitted = self.admitted(request, &method, &peer, &request_id, &mut entry);
            match admitted.await {
                Ok(request) => service.call(request).await,
                Err(status) => Ok(status.into_http()),
            }
        };
        let mut response = telemetry::scope(trace_parent, passed)
            .instrument(span.clone())
            .await?;
        let status = Status::from_header_map(response.headers());
        if let Some(status) = status.as_ref().filter(|status| status.code() != Code::Ok) {
            span.in_scope(|| {
                tracing::debug!(code = ?status.code(), message = status.message(), "refused");
            });
        }
        entry.answered(status.as_ref()).await;
        if let Ok(id) = HeaderValue::from_str(&request_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        Ok(response)
    }

    /// The request with its caller, if it may go on.
    async fn admitted(
        &self,
        mut request: Request<Body>,
        method: &str,
        peer: &str,
        request_id: &str,
        entry: &mut audit::Pending,
    ) -> Result<Request<Body>, Status> {
        let principal = match self.admit(method, &credentials(&request), peer) {
            Ok(principal) => principal,
            Err(refusal) => {
                if let Some(caller) = &refusal.caller {
                    entry.caller(caller);
                }
                if refusal.noted {
                    entry.note();
                }
                return Err(*refusal.status);
            }
        };
        let span = tracing::Span::current();
        span.record("caller", &principal.name);
        entry.caller(&principal);
        if !methods::need(method).is_some_and(methods::only_reads) {
            entry.note();
        }
        let (parts, body) = request.into_parts();
        let first = first_message::read(body);
        let (message, body) = tokio::time::timeout(FIRST_MESSAGE_TIMEOUT, first)
            .await
            .map_err(|_| Status::deadline_exceeded(format!("{method}: no message came in time")))?
            .map_err(|error| Status::unavailable(format!("{method}: {error}")))?;
        request = Request::from_parts(parts, body);
        let resource = target::of(method, &message);
        span.record("resource", &resource);
        entry.resource(&resource);
        if !principal.may_see(&resource) || !may_name_nothing(&principal, method, &resource) {
            entry.note();
            let projects = principal.projects.iter().flatten().cloned();
            let projects = projects.collect::<Vec<_>>().join(", ");
            let message = format!(
                "{method}: {resource:?} is not in the projects of {}, which are: {projects}",
                principal.name
            );
            let metadata = [
                ("method", method),
                ("resource", &resource),
                ("caller", &principal.name),
            ];
            return Err(errors::status(
                Code::PermissionDenied,
                "PROJECT_DENIED",
                message,
                &metadata,
            ));
        }
        request.extensions_mut().insert(principal);
        request
            .extensions_mut()
            .insert(RequestId(request_id.to_owned()));
        Ok(request)
    }
}

/// Whether somebody with projects may call a method on something that is in none: looking is for the
/// handlers to narrow down; changing what all share is not theirs.
fn may_name_nothing(principal: &Principal, method: &str, resource: &str) -> bool {
    principal.projects.is_none()
        || resource.starts_with("projects/")
        || methods::need(method).is_some_and(|need| need == Need::Open || methods::only_reads(need))
        // Handlers look at the operation's target.
        || resource.starts_with("operations/")
}

fn request_id(request: &Request<Body>) -> String {
    let given = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok());
    let fits = |id: &&str| {
        !id.is_empty()
            && id.len() <= MAX_REQUEST_ID_BYTES
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    given
        .filter(fits)
        .map_or_else(|| uuid::Uuid::new_v4().to_string(), str::to_owned)
}

fn credentials(request: &Request<Body>) -> Credentials {
    let authorization = request.headers().get("authorization");
    let extensions = request.extensions();
    let certificates = extensions
        .get::<TlsConnectInfo<TcpConnectInfo>>()
        .and_then(TlsConnectInfo::peer_certs)
        .or_else(|| {
            extensions
                .get::<TlsConnectInfo<UdsConnectInfo>>()
                .and_then(TlsConnectInfo::peer_certs)
        });
    let certificate = certificates.and_then(|chain| chain.first().map(|leaf| leaf.to_vec()));
    let unix = extensions.get::<UdsConnectInfo>();
    Credentials {
        authorization: authorization
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned),
        certificate,
        unix_uid: unix
            .and_then(|info| info.peer_cred.as_ref())
            .map(tokio::net::unix::UCred::uid),
    }
}

fn peer(request: &Request<Body>) -> String {
    let extensions = request.extensions();
    let plain = extensions.get::<TcpConnectInfo>().cloned();
    let tls = || {
        let tls = extensions.get::<TlsConnectInfo<TcpConnectInfo>>();
        tls.map(|info| info.get_ref().clone())
    };
    plain
        .or_else(tls)
        .and_then(|info| info.remote_addr())
        .map(|address| address.to_string())
        .unwrap_or_default()
}

/// An error and its causes, on one line.
fn with_source(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;

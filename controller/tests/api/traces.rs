//! One trace from a request of the API to the host, told to an OpenTelemetry collector.

use api::controller as pb;
use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::harness::{Controller, PATIENCE, create_vm};
use crate::simulated::Host;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn request_its_operation_and_the_host_are_in_one_trace() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let collector = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut exported) = mpsc::unbounded_channel();
    tokio::spawn(
        Server::builder()
            .add_service(TraceServiceServer::new(Collector(sender)))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let host = Host::serve(&socket);
    let node = format!("unix:{}", socket.display());
    let state = dir.path().join("state");
    let state = state.to_str().unwrap();
    let mut c =
        Controller::start(&["--node", &node, "--state-dir", state, "--otlp", &collector]).await;
    c.connected(1).await;

    let mut request = Request::new(create_vm("web"));
    let given = format!("00-{TRACE}-{PARENT}-01");
    let metadata = request.metadata_mut();
    metadata.insert("traceparent", given.parse().unwrap());
    metadata.insert("x-request-id", "request-17".parse().unwrap());
    let answer = c.vms().create_vm(request).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "request-17");
    let operation: pb::Operation = answer.into_inner();
    let kept = operation.metadata.clone().unwrap_or_default().trace_parent;
    assert!(kept.contains(TRACE), "{kept}");
    c.succeeded(operation).await;
    let traces = host.traces();
    assert!(
        traces.iter().any(|trace| trace.contains(TRACE)),
        "the host is told in the request's trace: {traces:?}"
    );

    // What is left is sent at the end.
    c.signal(Signal::SIGTERM);
    c.wait();
    let found = tokio::time::timeout(PATIENCE, async {
        loop {
            let export = exported.recv().await.unwrap();
            let scopes = export
                .resource_spans
                .into_iter()
                .flat_map(|spans| spans.scope_spans);
            let mut spans = scopes.flat_map(|scope| scope.spans);
            if let Some(span) = spans.find(|span| hex(&span.trace_id) == TRACE) {
                return span;
            }
        }
    });
    let span = found.await.expect("the span is exported");
    assert_eq!(span.name, "mortise.controller.v1.Vms/CreateVm");
    assert_eq!(hex(&span.parent_span_id), PARENT);
    assert!(kept.contains(&hex(&span.span_id)), "{kept}");
}

//! Spans arrive at a collector, as OTLP over gRPC, in the trace that the request began.

use std::time::{Duration, SystemTime};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::codegen::http::HeaderMap;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

const TRACE: &str = "0123456789abcdef0123456789abcdef";
const PARENT: &str = "0123456789abcdef";

/// Passes on what it is sent.
struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner()).await;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_gets_the_spans_of_a_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut exported) = mpsc::channel(16);
    tokio::spawn(
        Server::builder()
            .add_service(TraceServiceServer::new(Collector(sender)))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let telemetry = telemetry::init("under-test", Some(&address)).unwrap();

    let mut headers = HeaderMap::new();
    let given = format!("00-{TRACE}-{PARENT}-01");
    headers.insert(telemetry::TRACE_PARENT, given.parse().unwrap());
    let span = tracing::info_span!("request", otel.name = "Vms/CreateVm");
    let passed_on = telemetry::continue_trace(&span, &headers);
    assert_eq!(telemetry::trace_id(&passed_on), TRACE);
    assert_ne!(passed_on, given, "the next process's parent is this span");
    telemetry::scope(passed_on.clone(), async {
        let begun = SystemTime::now();
        telemetry::relay("Devices/AddDisk".into(), "device-blk", begun, begun);
    })
    .instrument(span)
    .await;
    tokio::task::spawn_blocking(move || telemetry.shutdown())
        .await
        .unwrap();

    let mut spans = Vec::new();
    while spans.len() < 2 {
        let next = tokio::time::timeout(Duration::from_secs(30), exported.recv());
        let export = next.await.expect("spans come in time").unwrap();
        for resource in export.resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            assert!(
                attributes.iter().any(|attribute| {
                    attribute.key == "service.name"
                        && format!("{attribute:?}").contains("under-test")
                }),
                "{attributes:?}"
            );
            spans.extend(
                resource
                    .scope_spans
                    .into_iter()
                    .flat_map(|scope| scope.spans),
            );
        }
    }
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let request = named("Vms/CreateVm");
    assert_eq!(hex(&request.trace_id), TRACE);
    assert_eq!(hex(&request.parent_span_id), PARENT);
    assert!(passed_on.contains(&hex(&request.span_id)));
    let daemon = named("Devices/AddDisk");
    assert_eq!(hex(&daemon.trace_id), TRACE);
    assert_eq!(daemon.parent_span_id, request.span_id);
}

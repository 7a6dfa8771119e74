//! The service `Nics`: what is asked of NICs while they are served. Handlers validate, find the NIC
//! and leave the async runtime; the work is [`crate::guard`]'s.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use api::daemon::{DeviceTable, blocking};
use api::device::nics_server::Nics;
use api::device::{
    self, CaptureChunk, CaptureRequest, CapturedFrames, Flow, GetNicRequest, ListFlowsRequest,
    ListFlowsResponse, Nic, SetLinkRequest, SetNetLimitsRequest, SetPolicyRequest,
};
use api::validate;
use filter::Direction;
use filter::capture::{self, Piece};
use filter::expression::Expression;
use filter::flow::FlowInfo;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::guard::Capturing;
use crate::nic::ServedNic;

/// Flows that an answer has unless more are asked for.
const DEFAULT_MAX_FLOWS: usize = 1000;

/// Chunks that wait for a caller beyond what the capture itself holds.
const CHUNKS_IN_FLIGHT: usize = 2;

/// See the module's description.
pub(crate) struct NicService {
    table: Arc<DeviceTable>,
}

type Answer<T> = Result<Response<T>, Status>;

impl NicService {
    pub(crate) fn new(table: Arc<DeviceTable>) -> Self {
        Self { table }
    }

    /// Runs `act` with the NIC, outside the async runtime.
    async fn with<T: Send + 'static>(
        &self,
        id: String,
        act: impl FnOnce(&ServedNic) -> Result<T, Status> + Send + 'static,
    ) -> Answer<T> {
        blocking(&self.table, move |table| {
            act(&*table.attached::<ServedNic>(&id)?)
        })
        .await
    }

    /// As [`with`](Self::with), and answers how the NIC is then.
    async fn change(
        &self,
        id: String,
        act: impl FnOnce(&ServedNic) -> Result<(), Status> + Send + 'static,
    ) -> Answer<Nic> {
        self.with(id.clone(), move |nic| {
            act(nic)?;
            Ok(describe(id, nic))
        })
        .await
    }
}

#[tonic::async_trait]
impl Nics for NicService {
    async fn get_nic(&self, request: Request<GetNicRequest>) -> Answer<Nic> {
        let request = request.into_inner();
        validate::nic_request(&request.id)?;
        self.change(request.id, |_| Ok(())).await
    }

    async fn set_policy(&self, request: Request<SetPolicyRequest>) -> Answer<Nic> {
        let request = request.into_inner();
        validate::set_policy_request(&request)?;
        self.change(request.id, |nic| {
            let guard = &nic.state().guard;
            guard
                .set_policy(request.policy)
                .map_err(|error| Status::invalid_argument(error.to_string()))
        })
        .await
    }

    async fn set_limits(&self, request: Request<SetNetLimitsRequest>) -> Answer<Nic> {
        let request = request.into_inner();
        validate::set_net_limits_request(&request)?;
        self.change(request.id, move |nic| {
            let limits = request.limits.unwrap_or_default();
            nic.state().guard.set_limits(limits);
            Ok(())
        })
        .await
    }

    async fn set_link(&self, request: Request<SetLinkRequest>) -> Answer<Nic> {
        let request = request.into_inner();
        validate::nic_request(&request.id)?;
        self.change(request.id, move |nic| {
            nic.set_link(request.up);
            Ok(())
        })
        .await
    }

    async fn list_flows(&self, request: Request<ListFlowsRequest>) -> Answer<ListFlowsResponse> {
        let request = request.into_inner();
        validate::list_flows_request(&request)?;
        let filter = parse_filter(&request.filter)?;
        self.with(request.id, move |nic| {
            let flows = nic.state().guard.flows().ok_or_else(|| {
                Status::failed_precondition(
                    "the NIC's policy tracks no flows; set track_flows or security rules first",
                )
            })?;
            let max_flows = match request.max_flows {
                0 => DEFAULT_MAX_FLOWS,
                count => count as usize,
            };
            let mut matching = flows.iter().filter(|flow| filter.matches_flow(flow));
            let flows = matching
                .by_ref()
                .take(max_flows)
                .map(flow_message)
                .collect();
            Ok(ListFlowsResponse {
                flows,
                truncated: matching.next().is_some(),
            })
        })
        .await
    }

    type CaptureStream = Pin<Box<dyn Stream<Item = Result<CaptureChunk, Status>> + Send>>;

    async fn capture(&self, request: Request<CaptureRequest>) -> Answer<Self::CaptureStream> {
        let request = request.into_inner();
        validate::capture_request(&request)?;
        let wanted = capture_request(&request)?;
        let news = Arc::new(Notify::new());
        let wake = {
            let news = news.clone();
            move || news.notify_one()
        };
        let begun = self.with(request.id, move |nic| {
            nic.state().guard.capture(wanted, wake).ok_or_else(|| {
                Status::resource_exhausted(
                    "the NIC has as many captures as it can have; end one of them first",
                )
            })
        });
        let capturing = begun.await?.into_inner();
        let ends = (request.max_duration_ms > 0)
            .then(|| Instant::now() + Duration::from_millis(request.max_duration_ms));
        let (chunks, stream) = mpsc::channel(CHUNKS_IN_FLIGHT);
        // Ends with the caller: then nothing can be sent.
        tokio::spawn(deliver(capturing, news, ends, chunks));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Sends what is captured until the capture has ended, or the caller is gone.
async fn deliver(
    capturing: Capturing,
    news: Arc<Notify>,
    ends: Option<Instant>,
    chunks: mpsc::Sender<Result<CaptureChunk, Status>>,
) {
    loop {
        let piece = capturing.take();
        let is_last = piece.is_last;
        if !piece.data.is_empty() || is_last {
            // While this waits, frames gather to larger pieces.
            if chunks.send(Ok(chunk(piece))).await.is_err() || is_last {
                return;
            }
            continue;
        }
        tokio::select! {
            () = news.notified() => {}
            () = until(ends) => capturing.end(),
            () = chunks.closed() => return,
        }
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

fn describe(id: String, nic: &ServedNic) -> Nic {
    let guard = &nic.state().guard;
    Nic {
        id,
        policy: guard.policy(),
        limits: Some(guard.limits()),
        stats: Some(nic.stats()),
        ingress_throttled: guard.throttled(Direction::Ingress),
        egress_throttled: guard.throttled(Direction::Egress),
        flows: guard.num_flows() as u32,
        flows_evicted: guard.num_flows_evicted(),
        captures: guard.num_captures() as u32,
    }
}

fn parse_filter(text: &str) -> Result<Expression, Status> {
    text.parse()
        .map_err(|error| Status::invalid_argument(format!("filter: {error}")))
}

fn capture_request(request: &CaptureRequest) -> Result<capture::Request, Status> {
    Ok(capture::Request {
        filter: parse_filter(&request.filter)?,
        snaplen_bytes: request.snaplen,
        direction: match request.direction() {
            device::Direction::Unspecified => None,
            device::Direction::Ingress => Some(Direction::Ingress),
            device::Direction::Egress => Some(Direction::Egress),
        },
        is_dropped: match request.frames() {
            CapturedFrames::Unspecified | CapturedFrames::All => None,
            CapturedFrames::Dropped => Some(true),
            CapturedFrames::Passed => Some(false),
        },
        max_packets: request.max_packets,
        max_bytes: request.max_bytes,
    })
}

fn chunk(piece: Piece) -> CaptureChunk {
    CaptureChunk {
        data: piece.data,
        packets: piece.packets,
        missed: piece.missed,
    }
}

fn flow_message(flow: &FlowInfo) -> Flow {
    let [outer, inner] = flow.vlans.map(u32::from);
    Flow {
        protocol: flow.protocol.into(),
        local_address: flow.local.to_string(),
        local_port: flow.local_port.into(),
        remote_address: flow.remote.to_string(),
        remote_port: flow.remote_port.into(),
        vlan: if inner == 0 { outer } else { inner },
        direction: match flow.origin {
            Direction::Ingress => device::Direction::Ingress,
            Direction::Egress => device::Direction::Egress,
        }
        .into(),
        state: flow.state.name().to_owned(),
        ingress_packets: flow.ingress.packets,
        ingress_bytes: flow.ingress.bytes,
        egress_packets: flow.egress.packets,
        egress_bytes: flow.egress.bytes,
        age_ms: flow.age_ns / 1_000_000,
        idle_ms: flow.idle_ns / 1_000_000,
    }
}

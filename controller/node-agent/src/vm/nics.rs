//! The NICs of a running VM as its device-net serves them: one call each, with a deadline, and captures,
//! which last as long as somebody takes them.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use api::{
    connect,
    device::{
        CaptureChunk, CaptureRequest, GetNicRequest, ListFlowsRequest, ListFlowsResponse, Nic,
        Policy, SetLinkRequest, SetNetLimitsRequest, SetPolicyRequest, nics_client::NicsClient,
    },
};
use tonic::{Status, Streaming, transport::Channel};

use super::daemon::{DaemonError, with_deadline};
use crate::{record::DaemonKind, spec::NicTuning};

const PROGRAM: &str = "device-net";
/// Answered from memory.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// A VM's device-net. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Nics {
    dir: PathBuf,
}

impl Nics {
    /// Of the VM whose sockets are in `dir`.
    pub(crate) fn of(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// A daemon serves, or is about to.
    pub(crate) fn are_served(&self) -> bool {
        self.dir
            .join(format!("{}.sock", DaemonKind::Net.stem()))
            .exists()
    }

    /// Sets limits and the cable.
    pub(super) async fn tune(&self, nic: &str, tuning: &NicTuning) -> Result<(), DaemonError> {
        let mut client = self.client().await?;
        let limits = SetNetLimitsRequest {
            id: nic.to_owned(),
            limits: Some(tuning.limits()),
        };
        let answer = client
            .set_limits(with_deadline(limits, CALL_DEADLINE))
            .await;
        answer.map_err(refused("to set limits"))?;
        let link = SetLinkRequest {
            id: nic.to_owned(),
            up: !tuning.link_down,
        };
        let answer = client.set_link(with_deadline(link, CALL_DEADLINE)).await;
        answer.map(drop).map_err(refused("to set the link"))
    }

    /// Replaces what a NIC lets pass.
    pub(crate) async fn set_policy(&self, nic: &str, policy: Policy) -> Result<(), DaemonError> {
        let request = SetPolicyRequest {
            id: nic.to_owned(),
            policy: Some(policy),
        };
        let mut client = self.client().await?;
        let answer = client
            .set_policy(with_deadline(request, CALL_DEADLINE))
            .await;
        answer.map(drop).map_err(refused("to set the policy"))
    }

    /// What is set, and figures.
    pub(crate) async fn nic(&self, nic: &str) -> Result<Nic, DaemonError> {
        let request = GetNicRequest { id: nic.to_owned() };
        let mut client = self.client().await?;
        let answer = client.get_nic(with_deadline(request, CALL_DEADLINE)).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("GetNic"))
    }

    /// Flows that are tracked.
    pub(crate) async fn flows(
        &self,
        request: ListFlowsRequest,
    ) -> Result<ListFlowsResponse, DaemonError> {
        let mut client = self.client().await?;
        let answer = client
            .list_flows(with_deadline(request, CALL_DEADLINE))
            .await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(refused("to list flows"))
    }

    /// Begins a capture. It ends when its stream is dropped.
    pub(crate) async fn capture(
        &self,
        request: CaptureRequest,
    ) -> Result<Streaming<CaptureChunk>, DaemonError> {
        let mut client = self.client().await?;
        let begun = tokio::time::timeout(CALL_DEADLINE, client.capture(request)).await;
        begun
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("it did not begin in time")))
            .map(tonic::Response::into_inner)
            .map_err(refused("the capture"))
    }

    async fn client(&self) -> Result<NicsClient<Channel>, DaemonError> {
        let socket = self.dir.join(format!("{}.sock", DaemonKind::Net.stem()));
        connect::unix(&socket, CALL_DEADLINE)
            .await
            .map(NicsClient::new)
            .map_err(|source| DaemonError::Connect {
                program: PROGRAM,
                source,
            })
    }
}

fn refused(call: &'static str) -> impl FnOnce(Status) -> DaemonError {
    move |status| DaemonError::Call {
        program: PROGRAM,
        call: call.to_owned(),
        code: status.code(),
        message: status.message().to_owned(),
    }
}

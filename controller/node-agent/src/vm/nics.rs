//! The NICs of a running VM as device-net serves them, the VM's own or that of a network: one call each, with a deadline, and captures,
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

use super::{
    Env,
    daemon::{DaemonError, with_deadline},
};
use crate::{
    network::port_id,
    record::DaemonKind,
    spec::{self, NicTuning},
};

const PROGRAM: &str = "device-net";
/// Answered from memory.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// A device-net. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Nics {
    socket: PathBuf,
    /// Whose NICs are meant, where it serves those of several VMs.
    vm: Option<String>,
}

impl Env {
    /// The daemon that serves a VM's NIC: the VM's own or its network's.
    pub(crate) fn nics(&self, vm: &str, nic: &spec::Nic) -> Nics {
        let network = nic.network.as_deref();
        match network.and_then(|network| self.networks.switch_socket(network)) {
            Some(socket) => Nics {
                socket,
                vm: Some(vm.to_owned()),
            },
            None => Nics::of(&self.vm_dir(vm)),
        }
    }
}

impl Nics {
    /// Of the VM whose sockets are in `dir`.
    pub(crate) fn of(dir: &Path) -> Self {
        Self::at(dir.join(format!("{}.sock", DaemonKind::Net.stem())))
    }

    /// Of the daemon that answers at `socket`.
    pub(crate) fn at(socket: PathBuf) -> Self {
        Self { socket, vm: None }
    }

    /// A daemon serves, or is about to.
    pub(crate) fn are_served(&self) -> bool {
        self.socket.exists()
    }

    /// Sets limits and the cable.
    pub(crate) async fn tune(&self, nic: &str, tuning: &NicTuning) -> Result<(), DaemonError> {
        let mut client = self.client().await?;
        let limits = SetNetLimitsRequest {
            id: self.id(nic),
            limits: Some(tuning.limits()),
        };
        let answer = client
            .set_limits(with_deadline(limits, CALL_DEADLINE))
            .await;
        answer.map_err(refused("to set limits"))?;
        let link = SetLinkRequest {
            id: self.id(nic),
            up: !tuning.link_down,
        };
        let answer = client.set_link(with_deadline(link, CALL_DEADLINE)).await;
        answer.map(drop).map_err(refused("to set the link"))
    }

    /// Replaces what a NIC lets pass.
    pub(crate) async fn set_policy(&self, nic: &str, policy: Policy) -> Result<(), DaemonError> {
        let request = SetPolicyRequest {
            id: self.id(nic),
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
        let request = GetNicRequest { id: self.id(nic) };
        let mut client = self.client().await?;
        let answer = client.get_nic(with_deadline(request, CALL_DEADLINE)).await;
        let answer = answer.map_err(refused("GetNic"))?;
        Ok(Nic {
            id: nic.to_owned(),
            ..answer.into_inner()
        })
    }

    /// Flows that are tracked.
    pub(crate) async fn flows(
        &self,
        mut request: ListFlowsRequest,
    ) -> Result<ListFlowsResponse, DaemonError> {
        request.id = self.id(&request.id);
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
        mut request: CaptureRequest,
    ) -> Result<Streaming<CaptureChunk>, DaemonError> {
        request.id = self.id(&request.id);
        let mut client = self.client().await?;
        let begun = tokio::time::timeout(CALL_DEADLINE, client.capture(request)).await;
        begun
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("it did not begin in time")))
            .map(tonic::Response::into_inner)
            .map_err(refused("the capture"))
    }

    /// What the daemon calls a NIC.
    fn id(&self, nic: &str) -> String {
        match &self.vm {
            Some(vm) => port_id(vm, nic),
            None => nic.to_owned(),
        }
    }

    async fn client(&self) -> Result<NicsClient<Channel>, DaemonError> {
        connect::unix(&self.socket, CALL_DEADLINE)
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

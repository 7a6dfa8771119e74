//! A `vmm-core` that runs no machine: the test itself is the guest of its devices, at native speed.

use std::{pin::Pin, time::Duration};

use api::{
    listen, serve,
    vmm::{
        AllowRunRequest, ConsoleInput, ConsoleOutput, GetDevicesRequest, GetDevicesResponse,
        GetVmmRequest, PauseRequest, PowerButtonRequest, RefreshDeviceConfigRequest, ResetRequest,
        ResumeRequest, StartRequest, StopRequest, VmmInfo, VmmState,
        vmm_server::{Vmm, VmmServer},
    },
};
use nix::sys::stat::Mode;
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::harness::{Agent, poll};

/// Waits until it is killed; it has no child that would outlive it.
pub(crate) const SCRIPT: &str = "read _ < $(dirname $0)/never";

/// Has the agent's next VM of this id be one without a machine.
pub(crate) fn answer_for(agent: &Agent, id: &str) -> JoinHandle<()> {
    let never = agent.path().join("bin/never");
    if !never.exists() {
        nix::unistd::mkfifo(&never, Mode::S_IRWXU).unwrap();
    }
    let dir = agent.vm_dir(id);
    tokio::spawn(async move {
        let listener = poll("the VM's directory", || {
            let listener = listen::unix(&dir.join("vmm.sock")).ok();
            async { listener }
        })
        .await;
        let services = serve::Services::new().with(VmmServer::new(NoMachine));
        serve::on(listener, services, tokio::time::sleep(Duration::MAX))
            .await
            .unwrap();
    })
}

struct NoMachine;

#[tonic::async_trait]
impl Vmm for NoMachine {
    async fn get_vmm(&self, _: Request<GetVmmRequest>) -> Result<Response<VmmInfo>, Status> {
        let mut info = VmmInfo::default();
        info.set_state(VmmState::Running);
        Ok(Response::new(info))
    }

    async fn get_devices(
        &self,
        _: Request<GetDevicesRequest>,
    ) -> Result<Response<GetDevicesResponse>, Status> {
        Ok(Response::new(GetDevicesResponse::default()))
    }

    async fn start(&self, _: Request<StartRequest>) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    async fn pause(&self, _: Request<PauseRequest>) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    async fn allow_run(&self, _: Request<AllowRunRequest>) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    async fn reset(&self, _: Request<ResetRequest>) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    async fn power_button(
        &self,
        _: Request<PowerButtonRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    async fn stop(&self, _: Request<StopRequest>) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    async fn refresh_device_config(
        &self,
        _: Request<RefreshDeviceConfigRequest>,
    ) -> Result<Response<VmmInfo>, Status> {
        no_machine()
    }

    type ConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

    async fn console(
        &self,
        _: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        no_machine()
    }
}

fn no_machine<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("there is no machine"))
}

//! What tells hosts what to do: etcd, two controllers with one authority; and the server of the shared disk.

use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use api::controller as pb;
use api::controller::certificates_client::CertificatesClient;
use api::controller::hosts_client::HostsClient;
use api::controller::pools_client::PoolsClient;
use api::controller::vms_client::VmsClient;
use api::controller::volumes_client::VolumesClient;
use nix::sys::signal::Signal;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;
use tonic::transport::Channel;

use super::Settings;
use super::ground;
use super::host::Invitation;

/// A busy machine renews late; and a host that pauses its VM for nothing would spoil the story.
const LEASE_MS: u32 = 15_000;
const GRACE_MS: u32 = 2_000;
const SETTLE_MS: u32 = 10_000;
const PROJECT: &str = "projects/default";
const CONTROLLERS: usize = 2;
const ETCD_MEMBERS: usize = 3;
/// Of the first one, for TLS.
const CONTROLLER_PORT: usize = 7070;
const DISK_PORT: u16 = 10_809;
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);
const ANSWER_PATIENCE: Duration = Duration::from_secs(20);

/// See the module. Everything ends when it is dropped.
pub struct Control {
    runtime: Runtime,
    dir: PathBuf,
    settings: Settings,
    children: Vec<Child>,
    channels: Vec<Channel>,
    etcd: etcd::Cluster,
}

impl Drop for Control {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Control {
    /// Starts etcd and controllers.
    ///
    /// # Errors
    /// When something does not come up.
    pub fn start(settings: &Settings, dir: &Path) -> Result<Self> {
        let etcd = etcd::Cluster::start(ETCD_MEMBERS).context("the variable ETCD names no etcd")?;
        let mut control = Self {
            runtime: Runtime::new()?,
            dir: dir.to_owned(),
            settings: settings.clone(),
            children: Vec::new(),
            channels: Vec::new(),
            etcd,
        };
        for number in 0..CONTROLLERS {
            control.start_controller(number)?;
        }
        Ok(control)
    }

    fn start_controller(&mut self, number: usize) -> Result<()> {
        let socket = self.dir.join(format!("controller{number}.sock"));
        let mut command = Command::new(self.settings.bin_dir.join("controller"));
        command
            .args(["--etcd", &self.etcd.endpoints().join(",")])
            .args(["--listen", &format!("unix:{}", socket.display())])
            .args(["--listen", &secure_address(number)])
            .args(["--host-lease-ms", &LEASE_MS.to_string()])
            .args(["--host-grace-ms", &GRACE_MS.to_string()])
            .args(["--host-settle-ms", &SETTLE_MS.to_string()])
            .arg("--state-dir")
            .arg(self.dir.join(format!("state{number}")))
            .arg("--run-dir")
            .arg(self.dir.join(format!("run{number}")));
        // The first one makes the authority; its key is in etcd, sealed with what only controllers have.
        if number > 0 {
            command
                .arg("--ca-secret")
                .arg(self.dir.join("state0").join("ca-secret"));
        }
        self.spawn(command, &format!("demo-controller{number}.log"))?;
        let channel = self
            .runtime
            .block_on(api::connect::unix(&socket, CONNECT_PATIENCE));
        self.channels
            .push(channel.with_context(|| format!("controller {number} did not come up"))?);
        Ok(())
    }

    fn spawn(&mut self, mut command: Command, log: &str) -> Result<()> {
        let log = File::create(self.settings.log_dir.join(log))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // SAFETY: prctl is async-signal-safe and touches no memory of this process.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)
            });
        }
        let words = format!("{command:?}");
        self.children.push(command.spawn().context(words)?);
        Ok(())
    }

    /// Serves an image to all hosts, to its latest owner alone; returns where.
    ///
    /// # Errors
    /// When it cannot be made or served.
    pub fn serve_disk(&mut self, image: &Path, export: &str, len_bytes: u64) -> Result<String> {
        File::create(image)?.set_len(len_bytes)?;
        let address = format!("{}:{DISK_PORT}", ground::ADDRESS);
        let mut command = Command::new(self.settings.bin_dir.join("device-blk"));
        command
            .args(["nbd-serve", "--export", export, "--listen", &address])
            .arg("--image")
            .arg(image)
            .arg("--generation-file")
            .arg(image.with_extension("generation"))
            .arg("--status-file")
            .arg(image.with_extension("status"));
        self.spawn(command, "demo-disk.log")?;
        Ok(address)
    }

    /// Asks both controllers, the second one first: whichever leads, all answer.
    fn ask<T, F>(&self, question: impl Fn(Channel) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, tonic::Status>>,
    {
        let mut last = None;
        for channel in self.channels.iter().rev() {
            let answer = self.runtime.block_on(async {
                tokio::time::timeout(ANSWER_PATIENCE, question(channel.clone())).await
            });
            match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) => last = Some(anyhow::Error::from(status)),
                Err(_) => last = Some(anyhow::anyhow!("a controller did not answer")),
            }
        }
        match last {
            Some(error) => Err(error),
            None => bail!("there is no controller"),
        }
    }

    /// What lets one host in.
    ///
    /// # Errors
    /// When the controllers refuse.
    pub fn invite(&self) -> Result<Invitation> {
        let made = self.ask(|channel| async move {
            let request = pb::CreateHostTokenRequest::default();
            let made = CertificatesClient::new(channel)
                .create_host_token(request)
                .await?;
            Ok(made.into_inner())
        })?;
        Ok(Invitation {
            token: made.secret,
            ca_hash: made.ca_hash,
            controllers: (0..CONTROLLERS).map(secure_address).collect(),
        })
    }

    /// Hosts that answer the controllers: their names, with their addresses.
    ///
    /// # Errors
    /// When no controller answers.
    pub fn connected(&self) -> Result<Vec<(String, String)>> {
        let hosts = self.ask(|channel| async move {
            let request = pb::ListHostsRequest::default();
            let listed = HostsClient::new(channel).list_hosts(request).await?;
            Ok(listed.into_inner().hosts)
        })?;
        let connected = hosts.into_iter().filter(|host| host.connected);
        Ok(connected.map(|host| (host.name, host.address)).collect())
    }

    /// Tells of a pool behind an address, and of a volume in it.
    ///
    /// # Errors
    /// When the controllers refuse.
    pub fn share(&self, pool: &str, address: &str, volume: &str, len_bytes: u64) -> Result<()> {
        let kind = pb::pool_spec::Kind::Nbd(pb::NbdPool {
            address: address.to_owned(),
            ..pb::NbdPool::default()
        });
        let create_pool = pb::CreatePoolRequest {
            pool_id: pool.to_owned(),
            request_id: format!("create-{pool}"),
            pool: Some(pb::Pool {
                spec: Some(pb::PoolSpec { kind: Some(kind) }),
                ..pb::Pool::default()
            }),
            ..pb::CreatePoolRequest::default()
        };
        let create_volume = pb::CreateVolumeRequest {
            parent: PROJECT.to_owned(),
            volume_id: volume.to_owned(),
            request_id: format!("create-{volume}"),
            volume: Some(pb::Volume {
                spec: Some(pb::VolumeSpec {
                    size_bytes: len_bytes,
                    pool: format!("pools/{pool}"),
                    ..pb::VolumeSpec::default()
                }),
                ..pb::Volume::default()
            }),
            ..pb::CreateVolumeRequest::default()
        };
        self.ask(|channel| {
            let (create_pool, create_volume) = (create_pool.clone(), create_volume.clone());
            async move {
                let mut pools = PoolsClient::new(channel.clone());
                pools.create_pool(create_pool).await?;
                let mut volumes = VolumesClient::new(channel);
                volumes.create_volume(create_volume).await.map(drop)
            }
        })
    }

    /// Makes a VM and starts it.
    ///
    /// # Errors
    /// When the controllers refuse.
    pub fn run_vm(&self, id: &str, spec: &pb::VmSpec) -> Result<()> {
        let create = pb::CreateVmRequest {
            parent: PROJECT.to_owned(),
            vm_id: id.to_owned(),
            request_id: format!("create-{id}"),
            vm: Some(pb::Vm {
                spec: Some(spec.clone()),
                ..pb::Vm::default()
            }),
            ..pb::CreateVmRequest::default()
        };
        let start = pb::StartVmRequest {
            name: name(id),
            request_id: format!("start-{id}"),
            ..pb::StartVmRequest::default()
        };
        self.ask(|channel| {
            let (create, start) = (create.clone(), start.clone());
            async move {
                let mut vms = VmsClient::new(channel);
                vms.create_vm(create).await?;
                vms.start_vm(start).await.map(drop)
            }
        })
    }

    /// Has a VM stopped without asking its guest.
    ///
    /// # Errors
    /// When the controllers refuse.
    pub fn stop_vm(&self, id: &str) -> Result<()> {
        let stop = pb::StopVmRequest {
            name: name(id),
            force: true,
            ..pb::StopVmRequest::default()
        };
        self.ask(|channel| {
            let stop = stop.clone();
            async move { VmsClient::new(channel).stop_vm(stop).await.map(drop) }
        })
    }

    /// A VM as the controllers know it.
    ///
    /// # Errors
    /// When no controller answers.
    pub fn status(&self, id: &str) -> Result<pb::VmStatus> {
        let vm = self.ask(|channel| async move {
            let request = pb::GetVmRequest { name: name(id) };
            Ok(VmsClient::new(channel).get_vm(request).await?.into_inner())
        })?;
        Ok(vm.status.unwrap_or_default())
    }

    /// What a VM's guest has said on its console, as far as it is still held.
    ///
    /// # Errors
    /// When no controller answers.
    pub fn console(&self, id: &str) -> Result<String> {
        // It goes on for as long as the guest speaks.
        const LISTEN: Duration = Duration::from_secs(3);
        let bytes = self.ask(|channel| async move {
            let first = pb::ConsoleInput {
                name: name(id),
                ..pb::ConsoleInput::default()
            };
            let input = tokio_stream::once(first).chain(tokio_stream::pending());
            let answer = VmsClient::new(channel).console_vm(input).await?;
            let mut output = answer.into_inner();
            let mut bytes = Vec::new();
            let until = tokio::time::Instant::now() + LISTEN;
            while let Ok(Ok(Some(piece))) = tokio::time::timeout_at(until, output.message()).await {
                bytes.extend(piece.data);
            }
            Ok(bytes)
        })?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Where a controller speaks TLS.
fn secure_address(number: usize) -> String {
    format!("https://{}:{}", ground::ADDRESS, CONTROLLER_PORT + number)
}

fn name(id: &str) -> String {
    format!("{PROJECT}/vms/{id}")
}

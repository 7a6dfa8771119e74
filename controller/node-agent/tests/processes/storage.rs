//! Disks of running VMs: formats, chains and limits as the daemon has them, before and after it
//! died, and what is done to them meanwhile.

use std::path::PathBuf;

use api::{
    device::{
        Device, GetDeviceRequest, GetImageRequest, Image, device_daemon_client::DeviceDaemonClient,
        disks_client::DisksClient,
    },
    node::{
        BackupDisk, CommitDisk, CreateVolumeRequest, DiskSpec, DiskStatus, ForgetJobRequest,
        GetDisksRequest, Job, JobState, ListJobsRequest, ListVolumesRequest, MirrorDisk, Power,
        RateLimit, RateLimits, ResizeVolume, SetVolumeKeyRequest, SnapshotDisk, StartJobRequest,
        VmPhase, VmSpec, VolumeStatus, disk_spec::Source, start_job_request::Work,
    },
};
use tonic::Code;

use crate::{
    guest,
    harness::{Agent, disk, gone, kill_hard, pid, poll, spec},
};

const MIB: u64 = 1 << 20;

/// A VM with one disk, on a volume.
fn vm_on(agent: &Agent, volume: &str) -> VmSpec {
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![DiskSpec {
        name: "root".into(),
        source: Some(Source::Volume(volume.into())),
        ..DiskSpec::default()
    }];
    vm
}

async fn create(agent: &mut Agent, request: CreateVolumeRequest) -> VolumeStatus {
    let answer = agent.client.create_volume(request).await;
    answer.unwrap().into_inner()
}

fn qcow2(id: &str, size_bytes: u64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        id: id.into(),
        size_bytes,
        format: "qcow2".into(),
        ..CreateVolumeRequest::default()
    }
}

async fn volume(agent: &mut Agent, id: &str) -> VolumeStatus {
    let listed = agent.client.list_volumes(ListVolumesRequest {}).await;
    let volumes = listed.unwrap().into_inner().volumes;
    volumes.into_iter().find(|volume| volume.id == id).unwrap()
}

/// What the daemon itself says it serves.
async fn served(agent: &Agent) -> (Device, Image) {
    let socket = agent.vm_dir("web").join("blk.sock");
    let channel = api::connect::unix(&socket, std::time::Duration::from_secs(10))
        .await
        .unwrap();
    let id = "root".to_owned();
    let device = DeviceDaemonClient::new(channel.clone())
        .get_device(GetDeviceRequest { id: id.clone() })
        .await
        .unwrap();
    let image = DisksClient::new(channel)
        .get_image(GetImageRequest { id })
        .await
        .unwrap();
    (device.into_inner(), image.into_inner())
}

/// Files of an image, the one that is written first.
fn chain(image: &Image) -> Vec<String> {
    let below = image.backing.iter().map(|backing| &backing.name);
    std::iter::once(&image.name).chain(below).cloned().collect()
}

async fn disk_status(agent: &mut Agent) -> DiskStatus {
    let request = GetDisksRequest {
        vm_id: "web".into(),
    };
    let answer = agent.client.get_disks(request).await.unwrap().into_inner();
    answer.disks.into_iter().next().unwrap()
}

async fn job(agent: &mut Agent, id: &str, work: Work) -> Job {
    // As the controller's: they begin with a digit.
    let id = &format!("0-{id}");
    let request = StartJobRequest {
        job_id: id.into(),
        work: Some(work),
    };
    agent.client.start_job(request.clone()).await.unwrap();
    // Twice is once.
    agent.client.start_job(request).await.unwrap();
    let client = agent.client.clone();
    let done = poll("the job's end", || {
        let (mut client, id) = (client.clone(), id.to_owned());
        async move {
            let jobs = client.list_jobs(ListJobsRequest {}).await.unwrap();
            let mut jobs = jobs.into_inner().jobs.into_iter();
            let job = jobs.find(|job| job.job_id == id).unwrap();
            let over = [JobState::Done, JobState::Failed, JobState::Cancelled];
            over.contains(&job.state()).then_some(job)
        }
    });
    let done = done.await;
    let forget = ForgetJobRequest { job_id: id.into() };
    agent.client.forget_job(forget).await.unwrap();
    done
}

async fn done(agent: &mut Agent, id: &str, work: Work) {
    let job = job(agent, id, work).await;
    assert_eq!(job.state(), JobState::Done, "{}", job.error);
}

async fn connected(agent: &mut Agent, incarnations: u64) {
    agent
        .until("web", "connected", |status| {
            status
                .devices
                .iter()
                .any(|root| root.connected && root.incarnations >= incarnations)
        })
        .await;
}

fn snapshot(name: &str) -> Work {
    Work::Snapshot(SnapshotDisk {
        volume: "data".into(),
        snapshot: name.into(),
    })
}

#[tokio::test]
async fn formats_and_limits_reach_the_daemon_and_its_next_incarnation() {
    let mut agent = Agent::start().await;
    create(&mut agent, qcow2("data", 64 * MIB)).await;
    let mut vm = vm_on(&agent, "data");
    vm.disks[0].block_size = 4096;
    vm.disks.push(disk("raw", &agent.image("disk.raw")));
    let rate = |iops| {
        Some(RateLimit {
            iops,
            ..RateLimit::default()
        })
    };
    vm.disks[0].limits = Some(RateLimits {
        read: rate(1000),
        write: None,
    });
    let status = agent.run(&vm).await;
    let (device, image) = served(&agent).await;
    let blk = device.blk.unwrap();
    assert_eq!(
        (image.format.as_str(), image.capacity_bytes),
        ("qcow2", 64 * MIB)
    );
    assert_eq!(blk.limits.unwrap().read.unwrap().iops, 1000);

    // Changed under the running guest.
    vm.generation += 1;
    vm.disks[0].limits = Some(RateLimits {
        read: rate(0),
        write: rate(50),
    });
    agent.apply(&vm).await.unwrap();
    let limits = served(&agent).await.0.blk.unwrap().limits.unwrap();
    assert_eq!(limits.write.unwrap().iops, 50);
    assert_eq!(limits.read.unwrap_or_default().iops, 0);
    let shown = disk_status(&mut agent).await;
    assert_eq!((shown.served, shown.format.as_str()), (true, "qcow2"));
    assert_eq!(shown.limits.unwrap().write.unwrap().iops, 50);

    kill_hard(pid(&status, "device-blk"));
    connected(&mut agent, 2).await;
    let (device, image) = served(&agent).await;
    assert_eq!(image.format, "qcow2");
    assert_eq!(device.blk.unwrap().limits.unwrap().write.unwrap().iops, 50);

    // Anything else of a disk needs a stopped VM.
    vm.generation += 1;
    vm.disks[0].block_size = 512;
    let error = agent.apply(&vm).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn snapshot_of_a_running_disk_outlives_daemon_agent_and_restart() {
    let mut agent = Agent::start().await;
    let plain = CreateVolumeRequest {
        id: "data".into(),
        size_bytes: 16 * MIB,
        ..CreateVolumeRequest::default()
    };
    let base = create(&mut agent, plain).await.path;
    let mut vm = vm_on(&agent, "data");
    let status = agent.run(&vm).await;
    done(&mut agent, "one", snapshot("monday")).await;
    let (_, image) = served(&agent).await;
    let layers = chain(&image);
    assert_eq!((layers.len(), &layers[1]), (2, &base));
    let job = job(&mut agent, "two", snapshot("monday")).await;
    assert_eq!(Code::from_i32(job.error_code), Code::AlreadyExists);

    let blk = pid(&status, "device-blk");
    kill_hard(blk);
    gone(blk).await;
    connected(&mut agent, 2).await;
    assert_eq!(chain(&served(&agent).await.1), layers);

    agent.end(nix::sys::signal::Signal::SIGKILL);
    agent.start_again().await;
    let seen = volume(&mut agent, "data").await;
    assert_eq!(seen.layers[0].path, layers[0]);
    assert_eq!(seen.layers[1].snapshot, "monday");
    done(&mut agent, "three", snapshot("tuesday")).await;

    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    // Nobody writes it: the agent makes the layer itself.
    done(&mut agent, "four", snapshot("wednesday")).await;
    agent.power(&mut vm, Power::On).await;
    agent
        .until("web", "running", |status| {
            status.phase() == VmPhase::Running
        })
        .await;
    assert_eq!(chain(&served(&agent).await.1).len(), 4);

    // What a snapshot keeps can be had by others while the guest writes on.
    let clone = CreateVolumeRequest {
        id: "clone".into(),
        base: "data".into(),
        base_snapshot: "monday".into(),
        ..CreateVolumeRequest::default()
    };
    let clone = create(&mut agent, clone).await;
    assert_eq!((clone.layers.len(), &clone.layers[1].path), (2, &base));
}

#[tokio::test]
async fn newest_snapshot_is_merged_under_the_running_guest() {
    let mut agent = Agent::start().await;
    create(&mut agent, qcow2("data", 16 * MIB)).await;
    let vm = vm_on(&agent, "data");
    agent.run(&vm).await;
    let before = chain(&served(&agent).await.1);
    done(&mut agent, "one", snapshot("monday")).await;
    let commit = Work::Commit(CommitDisk {
        volume: "data".into(),
    });
    done(&mut agent, "two", commit).await;
    assert_eq!(chain(&served(&agent).await.1), before);
    let seen = volume(&mut agent, "data").await;
    assert_eq!(
        (seen.layers.len(), seen.layers[0].snapshot.as_str()),
        (1, "")
    );
}

#[tokio::test]
async fn growing_disk_grows_under_the_guest_and_never_shrinks() {
    for format in ["raw", "qcow2"] {
        let mut agent = Agent::start().await;
        let request = CreateVolumeRequest {
            format: format.into(),
            ..qcow2("data", 16 * MIB)
        };
        create(&mut agent, request).await;
        let resize = |size_bytes| {
            Work::Resize(ResizeVolume {
                volume: "data".into(),
                size_bytes,
            })
        };
        done(&mut agent, "idle", resize(24 * MIB)).await;
        assert_eq!(volume(&mut agent, "data").await.size_bytes, 24 * MIB);
        let vm = vm_on(&agent, "data");
        agent.run(&vm).await;
        done(&mut agent, "served", resize(32 * MIB)).await;
        assert_eq!(served(&agent).await.1.capacity_bytes, 32 * MIB, "{format}");
        assert_eq!(volume(&mut agent, "data").await.size_bytes, 32 * MIB);
        let job = job(&mut agent, "shrink", resize(16 * MIB)).await;
        assert_eq!(Code::from_i32(job.error_code), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn mirror_moves_a_disk_to_another_format_for_good() {
    let mut agent = Agent::start().await;
    let plain = CreateVolumeRequest {
        id: "data".into(),
        size_bytes: 16 * MIB,
        ..CreateVolumeRequest::default()
    };
    let before = create(&mut agent, plain).await.path;
    let vm = vm_on(&agent, "data");
    let status = agent.run(&vm).await;
    let mirror = Work::Mirror(MirrorDisk {
        volume: "data".into(),
        format: "qcow2".into(),
        auto_complete: true,
        ..MirrorDisk::default()
    });
    done(&mut agent, "move", mirror).await;
    let (_, image) = served(&agent).await;
    assert_eq!((image.format.as_str(), image.backing.len()), ("qcow2", 0));
    assert!(!PathBuf::from(&before).exists(), "what was copied is gone");
    kill_hard(pid(&status, "device-blk"));
    connected(&mut agent, 2).await;
    assert_eq!(chain(&served(&agent).await.1), [image.name]);
    assert_eq!(volume(&mut agent, "data").await.format, "qcow2");
}

#[tokio::test]
async fn backup_is_a_file_of_its_own() {
    let mut agent = Agent::start().await;
    create(&mut agent, qcow2("data", 4 * MIB)).await;
    let vm = vm_on(&agent, "data");
    agent.run(&vm).await;
    let path = agent.path().join("backup.raw");
    let backup = |bitmap: &str, new_bitmap: &str| {
        Work::Backup(BackupDisk {
            vm_id: "web".into(),
            disk: "root".into(),
            path: path.display().to_string(),
            bitmap: bitmap.into(),
            new_bitmap: new_bitmap.into(),
            ..BackupDisk::default()
        })
    };
    done(&mut agent, "full", backup("", "daily")).await;
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 * MIB);
    assert_eq!(disk_status(&mut agent).await.bitmaps[0].bitmap, "daily");
    done(&mut agent, "more", backup("daily", "")).await;
    // One that exists is only brought up to date, never overwritten.
    let job = job(&mut agent, "again", backup("", "")).await;
    assert_eq!(job.state(), JobState::Failed);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 * MIB);
}

#[tokio::test]
async fn encrypted_volume_is_served_with_its_key_alone() {
    let mut agent = Agent::start().await;
    let key = |key: &[u8]| SetVolumeKeyRequest {
        id: "data".into(),
        key: key.into(),
    };
    agent
        .client
        .set_volume_key(key(b"a passphrase"))
        .await
        .unwrap();
    let secret = CreateVolumeRequest {
        id: "data".into(),
        size_bytes: 8 * MIB,
        encrypted: true,
        ..CreateVolumeRequest::default()
    };
    let made = create(&mut agent, secret).await;
    assert_eq!(
        (made.size_bytes, made.encrypted, made.key_present),
        (8 * MIB, true, true)
    );
    agent.client.set_volume_key(key(b"")).await.unwrap();
    let mut vm = vm_on(&agent, "data");
    agent.apply(&vm).await.unwrap();
    let settled = |status: &api::node::VmStatus| status.phase() == VmPhase::Failed;
    let status = agent.until("web", "refused", settled).await;
    assert!(
        status.error.contains("vmctl volume key set data"),
        "{}",
        status.error
    );

    agent
        .client
        .set_volume_key(key(b"a passphrase"))
        .await
        .unwrap();
    vm.generation += 1;
    agent.run(&vm).await;
    let (device, image) = served(&agent).await;
    assert!(device.blk.unwrap().encrypted && image.capacity_bytes == 8 * MIB);
    let job = job(&mut agent, "one", snapshot("monday")).await;
    assert!(job.error.contains("encrypted"), "{}", job.error);
}

#[tokio::test]
async fn base_of_a_clone_is_not_written() {
    let mut agent = Agent::start().await;
    create(&mut agent, qcow2("data", 4 * MIB)).await;
    let clone = |id: &str| CreateVolumeRequest {
        id: id.into(),
        base: "data".into(),
        ..CreateVolumeRequest::default()
    };
    create(&mut agent, clone("clone")).await;
    let mut vm = vm_on(&agent, "data");
    agent.apply(&vm).await.unwrap();
    let settled = |status: &api::node::VmStatus| status.phase() == VmPhase::Failed;
    let status = agent.until("web", "refused", settled).await;
    assert!(
        status.error.contains("vmctl volume clone"),
        "{}",
        status.error
    );
    vm.generation += 1;
    vm.disks[0].source = Some(Source::Volume("clone".into()));
    agent.run(&vm).await;
    assert_eq!(served(&agent).await.1.backing.len(), 1);
    // The base of a running clone is the base of another one, too.
    create(&mut agent, clone("other")).await;
    assert_eq!(volume(&mut agent, "data").await.clones, ["clone", "other"]);
}

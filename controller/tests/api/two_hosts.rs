//! Two real node agents on one machine and one controller: what is placed is where it is said to be.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use api::controller as pb;

use crate::harness::{Controller, built, create_vm, poll_async, vm_name};

/// A node agent with directories of its own; killed when dropped. It has no VMs that run.
struct Agent(Child);

impl Agent {
    fn start(dir: &Path, name: &str) -> Self {
        let state = dir.join(name);
        let child = Command::new(built("node-agent"))
            .arg("--listen")
            .arg(format!("unix:{}", socket(dir, name).display()))
            .arg("--state-dir")
            .arg(&state)
            .arg("--run-dir")
            .arg(dir.join(format!("{name}.run")))
            .args(["--zone", name, "--label", &format!("name={name}")])
            .env("MORTISE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn socket(dir: &Path, name: &str) -> std::path::PathBuf {
    dir.join(format!("{name}.sock"))
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_and_volumes_are_on_the_hosts_that_were_chosen_and_a_drain_moves_them() {
    let dir = tempfile::tempdir().unwrap();
    let agents = ["a", "b"].map(|name| Agent::start(dir.path(), name));
    let nodes = ["a", "b"].map(|name| format!("unix:{}", socket(dir.path(), name).display()));
    let state = dir.path().join("state");
    let state = state.to_str().unwrap();
    let args = [
        "--node",
        &nodes[0],
        "--node",
        &nodes[1],
        "--state-dir",
        state,
    ];
    let c = Controller::start(&args).await;
    let hosts = c.connected(2).await;
    // Hosts have made their names up; their zones say which is which.
    let host = |zone: &str| {
        let inventory = |host: &&pb::Host| host.inventory.as_ref().unwrap().zone == zone;
        hosts.iter().find(inventory).expect("its zone is reported")
    };
    let seen = host("a").inventory.clone().unwrap();
    assert_eq!(seen.labels["name"], "a");
    assert!(
        !seen.cpu_features.is_empty() && seen.pool_bytes > 0,
        "{seen:?}"
    );

    for (volume, zone) in [("one", "a"), ("two", "b")] {
        let request = pb::CreateVolumeRequest {
            parent: "projects/default".into(),
            volume_id: volume.into(),
            volume: Some(pb::Volume {
                spec: Some(pb::VolumeSpec {
                    size_bytes: 1 << 20,
                    host: host(zone).name.clone(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let operation = c.volumes().create_volume(request).await.unwrap();
        c.succeeded(operation.into_inner()).await;
        let name = format!("projects/default/volumes/{volume}");
        let made = c.volumes().get_volume(pb::GetVolumeRequest { name }).await;
        let status = made.unwrap().into_inner().status.unwrap();
        assert_eq!(status.host, host(zone).name);
        assert!(Path::new(&status.path).starts_with(dir.path().join(zone)));
        assert!(Path::new(&status.path).exists());
    }

    // One follows its volume, the other may be anywhere in its zone.
    let mut bound = create_vm("bound");
    let spec = bound.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.disks.push(pb::Disk {
        source: Some(pb::disk::Source::Volume(
            "projects/default/volumes/one".into(),
        )),
        ..Default::default()
    });
    let mut free = create_vm("free");
    let spec = free.vm.as_mut().unwrap().spec.as_mut().unwrap();
    spec.placement = Some(pb::Placement {
        node_selector: [("name".to_owned(), "a".to_owned())].into(),
        ..Default::default()
    });
    for request in [bound, free] {
        let operation = c.vms().create_vm(request).await.unwrap().into_inner();
        c.succeeded(operation).await;
    }
    for vm in ["bound", "free"] {
        let status = c.vm(vm).await.status.unwrap();
        assert_eq!(status.host, host("a").name, "{vm}");
    }

    let request = pb::DrainHostRequest {
        name: host("a").name.clone(),
        ..Default::default()
    };
    let operation = c.hosts().drain_host(request).await.unwrap().into_inner();
    let findings = c.done(operation).await.metadata.unwrap().findings;
    assert_eq!(findings.len(), 2, "{findings:?}");
    assert!(
        findings[0].contains("volume one in the pool"),
        "{findings:?}"
    );
    assert!(findings[1].contains("its label name is b"), "{findings:?}");

    c.create_vm("late").await;
    let status = c.vm("late").await.status.unwrap();
    assert_eq!(status.host, host("b").name, "the other one is cordoned");
    drop(agents);
    let stale = || async { c.vm("late").await.status.unwrap().stale };
    poll_async("it is noticed", stale, |stale| *stale).await;
    assert_eq!(c.vm("late").await.name, vm_name("late"));
}

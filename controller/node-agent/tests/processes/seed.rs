//! Seeds for cloud-init: what a guest finds on the disk, and who else finds it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use api::node::{CloudInit, Power, VmPhase};

use crate::{
    guest,
    harness::{Agent, files, kill_hard, pid, spec},
};

const PASSWORD: &str = "open-sesame";

fn seed() -> CloudInit {
    CloudInit {
        user_data: format!("#cloud-config\npassword: {PASSWORD}\n").into_bytes(),
        meta_data: b"instance-id: i-1\nlocal-hostname: web\n".to_vec(),
        network_config: b"version: 2\n".to_vec(),
    }
}

#[tokio::test]
async fn seed_is_a_labelled_disk_that_goes_with_the_run_and_stays_secret() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::listener(agent.path()));
    vm.cloud_init = Some(seed());
    let status = agent.run(&vm).await;
    let disk = status.devices.iter().find(|device| device.name == "cidata");
    assert!(
        disk.is_some_and(|disk| disk.connected && disk.r#type == "blk"),
        "{status:#?}"
    );

    let image = agent.vm_dir("web").join("cidata.iso");
    assert_eq!(mode(&image), 0o600);
    assert_eq!(blkid(&image, "LABEL"), "cidata");
    assert_eq!(blkid(&image, "TYPE"), "iso9660");
    if let Some(mounted) = Mount::new(&image, agent.path()) {
        assert_eq!(
            files(&mounted.0),
            ["meta-data", "network-config", "user-data"]
        );
        assert_eq!(
            fs::read(mounted.0.join("user-data")).unwrap(),
            seed().user_data
        );
        assert_eq!(
            fs::read(mounted.0.join("meta-data")).unwrap(),
            seed().meta_data
        );
    }

    // The next incarnation of the daemon serves it, too.
    kill_hard(pid(&status, "device-blk"));
    agent
        .until("web", "served again", |status| {
            status
                .devices
                .iter()
                .all(|device| device.connected && device.incarnations == 2)
        })
        .await;

    assert_eq!(mode(&agent.record("web")), 0o600);
    let told = [
        fs::read_to_string(agent.path().join("agent.log")).unwrap(),
        fs::read_to_string(agent.record("web")).unwrap(),
        format!("{:?}", agent.status("web").await),
    ]
    .concat();
    assert!(!told.contains(PASSWORD), "{told}");

    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    assert!(!image.exists(), "{:?}", files(&agent.vm_dir("web")));
    agent.power(&mut vm, Power::On).await;
    agent
        .until("web", "running", |status| {
            status.phase() == VmPhase::Running
        })
        .await;
    assert!(image.exists(), "it is made anew");
    agent.power(&mut vm, Power::OffNow).await;
    agent
        .until("web", "stopped", |status| {
            status.phase() == VmPhase::Stopped
        })
        .await;
    agent.delete("web").await.unwrap();
    agent.assert_nothing_left("web");
    assert!(!agent.record("web").exists());
}

#[tokio::test]
async fn seed_counts_as_a_disk_and_has_bounds() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.cloud_init = Some(seed());
    vm.disks = vec![crate::harness::disk("cidata", &agent.image("a.raw"))];
    let error = agent.apply(&vm).await.unwrap_err();
    assert!(
        error.message().contains("name of another device"),
        "{error}"
    );
    vm.disks.clear();
    vm.cloud_init = Some(CloudInit {
        user_data: vec![b'#'; (128 << 10) + 1],
        ..seed()
    });
    let error = agent.apply(&vm).await.unwrap_err();
    assert!(error.message().contains("at most 131072 fit"), "{error}");
    vm.cloud_init = Some(CloudInit::default());
    let error = agent.apply(&vm).await.unwrap_err();
    assert!(error.message().contains("instance-id"), "{error}");
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// What util-linux, and so cloud-init and udev, find in the image.
fn blkid(image: &Path, tag: &str) -> String {
    let output = Command::new("/sbin/blkid")
        .args(["--probe", "--output", "value", "--match-tag", tag])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The kernel's view of an image, where this process may mount one.
struct Mount(PathBuf);

impl Mount {
    fn new(image: &Path, dir: &Path) -> Option<Self> {
        let mounted = dir.join("mounted");
        fs::create_dir(&mounted).unwrap();
        let status = Command::new("mount")
            .args(["-o", "loop,ro", "-t", "iso9660"])
            .args([image, &mounted])
            .status()
            .unwrap();
        if !status.success() {
            println!("not mounted: this needs root, loop devices and iso9660");
            return None;
        }
        Some(Self(mounted))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

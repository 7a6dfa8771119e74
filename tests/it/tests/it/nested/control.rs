//! `vmm-core`'s control socket, while a real guest runs.

use std::path::Path;
use std::time::Duration;

use api::vmm::vmm_client::VmmClient;
use api::vmm::{
    ConsoleInput, GetVmmRequest, PauseRequest, PowerButtonRequest, ResumeRequest, StartRequest,
    VmmState,
};
use guest::plan::{End, Plan};
use guest::report::UP_LINE;
use tonic::transport::Channel;

use super::{Vmm, device_blk, disk_device, image};
use crate::guest_run::{self, BOOT_LIMIT};
use crate::reflection::expect_service;

async fn connect(dir: &Path) -> VmmClient<Channel> {
    let channel = api::connect::unix(&dir.join("vmm.sock"), Duration::from_secs(20)).await;
    VmmClient::new(channel.expect("vmm-core's control socket answers"))
}

/// Reads a console from its oldest byte until `text` was seen; returns the position after it.
async fn read_console_until(mut vmm: VmmClient<Channel>, text: &str) -> u64 {
    let (sender, input) = tokio::sync::mpsc::channel(1);
    let first = ConsoleInput {
        data: Vec::new(),
        from_offset: 0,
    };
    sender.send(first).await.expect("the stream is open");
    let input = tokio_stream::wrappers::ReceiverStream::new(input);
    let mut output = vmm.console(input).await.expect("a console").into_inner();
    let mut seen = Vec::new();
    let mut position = 0;
    let read = async {
        while !String::from_utf8_lossy(&seen).contains(text) {
            let chunk = output
                .message()
                .await
                .expect("the console goes on")
                .expect("the console goes on");
            assert_eq!(
                chunk.offset, position,
                "a reader that keeps up misses nothing"
            );
            position += chunk.data.len() as u64;
            seen.extend(chunk.data);
        }
        position
    };
    tokio::time::timeout(BOOT_LIMIT, read)
        .await
        .expect("the guest prints it in time")
}

#[tokio::test]
async fn a_vm_starts_pauses_resumes_and_hears_its_power_button() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = image(dir.path(), "disk.raw", 16 << 20);
    let _blk = device_blk(dir.path(), &image);
    let plan = Plan {
        end: End::Wait,
        ..Plan::default()
    };
    let vmm = Vmm {
        devices: vec![disk_device(dir.path())],
        more: vec!["--no-start".into()],
        ..Vmm::default()
    };
    let mut process = vmm.spawn(dir.path(), &plan);
    let mut client = connect(dir.path()).await;
    expect_service(
        &dir.path().join("vmm.sock"),
        "mortise.vmm.v1.Vmm",
        "VmmInfo",
    )
    .await;

    let info = client
        .get_vmm(GetVmmRequest {})
        .await
        .expect("it answers")
        .into_inner();
    assert_eq!(info.state(), VmmState::Created);
    assert_eq!(
        (info.vcpus, info.memory_bytes, info.pid),
        (1, 256 << 20, process.pid())
    );
    let info = client
        .start(StartRequest {})
        .await
        .expect("it starts")
        .into_inner();
    assert_eq!(info.state(), VmmState::Running);

    // Two readers at once, and a third that comes late, see the same console.
    let (first, second) = tokio::join!(
        read_console_until(client.clone(), UP_LINE),
        read_console_until(client.clone(), UP_LINE)
    );
    assert!(first > 0 && second > 0);
    guest_run::wait_for_line(&mut process, "\"job\":\"done\"", 1);
    read_console_until(client.clone(), "\"job\":\"done\"").await;

    let info = client
        .get_vmm(GetVmmRequest {})
        .await
        .expect("it answers")
        .into_inner();
    assert!(info.first_console_byte_ms > 0 && info.exits > 0, "{info:?}");
    let disk = &info.devices[0];
    assert!(
        disk.driver_ok && disk.inflight_tracking && disk.incarnations == 1,
        "{disk:?}"
    );

    for _ in 0..3 {
        let info = client
            .pause(PauseRequest {})
            .await
            .expect("it pauses")
            .into_inner();
        assert_eq!(info.state(), VmmState::Paused);
        let before = client
            .get_vmm(GetVmmRequest {})
            .await
            .expect("it answers")
            .into_inner()
            .exits;
        let after = client
            .get_vmm(GetVmmRequest {})
            .await
            .expect("it answers")
            .into_inner()
            .exits;
        assert_eq!(before, after, "a paused guest does not run");
        let info = client
            .resume(ResumeRequest {})
            .await
            .expect("it resumes")
            .into_inner();
        assert_eq!(info.state(), VmmState::Running);
    }
    client
        .power_button(PowerButtonRequest {})
        .await
        .expect("the button can be pressed");
    guest_run::finish(&mut process);
}

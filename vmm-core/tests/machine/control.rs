//! The control socket, with tiny guests behind it.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use crate::tiny_guest::{Code, DEADLINE, Vmm, kvm_is_usable, poll};
use api::boottime;
use api::vmm::vmm_client::VmmClient;
use api::vmm::{
    AllowRunRequest, ConsoleInput, ConsoleOutput, DeviceConnection, GetVmmRequest, PauseRequest,
    PowerButtonRequest, RefreshDeviceConfigRequest, ResetRequest, ResumeRequest, StartRequest,
    StopRequest, VmmInfo, VmmState,
};
use nix::sys::signal::{Signal, kill};
use tonic::Streaming;
use tonic::transport::Channel;

/// How long `vmm-core` waits for a backend, about.
const BACKEND_PATIENCE: Duration = Duration::from_secs(8);

/// Prints dots for ever.
fn dots() -> Code {
    Code::default().raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd])
}

fn with_client<F: Future>(vmm: &Vmm, test: impl FnOnce(VmmClient<Channel>) -> F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    poll(|| vmm.control_socket().exists().then_some(()));
    runtime.block_on(async {
        let channel = api::connect::unix(&vmm.control_socket(), DEADLINE)
            .await
            .unwrap();
        tokio::time::timeout(DEADLINE, test(VmmClient::new(channel)))
            .await
            .expect("test ends in time")
    })
}

#[test]
fn life_goes_from_created_to_stopped() {
    if !kvm_is_usable("life_goes_from_created_to_stopped") {
        return;
    }
    let vmm = Vmm::start(&dots(), &["--no-start", "--id", "dots", "--cpus", "2"]);
    with_client(&vmm, async |mut client| {
        let info = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        assert_eq!(
            (info.state(), info.id.as_str(), info.vcpus),
            (VmmState::Created, "dots", 2)
        );
        assert_eq!(
            (info.memory_bytes, info.first_console_byte_ms, info.exits),
            (32 << 20, 0, 0)
        );
        wait_for_sandbox(
            &mut client,
            &[
                "no_new_privs",
                "seccomp:vmm-core-vcpu",
                "seccomp:vmm-core-control",
            ],
        )
        .await;
        let refused = client.pause(PauseRequest {}).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(
            refused.message().contains("created: start it first"),
            "{refused}"
        );

        for _ in 0..2 {
            let info = client.start(StartRequest {}).await.unwrap().into_inner();
            assert_eq!(info.state(), VmmState::Running);
        }
        wait_for_output(&mut client, 0).await;

        for _ in 0..2 {
            let info = client.pause(PauseRequest {}).await.unwrap().into_inner();
            assert_eq!(info.state(), VmmState::Paused);
        }
        let paused = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let later = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        assert_eq!(paused.exits, later.exits, "no vCPU executes guest code");
        let refused = client
            .power_button(PowerButtonRequest {})
            .await
            .unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);

        let info = client.resume(ResumeRequest {}).await.unwrap().into_inner();
        assert_eq!(info.state(), VmmState::Running);
        wait_for_output(&mut client, later.exits + 10).await;

        let info = client.reset(ResetRequest {}).await.unwrap().into_inner();
        assert_eq!((info.state(), info.resets), (VmmState::Running, 1));
        wait_for_output(&mut client, info.exits + 10).await;
        client.power_button(PowerButtonRequest {}).await.unwrap();
        let refused = client.allow_run(AllowRunRequest::default()).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");
        client.stop(StopRequest {}).await.unwrap();
    });
    let ended = vmm.wait();
    assert!(ended.status.success(), "{ended:?}");
    assert!(
        ended.exit_file.contains("\"stop-request\"") && !ended.socket_left,
        "{ended:?}"
    );
}

#[test]
fn machine_pauses_at_its_lease_s_end_and_goes_on_with_the_next_one() {
    if !kvm_is_usable("machine_pauses_at_its_lease_s_end_and_goes_on_with_the_next_one") {
        return;
    }
    let vmm = Vmm::start(&dots(), &["--run-until-boottime-ns", "1"]);
    with_client(&vmm, async |mut client| {
        let ended = until_lease_ended(&mut client).await;
        assert_eq!(ended.exits, 0, "it ran without leave");
        let refused = client.resume(ResumeRequest {}).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("lease is over"), "{refused}");

        while allow(&mut client, Duration::from_secs(1)).await.exits == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let ended = until_lease_ended(&mut client).await;
        let info = client.reset(ResetRequest {}).await.unwrap().into_inner();
        assert_eq!(info.state(), VmmState::Paused);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let later = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        assert_eq!(ended.exits, later.exits, "no vCPU executes guest code");

        let info = allow(&mut client, DEADLINE).await;
        assert_eq!((info.state(), info.lease_ended), (VmmState::Running, false));
        wait_for_output(&mut client, later.exits + 10).await;
        // An earlier moment takes nothing back, and one that was asked to pause stays so.
        assert_eq!(
            allow(&mut client, Duration::ZERO).await.state(),
            VmmState::Running
        );
        client.pause(PauseRequest {}).await.unwrap();
        let info = allow(&mut client, 2 * DEADLINE).await;
        assert_eq!(info.state(), VmmState::Paused);
        let info = client.resume(ResumeRequest {}).await.unwrap().into_inner();
        assert_eq!(info.state(), VmmState::Running);
        client.stop(StopRequest {}).await.unwrap();
    });
    assert!(vmm.wait().status.success());
}

async fn allow(client: &mut VmmClient<Channel>, time: Duration) -> VmmInfo {
    let request = AllowRunRequest {
        until_boottime_ns: boottime::now_ns() + time.as_nanos() as u64,
    };
    client.allow_run(request).await.unwrap().into_inner()
}

async fn until_lease_ended(client: &mut VmmClient<Channel>) -> VmmInfo {
    loop {
        let info = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        if info.lease_ended && info.state() == VmmState::Paused {
            return info;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Each thread confines itself as it begins, some after the control socket answers.
async fn wait_for_sandbox(client: &mut VmmClient<Channel>, names: &[&str]) {
    loop {
        let info = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        if names
            .iter()
            .all(|name| info.sandbox.iter().any(|has| has == name))
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn wait_for_output(client: &mut VmmClient<Channel>, exits: u64) {
    loop {
        let info = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        if info.first_console_byte_ms > 0 && info.exits > exits {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn console_is_replayed_to_every_reader_and_takes_input() {
    if !kvm_is_usable("console_is_replayed_to_every_reader_and_takes_input") {
        return;
    }
    // Prints "ab", waits for a byte, prints that.
    let code = Code::default().print("ab");
    let code = code.raw(&[
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xfb, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee,
    ]);
    let vmm = Vmm::start(&code.halt(), &[]);
    with_client(&vmm, async |mut client| {
        let from_offset = |from_offset: u64| ConsoleInput {
            data: Vec::new(),
            from_offset,
        };
        let request = tokio_stream::iter([from_offset(0)]);
        let mut first = client.console(request).await.unwrap().into_inner();
        let mut first_text = Vec::new();
        read_until(&mut first, &mut first_text, 0, b"ab").await;

        let request = tokio_stream::iter([from_offset(1)]);
        let mut second = client.console(request).await.unwrap().into_inner();
        let mut second_text = Vec::new();
        let typed = ConsoleInput {
            data: b"c".to_vec(),
            from_offset: u64::MAX,
        };
        let _writer = client.console(tokio_stream::iter([typed])).await.unwrap();
        read_until(&mut first, &mut first_text, 0, b"abc").await;
        read_until(&mut second, &mut second_text, 1, b"bc").await;
        client.stop(StopRequest {}).await.unwrap();
    });
    assert!(vmm.wait().status.success());
}

/// Reads until the text is `expected`; each message must go on where the last one ended.
async fn read_until(
    stream: &mut Streaming<ConsoleOutput>,
    text: &mut Vec<u8>,
    from_offset: u64,
    expected: &[u8],
) {
    while text.len() < expected.len() {
        let message = stream.message().await.unwrap().unwrap();
        assert_eq!(message.offset, from_offset + text.len() as u64);
        text.extend(message.data);
    }
    assert_eq!(text, expected);
}

/// Accepts connections and never says a word.
fn mute_backend() -> (tempfile::TempDir, UnixListener, String) {
    let dir = tempfile::TempDir::new().unwrap();
    let socket = dir.path().join("mute.vu");
    let listener = UnixListener::bind(&socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    let device = format!("tag=disk0,type=blk,socket={}", socket.display());
    (dir, listener, device)
}

#[test]
fn machine_that_waits_for_a_backend_answers_and_stops() {
    if !kvm_is_usable("machine_that_waits_for_a_backend_answers_and_stops") {
        return;
    }
    let (_dir, _listener, device) = mute_backend();
    let started = Instant::now();
    let vmm = Vmm::start(&dots(), &["--device", &device]);
    with_client(&vmm, async |mut client| {
        let info = client.get_vmm(GetVmmRequest {}).await.unwrap().into_inner();
        assert_eq!(info.state(), VmmState::Created);
        let [disk] = info.devices.as_slice() else {
            panic!("{info:?}")
        };
        assert_eq!(
            (disk.tag.as_str(), disk.connection()),
            ("disk0", DeviceConnection::Reconnecting)
        );
        let refresh = |tag: &str| RefreshDeviceConfigRequest { tag: tag.into() };
        let info = client.refresh_device_config(refresh("disk0")).await;
        assert_eq!(info.unwrap().into_inner().devices.len(), 1);
        let refused = client.refresh_device_config(refresh("disk1")).await;
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::NotFound);
        assert!(refused.message().contains("disk1"), "{refused}");
        client.stop(StopRequest {}).await.unwrap();
    });
    let ended = vmm.wait();
    assert!(started.elapsed() < BACKEND_PATIENCE, "{ended:?}");
    assert!(ended.status.success(), "{ended:?}");
    assert!(
        ended.exit_file.contains("\"stop-request\"") && !ended.socket_left,
        "{ended:?}"
    );
}

#[test]
fn sigterm_ends_the_wait_for_a_backend() {
    if !kvm_is_usable("sigterm_ends_the_wait_for_a_backend") {
        return;
    }
    let (_dir, listener, device) = mute_backend();
    let started = Instant::now();
    let vmm = Vmm::start(&dots(), &["--device", &device]);
    let _waiting = poll(|| listener.accept().ok());
    kill(vmm.pid(), Signal::SIGTERM).unwrap();
    let ended = vmm.wait();
    assert!(started.elapsed() < BACKEND_PATIENCE, "{ended:?}");
    assert!(ended.status.success(), "{ended:?}");
    assert!(
        ended.exit_file.contains("\"stop-request\"") && !ended.socket_left,
        "{ended:?}"
    );
}

#[test]
fn console_that_could_still_be_typed_into_does_not_hold_up_the_end() {
    if !kvm_is_usable("console_that_could_still_be_typed_into_does_not_hold_up_the_end") {
        return;
    }
    let vmm = Vmm::start(&dots(), &[]);
    with_client(&vmm, async |mut client| {
        let (typist, input) = tokio::sync::mpsc::channel(1);
        typist.send(ConsoleInput::default()).await.unwrap();
        let input = tokio_stream::wrappers::ReceiverStream::new(input);
        let mut output = client.console(input).await.unwrap().into_inner();
        output.message().await.unwrap();
        client.stop(StopRequest {}).await.unwrap();
        let stopped = Instant::now();
        while let Ok(Some(_)) = output.message().await {}
        assert!(stopped.elapsed() < api::serve::DRAIN_TIMEOUT, "cut off");
    });
    assert!(vmm.wait().status.success());
}

//! Starts that cannot succeed: one clear error each, and nothing left behind.

use std::{fs, os::fd::AsRawFd};

use api::node::{NicSpec, VmPhase, VmSpec, VmStatus};
use tonic::Code;

use crate::{
    guest,
    harness::{Agent, disk, is_alive, may_make_taps, spec},
};

async fn failed(agent: &mut Agent, vm: &VmSpec) -> VmStatus {
    agent.apply(vm).await.unwrap();
    let status = agent
        .until(&vm.id, "failed", |status| status.phase() == VmPhase::Failed)
        .await;
    agent.assert_nothing_left(&vm.id);
    status
}

fn assert_error(status: &VmStatus, code: Code, parts: &[&str]) {
    assert_eq!(Code::from_i32(status.error_code), code, "{}", status.error);
    for part in parts {
        assert!(
            status.error.contains(part),
            "{part:?} is not in {:?}",
            status.error
        );
    }
    assert!(
        !status.error.contains('\n'),
        "more than one line: {:?}",
        status.error
    );
}

#[tokio::test]
async fn missing_empty_and_corrupt_kernels_are_named() {
    let mut agent = Agent::start().await;
    let missing = agent.path().join("no-such-kernel");
    let status = failed(&mut agent, &spec("a", &missing)).await;
    assert_error(
        &status,
        Code::NotFound,
        &["kernel", "no-such-kernel", "correct the path"],
    );

    let empty = agent.path().join("empty-kernel");
    fs::write(&empty, "").unwrap();
    let status = failed(&mut agent, &spec("b", &empty)).await;
    assert_error(
        &status,
        Code::InvalidArgument,
        &["empty-kernel", "is empty"],
    );

    let corrupt = agent.path().join("corrupt-kernel");
    fs::write(&corrupt, "this is no kernel at all").unwrap();
    let mut vm = spec("c", &corrupt);
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::FailedPrecondition,
        &["vmm-core", "corrupt-kernel"],
    );
}

#[tokio::test]
async fn image_that_is_missing_or_no_disk_is_named() {
    let mut agent = Agent::start().await;
    let kernel = guest::sleeper(agent.path());
    let mut vm = spec("a", &kernel);
    vm.disks = vec![disk("root", &agent.path().join("no-such-image"))];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::NotFound,
        &["disk root", "no-such-image", "does not exist"],
    );

    let short = agent.path().join("short.raw");
    fs::write(&short, [0; 1000]).unwrap();
    let mut vm = spec("b", &kernel);
    vm.disks = vec![disk("root", &short)];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::InvalidArgument,
        &["short.raw", "1000 bytes", "truncate"],
    );

    let mut vm = spec("c", &kernel);
    vm.disks = vec![disk("root", &short)];
    vm.disks[0].source = Some(api::node::disk_spec::Source::Volume("nothing".into()));
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::NotFound,
        &["volume \"nothing\"", "vmctl volume list"],
    );
}

#[tokio::test]
async fn image_of_another_vm_is_refused() {
    let mut agent = Agent::start().await;
    let kernel = guest::sleeper(agent.path());
    let image = agent.image("shared.raw");
    let mut first = spec("first", &kernel);
    first.disks = vec![disk("root", &image)];
    agent.run(&first).await;
    let mut second = spec("second", &kernel);
    second.disks = vec![disk("root", &image)];
    agent.apply(&second).await.unwrap();
    let status = agent
        .until("second", "failed", |status| {
            status.phase() == VmPhase::Failed
        })
        .await;
    assert_error(
        &status,
        Code::FailedPrecondition,
        &["shared.raw", "in use by VM first"],
    );
    assert!(!agent.vm_dir("second").exists());
    assert_eq!(
        agent.processes().len(),
        2,
        "only the first VM's processes are there"
    );
}

#[tokio::test]
async fn image_that_another_process_locked_is_refused() {
    let mut agent = Agent::start().await;
    let image = agent.image("locked.raw");
    let holder = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK only reads the flock.
    let locked = unsafe { libc::fcntl(holder.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    assert_eq!(locked, 0);
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &image)];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::FailedPrecondition,
        &["locked.raw", "holds a lock"],
    );
}

#[tokio::test]
async fn tap_that_is_not_there_is_named() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    vm.nics = vec![NicSpec {
        name: "eth0".into(),
        tap: "no-such-tap".into(),
        ..NicSpec::default()
    }];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::NotFound,
        &["NIC eth0", "no-such-tap", "ip tuntap add"],
    );
}

#[tokio::test]
async fn bridge_that_is_not_there_leaves_no_tap() {
    let mut agent = Agent::start().await;
    let mut vm = spec("nobr", &guest::sleeper(agent.path()));
    vm.nics = vec![NicSpec {
        name: "eth0".into(),
        bridge: "no-such-br".into(),
        ..NicSpec::default()
    }];
    let status = failed(&mut agent, &vm).await;
    if may_make_taps() {
        assert_error(&status, Code::NotFound, &["no-such-br", "ip link add"]);
    } else {
        assert_error(
            &status,
            Code::PermissionDenied,
            &["NIC eth0", "CAP_NET_ADMIN"],
        );
    }
}

#[tokio::test]
async fn daemon_that_ends_at_once_is_quoted() {
    let script = "echo starting >&2; echo 'device-blk: error: no luck today' >&2; exit 3";
    let mut agent = Agent::start_with("device-blk", script).await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let status = failed(&mut agent, &vm).await;
    let parts = ["device-blk exited with status 3", "no luck today"];
    assert_error(&status, Code::FailedPrecondition, &parts);
}

#[tokio::test]
async fn daemon_that_never_answers_is_given_up_and_killed() {
    let script = "echo $$ > $(dirname $2)/../../../pid; echo thinking >&2; exec sleep 1000";
    let mut agent = Agent::start_with("device-blk", script).await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.disks = vec![disk("root", &agent.image("root.raw"))];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::DeadlineExceeded,
        &["device-blk did not answer", "thinking"],
    );
    let pid = fs::read_to_string(agent.path().join("pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(!is_alive(pid), "it was not killed");
}

#[tokio::test]
async fn foreign_daemon_that_never_answers_is_named() {
    let mut agent = Agent::start().await;
    let socket = agent.path().join("mute.sock");
    let _mute = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.vhost_user = vec![api::node::VhostUserSpec {
        name: "share".into(),
        r#type: "fs".into(),
        socket: socket.display().to_string(),
        ..Default::default()
    }];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::FailedPrecondition,
        &["vmm-core", "share", "mute.sock"],
    );
}

#[tokio::test]
async fn memory_that_is_not_there_is_refused_with_numbers() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.memory_bytes = 8 << 40;
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::ResourceExhausted,
        &["8388608 MiB", "are available"],
    );
}

#[tokio::test]
async fn foreign_socket_that_is_not_there_is_named() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.vhost_user = vec![api::node::VhostUserSpec {
        name: "share".into(),
        r#type: "fs".into(),
        socket: agent.path().join("no-such.sock").display().to_string(),
        ..Default::default()
    }];
    let status = failed(&mut agent, &vm).await;
    assert_error(
        &status,
        Code::FailedPrecondition,
        &["share", "no-such.sock"],
    );
}

#[tokio::test]
async fn unacceptable_fields_are_refused_at_once() {
    let mut agent = Agent::start().await;
    let mut vm = spec("web", &guest::sleeper(agent.path()));
    vm.vcpus = 99;
    let refused = agent.apply(&vm).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("spec.vcpus"), "{refused}");
    agent.assert_nothing_left("web");
}

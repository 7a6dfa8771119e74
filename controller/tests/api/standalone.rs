//! Standalone mode with a real node agent: no configuration, and both may die.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};

use api::controller as pb;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_stream::StreamExt as _;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::harness::{Controller, PATIENCE, built, poll, poll_async};

/// Directories of a standalone controller. The agent ends with it.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        built("node-agent");
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn args(&self) -> [String; 5] {
        let path = |name: &str| self.dir.path().join(name).to_str().unwrap().to_owned();
        [
            "--standalone".into(),
            "--state-dir".into(),
            path("s"),
            "--run-dir".into(),
            path("r"),
        ]
    }

    async fn start(&self) -> Controller {
        let args = self.args();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Controller::start(&args).await
    }

    fn agent_pid(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.dir.path().join("r/node-agent.pid")).ok()?;
        text.trim().parse().ok().map(Pid::from_raw)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some(pid) = self.agent_pid() {
            let _ = kill(pid, Signal::SIGTERM);
        }
    }
}

async fn connected_host(controller: &Controller) -> pb::Host {
    let hosts = || async {
        let answer = controller
            .hosts()
            .list_hosts(pb::ListHostsRequest::default())
            .await;
        answer
            .unwrap()
            .into_inner()
            .hosts
            .into_iter()
            .find(|host| host.connected)
    };
    poll_async("a host", hosts, Option::is_some).await.unwrap()
}

fn is_alive(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_outlives_the_controller_and_is_adopted() {
    let home = Home::new();
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut first = home.start().await;
        let host = connected_host(&first).await;
        let agent = home.agent_pid().unwrap();
        first.signal(signal);
        let status = first.wait();
        assert_eq!(status.success(), signal == Signal::SIGTERM, "{status}");
        assert!(
            is_alive(agent),
            "{signal} to the controller must not reach the agent"
        );
        let second = home.start().await;
        assert_eq!(connected_host(&second).await.name, host.name);
        assert_eq!(home.agent_pid(), Some(agent), "adopted, not started again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_dies_is_started_again() {
    let home = Home::new();
    let controller = home.start().await;
    let host = connected_host(&controller).await;
    let first = home.agent_pid().unwrap();
    kill(first, Signal::SIGKILL).unwrap();
    poll("another agent", || {
        home.agent_pid().filter(|pid| *pid != first)
    });
    // What was seen of the first agent counts as connected until its end is noticed.
    let came_back = || async { connected_host(&controller).await };
    poll_async("the host", came_back, |seen| seen.name == host.name).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_serves_its_metrics_where_the_controller_was_told() {
    let home = Home::new();
    let socket = home.dir.path().join("metrics.sock");
    let listen = format!("unix:{}", text(&socket));
    let args = home.args();
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    args.extend(["--agent-metrics-listen", &listen]);
    let _controller = Controller::start(&args).await;
    let answer = poll("the agent's metrics", || {
        let mut stream = UnixStream::connect(&socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n";
        stream.write_all(request).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    });
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("mortise_"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_and_health_answer() {
    let home = Home::new();
    let controller = home.start().await;
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(controller.channel.clone())
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<String> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for service in ["Vms", "Volumes", "Hosts", "Operations", "Events"] {
        let name = format!("mortise.controller.v1.{service}");
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    let health = tonic_health::pb::HealthCheckRequest {
        service: "mortise.controller.v1.Vms".into(),
    };
    let answer = tonic_health::pb::health_client::HealthClient::new(controller.channel.clone())
        .check(health)
        .await
        .unwrap();
    assert_eq!(answer.into_inner().status, 1);
}

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_controller"))
        .args(args)
        .env("MORTISE_LOG", "warn")
        .output()
        .unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn second_controller_and_port_in_use_are_one_clear_error_each() {
    let home = Home::new();
    let controller = home.start().await;
    let args = home.args();
    let mut same: Vec<&str> = args.iter().map(String::as_str).collect();
    same.extend(["--listen", "127.0.0.1:0"]);
    let output = run(&same);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("another controller uses"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");

    let other = tempfile::tempdir().unwrap();
    let (state, run_dir) = (other.path().join("s"), other.path().join("r"));
    let output = run(&[
        "--standalone",
        "--state-dir",
        text(&state),
        "--run-dir",
        text(&run_dir),
        "--listen",
        &controller.address,
    ]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.contains(&controller.address) && error.contains("another port"),
        "{error}"
    );
    assert!(
        !run_dir.join("node-agent.pid").exists(),
        "no agent was started for nothing"
    );
}

#[test]
fn missing_agent_program_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("s");
    let output = run(&[
        "--standalone",
        "--state-dir",
        text(&state),
        "--run-dir",
        text(dir.path()),
        "--bin-dir",
        text(dir.path()),
        "--listen",
        "127.0.0.1:0",
    ]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.contains("node-agent") && error.contains("--bin-dir"),
        "{error}"
    );
}

#[test]
fn nonsense_on_the_command_line_is_a_usage_error() {
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_eq!(
        run(&["--standalone", "--listen", "nowhere"]).status.code(),
        Some(2)
    );
}

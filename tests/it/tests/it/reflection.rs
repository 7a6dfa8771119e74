//! A generic reflection client, as grpcurl is one, lists and describes the services of each process.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tonic::transport::Channel;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::process::Process;
use crate::site;

#[tokio::test]
async fn daemons_list_their_services_and_say_they_are_healthy() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["device-blk", "device-net"] {
        let socket = dir.path().join(format!("{name}.sock"));
        let mut daemon = Process::spawn(
            dir.path(),
            name,
            Command::new(site::program(name))
                .arg("--control-socket")
                .arg(&socket),
        );
        daemon.wait_for_socket(&socket);
        expect_service(&socket, "mortise.device.v1.DeviceDaemon", "AttachRequest").await;
        daemon.terminate(Duration::from_secs(10));
    }
}

#[tokio::test]
async fn node_agent_lists_its_services() {
    let dir = tempfile::tempdir().expect("a folder");
    let socket = dir.path().join("agent.sock");
    let mut agent = Process::spawn(
        dir.path(),
        "node-agent",
        Command::new(site::program("node-agent"))
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--run-dir")
            .arg(dir.path().join("run")),
    );
    agent.wait_for_socket(&socket);
    expect_service(&socket, "mortise.node.v1.NodeAgent", "VmSpec").await;
    agent.terminate(Duration::from_secs(10));
}

/// `service` is listed, its file describes `message`, and the server is serving.
pub(crate) async fn expect_service(socket: &Path, service: &str, message: &str) {
    let channel = api::connect::unix(socket, Duration::from_secs(10))
        .await
        .expect("the socket answers");
    let listed = list_services(channel.clone()).await;
    assert!(
        listed.contains(service),
        "{service} is not among {listed:?}"
    );
    assert!(listed.contains("grpc.health.v1.Health"), "{listed:?}");
    assert!(
        describe(channel.clone(), service).await.contains(message),
        "{service} is described"
    );
    let health = HealthClient::new(channel)
        .check(HealthCheckRequest {
            service: service.to_owned(),
        })
        .await
        .expect("health answers");
    assert_eq!(health.into_inner().status(), ServingStatus::Serving);
}

async fn ask(channel: Channel, request: MessageRequest) -> MessageResponse {
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(request),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .expect("reflection answers")
        .into_inner();
    let answer = answers
        .message()
        .await
        .expect("an answer")
        .expect("one answer");
    answer.message_response.expect("a response")
}

async fn list_services(channel: Channel) -> BTreeSet<String> {
    match ask(channel, MessageRequest::ListServices(String::new())).await {
        MessageResponse::ListServicesResponse(list) => list
            .service
            .into_iter()
            .map(|service| service.name)
            .collect(),
        other => panic!("asked for services, got {other:?}"),
    }
}

/// The names in the descriptor of the file that defines `symbol`, as raw text.
async fn describe(channel: Channel, symbol: &str) -> String {
    match ask(
        channel,
        MessageRequest::FileContainingSymbol(symbol.to_owned()),
    )
    .await
    {
        MessageResponse::FileDescriptorResponse(files) => files
            .file_descriptor_proto
            .iter()
            .map(|file| String::from_utf8_lossy(file).into_owned())
            .collect(),
        other => panic!("asked for a file, got {other:?}"),
    }
}

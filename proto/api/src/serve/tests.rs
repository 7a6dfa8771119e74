use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use super::*;
use crate::connect;
use crate::device::device_daemon_server::{DeviceDaemon, DeviceDaemonServer};
use crate::device::*;

const PATIENCE: Duration = Duration::from_secs(10);

struct Daemon;

#[tonic::async_trait]
impl DeviceDaemon for Daemon {
    async fn get_daemon(
        &self,
        _: Request<GetDaemonRequest>,
    ) -> Result<Response<DaemonInfo>, Status> {
        Ok(Response::new(DaemonInfo {
            name: "test".into(),
            ..Default::default()
        }))
    }
    async fn attach(&self, _: Request<AttachRequest>) -> Result<Response<Device>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn detach(&self, _: Request<DetachRequest>) -> Result<Response<DetachResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn list_devices(
        &self,
        _: Request<ListDevicesRequest>,
    ) -> Result<Response<ListDevicesResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn get_device(&self, _: Request<GetDeviceRequest>) -> Result<Response<Device>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn get_metrics(
        &self,
        _: Request<GetMetricsRequest>,
    ) -> Result<Response<MetricsResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn services() -> Services {
    Services::new().with(DeviceDaemonServer::new(Daemon))
}

#[tokio::test]
async fn health_and_reflection_answer_on_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (stop, stopped) = oneshot::channel::<()>();
    let server_path = path.clone();
    let server =
        tokio::spawn(
            async move { unix(&server_path, services(), async { drop(stopped.await) }).await },
        );
    let channel = connect::unix(&path, PATIENCE).await.unwrap();

    for service in ["", "mortise.device.v1.DeviceDaemon"] {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let status = HealthClient::new(channel.clone())
            .check(request)
            .await
            .unwrap();
        assert_eq!(status.into_inner().status, 1, "{service:?} serves");
    }
    let names = reflected(channel.clone()).await;
    assert!(
        names.contains(&"mortise.device.v1.DeviceDaemon".to_owned()),
        "{names:?}"
    );
    assert!(
        names.contains(&"grpc.health.v1.Health".to_owned()),
        "{names:?}"
    );
    assert!(
        !names.contains(&"mortise.vmm.v1.Vmm".to_owned()),
        "only what is served is listed: {names:?}"
    );

    stop.send(()).unwrap();
    tokio::time::timeout(PATIENCE, server)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(!path.exists(), "the socket file goes with the server");
}

#[tokio::test]
async fn open_stream_does_not_hold_up_shutdown() {
    let listener = listen::tcp("127.0.0.1:0").unwrap();
    let addr = listener.address().to_string();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(on(listener, services(), async { drop(stopped.await) }));
    let channel = connect::tcp(&addr, PATIENCE).await.unwrap();
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let mut watch = HealthClient::new(channel)
        .watch(request)
        .await
        .unwrap()
        .into_inner();
    assert!(watch.next().await.is_some());

    let begun = Instant::now();
    stop.send(()).unwrap();
    tokio::time::timeout(PATIENCE, server)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(begun.elapsed() < DRAIN_TIMEOUT + Duration::from_secs(3));
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_until_others_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = listen::unix(&path).unwrap();
    let server = tokio::spawn(on(listener, services(), std::future::pending()));
    let mut silent = Vec::new();
    while silent.len() < admission::MAX_CONNECTIONS {
        match tokio::net::UnixStream::connect(&path).await {
            Ok(stream) => silent.push(stream),
            Err(_backlog_full) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
    let check = async |timeout| {
        let channel = connect::unix(&path, PATIENCE).await.unwrap();
        let request = HealthCheckRequest {
            service: String::new(),
        };
        let mut client = HealthClient::new(channel);
        tokio::time::timeout(timeout, client.check(request))
            .await
            .is_ok_and(|answer| answer.is_ok())
    };
    assert!(!check(Duration::from_millis(300)).await, "no room is left");
    silent.truncate(admission::MAX_CONNECTIONS / 2);
    assert!(check(PATIENCE).await, "there is room again");
    server.abort();
}

#[tokio::test]
async fn connect_waits_for_a_socket_that_comes_late() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late");
    let client = tokio::spawn({
        let path = path.clone();
        async move { connect::unix(&path, PATIENCE).await }
    });
    tokio::task::yield_now().await;
    let server = tokio::spawn(async move { unix(&path, services(), std::future::pending()).await });
    client.await.unwrap().unwrap();
    server.abort();
}

#[tokio::test]
async fn connect_names_the_address_that_does_not_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nobody");
    let error = connect::unix(&path, Duration::from_millis(100))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
}

async fn reflected(channel: tonic::transport::Channel) -> Vec<String> {
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    match answers
        .next()
        .await
        .unwrap()
        .unwrap()
        .message_response
        .unwrap()
    {
        MessageResponse::ListServicesResponse(list) => list
            .service
            .into_iter()
            .map(|service| service.name)
            .collect(),
        other => panic!("{other:?}"),
    }
}

//! Events: list then watch misses nothing, and a watch resumes after the controller restarted.

use api::controller as pb;
use api::controller::watch_events_response::Message;
use tokio_stream::StreamExt as _;
use tonic::Streaming;

use crate::harness::{PATIENCE, Site, vm_name};

async fn next(stream: &mut Streaming<pb::WatchEventsResponse>) -> pb::Event {
    loop {
        let message = tokio::time::timeout(PATIENCE, stream.next())
            .await
            .expect("in time");
        if let Some(Message::Event(event)) = message.unwrap().unwrap().message {
            return event;
        }
    }
}

async fn until(stream: &mut Streaming<pb::WatchEventsResponse>, reason: &str) -> pb::Event {
    loop {
        let event = next(stream).await;
        if event.reason == reason {
            return event;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_shows_what_was_and_what_comes() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("web").await;
    let request = pb::WatchEventsRequest::default();
    let mut watch = c.events().watch_events(request).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await.reason, "HOST_REGISTERED");
    assert_eq!(until(&mut watch, "VM_CREATED").await.target, vm_name("web"));
    let started = c.start_vm("web").await;
    c.succeeded(started).await;
    let running = until(&mut watch, "VM_RUNNING").await;
    assert_eq!(running.target, vm_name("web"));
    assert!(running.revision > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_resumes_after_a_crash_without_loss_or_repetition() {
    let mut site = Site::new().await;
    site.controller.create_vm("a").await;
    let list = site
        .controller
        .events()
        .list_events(pb::ListEventsRequest::default())
        .await;
    let list = list.unwrap().into_inner();
    assert!(list.events.iter().any(|event| event.reason == "VM_CREATED"));
    site.controller.create_vm("b").await;
    site.kill_and_restart_controller().await;
    site.controller.create_vm("c").await;
    let request = pb::WatchEventsRequest {
        after_revision: list.revision,
        ..Default::default()
    };
    let mut watch = site
        .controller
        .events()
        .watch_events(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(until(&mut watch, "VM_CREATED").await.target, vm_name("b"));
    assert_eq!(until(&mut watch, "VM_CREATED").await.target, vm_name("c"));
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_of_one_vm_shows_only_its_events() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("a").await;
    c.create_vm("b").await;
    let request = pb::WatchEventsRequest {
        target: vm_name("b"),
        ..Default::default()
    };
    let mut watch = c.events().watch_events(request).await.unwrap().into_inner();
    let event = next(&mut watch).await;
    assert_eq!(
        (event.target, event.reason.as_str()),
        (vm_name("b"), "VM_CREATED")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn first_bookmark_says_that_everything_kept_was_sent() {
    let site = Site::new().await;
    let c = &site.controller;
    c.create_vm("a").await;
    c.create_vm("b").await;
    let request = pb::WatchEventsRequest {
        target: vm_name("b"),
        ..Default::default()
    };
    let mut watch = c.events().watch_events(request).await.unwrap().into_inner();
    let mut reasons = Vec::new();
    while let Some(Message::Event(event)) = watch.next().await.unwrap().unwrap().message {
        reasons.push(event.reason);
    }
    assert!(reasons.contains(&"VM_CREATED".to_owned()), "{reasons:?}");
}

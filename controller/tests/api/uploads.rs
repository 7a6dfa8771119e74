//! Uploads, and what volumes are made of besides.

use api::controller as pb;
use tokio_stream::StreamExt as _;
use tonic::Code;

use crate::harness::Site;

fn volume(id: &str, spec: pb::VolumeSpec) -> pb::CreateVolumeRequest {
    pb::CreateVolumeRequest {
        parent: "projects/default".into(),
        volume_id: id.into(),
        volume: Some(pb::Volume {
            spec: Some(spec),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_passes_through_and_goes_on_where_it_ended() {
    let mut site = Site::new().await;
    let create = pb::CreateUploadRequest {
        parent: "projects/default".into(),
        upload_id: "import-1".into(),
        files: vec![pb::UploadFile {
            name: "a.vmdk".into(),
            size_bytes: 6,
            received_bytes: 0,
        }],
        ..Default::default()
    };
    let name = "projects/default/uploads/import-1";
    let chunk = |offset, data: &[u8]| pb::WriteUploadRequest {
        name: name.into(),
        file: 0,
        offset,
        data: data.into(),
    };
    let c = &site.controller;
    c.uploads().create_upload(create.clone()).await.unwrap();
    let chunks = tokio_stream::iter([chunk(0, b"ab"), chunk(2, b"cd")]);
    let answers = c.uploads().write_upload(chunks).await.unwrap().into_inner();
    let received: Vec<u64> = answers
        .map(|answer| answer.unwrap().received_bytes)
        .collect()
        .await;
    assert_eq!(received, [2, 4]);

    site.kill_and_restart_controller().await;
    let c = &site.controller;
    let known = c
        .uploads()
        .create_upload(create)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(known.files[0].received_bytes, 4);
    let wrong = tokio_stream::iter([chunk(0, b"ab")]);
    let mut answers = c.uploads().write_upload(wrong).await.unwrap().into_inner();
    let error = answers.next().await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange);
}

#[tokio::test(flavor = "multi_thread")]
async fn file_names_with_paths_are_refused() {
    let site = Site::new().await;
    for bad in ["../a", "/etc/passwd", ".hidden", "-p", "a,b", ""] {
        let create = pb::CreateUploadRequest {
            parent: "projects/default".into(),
            upload_id: "import-1".into(),
            files: vec![pb::UploadFile {
                name: bad.into(),
                size_bytes: 6,
                received_bytes: 0,
            }],
            ..Default::default()
        };
        let error = site
            .controller
            .uploads()
            .create_upload(create)
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn key_goes_to_the_host_and_is_not_kept() {
    const KEY: &[u8] = b"a passphrase that is nowhere else";
    let mut site = Site::new().await;
    let c = &site.controller;
    let spec = pb::VolumeSpec {
        size_bytes: 1 << 20,
        encrypted: true,
        ..Default::default()
    };
    let mut request = volume("secret", spec);
    request.key = KEY.into();
    request.request_id = "once".into();
    let operation = c.volumes().create_volume(request).await.unwrap();
    c.succeeded(operation.into_inner()).await;
    assert_eq!(site.host.key("secret").as_deref(), Some(KEY));
    let name = "projects/default/volumes/secret".to_owned();
    let set = pb::SetVolumeKeyRequest {
        name,
        key: [KEY, b"2"].concat(),
    };
    c.volumes().set_volume_key(set).await.unwrap();
    site.kill_and_restart_controller().await;
    let stored = std::fs::read(site.store_file()).unwrap();
    assert!(!stored.windows(KEY.len()).any(|window| window == KEY));
}

#[tokio::test(flavor = "multi_thread")]
async fn base_of_a_clone_is_there_first_and_goes_last() {
    let site = Site::new().await;
    let c = &site.controller;
    let base = "projects/default/volumes/base".to_owned();
    let clone = volume(
        "clone",
        pb::VolumeSpec {
            base: base.clone(),
            ..Default::default()
        },
    );
    let error = c.volumes().create_volume(clone.clone()).await.unwrap_err();
    assert!(
        error.message().contains("vmctl volume create base"),
        "{error}"
    );
    let spec = pb::VolumeSpec {
        size_bytes: 1 << 20,
        ..Default::default()
    };
    for request in [volume("base", spec), clone] {
        let operation = c.volumes().create_volume(request).await.unwrap();
        c.succeeded(operation.into_inner()).await;
    }
    let delete = pb::DeleteVolumeRequest {
        name: base,
        ..Default::default()
    };
    let error = c.volumes().delete_volume(delete).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("volume clone"), "{error}");
}

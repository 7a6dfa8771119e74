//! Volumes are made whole or not at all, and kept while used.

use tonic::Code;

use super::*;

fn pool() -> (tempfile::TempDir, Pool) {
    let dir = tempfile::tempdir().unwrap();
    let pool = open(dir.path());
    (dir, pool)
}

/// As an agent does that starts there.
fn open(dir: &Path) -> Pool {
    let imports = crate::import::Imports::open(dir, None).unwrap();
    Pool::open(dir, &dir.join("run"), Claims::default(), imports).unwrap()
}

/// The file that a volume writes to.
fn top(pool: &Pool, id: &str) -> PathBuf {
    pool.chain(id, false).unwrap().layers[0].path.clone()
}

fn clone_of(base: &str, id: &str, snapshot: Option<&str>) -> Request {
    Request {
        format: Format::Qcow2,
        content: Content::Clone(Base {
            volume: base.into(),
            snapshot: snapshot.map(str::to_owned),
        }),
        ..request(id, 0)
    }
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir.join("volumes"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn allocated_bytes(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
}

fn request(id: &str, size_bytes: u64) -> Request {
    Request {
        id: id.into(),
        size_bytes,
        ..Request::default()
    }
}

#[tokio::test]
async fn volume_is_created_once_and_sparse() {
    let (_dir, pool) = pool();
    let made = pool.create(request("data", 64 << 20)).await.unwrap();
    assert_eq!(pool.create(request("data", 64 << 20)).await.unwrap(), made);
    assert_eq!(pool.list().unwrap(), [made]);
    assert_eq!(pool.get("data").unwrap().layers[0].created_at_ms, 0);
    assert!(allocated_bytes(&top(&pool, "data")) < 1 << 20);
    let error = pool.create(request("data", 1 << 20)).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    pool.delete("data").unwrap();
    pool.delete("data").unwrap();
    assert_eq!(pool.list().unwrap(), []);
}

#[tokio::test]
async fn source_is_copied_with_its_holes() {
    let (dir, pool) = pool();
    let source = dir.path().join("source.raw");
    let file = File::create(&source).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"end", (32 << 20) - 3).unwrap();
    let mut wanted = request("copy", 0);
    wanted.content = Content::Copy(source);
    let made = pool.create(wanted).await.unwrap();
    assert_eq!(made.size_bytes, 32 << 20);
    let bytes = fs::read(top(&pool, "copy")).unwrap();
    assert!(bytes.ends_with(b"\0end") && bytes[..100] == [0; 100]);
    assert!(allocated_bytes(&top(&pool, "copy")) < 1 << 20);
}

#[tokio::test]
async fn bad_requests_leave_nothing() {
    let (dir, pool) = pool();
    let source = dir.path().join("source.raw");
    File::create(&source).unwrap().set_len(4096).unwrap();
    let mut small = request("a", 512);
    small.content = Content::Copy(source);
    assert!(matches!(
        pool.create(small).await,
        Err(VolumeError::TooSmall { .. })
    ));
    assert!(matches!(
        pool.create(request("b", 1000)).await,
        Err(VolumeError::Size { .. })
    ));
    let mut missing = request("c", 0);
    missing.content = Content::Copy(dir.path().join("none"));
    assert_eq!(
        pool.create(missing).await.unwrap_err().code(),
        Code::NotFound
    );
    let mut huge = request("d", 15 << 40);
    huge.preallocation = Preallocation::Falloc;
    let error = pool.create(huge).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert_eq!(fs::read_dir(dir.path().join("volumes")).unwrap().count(), 0);
}

#[tokio::test]
async fn volume_in_use_is_not_deleted() {
    let (_dir, pool) = pool();
    pool.create(request("data", 1 << 20)).await.unwrap();
    let path = top(&pool, "data");
    let file = image::open(&path, false, Format::Raw).unwrap();
    let claim = pool.claims.claim(&path, &file, "VM web", false).unwrap();
    let error = pool.delete("data").unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    drop(claim);
    pool.delete("data").unwrap();
}

#[tokio::test]
async fn qcow2_volume_is_made_with_its_options_and_found_by_the_next_agent() {
    let (dir, pool) = pool();
    let wanted = Request {
        format: Format::Qcow2,
        cluster_bytes: 4096,
        ..request("data", 64 << 20)
    };
    let made = pool.create(wanted).await.unwrap();
    assert_eq!(
        (made.size_bytes, made.format, made.cluster_bytes),
        (64 << 20, Format::Qcow2, 4096)
    );
    assert!(made.layers[0].allocated_bytes < 1 << 20);
    assert_eq!(open(dir.path()).list().unwrap(), [made]);
    pool.delete("data").unwrap();
    assert_eq!(files(dir.path()), Vec::<String>::new());
}

#[tokio::test]
async fn base_of_a_linked_clone_is_kept_and_read_only() {
    let (dir, pool) = pool();
    pool.create(request("base", 4 << 20)).await.unwrap();
    let clone = pool.create(clone_of("base", "clone", None)).await.unwrap();
    assert_eq!(clone.base.as_deref(), Some("base"));
    assert_eq!(clone.size_bytes, 4 << 20);
    let formats: Vec<Format> = clone.layers.iter().map(|layer| layer.format).collect();
    assert_eq!(formats, [Format::Qcow2, Format::Raw]);
    assert_eq!(pool.get("base").unwrap().clones, ["clone"]);
    assert!(matches!(
        pool.refuse_frozen("base"),
        Err(VolumeError::Frozen { .. })
    ));
    let error = pool.delete("base").unwrap_err();
    assert!(error.to_string().contains("clone"), "{error}");
    pool.delete("clone").unwrap();
    pool.refuse_frozen("base").unwrap();
    pool.delete("base").unwrap();
    assert_eq!(files(dir.path()), Vec::<String>::new());
}

#[tokio::test]
async fn chains_of_clones_are_bounded() {
    let (_dir, pool) = pool();
    pool.create(request("v0", 1 << 20)).await.unwrap();
    for index in 1..MAX_LAYERS {
        let made = pool.create(clone_of(
            &format!("v{}", index - 1),
            &format!("v{index}"),
            None,
        ));
        assert_eq!(made.await.unwrap().layers.len(), index + 1);
    }
    let last = format!("v{}", MAX_LAYERS - 1);
    let error = pool
        .create(clone_of(&last, "more", None))
        .await
        .unwrap_err();
    assert!(matches!(error, VolumeError::Layers { .. }), "{error}");
    assert!(pool.get("more").is_err());
}

#[tokio::test]
async fn clone_of_a_missing_snapshot_leaves_nothing() {
    let (dir, pool) = pool();
    pool.create(request("base", 1 << 20)).await.unwrap();
    let made = pool.create(clone_of("base", "clone", Some("monday")));
    let error = made.await.unwrap_err();
    assert!(error.to_string().contains("monday"), "{error}");
    assert_eq!(files(dir.path()), ["base.raw"]);
}

#[tokio::test]
async fn encrypted_volume_needs_its_key_and_has_the_size_asked_for() {
    let (dir, pool) = pool();
    let wanted = Request {
        encrypted: true,
        ..request("secret", 8 << 20)
    };
    let error = pool.create(wanted.clone()).await.unwrap_err();
    assert!(
        error.to_string().contains("vmctl volume key set"),
        "{error}"
    );
    pool.keys().set("secret", b"correct horse").unwrap();
    let made = pool.create(wanted).await.unwrap();
    assert_eq!((made.size_bytes, made.encrypted), (8 << 20, true));
    let key = dir.path().join("run/keys/secret.key");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&key).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(
        pool.create(clone_of("secret", "clone", None)).await,
        Err(VolumeError::Encrypted { .. })
    ));
    pool.delete("secret").unwrap();
    assert!(!key.exists(), "a key without its volume is of no use");
}

#[tokio::test]
async fn layers_that_no_record_names_go_and_begun_deletions_end() {
    let (dir, pool) = pool();
    let qcow2 = Request {
        format: Format::Qcow2,
        ..request("data", 1 << 20)
    };
    pool.create(qcow2).await.unwrap();
    pool.create(request("plain", 1 << 20)).await.unwrap();
    for name in ["data.7.qcow2", "half.tmp"] {
        fs::write(dir.path().join("volumes").join(name), b"x").unwrap();
    }
    drop(open(dir.path()));
    assert_eq!(
        files(dir.path()),
        ["data.0.qcow2", "data.json", "plain.raw"]
    );
    let mut record = pool.record("data").unwrap();
    record.deleting = true;
    pool.save(&record).unwrap();
    drop(open(dir.path()));
    assert_eq!(files(dir.path()), ["plain.raw"]);
}

/// A snapshot whose new layer is noted: what decides is whether the guest wrote to it.
#[tokio::test]
async fn interrupted_snapshot_counts_if_its_layer_holds_data() {
    for written in [false, true] {
        let (_dir, pool) = pool();
        pool.create(request("data", 1 << 20)).await.unwrap();
        let mut record = pool.record("data").unwrap();
        let layer = record.new_layer(Format::Qcow2);
        let path = pool.file(&layer);
        record.pending = Some(Pending::Snapshot {
            layer,
            snapshot: "monday".into(),
        });
        pool.save(&record).unwrap();
        // Before the daemon made anything of the file, too.
        let file = create_file("data", &path).unwrap();
        if written {
            let backing = qcow2::BackingRef {
                name: "data.raw".into(),
                format: Some("raw".into()),
            };
            make_overlay("data", &file, &path, 1 << 20, backing).unwrap();
            let open = |file: File, format| qcow2::Layer {
                file: Arc::new(file),
                format,
                mem_align_bytes: None,
            };
            let base = File::open(top(&pool, "data")).unwrap();
            let layers = vec![
                open(file, qcow2::Format::Qcow2),
                open(base, qcow2::Format::Raw),
            ];
            let image = qcow2::Image::open(layers, false).unwrap();
            image.write(4096, &[7u8; 512].as_slice()).unwrap();
        }
        let chain = pool.chain("data", true).unwrap();
        assert_eq!(chain.layers.len(), 1 + usize::from(written));
        assert_eq!(chain.layers[0].path == path, written);
        let volume = pool.get("data").unwrap();
        let snapshots: Vec<_> = volume
            .layers
            .iter()
            .filter_map(|l| l.snapshot.clone())
            .collect();
        assert_eq!(snapshots, ["monday"][..usize::from(written)]);
        assert_eq!(path.exists(), written);
    }
}

/// A mirror's target counts once the daemon marked it, whatever the record's phase.
#[tokio::test]
async fn interrupted_mirror_goes_where_the_daemon_wrote() {
    for marked in [false, true] {
        let (_dir, pool) = pool();
        pool.create(request("data", 1 << 20)).await.unwrap();
        let before = top(&pool, "data");
        let mut record = pool.record("data").unwrap();
        let layer = record.new_layer(Format::Raw);
        let path = pool.file(&layer);
        let target = create_new("data", &path).unwrap();
        target.set_len(1 << 20).unwrap();
        record.pending = Some(Pending::Switch { layer });
        pool.save(&record).unwrap();
        if marked {
            let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
            // SAFETY: both names end with NUL and the value has the length given.
            let set = unsafe {
                libc::setxattr(
                    name.as_ptr(),
                    c"user.mortise.current".as_ptr(),
                    c"1".as_ptr().cast(),
                    1,
                    0,
                )
            };
            assert_eq!(set, 0, "{}", io::Error::last_os_error());
        }
        let chain = pool.chain("data", true).unwrap();
        let (kept, gone) = if marked {
            (&path, &before)
        } else {
            (&before, &path)
        };
        assert_eq!(chain.layers[0].path, *kept);
        assert!(kept.exists() && !gone.exists());
    }
}

//! Volumes are made whole or not at all, and kept while used.

use super::*;

fn pool() -> (tempfile::TempDir, Pool) {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::open(dir.path(), Claims::default()).unwrap();
    (dir, pool)
}

fn allocated_bytes(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
}

fn request(id: &str, size_bytes: u64) -> Request {
    Request {
        id: id.into(),
        size_bytes,
        source: None,
        preallocate: false,
    }
}

#[tokio::test]
async fn volume_is_created_once_and_sparse() {
    let (_dir, pool) = pool();
    let made = pool.create(request("data", 64 << 20)).await.unwrap();
    assert_eq!(pool.create(request("data", 64 << 20)).await.unwrap(), made);
    assert_eq!(pool.list().unwrap(), [made]);
    assert!(allocated_bytes(&pool.path("data")) < 1 << 20);
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
    wanted.source = Some(source);
    let made = pool.create(wanted).await.unwrap();
    assert_eq!(made.size_bytes, 32 << 20);
    let bytes = fs::read(pool.path("copy")).unwrap();
    assert!(bytes.ends_with(b"\0end") && bytes[..100] == [0; 100]);
    assert!(allocated_bytes(&pool.path("copy")) < 1 << 20);
}

#[tokio::test]
async fn bad_requests_leave_nothing() {
    let (dir, pool) = pool();
    let source = dir.path().join("source.raw");
    File::create(&source).unwrap().set_len(4096).unwrap();
    let mut small = request("a", 512);
    small.source = Some(source);
    assert!(matches!(
        pool.create(small).await,
        Err(VolumeError::TooSmall { .. })
    ));
    assert!(matches!(
        pool.create(request("b", 1000)).await,
        Err(VolumeError::Size { .. })
    ));
    let mut missing = request("c", 0);
    missing.source = Some(dir.path().join("none"));
    assert_eq!(
        pool.create(missing).await.unwrap_err().code(),
        Code::NotFound
    );
    let mut huge = request("d", 15 << 40);
    huge.preallocate = true;
    let error = pool.create(huge).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert_eq!(fs::read_dir(dir.path().join("volumes")).unwrap().count(), 0);
}

#[tokio::test]
async fn volume_in_use_is_not_deleted() {
    let (_dir, pool) = pool();
    pool.create(request("data", 1 << 20)).await.unwrap();
    let path = pool.path("data");
    let file = image::open(&path, false).unwrap();
    let claim = pool.claims.claim(&path, &file, "VM web", false).unwrap();
    let error = pool.delete("data").unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    drop(claim);
    pool.delete("data").unwrap();
}

//! The stand-in for protoc gives out what the protos of the etcd-client in use say.

use std::path::{Path, PathBuf};
use std::process::Command;

/// As etcd-client's build script names them, in its order.
const FILES: [&str; 5] = [
    "proto/etcd/api/authpb/auth.proto",
    "proto/etcd/api/etcdserverpb/rpc.proto",
    "proto/etcd/api/mvccpb/kv.proto",
    "proto/etcd/server/etcdserver/api/v3election/v3electionpb/v3election.proto",
    "proto/etcd/server/etcdserver/api/v3lock/v3lockpb/v3lock.proto",
];

#[test]
fn descriptors_are_those_of_the_etcd_client_in_use() {
    let source = etcd_client();
    let mut compiler = protox::Compiler::new([source.join("proto")]).unwrap();
    compiler.include_imports(true);
    for file in FILES {
        compiler.open_file(source.join(file)).unwrap();
    }
    let descriptors = compiler.encode_file_descriptor_set();
    let cat = Command::new("cat")
        .args(FILES)
        .current_dir(&source)
        .output();
    let mut cksum = Command::new("cksum");
    cksum.stdin(std::process::Stdio::piped());
    cksum.stdout(std::process::Stdio::piped());
    let mut cksum = cksum.spawn().unwrap();
    std::io::Write::write_all(&mut cksum.stdin.take().unwrap(), &cat.unwrap().stdout).unwrap();
    let sum = cksum.wait_with_output().unwrap().stdout;

    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("etcd");
    if std::env::var_os("RENEW_ETCD_DESCRIPTORS").is_some() {
        std::fs::write(kept.join("etcd.bin"), &descriptors).unwrap();
        std::fs::write(kept.join("etcd.cksum"), &sum).unwrap();
    }
    let renew = "RENEW_ETCD_DESCRIPTORS=1 cargo test -p store --test etcd_protoc";
    assert!(
        std::fs::read(kept.join("etcd.bin")).unwrap() == descriptors,
        "{renew}"
    );
    assert!(
        std::fs::read(kept.join("etcd.cksum")).unwrap() == sum,
        "{renew}"
    );
}

fn etcd_client() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let metadata = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let found = packages
        .iter()
        .find(|package| package["name"] == "etcd-client");
    let manifest = found.unwrap()["manifest_path"].as_str().unwrap();
    Path::new(manifest).parent().unwrap().to_owned()
}

//! The state that an older program left is taken over, and that of a newer one is left alone: the real
//! program on a store's file that was written table by table, as version 0.1.0 did it for one host.

use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use api::controller as pb;
use api::node;
use controller::store::embedded::EmbeddedStore;
use controller::store::{SharedStore, schema};
use nix::sys::signal::Signal;
use prost::Message;
use redb::{Database, TableDefinition};

use crate::harness::{Controller, poll, poll_async, vm_name};
use crate::simulated::Host;

/// Tables of the file: a value is the revision that wrote it, 8 bytes in little endian, then the bytes.
const DATA: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("data");
const LOG: TableDefinition<'_, (u64, u32), Change> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// A key, and its value unless it was removed.
type Change = (&'static str, Option<&'static [u8]>);

/// A VM as that version stored it: nothing says on which host it is.
#[derive(Clone, PartialEq, Message)]
struct OldVmRecord {
    #[prost(message, required, tag = "1")]
    vm: pb::Vm,
    #[prost(string, tag = "2")]
    node_id: String,
    #[prost(uint64, tag = "3")]
    rejected_generation: u64,
}

/// A volume.
#[derive(Clone, PartialEq, Message)]
struct OldVolumeRecord {
    #[prost(message, required, tag = "1")]
    volume: pb::Volume,
    #[prost(string, tag = "2")]
    node_id: String,
}

/// What the store says of itself, as every version to come will write it.
#[derive(Clone, PartialEq, Message)]
struct SchemaRecord {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(uint32, tag = "2")]
    oldest_reader: u32,
    #[prost(string, tag = "3")]
    program: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn state_of_the_version_for_one_host_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::serve(&dir.path().join("agent.sock"));
    host.runs_already(node::VmSpec {
        id: "web".into(),
        generation: 4,
        power: node::Power::On as i32,
        ..Default::default()
    });
    host.has_already(node::VolumeStatus {
        id: "data".into(),
        size_bytes: 1 << 20,
        path: "/pool/data".into(),
        ..Default::default()
    });
    write_file(dir.path(), &one_host());

    let mut controller = start(dir.path()).await;
    let placed = |vm: &pb::Vm| {
        let status = vm.status.as_ref();
        status.is_some_and(|status| status.host == "hosts/simulated")
    };
    for id in ["db", "web"] {
        poll_async("a host of the VM", || controller.vm(id), placed).await;
    }
    let vms = list(&controller).await;
    let names: Vec<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, [vm_name("db"), vm_name("web")]);
    let web = &vms[1];
    assert_eq!((web.uid.as_str(), web.generation), ("0123456789abcdef", 4));
    let spec = web.spec.clone().unwrap();
    assert_eq!((spec.vcpus, spec.memory_bytes), (2, 1 << 30));
    assert_eq!(web.status.clone().unwrap().phase(), pb::VmPhase::Running);
    assert_eq!(host.spec("web").generation, 4, "it runs on as it did");
    assert_eq!(host.phase("web"), Some(node::VmPhase::Running));

    // What was made for one host can be used as before.
    let started = controller.start_vm("db").await;
    controller.succeeded(started).await;
    assert_eq!(host.phase("db"), Some(node::VmPhase::Running));
    let volume = pb::GetVolumeRequest {
        name: "projects/default/volumes/data".into(),
    };
    let volume = controller.volumes().get_volume(volume).await.unwrap();
    let status = volume.into_inner().status.unwrap();
    assert_eq!(status.phase(), pb::VolumePhase::Ready);
    assert_eq!(status.host, "hosts/simulated");
    let operation = pb::GetOperationRequest {
        name: "operations/000000000000001-00000000".into(),
    };
    let operation = controller.operations().get_operation(operation).await;
    assert!(operation.unwrap().into_inner().done);

    // It is this version's now, and stays what it is.
    stop(&mut controller);
    let record = kept(dir.path()).await;
    assert_eq!(record.version, schema::CURRENT);
    let mut controller = start(dir.path()).await;
    assert_eq!(list(&controller).await.len(), 2);
    stop(&mut controller);
    assert_eq!(kept(dir.path()).await, record);
}

#[test]
fn state_of_a_version_to_come_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let newer = SchemaRecord {
        version: schema::CURRENT + 7,
        oldest_reader: schema::CURRENT + 1,
        program: "7.1.0".into(),
    };
    let mut records = one_host();
    records.push((schema::KEY.into(), newer.encode_to_vec()));
    write_file(dir.path(), &records);
    let file = dir.path().join("state/controller.redb");
    let mut child = Command::new(env!("CARGO_BIN_EXE_controller"))
        .args(["--listen", "127.0.0.1:0", "--node", "unix:/nowhere"])
        .arg("--state-dir")
        .arg(dir.path().join("state"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = poll("the program's end", || child.try_wait().unwrap());
    assert!(!status.success());
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    let schema = format!("schema {}", newer.version);
    for word in [schema.as_str(), "version 7.1.0", "restore a backup"] {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    let database = Database::open(file).unwrap();
    let reading = redb::ReadableDatabase::begin_read(&database).unwrap();
    let data = reading.open_table(DATA).unwrap();
    for (key, value) in records {
        let found = data.get(key.as_str()).unwrap().expect("it is kept");
        assert_eq!(found.value()[8..], value, "{key} is as it was");
    }
}

/// Two VMs, one of which runs, a volume, and an operation that is done.
fn one_host() -> Vec<(String, Vec<u8>)> {
    let vm = |id: &str, vm: pb::Vm| OldVmRecord {
        vm: pb::Vm {
            name: vm_name(id),
            uid: "0123456789abcdef".into(),
            ..vm
        },
        node_id: id.into(),
        rejected_generation: 0,
    };
    let spec = pb::VmSpec {
        vcpus: 2,
        memory_bytes: 1 << 30,
        kernel: "/boot/vmlinuz".into(),
        ..Default::default()
    };
    let web = vm(
        "web",
        pb::Vm {
            generation: 4,
            spec: Some(spec.clone()),
            desired_power: pb::DesiredPower::On as i32,
            status: Some(pb::VmStatus {
                phase: pb::VmPhase::Running as i32,
                host: "hosts/simulated".into(),
                observed_generation: 4,
                ..Default::default()
            }),
            ..Default::default()
        },
    );
    let data = "projects/default/volumes/data";
    let db = vm(
        "db",
        pb::Vm {
            generation: 1,
            spec: Some(pb::VmSpec {
                disks: vec![pb::Disk {
                    name: "root".into(),
                    source: Some(pb::disk::Source::Volume(data.into())),
                    ..Default::default()
                }],
                ..spec
            }),
            desired_power: pb::DesiredPower::Off as i32,
            ..Default::default()
        },
    );
    let volume = OldVolumeRecord {
        volume: pb::Volume {
            name: data.into(),
            uid: "fedcba9876543210".into(),
            generation: 1,
            spec: Some(pb::VolumeSpec {
                size_bytes: 1 << 20,
                ..Default::default()
            }),
            status: Some(pb::VolumeStatus {
                phase: pb::VolumePhase::Ready as i32,
                size_bytes: 1 << 20,
                ..Default::default()
            }),
            ..Default::default()
        },
        node_id: "data".into(),
    };
    let operation = pb::Operation {
        name: "operations/000000000000001-00000000".into(),
        done: true,
        metadata: Some(pb::OperationMetadata {
            kind: pb::OperationKind::CreateVm as i32,
            target: vm_name("web"),
            generation: 1,
            ..Default::default()
        }),
        ..Default::default()
    };
    vec![
        ("vms/default/web".into(), web.encode_to_vec()),
        ("vms/default/db".into(), db.encode_to_vec()),
        ("volumes/default/data".into(), volume.encode_to_vec()),
        ("node-ids/vms/web".into(), vm_name("web").into_bytes()),
        ("node-ids/vms/db".into(), vm_name("db").into_bytes()),
        ("node-ids/volumes/data".into(), data.into()),
        (operation.name.clone(), operation.encode_to_vec()),
    ]
}

/// The file as that version left it: no leases, nothing about its layout, no schema unless it is among
/// the records.
fn write_file(dir: &Path, records: &[(String, Vec<u8>)]) {
    std::fs::create_dir(dir.join("state")).unwrap();
    let database = Database::create(dir.join("state/controller.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut data = transaction.open_table(DATA).unwrap();
        let mut log = transaction.open_table(LOG).unwrap();
        let mut meta = transaction.open_table(META).unwrap();
        for (revision, (key, value)) in (1_u64..).zip(records) {
            let stored = [&revision.to_le_bytes(), value.as_slice()].concat();
            data.insert(key.as_str(), stored.as_slice()).unwrap();
            let change = (key.as_str(), Some(value.as_slice()));
            log.insert((revision, 0), change).unwrap();
            meta.insert("revision", revision).unwrap();
        }
    }
    transaction.commit().unwrap();
}

async fn start(dir: &Path) -> Controller {
    let node = format!("unix:{}", dir.join("agent.sock").display());
    let state_dir = dir.join("state");
    let args = ["--node", &node, "--state-dir", state_dir.to_str().unwrap()];
    let controller = Controller::start(&args).await;
    controller.connected(1).await;
    controller
}

fn stop(controller: &mut Controller) {
    controller.signal(Signal::SIGTERM);
    assert!(controller.wait().success());
}

async fn list(controller: &Controller) -> Vec<pb::Vm> {
    let request = pb::ListVmsRequest {
        parent: "projects/default".into(),
        ..Default::default()
    };
    let answer = controller.vms().list_vms(request).await.unwrap();
    answer.into_inner().vms
}

/// What the store says of itself.
async fn kept(dir: &Path) -> SchemaRecord {
    let store = EmbeddedStore::open(&dir.join("state/controller.redb")).unwrap();
    let store: SharedStore = Arc::new(store);
    let item = store.get(schema::KEY).await.unwrap();
    SchemaRecord::decode(item.expect("it says so").value.as_slice()).unwrap()
}

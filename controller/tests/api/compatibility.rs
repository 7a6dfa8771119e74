//! Neighbouring versions understand each other: what the version before wrote is read as it was meant,
//! and what the next one adds is passed over. The bytes are those of version 0.1.0, before fleets.

use api::{controller as pb, node};
use controller::model::{VmRecord, VolumeRecord};
use prost::Message;

const VM_RECORD: &str = "\
    0a5d0a1870726f6a656374732f64656661756c742f766d732f77656212103031323334353637383961626364\
    65662004321a08021080808080041a0d2f626f6f742f766d6c696e757a48882738014a0f08031209686f7374\
    732f682d31180412037765621803";
const VOLUME_RECORD: &str = "\
    0a4c0a1d70726f6a656374732f64656661756c742f766f6c756d65732f646174611210666564636261393837\
    363534333231302a04088080403a1108021209686f7374732f682d31188080404002120464617461";
const HOST_STATUS: &str = "\
    0a03682d3112057261636b311a05302e312e30200828808080804032036b766d40034a0831302e302e302e31";
const APPLY_VM: &str = "\
    0a200a03776562100418012002288080808004320d2f626f6f742f766d6c696e757a";

#[test]
fn records_of_the_version_before_are_read() {
    let record: VmRecord = read(VM_RECORD);
    assert_eq!(record.vm.name, "projects/default/vms/web");
    assert_eq!(
        (record.node_id.as_str(), record.rejected_generation),
        ("web", 3)
    );
    assert_eq!(record.vm.generation, 4);
    assert_eq!(record.vm.desired_power(), pb::DesiredPower::On);
    let spec = record.vm.spec.clone().unwrap();
    assert_eq!((spec.vcpus, spec.memory_bytes), (2, 1 << 30));
    assert_eq!(record.status().host, "hosts/h-1");
    assert_eq!(record.host, "", "which host it is on is found out");

    let record: VolumeRecord = read(VOLUME_RECORD);
    assert_eq!(record.node_id, "data");
    assert_eq!(record.volume.status.unwrap().size_bytes, 1 << 20);
    assert_eq!(record.host, "");
}

#[test]
fn agents_and_controllers_of_the_version_before_are_understood() {
    let status: node::HostStatus = read(HOST_STATUS);
    assert_eq!(
        (status.host_id.as_str(), status.version.as_str()),
        ("h-1", "0.1.0")
    );
    assert_eq!((status.cpus, status.memory_bytes), (8, 16 << 30));
    let request: node::ApplyVmRequest = read(APPLY_VM);
    let spec = request.spec.unwrap();
    assert_eq!((spec.id.as_str(), spec.generation), ("web", 4));
    assert_eq!(spec.power(), node::Power::On);
}

#[test]
fn what_the_next_version_adds_is_passed_over() {
    passes_over::<VmRecord>(VM_RECORD);
    passes_over::<VolumeRecord>(VOLUME_RECORD);
    passes_over::<node::HostStatus>(HOST_STATUS);
    passes_over::<node::ApplyVmRequest>(APPLY_VM);
}

fn passes_over<T: Message + Default + PartialEq + std::fmt::Debug>(hex: &str) {
    let mut newer = bytes(hex);
    // Field 15000, a number, and field 15001, bytes.
    newer.extend([0xc0, 0xa9, 0x07, 0x2a]);
    newer.extend([0xca, 0xa9, 0x07, 0x03, b'n', b'e', b'w']);
    assert_eq!(T::decode(newer.as_slice()).unwrap(), read::<T>(hex));
}

fn read<T: Message + Default>(hex: &str) -> T {
    T::decode(bytes(hex).as_slice()).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

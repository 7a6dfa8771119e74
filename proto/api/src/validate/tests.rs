use tonic::Code;
use tonic_types::StatusExt;

use super::*;

fn fields(result: Result<(), Status>) -> Vec<String> {
    let status = result.expect_err("should be refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    let bad = status.get_details_bad_request().expect("details");
    bad.field_violations
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}

fn create_vm() -> controller::CreateVmRequest {
    controller::CreateVmRequest {
        parent: "projects/default".into(),
        vm_id: "web".into(),
        vm: Some(controller::Vm {
            spec: Some(controller::VmSpec {
                vcpus: 2,
                memory_bytes: 512 << 20,
                kernel: "/boot/vmlinuz".into(),
                disks: vec![controller::Disk {
                    source: Some(controller::disk::Source::Path("/img".into())),
                    ..Default::default()
                }],
                nics: vec![controller::Nic {
                    host_cidr: "192.168.100.1/24".into(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn spec(request: &mut controller::CreateVmRequest) -> &mut controller::VmSpec {
    request.vm.as_mut().unwrap().spec.as_mut().unwrap()
}

fn attach_blk() -> device::AttachRequest {
    device::AttachRequest {
        id: "disk0".into(),
        listener: Some(device::attach_request::Listener::SocketPath(
            "/run/s".into(),
        )),
        device: Some(device::attach_request::Device::Blk(device::BlkConfig {
            image_fd: Some(device::FdRef {
                token: "t-1".into(),
            }),
            ..Default::default()
        })),
    }
}

fn apply_vm() -> node::ApplyVmRequest {
    node::ApplyVmRequest {
        spec: Some(node::VmSpec {
            id: "web".into(),
            generation: 1,
            power: node::Power::On as i32,
            vcpus: 1,
            memory_bytes: 64 << 20,
            kernel: "/boot/vmlinuz".into(),
            ..Default::default()
        }),
    }
}

#[test]
fn good_requests_pass() {
    create_vm_request(&create_vm()).unwrap();
    attach_request(&attach_blk()).unwrap();
    apply_vm_request(&apply_vm()).unwrap();
}

#[test]
fn every_bad_field_of_a_vm_is_named() {
    type Break = fn(&mut controller::VmSpec);
    let cases: &[(&str, Break)] = &[
        ("vm.spec.vcpus", |spec| spec.vcpus = 33),
        ("vm.spec.memory_bytes", |spec| spec.memory_bytes = 4097),
        ("vm.spec.memory_bytes", |spec| spec.memory_bytes = u64::MAX),
        ("vm.spec.kernel", |spec| spec.kernel.clear()),
        ("vm.spec.kernel", |spec| spec.kernel = "vmlinuz".into()),
        ("vm.spec.kernel", |spec| spec.kernel = "/a,b".into()),
        ("vm.spec.initramfs", |spec| spec.initramfs = "x".into()),
        ("vm.spec.cmdline", |spec| spec.cmdline = "a\nb".into()),
        ("vm.spec.cmdline", |spec| spec.cmdline = "x".repeat(2048)),
        ("vm.spec.disks[0]", |spec| spec.disks[0].source = None),
        ("vm.spec.disks[0].path", |spec| {
            spec.disks[0].source = Some(controller::disk::Source::Path("img".into()));
        }),
        ("vm.spec.disks[0].volume", |spec| {
            spec.disks[0].source = Some(controller::disk::Source::Volume("data".into()));
        }),
        ("vm.spec.disks[0].num_queues", |spec| {
            spec.disks[0].num_queues = 65
        }),
        ("vm.spec.disks[0].serial", |spec| {
            spec.disks[0].serial = "x".repeat(21)
        }),
        ("vm.spec.disks[0].name", |spec| {
            spec.disks[0].name = "Disk".into()
        }),
        ("vm.spec.nics[0].name", |spec| {
            spec.disks[0].name = "same".into();
            spec.nics[0].name = "same".into();
        }),
        ("vm.spec.nics[0].mac", |spec| {
            spec.nics[0].mac = "01:00:00:00:00:01".into()
        }),
        ("vm.spec.nics[0].mtu", |spec| spec.nics[0].mtu = 67),
        ("vm.spec.nics[0].queue_pairs", |spec| {
            spec.nics[0].queue_pairs = 17
        }),
        ("vm.spec.nics[0].host_cidr", |spec| {
            spec.nics[0].host_cidr = "10.0.0.1/33".into()
        }),
        ("vm.spec.nics[0].bridge", |spec| {
            spec.nics[0].bridge = "a".repeat(16)
        }),
        ("vm.spec.nics[0]", |spec| spec.nics[0].tap = "tap0".into()),
        ("vm.spec.vhost_user[0].type", |spec| {
            spec.vhost_user.push(controller::VhostUserDevice {
                r#type: "floppy".into(),
                socket: "/s".into(),
                ..Default::default()
            });
        }),
        ("vm.spec.vhost_user[0].queue_size", |spec| {
            spec.vhost_user.push(controller::VhostUserDevice {
                r#type: "fs".into(),
                socket: "/s".into(),
                queue_size: 100,
                ..Default::default()
            });
        }),
        ("vm.spec.vhost_user[0].config", |spec| {
            spec.vhost_user.push(controller::VhostUserDevice {
                r#type: "fs".into(),
                socket: "/s".into(),
                config: vec![0; 257],
                ..Default::default()
            });
        }),
        ("vm.spec", |spec| {
            spec.disks = vec![spec.disks[0].clone(); MAX_DEVICES + 1]
        }),
    ];
    for (field, break_it) in cases {
        let mut request = create_vm();
        break_it(spec(&mut request));
        assert_eq!(fields(create_vm_request(&request)), [*field]);
    }
}

#[test]
fn all_violations_are_reported_at_once() {
    let mut request = create_vm();
    request.vm_id = "Web".into();
    request.parent = "default".into();
    request.request_id = "a b".into();
    spec(&mut request).kernel.clear();
    assert_eq!(
        fields(create_vm_request(&request)),
        ["parent", "vm_id", "request_id", "vm.spec.kernel"]
    );
    request.vm = None;
    assert!(fields(create_vm_request(&request)).contains(&"vm.spec".to_owned()));
}

#[test]
fn attach_names_its_bad_fields() {
    let mut request = attach_blk();
    request.id = "../x".into();
    request.listener = None;
    request.device = Some(device::attach_request::Device::Blk(device::BlkConfig {
        image_fd: None,
        num_queues: 65,
        serial: "\u{7f}".into(),
        ..Default::default()
    }));
    assert_eq!(
        fields(attach_request(&request)),
        [
            "id",
            "listener",
            "blk.image_fd.token",
            "blk.serial",
            "blk.num_queues"
        ]
    );
    request = attach_blk();
    request.device = Some(device::attach_request::Device::Net(device::NetConfig {
        mac: "nonsense".into(),
        mtu: 1,
        ..Default::default()
    }));
    assert_eq!(
        fields(attach_request(&request)),
        ["net.tap_fds", "net.mac", "net.mtu"]
    );
    request.device = None;
    assert_eq!(fields(attach_request(&request)), ["device"]);
}

#[test]
fn hosts_get_complete_machines_only() {
    type Break = fn(&mut node::VmSpec);
    let cases: &[(&str, Break)] = &[
        ("spec.id", |spec| spec.id.clear()),
        ("spec.generation", |spec| spec.generation = 0),
        ("spec.power", |spec| spec.power = 0),
        ("spec.power", |spec| spec.power = 77),
        ("spec.vcpus", |spec| spec.vcpus = 0),
        ("spec.memory_bytes", |spec| spec.memory_bytes = 0),
        ("spec.disks[0].name", |spec| {
            spec.disks.push(node::DiskSpec {
                source: Some(node::disk_spec::Source::Path("/img".into())),
                ..Default::default()
            });
        }),
    ];
    for (field, break_it) in cases {
        let mut request = apply_vm();
        break_it(request.spec.as_mut().unwrap());
        assert_eq!(fields(apply_vm_request(&request)), [*field]);
    }
    assert_eq!(
        fields(apply_vm_request(&node::ApplyVmRequest::default())),
        ["spec"]
    );
}

#[test]
fn volume_needs_a_size_or_a_source() {
    let mut request = node::CreateVolumeRequest {
        id: "data".into(),
        ..Default::default()
    };
    assert_eq!(fields(node_create_volume_request(&request)), ["size_bytes"]);
    request.size_bytes = 513;
    assert_eq!(fields(node_create_volume_request(&request)), ["size_bytes"]);
    request.size_bytes = 0;
    request.source_path = "/img".into();
    node_create_volume_request(&request).unwrap();
}

#[test]
fn names_are_parsed_once_and_errors_name_the_field() {
    assert_eq!(
        vm_request("projects/p/vms/v", "").unwrap(),
        names::Name::vm("p", "v")
    );
    let status = vm_request("v", "ok").unwrap_err();
    assert_eq!(
        status.get_details_bad_request().unwrap().field_violations[0].field,
        "name"
    );
    assert!(flat_name("operations/../x", "operations").is_err());
    assert_eq!(page_size(0), 100);
    assert_eq!(page_size(5000), 1000);
}

#[test]
fn every_part_of_a_disk_is_checked() {
    let with = |change: fn(&mut device::BlkConfig)| {
        let mut request = attach_blk();
        let Some(device::attach_request::Device::Blk(blk)) = &mut request.device else {
            unreachable!("a disk");
        };
        change(blk);
        fields(attach_request(&request))
    };
    assert_eq!(with(|blk| blk.format = "vmdk".into()), ["blk.format"]);
    assert_eq!(with(|blk| blk.block_size = 1024), ["blk.block_size"]);
    assert_eq!(with(|blk| blk.polling = 9), ["blk.polling"]);
    assert_eq!(with(|blk| blk.cpus = vec![0, 9999]), ["blk.cpus[1]"]);
    assert_eq!(
        with(|blk| blk.backing = vec![device::BackingImage::default()]),
        ["blk.backing", "blk.backing[0].image_fd.token"]
    );
    assert_eq!(
        with(|blk| {
            blk.limits = Some(device::RateLimits {
                read: Some(device::RateLimit {
                    burst_ios: 5,
                    ..Default::default()
                }),
                write: None,
            });
        }),
        ["blk.limits.read.burst_ios"]
    );
    assert_eq!(
        with(|blk| blk.nbd = Some(device::NbdSource::default())),
        ["blk.nbd.address", "blk.image_fd"]
    );
}

#[test]
fn calls_on_a_served_disk_are_checked() {
    let resize = |capacity_bytes| {
        resize_request(&device::ResizeRequest {
            id: "d".into(),
            capacity_bytes,
        })
    };
    resize(4096).unwrap();
    for wrong in [0, 1000, u64::MAX] {
        assert!(!fields(resize(wrong)).is_empty(), "{wrong}");
    }
    let bitmap = |granularity_bytes| {
        create_bitmap_request(&device::CreateBitmapRequest {
            id: "d".into(),
            bitmap: "b".into(),
            granularity_bytes,
        })
    };
    bitmap(0).unwrap();
    bitmap(4096).unwrap();
    for wrong in [512, 5000, 1 << 31] {
        assert_eq!(fields(bitmap(wrong)), ["granularity_bytes"], "{wrong}");
    }
    assert_eq!(fields(job_request("d", "")), ["job_id"]);
    let mirror = device::StartMirrorRequest {
        id: "d".into(),
        job_id: "j".into(),
        ..Default::default()
    };
    assert_eq!(fields(start_mirror_request(&mirror)), ["target"]);
    let backup = device::StartBackupRequest {
        id: "d".into(),
        job_id: "j".into(),
        target: Some(device::Target {
            image_fd: Some(device::FdRef { token: "t".into() }),
            format: "raw".into(),
            ..Default::default()
        }),
        bitmap: "b".into(),
        new_bitmap: "b".into(),
        ..Default::default()
    };
    assert_eq!(fields(start_backup_request(&backup)), ["new_bitmap"]);
    let limits = device::SetLimitsRequest {
        id: "d".into(),
        limits: None,
    };
    assert_eq!(fields(set_limits_request(&limits)), ["limits"]);
}

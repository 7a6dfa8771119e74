//! The only validation of requests. Each server calls the function named after the message before
//! it looks at anything else; what passes has safe names, absolute paths and counts in range.
//!
//! A function collects all violations; see [`crate::errors::Violations`]. Whether a file exists or
//! a name is taken is not decided here.

use tonic::Status;

use crate::errors::Violations;
use crate::{controller, device, names, node};

/// vCPUs of one VM.
pub const MAX_VCPUS: u32 = 32;
/// Queues of one device: an index travels in one byte of vhost-user's messages, and the daemons
/// accept this many.
pub const MAX_QUEUES: u32 = 64;
/// Queue pairs of one NIC.
pub const MAX_QUEUE_PAIRS: u32 = 16;
/// Devices of one VM: slots of its host bridge less the bridge itself.
pub const MAX_DEVICES: usize = 30;
/// Bytes of a virtio-blk serial number (VIRTIO_BLK_ID_BYTES).
pub const MAX_SERIAL_BYTES: usize = 20;
/// What Linux takes on x86-64 (COMMAND_LINE_SIZE), the terminating NUL included.
pub const MAX_CMDLINE_BYTES: usize = 2047;
/// Longest wait that WaitOperation accepts.
pub const MAX_WAIT_MS: u32 = 300_000;
/// Largest page of a list.
pub const MAX_PAGE_SIZE: u32 = 1000;

const MIN_MEMORY_BYTES: u64 = 1 << 20;
const MAX_MEMORY_BYTES: u64 = 16 << 40;
const PAGE_BYTES: u64 = 4096;
/// Devices are addressed in units of this, whatever their block size is.
const SECTOR_BYTES: u64 = 512;
const MAX_VOLUME_BYTES: u64 = 1 << 50;
/// IFNAMSIZ less its NUL.
const MAX_INTERFACE_BYTES: usize = 15;
const MAX_QUEUE_SIZE: u32 = 32768;
/// `VHOST_USER_MAX_CONFIG_SIZE`
const MAX_CONFIG_BYTES: usize = 256;
const MAX_GRACE_MS: u32 = 3_600_000;

/// Checks what a device daemon is asked to serve.
///
/// # Errors
/// INVALID_ARGUMENT with the path of each field that cannot be accepted.
pub fn attach_request(request: &device::AttachRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    match &request.listener {
        Some(device::attach_request::Listener::SocketPath(path)) => {
            absolute(&mut found, "socket_path", path);
        }
        Some(device::attach_request::Listener::SocketFd(fd)) => {
            token(&mut found, "socket_fd", Some(fd));
        }
        None => found.add("listener", "give socket_path or socket_fd"),
    }
    match &request.device {
        Some(device::attach_request::Device::Blk(blk)) => {
            token(&mut found, "blk.image_fd", blk.image_fd.as_ref());
            serial(&mut found, "blk.serial", &blk.serial);
            at_most(&mut found, "blk.num_queues", blk.num_queues, MAX_QUEUES);
        }
        Some(device::attach_request::Device::Net(net)) => {
            let pairs = net.tap_fds.len();
            found.require((1..=MAX_QUEUE_PAIRS as usize).contains(&pairs), "net.tap_fds", || {
                format!(
                    "has {pairs} descriptors; give one for each queue pair, {MAX_QUEUE_PAIRS} at most"
                )
            });
            for (index, fd) in net.tap_fds.iter().enumerate() {
                token(&mut found, &format!("net.tap_fds[{index}]"), Some(fd));
            }
            mac(&mut found, "net.mac", &net.mac);
            mtu(&mut found, "net.mtu", net.mtu);
        }
        None => found.add("device", "give blk or net"),
    }
    found.into_result()
}

/// Checks which device a daemon is asked to drop.
///
/// # Errors
/// As [`attach_request`].
pub fn detach_request(request: &device::DetachRequest) -> Result<(), Status> {
    one_id("id", &request.id)
}

/// Checks which device is asked for.
///
/// # Errors
/// As [`attach_request`].
pub fn get_device_request(request: &device::GetDeviceRequest) -> Result<(), Status> {
    one_id("id", &request.id)
}

/// Checks what a host is asked to run.
///
/// # Errors
/// As [`attach_request`]; paths begin with `spec.`
pub fn apply_vm_request(request: &node::ApplyVmRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    let Some(spec) = &request.spec else {
        found.add("spec", "is missing");
        return found.into_result();
    };
    id(&mut found, "spec.id", &spec.id);
    found.require(spec.generation > 0, "spec.generation", || {
        "must be at least 1".into()
    });
    match node::Power::try_from(spec.power) {
        Ok(node::Power::Unspecified) => {
            found.add("spec.power", "must be POWER_ON, POWER_OFF or POWER_OFF_NOW");
        }
        Ok(_) => {}
        Err(_) => found.add("spec.power", format!("unknown value {}", spec.power)),
    }
    found.require(spec.vcpus > 0, "spec.vcpus", || "must be at least 1".into());
    let mut machine = Machine::new(&mut found, "spec");
    machine.cpus_and_memory(spec.vcpus, spec.memory_bytes);
    machine.boot(
        &spec.kernel,
        &spec.initramfs,
        &spec.cmdline,
        spec.shutdown_grace_ms,
    );
    for (index, disk) in spec.disks.iter().enumerate() {
        let at = machine.device("disks", index, &disk.name);
        match &disk.source {
            Some(node::disk_spec::Source::Path(path)) => {
                absolute(machine.found, &format!("{at}.path"), path);
            }
            Some(node::disk_spec::Source::Volume(volume)) => {
                id(machine.found, &format!("{at}.volume"), volume);
            }
            None => machine.found.add(at.clone(), "give path or volume"),
        }
        machine.disk(&at, disk.num_queues, &disk.serial);
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        let at = machine.device("nics", index, &nic.name);
        machine.nic(
            &at,
            &NicFields {
                tap: &nic.tap,
                mac: &nic.mac,
                queue_pairs: nic.queue_pairs,
                host_cidr: &nic.host_cidr,
                bridge: &nic.bridge,
                mtu: nic.mtu,
            },
        );
    }
    for (index, dev) in spec.vhost_user.iter().enumerate() {
        let at = machine.device("vhost_user", index, &dev.name);
        machine.vhost_user(
            &at,
            &VhostUserFields {
                kind: &dev.r#type,
                socket: &dev.socket,
                num_queues: dev.num_queues,
                queue_size: dev.queue_size,
                config: &dev.config,
            },
        );
    }
    machine.finish();
    found.into_result()
}

/// Checks the volume that a host is asked to make.
///
/// # Errors
/// As [`attach_request`].
pub fn node_create_volume_request(request: &node::CreateVolumeRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, "id", &request.id);
    volume_content(&mut found, "", request.size_bytes, &request.source_path);
    found.into_result()
}

/// Checks an id that a host is asked about: GetVm, ResetVm, DeleteVm, DeleteVolume.
///
/// # Errors
/// As [`attach_request`].
pub fn node_id(value: &str) -> Result<(), Status> {
    one_id("id", value)
}

/// Checks a VM that is to be created.
///
/// # Errors
/// As [`attach_request`].
pub fn create_vm_request(request: &controller::CreateVmRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "vm_id", &request.vm_id);
    request_id(&mut found, &request.request_id);
    let Some(spec) = request.vm.as_ref().and_then(|vm| vm.spec.as_ref()) else {
        found.add("vm.spec", "is missing");
        return found.into_result();
    };
    let mut machine = Machine::new(&mut found, "vm.spec");
    machine.cpus_and_memory(spec.vcpus, spec.memory_bytes);
    machine.boot(
        &spec.kernel,
        &spec.initramfs,
        &spec.cmdline,
        spec.shutdown_grace_ms,
    );
    for (index, disk) in spec.disks.iter().enumerate() {
        let at = machine.device("disks", index, &disk.name);
        match &disk.source {
            Some(controller::disk::Source::Path(path)) => {
                absolute(machine.found, &format!("{at}.path"), path);
            }
            Some(controller::disk::Source::Volume(volume)) => {
                if let Err(error) = names::Name::parse_volume(volume) {
                    machine.found.add(format!("{at}.volume"), error.to_string());
                }
            }
            None => machine.found.add(at.clone(), "give path or volume"),
        }
        machine.disk(&at, disk.num_queues, &disk.serial);
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        let at = machine.device("nics", index, &nic.name);
        machine.nic(
            &at,
            &NicFields {
                tap: &nic.tap,
                mac: &nic.mac,
                queue_pairs: nic.queue_pairs,
                host_cidr: &nic.host_cidr,
                bridge: &nic.bridge,
                mtu: nic.mtu,
            },
        );
    }
    for (index, dev) in spec.vhost_user.iter().enumerate() {
        let at = machine.device("vhost_user", index, &dev.name);
        machine.vhost_user(
            &at,
            &VhostUserFields {
                kind: &dev.r#type,
                socket: &dev.socket,
                num_queues: dev.num_queues,
                queue_size: dev.queue_size,
                config: &dev.config,
            },
        );
    }
    machine.finish();
    found.into_result()
}

/// Checks a volume that is to be created.
///
/// # Errors
/// As [`attach_request`].
pub fn create_volume_request(request: &controller::CreateVolumeRequest) -> Result<(), Status> {
    let mut found = Violations::new();
    parent_project(&mut found, &request.parent);
    id(&mut found, "volume_id", &request.volume_id);
    request_id(&mut found, &request.request_id);
    match request
        .volume
        .as_ref()
        .and_then(|volume| volume.spec.as_ref())
    {
        Some(spec) => {
            volume_content(
                &mut found,
                "volume.spec.",
                spec.size_bytes,
                &spec.source_path,
            );
        }
        None => found.add("volume.spec", "is missing"),
    }
    found.into_result()
}

/// Checks the fields that requests changing a VM share, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn vm_request(name: &str, request: &str) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    request_id(&mut found, request);
    resource(found, names::Name::parse_vm(name))
}

/// Checks the fields that requests changing a volume share, and parses its name.
///
/// # Errors
/// As [`attach_request`].
pub fn volume_request(name: &str, request: &str) -> Result<names::Name, Status> {
    let mut found = Violations::new();
    request_id(&mut found, request);
    resource(found, names::Name::parse_volume(name))
}

/// Checks a list's parent.
///
/// # Errors
/// As [`attach_request`].
pub fn list_parent(parent: &str) -> Result<names::Parent, Status> {
    names::Parent::parse(parent)
        .map_err(|error| crate::errors::invalid_field("parent", error.to_string()))
}

/// Checks a name such as `operations/…` and gives its id.
///
/// # Errors
/// As [`attach_request`].
pub fn flat_name<'a>(name: &'a str, collection: &'static str) -> Result<&'a str, Status> {
    names::flat_id(name, collection)
        .map_err(|error| crate::errors::invalid_field("name", error.to_string()))
}

/// The size of a page: what was asked for, at most [`MAX_PAGE_SIZE`], or 100.
pub fn page_size(asked: u32) -> usize {
    match asked {
        0 => 100,
        asked => asked.min(MAX_PAGE_SIZE) as usize,
    }
}

/// What both kinds of request say of a third-party device.
struct VhostUserFields<'a> {
    kind: &'a str,
    socket: &'a str,
    num_queues: u32,
    queue_size: u32,
    config: &'a [u8],
}

/// The machine in a request of either level. Fields are named relative to `at`.
struct Machine<'a> {
    found: &'a mut Violations,
    at: &'static str,
    names: Vec<(String, String)>,
}

struct NicFields<'a> {
    tap: &'a str,
    mac: &'a str,
    queue_pairs: u32,
    host_cidr: &'a str,
    bridge: &'a str,
    mtu: u32,
}

impl<'a> Machine<'a> {
    fn new(found: &'a mut Violations, at: &'static str) -> Self {
        Self {
            found,
            at,
            names: Vec::new(),
        }
    }

    fn cpus_and_memory(&mut self, vcpus: u32, memory_bytes: u64) {
        let at = self.at;
        self.found
            .require(vcpus <= MAX_VCPUS, &format!("{at}.vcpus"), || {
                format!("must be 1 to {MAX_VCPUS}, not {vcpus}")
            });
        let fits = (MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes)
            && memory_bytes.is_multiple_of(PAGE_BYTES);
        let unset = memory_bytes == 0 && at != "spec";
        self.found
            .require(fits || unset, &format!("{at}.memory_bytes"), || {
                format!(
                    "must be a multiple of {PAGE_BYTES} from 1 MiB to 16 TiB, not {memory_bytes}"
                )
            });
    }

    fn boot(&mut self, kernel: &str, initramfs: &str, cmdline: &str, shutdown_grace_ms: u32) {
        let at = self.at;
        absolute(self.found, &format!("{at}.kernel"), kernel);
        if !initramfs.is_empty() {
            absolute(self.found, &format!("{at}.initramfs"), initramfs);
        }
        let field = format!("{at}.cmdline");
        self.found
            .require(cmdline.len() <= MAX_CMDLINE_BYTES, &field, || {
                format!(
                    "has {} bytes, Linux takes {MAX_CMDLINE_BYTES}",
                    cmdline.len()
                )
            });
        no_control_characters(self.found, &field, cmdline);
        at_most(
            self.found,
            &format!("{at}.shutdown_grace_ms"),
            shutdown_grace_ms,
            MAX_GRACE_MS,
        );
    }

    /// Notes a device's name and answers the path of its message.
    fn device(&mut self, list: &str, index: usize, name: &str) -> String {
        let at = format!("{}.{list}[{index}]", self.at);
        let field = format!("{at}.name");
        // Northbound, the controller gives a name to a device that has none.
        if !(name.is_empty() && self.at != "spec") {
            id(self.found, &field, name);
        }
        self.names.push((field, name.to_owned()));
        at
    }

    fn disk(&mut self, at: &str, num_queues: u32, text: &str) {
        at_most(
            self.found,
            &format!("{at}.num_queues"),
            num_queues,
            MAX_QUEUES,
        );
        serial(self.found, &format!("{at}.serial"), text);
    }

    fn nic(&mut self, at: &str, nic: &NicFields<'_>) {
        mac(self.found, &format!("{at}.mac"), nic.mac);
        mtu(self.found, &format!("{at}.mtu"), nic.mtu);
        at_most(
            self.found,
            &format!("{at}.queue_pairs"),
            nic.queue_pairs,
            MAX_QUEUE_PAIRS,
        );
        interface(self.found, &format!("{at}.tap"), nic.tap);
        interface(self.found, &format!("{at}.bridge"), nic.bridge);
        let cidr = nic.host_cidr;
        self.found.require(
            cidr.is_empty() || is_cidr(cidr),
            &format!("{at}.host_cidr"),
            || format!("{cidr:?} must be an address and a prefix length such as 192.168.100.1/24"),
        );
        let existing = !nic.tap.is_empty();
        self.found.require(
            !existing || (cidr.is_empty() && nic.bridge.is_empty()),
            at,
            || "host_cidr and bridge are for a tap that is created; leave tap out or these".into(),
        );
    }

    fn vhost_user(&mut self, at: &str, device: &VhostUserFields<'_>) {
        let kind = device.kind;
        let known = matches!(kind, "blk" | "net" | "fs" | "vsock" | "rng")
            || kind
                .parse::<u32>()
                .is_ok_and(|number| (1..=63).contains(&number));
        self.found.require(known, &format!("{at}.type"), || {
            format!("{kind:?} must be blk, net, fs, vsock, rng or a virtio device number (1 to 63)")
        });
        absolute(self.found, &format!("{at}.socket"), device.socket);
        at_most(
            self.found,
            &format!("{at}.num_queues"),
            device.num_queues,
            MAX_QUEUES,
        );
        let queue_size = device.queue_size;
        let fits =
            queue_size == 0 || (queue_size.is_power_of_two() && queue_size <= MAX_QUEUE_SIZE);
        self.found.require(fits, &format!("{at}.queue_size"), || {
            format!("must be a power of two up to {MAX_QUEUE_SIZE}, not {queue_size}")
        });
        let len = device.config.len();
        self.found
            .require(len <= MAX_CONFIG_BYTES, &format!("{at}.config"), || {
                format!(
                    "has {len} bytes, a device's configuration space at most {MAX_CONFIG_BYTES}"
                )
            });
    }

    fn finish(self) {
        let count = self.names.len();
        self.found.require(count <= MAX_DEVICES, self.at, || {
            format!("has {count} devices, {MAX_DEVICES} fit")
        });
        let mut seen = std::collections::HashSet::new();
        for (field, name) in self.names {
            if !name.is_empty() && !seen.insert(name.clone()) {
                self.found.add(
                    field,
                    format!("{name:?} is the name of another device of this VM"),
                );
            }
        }
    }
}

fn one_id(field: &str, value: &str) -> Result<(), Status> {
    let mut found = Violations::new();
    id(&mut found, field, value);
    found.into_result()
}

fn resource(
    mut found: Violations,
    name: Result<names::Name, names::NameError>,
) -> Result<names::Name, Status> {
    match name {
        Ok(name) => found.into_result().map(|()| name),
        Err(error) => {
            found.add("name", error.to_string());
            Err(found.into_result().expect_err("there is a violation"))
        }
    }
}

fn parent_project(found: &mut Violations, parent: &str) {
    if let Err(error) = names::Parent::parse(parent).and_then(names::Parent::project) {
        found.add("parent", error.to_string());
    }
}

fn request_id(found: &mut Violations, value: &str) {
    let fits = value.len() <= 64
        && value
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    found.require(fits, "request_id", || {
        "must be at most 64 of A-Z, a-z, 0-9, - and _".into()
    });
}

fn id(found: &mut Violations, field: &str, value: &str) {
    found.require(names::is_id(value), field, || {
        format!("{value:?} {}", names::ID_RULE)
    });
}

fn absolute(found: &mut Violations, field: &str, path: &str) {
    found.require(path.starts_with('/'), field, || match path {
        "" => "is missing".to_owned(),
        _ => format!("{path:?} must be an absolute path"),
    });
    // PATH_MAX with its NUL.
    found.require(path.len() < 4096, field, || {
        "is longer than 4095 bytes".into()
    });
    // Options on vmm-core's and the daemons' command lines are separated by commas.
    found.require(!path.contains(','), field, || {
        format!("{path:?} has a comma, which cannot be passed on; rename it")
    });
    no_control_characters(found, field, path);
}

fn no_control_characters(found: &mut Violations, field: &str, text: &str) {
    found.require(!text.contains(|c: char| c.is_control()), field, || {
        "has a control character".into()
    });
}

fn at_most(found: &mut Violations, field: &str, value: u32, max: u32) {
    found.require(value <= max, field, || {
        format!("must be at most {max}, not {value}")
    });
}

fn serial(found: &mut Violations, field: &str, text: &str) {
    let printable = text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    found.require(printable && text.len() <= MAX_SERIAL_BYTES, field, || {
        format!("{text:?} must be at most {MAX_SERIAL_BYTES} bytes of printable ASCII")
    });
}

fn token(found: &mut Violations, field: &str, fd: Option<&device::FdRef>) {
    let fits = fd.is_some_and(|fd| {
        (1..=crate::fds::MAX_TOKEN_BYTES).contains(&fd.token.len())
            && fd
                .token
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    });
    found.require(fits, &format!("{field}.token"), || {
        "must be the token of descriptors sent before: 1 to 64 letters, digits and hyphens".into()
    });
}

/// Empty is fine: an address is then made up.
fn mac(found: &mut Violations, field: &str, text: &str) {
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|octet| match octet.len() {
            // from_str_radix alone would take a sign.
            2 if octet.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                u8::from_str_radix(octet, 16).ok()
            }
            _ => None,
        })
        .collect();
    let unicast = octets.is_some_and(|octets| {
        octets.len() == 6 && octets[0] & 1 == 0 && octets.iter().any(|octet| *octet != 0)
    });
    found.require(text.is_empty() || unicast, field, || {
        format!("{text:?} must be a unicast address such as 52:54:00:12:34:56")
    });
}

/// The range that virtio and Linux's tap share; 0 leaves it to the default.
fn mtu(found: &mut Violations, field: &str, value: u32) {
    found.require(value == 0 || (68..=65521).contains(&value), field, || {
        format!("must be 68 to 65521, not {value}")
    });
}

fn interface(found: &mut Violations, field: &str, name: &str) {
    let fits = name.len() <= MAX_INTERFACE_BYTES
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b',' | b'%'));
    found.require(fits, field, || {
        format!(
            "{name:?} cannot be an interface: at most 15 bytes without spaces, '/', '%' and ','"
        )
    });
}

fn is_cidr(text: &str) -> bool {
    text.split_once('/').is_some_and(|(address, prefix)| {
        let Ok(address) = address.parse::<std::net::IpAddr>() else {
            return false;
        };
        let max = if address.is_ipv4() { 32 } else { 128 };
        prefix.parse::<u8>().is_ok_and(|prefix| prefix <= max)
    })
}

fn volume_content(found: &mut Violations, at: &str, size_bytes: u64, source_path: &str) {
    let field = format!("{at}size_bytes");
    found.require(size_bytes.is_multiple_of(SECTOR_BYTES), &field, || {
        format!("must be a multiple of {SECTOR_BYTES}, not {size_bytes}")
    });
    found.require(size_bytes <= MAX_VOLUME_BYTES, &field, || {
        "must be at most 1 PiB".into()
    });
    if source_path.is_empty() {
        found.require(size_bytes > 0, &field, || {
            "is missing; only a source can tell it".into()
        });
    } else {
        absolute(found, &format!("{at}source_path"), source_path);
    }
}

#[cfg(test)]
mod tests;

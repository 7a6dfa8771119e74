//! What the controller's and the node agent's descriptions of a machine have in common.

use super::vm_disks::{DiskFields, disk_fields};
use super::*;

/// What both kinds of request say of a third-party device.
pub(super) struct VhostUserFields<'a> {
    pub(super) kind: &'a str,
    pub(super) socket: &'a str,
    pub(super) num_queues: u32,
    pub(super) queue_size: u32,
    pub(super) config: &'a [u8],
}

/// The machine in a request of either level. Fields are named relative to `at`.
pub(super) struct Machine<'a> {
    pub(super) found: &'a mut Violations,
    pub(super) at: &'static str,
    pub(super) names: Vec<(String, String)>,
}

pub(super) struct NicFields<'a> {
    pub(super) tap: &'a str,
    pub(super) mac: &'a str,
    pub(super) queue_pairs: u32,
    pub(super) host_cidr: &'a str,
    pub(super) bridge: &'a str,
    pub(super) mtu: u32,
}

impl<'a> Machine<'a> {
    pub(super) fn new(found: &'a mut Violations, at: &'static str) -> Self {
        Self {
            found,
            at,
            names: Vec::new(),
        }
    }

    pub(super) fn cpus_and_memory(&mut self, vcpus: u32, memory_bytes: u64) {
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

    pub(super) fn boot(
        &mut self,
        kernel: &str,
        initramfs: &str,
        cmdline: &str,
        shutdown_grace_ms: u32,
    ) {
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
    pub(super) fn device(&mut self, list: &str, index: usize, name: &str) -> String {
        let at = format!("{}.{list}[{index}]", self.at);
        let field = format!("{at}.name");
        // Northbound, the controller gives a name to a device that has none.
        if !(name.is_empty() && self.at != "spec") {
            id(self.found, &field, name);
        }
        self.names.push((field, name.to_owned()));
        at
    }

    pub(super) fn disk(&mut self, at: &str, disk: &DiskFields<'_>) {
        disk_fields(self.found, at, disk);
    }

    pub(super) fn nic(&mut self, at: &str, nic: &NicFields<'_>) {
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

    pub(super) fn vhost_user(&mut self, at: &str, device: &VhostUserFields<'_>) {
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

    pub(super) fn finish(self) {
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

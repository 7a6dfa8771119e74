//! What `cpuid` answers on each vCPU: what KVM supports, with the host's topology replaced by
//! ours: one socket, one thread a core, APIC id = vCPU index.
//!
//! Leaves: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm::{KvmError, failed_to};

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_SVM: u32 = 1 << 2;

/// The leaves all vCPUs have in common.
pub struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u32,
}

impl CpuidTemplate {
    /// What `kvm` supports, for a machine of `vcpus` vCPUs.
    ///
    /// # Errors
    /// The ioctl's error.
    pub fn new(kvm: &Kvm, vcpus: u32) -> Result<Self, KvmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed_to("list the supported CPUID leaves"))?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_supported(
            supported.as_slice(),
            deadline_timer,
            vcpus,
        ))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], deadline_timer: bool, vcpus: u32) -> Self {
        let mut entries: Vec<_> = supported
            .iter()
            .copied()
            .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
            .collect();
        let max_leaf = entries
            .iter()
            .find(|entry| entry.function == 0)
            .map_or(0, |entry| entry.eax);
        for function in [0xb, 0x1f]
            .into_iter()
            .filter(|function| *function <= max_leaf)
        {
            entries.extend(extended_topology(function, vcpus));
        }
        for entry in &mut entries {
            describe_package(entry, deadline_timer, vcpus);
        }
        Self { entries, vcpus }
    }

    /// The leaves of the vCPU with index `index`.
    pub fn for_vcpu(&self, index: u32) -> CpuId {
        debug_assert!(index < self.vcpus);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | index << 24,
                0xb | 0x1f => entry.edx = index,
                0x8000_001e => {
                    entry.eax = index;
                    // One thread a core; core id.
                    entry.ebx = index & 0xff;
                    // One node.
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        CpuId::from_entries(&entries).expect("two leaves more than KVM gave fit")
    }

    /// Physical address bits of the guest (leaf 0x80000008).
    pub fn physical_address_bits(&self) -> u32 {
        let leaf = self
            .entries
            .iter()
            .find(|entry| entry.function == 0x8000_0008);
        leaf.map_or(36, |entry| entry.eax & 0xff)
    }
}

/// Bits of an APIC id that tell the cores of a package apart.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// Leaf 0xb or 0x1f: a thread level of one, a core level of all vCPUs, an end.
fn extended_topology(function: u32, vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, eax: u32, ebx: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, core_bits(vcpus), vcpus, 2),
        level(2, 0, 0, 0),
    ]
}

fn describe_package(entry: &mut kvm_cpuid_entry2, deadline_timer: bool, vcpus: u32) {
    match entry.function {
        0x1 => {
            entry.ecx |= LEAF1_ECX_HYPERVISOR;
            // Hypervisors in the guest would add state that reset must undo.
            entry.ecx &= !LEAF1_ECX_VMX;
            set(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, deadline_timer);
            set(&mut entry.edx, LEAF1_EDX_HTT, vcpus > 1);
            entry.ebx = entry.ebx & 0xff00_ffff | vcpus.next_power_of_two() << 16;
        }
        // Caches, Intel (0x4) and AMD (0x8000001d): levels 1 and 2 belong to a core, others to all.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level <= 2 { 0 } else { vcpus - 1 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
            if entry.function == 0x4 {
                entry.eax = entry.eax & !(0x3f << 26) | (vcpus.next_power_of_two() - 1) << 26;
            }
        }
        0x8000_0001 => {
            entry.ecx &= !EXT1_ECX_SVM;
            set(&mut entry.ecx, EXT1_ECX_CMP_LEGACY, vcpus > 1);
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits(vcpus) << 12 | (vcpus - 1),
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        vec![
            leaf(0, 0xd, 0, 0, 0),
            leaf(1, 0, 0x0708_0800, LEAF1_ECX_VMX, 0),
            leaf(4, 0x1c00_4121, 0, 0, 0),
            leaf(0xb, 1, 2, 0x100, 55),
            leaf(0x8000_0001, 0, 0, EXT1_ECX_SVM, 0),
            leaf(0x8000_0008, 0x3028, 0, 0x707f, 0),
            leaf(0x8000_001e, 9, 0x0109, 0x0100, 0),
        ]
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn apic_id_is_the_index_in_every_leaf() {
        let template = CpuidTemplate::from_supported(&supported(), true, 6);
        let cpuid = template.for_vcpu(5);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 24, 5);
        assert_eq!(find(&cpuid, 0xb, 0).edx, 5);
        assert_eq!(find(&cpuid, 0xb, 1).edx, 5);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, 5);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).ebx, 5);
    }

    #[test]
    fn package_has_as_many_cores_as_vcpus() {
        let cpuid = CpuidTemplate::from_supported(&supported(), false, 6).for_vcpu(0);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 8);
        assert_eq!((find(&cpuid, 0xb, 1).eax, find(&cpuid, 0xb, 1).ebx), (3, 6));
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0x3005);
        assert_eq!(
            cpuid
                .as_slice()
                .iter()
                .filter(|entry| entry.function == 0xb)
                .count(),
            3
        );
        assert!(
            !cpuid.as_slice().iter().any(|entry| entry.function == 0x1f),
            "beyond the highest leaf"
        );
    }

    #[test]
    fn features_follow_the_host_without_nested_virtualization() {
        let cpuid = CpuidTemplate::from_supported(&supported(), true, 1).for_vcpu(0);
        let leaf1 = find(&cpuid, 1, 0);
        assert_eq!(leaf1.ecx, LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE);
        assert_eq!(leaf1.edx & LEAF1_EDX_HTT, 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, 0);
        let template = CpuidTemplate::from_supported(&supported(), true, 1);
        assert_eq!(template.physical_address_bits(), 0x28);
    }
}

//! Registers of the boot vCPU when the kernel takes over, for each boot protocol.
//!
//! Sources: Xen `docs/misc/pvh.pandoc`; Linux `Documentation/x86/boot.rst`, "64-bit boot
//! protocol" and "32-bit boot protocol"; Intel SDM volume 3, 3.4.5 (segment descriptors).

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::state::write_msrs;
use crate::boot::{Entry, Protocol};
use crate::kvm::{KvmError, failed_to};
use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The descriptor table that the segment registers below were loaded from: null, unused, code,
/// data, task state. Code is `0x10` and data `0x18`, as the Linux protocols demand.
pub fn boot_gdt(protocol: Protocol) -> [u64; 5] {
    let code_flags = if protocol == Protocol::Linux64 {
        0xa
    } else {
        0xc
    };
    [
        0,
        0,
        descriptor(0x9b, code_flags, 0xf_ffff),
        descriptor(0x93, 0xc, 0xf_ffff),
        descriptor(0x8b, 0, 0x67),
    ]
}

/// What firmware leaves in model-specific registers, on every vCPU.
///
/// # Errors
/// The ioctl's error.
pub fn set_firmware_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    write_msrs(vcpu, &entries)
}

/// Points the boot vCPU at `entry`. Its GDT and page tables are in guest memory already.
///
/// # Errors
/// An ioctl's error.
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let gdt = boot_gdt(entry.protocol);
    let mut sregs = vcpu
        .get_sregs()
        .map_err(failed_to("read the boot vCPU's special registers"))?;
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = (size_of_val(&gdt) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(&gdt, 2);
    let data = segment(&gdt, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(&gdt, 4);
    sregs.cr0 = CR0_PE | CR0_ET;
    if entry.protocol == Protocol::Linux64 {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = BOOT_PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs)
        .map_err(failed_to("write the boot vCPU's special registers"))?;

    let mut regs = kvm_regs {
        rip: entry.rip,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match entry.protocol {
        Protocol::Pvh => regs.rbx = entry.params,
        Protocol::Linux64 | Protocol::Linux32 => {
            regs.rsi = entry.params;
            regs.rsp = BOOT_STACK;
        }
    }
    vcpu.set_regs(&regs)
        .map_err(failed_to("write the boot vCPU's registers"))
}

/// A segment descriptor with base 0.
const fn descriptor(access: u64, flags: u64, limit: u64) -> u64 {
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// The segment register's hidden part for entry `index` of `gdt`.
fn segment(gdt: &[u64], index: usize) -> kvm_segment {
    let descriptor = gdt[index];
    let bit = |at: u32| (descriptor >> at & 1) as u8;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let granular = bit(55);
    kvm_segment {
        base: 0,
        limit: if granular == 1 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        selector: (index * 8) as u16,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: (descriptor >> 45 & 3) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: granular,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_manual_s_flat_segments() {
        assert_eq!(
            boot_gdt(Protocol::Linux64),
            [
                0,
                0,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0x0000_8b00_0000_0067
            ]
        );
        assert_eq!(boot_gdt(Protocol::Pvh)[2], 0x00cf_9b00_0000_ffff);
    }

    #[test]
    fn segments_match_their_descriptors() {
        let code = segment(&boot_gdt(Protocol::Linux64), 2);
        assert_eq!(
            (code.selector, code.limit, code.type_),
            (0x10, 0xffff_ffff, 0xb)
        );
        assert_eq!(
            (code.present, code.s, code.l, code.db, code.g),
            (1, 1, 1, 0, 1)
        );
        let task = segment(&boot_gdt(Protocol::Pvh), 4);
        assert_eq!(
            (task.selector, task.limit, task.type_, task.s),
            (0x20, 0x67, 0xb, 0)
        );
    }
}

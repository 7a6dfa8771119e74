//! The guest's physical address space: where RAM, windows and boot structures lie.
//!
//! ```text
//!  0x0000_0000  low RAM (boot structures below 0x9_fc00, ACPI tables at 0xe_0000)
//!  0x0010_0000  kernel
//!  0xc000_0000  32-bit PCI window (RAM of more than 3 GiB continues at 4 GiB)
//!  0xe000_0000  ECAM
//!  0xfec0_0000  IOAPIC, 0xfee0_0000 local APICs
//!  0xfffb_c000  pages KVM needs on some processors
//!  0x1_0000_0000  high RAM
//!  after it     64-bit PCI window
//! ```

/// First address of the PCI hole: low RAM never reaches it.
pub const PCI_HOLE_START: u64 = 0xc000_0000;
/// First address of high RAM.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// The PCI window below 4 GiB.
pub const PCI_MMIO32_START: u64 = PCI_HOLE_START;
/// One past the end of the PCI window below 4 GiB.
pub const PCI_MMIO32_END: u64 = 0xe000_0000;
/// PCI Express enhanced configuration space: bus 0 alone.
pub const ECAM_START: u64 = 0xe000_0000;
/// One MiB for each bus.
pub const ECAM_LEN: u64 = 0x10_0000;
/// Size of the PCI window above high RAM.
pub const PCI_MMIO64_LEN: u64 = 16 << 30;
/// The window above high RAM starts at a multiple of this.
pub const PCI_MMIO64_ALIGN: u64 = 1 << 30;

/// Registers of the one IOAPIC.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Registers of each vCPU's local APIC.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const IDENTITY_MAP_START: u64 = 0xfffb_c000;
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const TSS_START: u64 = 0xfffb_d000;

/// Global descriptor table of the boot vCPU.
pub const BOOT_GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list of the PVH boot protocol.
pub const PVH_MODULES: u64 = 0x6040;
/// Memory map of the PVH boot protocol.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// `boot_params` of the Linux 64-bit boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit boot protocol: one PML4, one PDPT, four PDs.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line and its terminating zero.
pub const CMDLINE_CAPACITY: usize = 0x1_0000;
/// End of conventional memory: what a PC leaves to its extended BIOS data area.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// RSDP, then the other ACPI tables.
pub const ACPI_START: u64 = 0xe_0000;
/// Where an 80x86 starts after a reset, as a real-mode jump reaches it.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where kernels are loaded from.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// COM1's registers.
pub const COM1_PORT: u16 = 0x3f8;
/// COM1's interrupt (edge, active high).
pub const COM1_GSI: u32 = 4;
/// The generic event device's interrupt (edge, active high): the power button.
pub const GED_GSI: u32 = 5;
/// ACPI sleep control, sleep status and reset registers, one byte each.
pub const ACPI_PORT: u16 = 0x600;
/// First GSI that is free for MSI routes: the IOAPIC has 24 pins.
pub const FIRST_MSI_GSI: u32 = 24;

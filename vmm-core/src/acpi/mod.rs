//! ACPI tables of a hardware-reduced machine (ACPI 6.5).
//!
//! RSDP -> XSDT -> FADT (-> DSDT), MADT, MCFG. [`dsdt`] holds the devices, [`fixed`] the rest.
//! Tables are data: they are built once and written again at each reset.

pub mod dsdt;
pub mod fixed;

use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::layout::ACPI_START;

const OEM_ID: [u8; 6] = *b"MORTIS";
const OEM_TABLE_ID: [u8; 8] = *b"MORTISE ";
const OEM_REVISION: u32 = 1;
const TABLE_ALIGN: usize = 16;

/// What the tables say about the machine.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// vCPUs, with APIC ids from 0.
    pub vcpus: u32,
    /// The PCI windows, inclusive.
    pub pci_mmio32: (u32, u32),
    /// The PCI windows, inclusive.
    pub pci_mmio64: (u64, u64),
}

/// All tables, to be written to [`ACPI_START`]; the RSDP comes first.
pub fn tables(machine: &Description) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len()];
    let dsdt = append(&mut image, &dsdt::dsdt(machine));
    let fadt = append(&mut image, &fixed::fadt(dsdt));
    let madt = append(&mut image, &fixed::madt(machine.vcpus));
    let mcfg = append(&mut image, &fixed::mcfg());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = append(&mut image, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

/// Appends `table` and returns its address.
fn append(image: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    image.resize(image.len().next_multiple_of(TABLE_ALIGN), 0);
    let address = ACPI_START + image.len() as u64;
    table.to_aml_bytes(image);
    address
}

/// A table whose bytes exist already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RESET_VECTOR;

    fn image(vcpus: u32) -> Vec<u8> {
        let pci_mmio64 = (1 << 32, (1 << 34) - 1);
        tables(&Description {
            vcpus,
            pci_mmio32: (0xc000_0000, 0xdfff_ffff),
            pci_mmio64,
        })
    }

    fn u32_at(image: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
    }

    fn offset_at(image: &[u8], at: usize) -> usize {
        let gpa = u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
        (gpa - ACPI_START) as usize
    }

    fn table(image: &[u8], at: usize) -> &[u8] {
        &image[at..at + u32_at(image, at + 4) as usize]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_with_a_valid_checksum() {
        let image = image(2);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        let xsdt = table(&image, offset_at(&image, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let found: Vec<_> = (36..xsdt.len())
            .step_by(8)
            .map(|at| table(&image, offset_at(xsdt, at)))
            .collect();
        let names: Vec<_> = found.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        assert!(found.iter().all(|table| sum(table) == 0));
        let dsdt = table(&image, offset_at(found[0], 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
    }

    #[test]
    fn madt_has_a_local_apic_for_each_vcpu() {
        let image = image(32);
        let at = image.windows(4).position(|bytes| bytes == b"APIC").unwrap();
        let madt = table(&image, at);
        let mut ids = Vec::new();
        let mut at = 44;
        while at < madt.len() {
            if madt[at] == 0 {
                ids.push(madt[at + 3]);
                assert_eq!(u32_at(madt, at + 4), 1, "enabled");
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(ids, (0..32).collect::<Vec<u8>>());
    }

    #[test]
    fn tables_fit_below_the_reset_vector() {
        assert!(ACPI_START + image(32).len() as u64 <= RESET_VECTOR);
    }
}

//! DSDT: the PCI host bridge, the serial port and the power button.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method,
    Name, Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Raw};
use crate::layout::{COM1_GSI, COM1_PORT, ECAM_LEN, ECAM_START, GED_GSI};
use crate::power::S5_SLEEP_TYPE;

/// What a device gets when its button is pressed (ACPI 6.5 table 5.173).
const NOTIFY_PRESSED: u8 = 0x80;
const REVISION: u8 = 2;
const HEADER_LEN: u32 = 36;

/// The whole table.
pub(super) fn dsdt(machine: &Description) -> Raw {
    let mut aml = Vec::new();
    sleep_states(&mut aml);
    Scope::new(
        "_SB_".into(),
        vec![
            &HostBridge(*machine),
            &Motherboard,
            &SerialPort,
            &PowerButton,
            &GenericEvents,
        ],
    )
    .to_aml_bytes(&mut aml);
    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&aml);
    Raw(table.as_slice().to_vec())
}

/// `_S5`: off. There is no other sleep state.
fn sleep_states(sink: &mut dyn AmlSink) {
    Name::new("_S5_".into(), &Package::new(vec![&S5_SLEEP_TYPE])).to_aml_bytes(sink);
}

/// PCI Express root of bus 0.
struct HostBridge(Description);

impl Aml for HostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (start32, end32) = self.0.pci_mmio32;
        let (start64, end64) = self.0.pci_mmio64;
        let cacheable = AddressSpaceCacheable::NotCacheable;
        Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &0u8),
                &Name::new("_BBN".into(), &0u8),
                &Name::new("_UID".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &AddressSpace::new_bus_number(0u16, 0u16),
                        &AddressSpace::new_memory(cacheable, true, start32, end32, None),
                        &AddressSpace::new_memory(cacheable, true, start64, end64, None),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Reserves ECAM, without which Linux does not use it.
struct Motherboard;

impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ecam = Memory32Fixed::new(true, ECAM_START as u32, ECAM_LEN as u32);
        Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// COM1.
struct SerialPort;

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let interrupt = Interrupt::new(true, true, false, false, COM1_GSI);
        let ports = IO::new(COM1_PORT, COM1_PORT, 1, 8);
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&ports, &interrupt]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The control method power button (ACPI 6.5 section 4.8.2.2.1.2).
struct PowerButton;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            "PWRB".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                &Name::new("_UID".into(), &0u8),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The generic event device (ACPI 6.5 section 5.6.9): its one interrupt presses the power button.
struct GenericEvents;

impl Aml for GenericEvents {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let interrupt = Interrupt::new(true, true, false, false, GED_GSI);
        let button = Path::new("PWRB");
        let press = Notify::new(&button, &NOTIFY_PRESSED);
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                &Method::new("_EVT".into(), 1, true, vec![&press]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

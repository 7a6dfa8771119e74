//! ECAM, BAR sizing and moves, MSI-X masking.

use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::msix::NO_VECTOR;
use super::*;
use crate::bus::Bus;
use crate::kvm::interrupts::{InterruptFabric, MsiMessage, MsiRoute};

const ECAM: u64 = 0xe000_0000;
const WINDOW: MmioWindow = MmioWindow {
    base: 0xc000_0000,
    len: 0x2_0000,
};
const HIGH_WINDOW: MmioWindow = MmioWindow {
    base: 0x10_0000_0000,
    len: 1 << 30,
};
const BAR_LEN: u64 = 0x8000;
const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u64 = 1 << 1;
const BAR0: u64 = 0x10;
const NOTHING: [u32; 0] = [];

/// A function whose BAR is plain memory.
struct Plain {
    space: Mutex<ConfigSpace>,
    bar: Mutex<Vec<u8>>,
}

impl Plain {
    fn new(device: u16) -> Arc<Self> {
        let identity = Identity {
            vendor: 0x1af4,
            device,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 7,
        };
        Arc::new(Self {
            space: Mutex::new(ConfigSpace::new(&identity).with_bar(BAR_LEN)),
            bar: Mutex::new(vec![0; BAR_LEN as usize]),
        })
    }
}

impl Function for Plain {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.space.lock().unwrap().read(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) {
        self.space.lock().unwrap().write(offset, data);
    }
    fn bar_len(&self) -> u64 {
        BAR_LEN
    }
    fn place_bar(&self, gpa: u64) {
        self.space.lock().unwrap().place_bar(gpa);
    }
    fn bar_gpa(&self) -> Option<u64> {
        self.space.lock().unwrap().bar_gpa()
    }
    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let start = offset as usize;
        data.copy_from_slice(&self.bar.lock().unwrap()[start..start + data.len()]);
    }
    fn write_bar(&self, offset: u64, data: &[u8]) {
        let start = offset as usize;
        self.bar.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
    }
}

struct Machine {
    root_bus: Arc<RootBus>,
    bus: Bus,
}

impl Machine {
    fn new(functions: u16) -> Self {
        let root_bus = RootBus::new(Layout {
            ecam: MmioWindow {
                base: ECAM,
                len: 1 << 20,
            },
            windows: vec![WINDOW, HIGH_WINDOW],
        });
        for device in 0..functions {
            root_bus.add(Plain::new(0x1040 + device)).unwrap();
        }
        let mut bus = Bus::default();
        for range in root_bus.ranges() {
            bus.insert(range.base, range.len, range.device).unwrap();
        }
        Self { root_bus, bus }
    }

    fn read(&self, gpa: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.bus.read(gpa, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    fn write(&self, gpa: u64, len: usize, value: u64) {
        self.bus.write(gpa, &value.to_le_bytes()[..len]);
    }

    fn bar(&self, slot: u64) -> u64 {
        let function = function_gpa(slot, 0);
        self.read(function + BAR0, 4) & !0xf | self.read(function + BAR0 + 4, 4) << 32
    }
}

fn function_gpa(slot: u64, function: u64) -> u64 {
    ECAM + (slot << 15) + (function << 12)
}

#[test]
fn host_bridge_is_at_slot_0_and_functions_follow() {
    let machine = Machine::new(2);
    assert_eq!(machine.read(function_gpa(0, 0), 4), 0x0008_1b36);
    assert_eq!(machine.read(function_gpa(0, 0) + 8, 4), 0x0600_0000);
    assert_eq!(machine.read(function_gpa(1, 0), 4), 0x1040_1af4);
    assert_eq!(machine.read(function_gpa(2, 0), 2), 0x1af4);
    assert_eq!(machine.read(function_gpa(2, 0) + 2, 2), 0x1041);
    assert_eq!(
        machine.read(function_gpa(2, 0) + 0xb, 1),
        0x01,
        "base class"
    );
    assert_eq!(machine.read(function_gpa(2, 0) + 0xe, 1), 0, "header type");
}

#[test]
fn absent_functions_read_as_all_ones() {
    let machine = Machine::new(1);
    for gpa in [
        function_gpa(2, 0),
        function_gpa(1, 1),
        function_gpa(31, 7),
        ECAM + 0xf_fffc,
    ] {
        assert_eq!(machine.read(gpa, 4), 0xffff_ffff, "{gpa:#x}");
        machine.write(gpa, 4, 0);
    }
}

#[test]
fn extended_space_ends_the_list_of_extended_capabilities() {
    let machine = Machine::new(1);
    assert_eq!(machine.read(function_gpa(1, 0) + 0x100, 4), 0);
    assert_eq!(machine.read(function_gpa(1, 0) + 0xffc, 4), 0);
}

#[test]
fn identity_is_read_only() {
    let machine = Machine::new(1);
    machine.write(function_gpa(1, 0), 4, 0);
    machine.write(function_gpa(1, 0) + 8, 4, 0);
    assert_eq!(machine.read(function_gpa(1, 0), 4), 0x1040_1af4);
    assert_eq!(machine.read(function_gpa(1, 0) + 8, 4), 0x0180_0001);
}

#[test]
fn bar_reports_its_size_and_takes_its_address_back() {
    let machine = Machine::new(1);
    let function = function_gpa(1, 0);
    let low = machine.read(function + BAR0, 4);
    assert_eq!(low & 0xf, 0b100, "memory, 64 bit, not prefetchable");
    machine.write(function + BAR0, 4, 0xffff_ffff);
    machine.write(function + BAR0 + 4, 4, 0xffff_ffff);
    let mask = machine.read(function + BAR0, 4) & !0xf | machine.read(function + BAR0 + 4, 4) << 32;
    assert_eq!((!mask).wrapping_add(1), BAR_LEN);
    machine.write(function + BAR0, 4, low);
    machine.write(function + BAR0 + 4, 4, 0);
    assert_eq!(machine.bar(1), low & !0xf);
    assert_eq!(
        machine.read(function + BAR0 + 8, 4),
        0,
        "there is no third BAR"
    );
}

#[test]
fn bars_fill_the_first_window_then_the_next_without_overlap() {
    let machine = Machine::new(6);
    let mut bars: Vec<u64> = (1..=6).map(|slot| machine.bar(slot)).collect();
    assert!(bars.iter().all(|bar| bar.is_multiple_of(BAR_LEN)));
    let inside = |window: MmioWindow| {
        let bars = bars
            .iter()
            .filter(|bar| (window.base..window.base + window.len).contains(*bar));
        bars.count()
    };
    assert_eq!((inside(WINDOW), inside(HIGH_WINDOW)), (4, 2));
    bars.dedup();
    assert_eq!(bars.len(), 6);
}

#[test]
fn bus_takes_31_functions() {
    let machine = Machine::new(31);
    let last = machine.root_bus.add(Plain::new(0x1050));
    assert_eq!(last, Err(BusFull::Slots));
}

#[test]
fn moved_bar_answers_at_its_new_address_only() {
    let machine = Machine::new(2);
    let (function, old) = (function_gpa(2, 0), machine.bar(2));
    machine.write(old + 0x10, 4, 0x1234_5678);
    let new = HIGH_WINDOW.base + 5 * BAR_LEN;
    machine.write(function + COMMAND, 2, 0);
    machine.write(function + BAR0, 4, new & 0xffff_ffff);
    machine.write(function + BAR0 + 4, 4, new >> 32);
    assert_eq!(machine.read(new + 0x10, 4), 0xffff_ffff, "decoding is off");
    machine.write(function + COMMAND, 2, COMMAND_MEMORY);
    assert_eq!(machine.read(new + 0x10, 4), 0x1234_5678);
    assert_eq!(machine.read(old + 0x10, 4), 0xffff_ffff);
    machine.root_bus.place_bars();
    assert_eq!(
        machine.read(old + 0x10, 4),
        0x1234_5678,
        "a reset undoes the move"
    );
}

#[test]
fn access_across_the_end_of_a_bar_is_nobodys() {
    let machine = Machine::new(1);
    let end = machine.bar(1) + BAR_LEN;
    assert_eq!(machine.read(end - 4, 4), 0);
    assert_eq!(machine.read(end - 4, 8), u64::MAX);
}

#[test]
fn capabilities_form_a_list() {
    let mut space = ConfigSpace::new(&Identity::HOST_BRIDGE);
    assert_eq!(space.read_u16(6) & 1 << 4, 0);
    let first = space.add_capability(9, &[5, 6, 7], &[0xff, 0, 0]);
    let second = space.add_capability(0x11, &[1], &[0]);
    assert_ne!(
        space.read_u16(6) & 1 << 4,
        0,
        "the status register says that there is a list"
    );
    assert_eq!(u32::from(first), space.read_u32(0x34));
    assert_eq!(space.read_u16(first), second << 8 | 9);
    assert_eq!(space.read_u16(second), 0x11);
    space.write(first + 2, &[0xaa, 0xaa]);
    assert_eq!(space.read_u16(first + 2), 0x06aa);
}

/// Remembers routes, and acts as KVM's irqfd when asked what was delivered.
#[derive(Default)]
struct Recorder(Mutex<Vec<(EventFd, Option<MsiMessage>)>>);

impl InterruptFabric for Recorder {
    fn add_msi_route(&self, irqfd: &EventFd) -> io::Result<MsiRoute> {
        let mut routes = self.0.lock().unwrap();
        routes.push((irqfd.try_clone()?, None));
        Ok(MsiRoute(routes.len() as u32 - 1))
    }
    fn set_msi_route(
        &self,
        route: MsiRoute,
        _irqfd: &EventFd,
        message: Option<MsiMessage>,
    ) -> io::Result<()> {
        self.0.lock().unwrap()[route.0 as usize].1 = message;
        Ok(())
    }
    fn add_doorbell(&self, _gpa: u64, _doorbell: &EventFd) -> io::Result<()> {
        unreachable!("MSI-X has no doorbells")
    }
    fn remove_doorbell(&self, _gpa: u64, _doorbell: &EventFd) -> io::Result<()> {
        unreachable!("MSI-X has no doorbells")
    }
}

impl Recorder {
    fn delivered(&self) -> Vec<u32> {
        let routes = self.0.lock().unwrap();
        let deliverable = routes
            .iter()
            .filter_map(|(irqfd, message)| Some((irqfd, (*message)?)));
        deliverable
            .filter(|(irqfd, _)| irqfd.read().is_ok())
            .map(|(_, message)| message.data)
            .collect()
    }
}

/// Forty sources; source 33 is bound to vector 33, whose message has data 0x33.
fn msix() -> (Msix, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    let mut msix = Msix::new(40, recorder.clone()).unwrap();
    msix.set_vector(33, 33);
    write_dword(&mut msix, 33 * 16, 0xfee0_1000);
    write_dword(&mut msix, 33 * 16 + 8, 0x33);
    (msix, recorder)
}

fn write_dword(msix: &mut Msix, offset: u64, value: u32) {
    msix.write_table(offset, &value.to_le_bytes());
}

fn set_masked(msix: &mut Msix, masked: bool) {
    write_dword(msix, 33 * 16 + 12, u32::from(masked));
}

fn pending(msix: &Msix) -> u64 {
    let mut bits = [0; 8];
    msix.read_pba(0, &mut bits);
    u64::from_le_bytes(bits)
}

#[test]
fn vectors_start_masked_and_msix_starts_disabled() {
    let (mut msix, recorder) = msix();
    msix.irqfd(33).write(1).unwrap();
    assert_eq!(recorder.delivered(), NOTHING);
    msix.set_control(true, false);
    assert_eq!(recorder.delivered(), NOTHING, "the vector is still masked");
    set_masked(&mut msix, false);
    assert_eq!(recorder.delivered(), [0x33]);
}

#[test]
fn vector_and_function_mask_hold_an_interrupt_back_and_keep_it_pending() {
    let (mut msix, recorder) = msix();
    msix.set_control(true, false);
    set_masked(&mut msix, false);
    assert_eq!(pending(&msix), 0);
    set_masked(&mut msix, true);
    msix.irqfd(33).write(1).unwrap();
    msix.irqfd(33).write(1).unwrap();
    assert_eq!(recorder.delivered(), NOTHING);
    assert_eq!((pending(&msix), pending(&msix)), (1 << 33, 1 << 33));
    msix.set_control(true, true);
    set_masked(&mut msix, false);
    assert_eq!(recorder.delivered(), NOTHING, "the function is masked");
    assert_eq!(pending(&msix), 1 << 33);
    msix.set_control(true, false);
    assert_eq!(
        recorder.delivered(),
        [0x33],
        "once, however often it was raised"
    );
    assert_eq!(pending(&msix), 0);
}

#[test]
fn message_that_is_changed_while_masked_is_used_afterwards() {
    let (mut msix, recorder) = msix();
    msix.set_control(true, false);
    set_masked(&mut msix, true);
    msix.irqfd(33).write(1).unwrap();
    write_dword(&mut msix, 33 * 16 + 8, 0x44);
    set_masked(&mut msix, false);
    assert_eq!(recorder.delivered(), [0x44]);
}

#[test]
fn sources_may_share_a_vector() {
    let (mut msix, recorder) = msix();
    msix.set_control(true, false);
    set_masked(&mut msix, false);
    msix.set_vector(2, 33);
    msix.irqfd(2).write(1).unwrap();
    assert_eq!(recorder.delivered(), [0x33]);
    msix.irqfd(33).write(1).unwrap();
    assert_eq!(recorder.delivered(), [0x33]);
}

#[test]
fn source_without_a_vector_raises_nothing_then_or_later() {
    let (mut msix, recorder) = msix();
    msix.set_control(true, false);
    set_masked(&mut msix, false);
    msix.set_vector(33, NO_VECTOR);
    assert_eq!(msix.vector(33), NO_VECTOR);
    msix.irqfd(33).write(1).unwrap();
    assert_eq!(recorder.delivered(), NOTHING);
    msix.set_vector(33, 33);
    assert_eq!(recorder.delivered(), NOTHING, "nobody waited for it");
    msix.set_vector(33, 40);
    assert_eq!(msix.vector(33), NO_VECTOR, "vector 40 does not exist");
    assert_eq!(msix.vector(99), NO_VECTOR, "source 99 does not exist");
}

#[test]
fn table_reads_back_what_was_written() {
    let (mut msix, _recorder) = msix();
    msix.write_table(39 * 16, &0x1_fee0_2003_u64.to_le_bytes());
    let mut quad = [0; 8];
    msix.read_table(39 * 16, &mut quad);
    assert_eq!(
        u64::from_le_bytes(quad),
        0x1_fee0_2000,
        "messages are dwords, so aligned"
    );
    let mut control = [0; 4];
    msix.read_table(39 * 16 + 12, &mut control);
    assert_eq!(u32::from_le_bytes(control), 1);
    for (offset, len) in [
        (40 * 16, 4),
        (39 * 16 + 2, 4),
        (39 * 16, 2),
        (u64::MAX - 7, 8),
    ] {
        let mut data = vec![0xff; len];
        msix.write_table(offset, &data);
        msix.read_table(offset, &mut data);
        assert_eq!(data, vec![0; len], "offset {offset:#x}, {len} bytes");
    }
}

#[test]
fn reset_unbinds_masks_and_forgets_what_was_pending() {
    let (mut msix, recorder) = msix();
    msix.set_control(true, false);
    msix.irqfd(33).write(1).unwrap();
    msix.reset();
    assert_eq!(msix.state().vectors, [NO_VECTOR; 40]);
    assert!(
        msix.state()
            .entries
            .iter()
            .all(|entry| entry.masked && entry.address == 0)
    );
    msix.set_control(true, false);
    set_masked(&mut msix, false);
    msix.set_vector(33, 33);
    assert_eq!(recorder.delivered(), NOTHING);
}

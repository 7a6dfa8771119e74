//! The machine as hand-written guests see it: serial port, power registers, vCPUs, reset.

use crate::tiny_guest::{Code, Vmm, kvm_is_usable};
use nix::sys::signal::{Signal, kill};

const SERIAL_LINE_STATUS: [u8; 2] = 0x3fdu16.to_le_bytes();
const SERIAL_DATA: [u8; 2] = 0x3f8u16.to_le_bytes();

#[test]
fn guest_prints_and_switches_itself_off() {
    if !kvm_is_usable("guest_prints_and_switches_itself_off") {
        return;
    }
    let ended = Vmm::start(&Code::default().print("hello\n").shutdown(), &[]).wait();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(ended.console, "hello\n");
    assert!(ended.exit_file.contains("\"guest-shutdown\""), "{ended:?}");
    assert!(!ended.socket_left);
}

#[test]
fn every_reset_register_boots_the_guest_again_from_clean_memory() {
    if !kvm_is_usable("every_reset_register_boots_the_guest_again_from_clean_memory") {
        return;
    }
    for (port, value) in [(0x602, 1), (0xcf9, 6), (0x64, 0xfe)] {
        // Prints '0' plus what is in memory, and changes that, then resets.
        let code = Code::default()
            .raw(&[0x8a, 0x04, 0x25])
            .raw(&0x50_0000u32.to_le_bytes()) // mov al, [0x500000]
            .raw(&[0x04, b'0', 0x66, 0xba])
            .raw(&SERIAL_DATA)
            .raw(&[0xee]) // add al, '0'; out
            .store32(0x50_0000, 5)
            .out(port, value)
            .halt();
        let vmm = Vmm::start(&code, &["--cpus", "2"]);
        assert_eq!(vmm.read(4), "0000", "port {port:#x}");
        kill(vmm.pid(), Signal::SIGTERM).unwrap();
        let ended = vmm.wait();
        assert!(ended.status.success(), "{ended:?}");
        assert!(ended.exit_file.contains("\"stop-request\""), "{ended:?}");
    }
}

/// Linux does this when it finds hardware-reduced ACPI without EFI.
#[test]
fn jump_to_the_reset_vector_in_real_mode_resets() {
    if !kvm_is_usable("jump_to_the_reset_vector_in_real_mode_resets") {
        return;
    }
    // A vCPU that gets a SIPI with vector 0xff starts in real mode at ff00:0000, which is at 0xff000: a slide of
    // no-ops leads from there to the vector. This guest may write there, as it owns all memory.
    let slide = (0xf_f000..0xf_fff0)
        .step_by(4)
        .fold(Code::default().print("x"), |code, at| {
            code.store32(at, 0x9090_9090)
        });
    let code = slide
        .store32(0xfee0_00f0, 0x1ff) // local APIC on
        .store32(0xfee0_0300, 0xc_4500) // INIT to all others
        .store32(0xfee0_0300, 0xc_46ff) // SIPI to all others, vector 0xff
        .raw(&[0xf3, 0x90, 0xeb, 0xfc]); // pause for ever
    let vmm = Vmm::start(&code, &["--cpus", "2"]);
    assert_eq!(vmm.read(3), "xxx");
}

#[test]
fn triple_fault_resets_a_guest_that_has_printed_and_fails_one_that_has_not() {
    if !kvm_is_usable("triple_fault_resets_a_guest_that_has_printed_and_fails_one_that_has_not") {
        return;
    }
    // The interrupt descriptor table is empty.
    let fault = [0x0f, 0x0b]; // ud2
    let vmm = Vmm::start(&Code::default().print("x").raw(&fault), &[]);
    assert_eq!(vmm.read(3), "xxx");
    drop(vmm);
    let ended = Vmm::start(&Code::default().raw(&fault), &[]).wait();
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        ended
            .stderr
            .iter()
            .any(|line| line.contains("triple fault")),
        "{ended:?}"
    );
    assert!(ended.exit_file.contains("\"vmm-error\""), "{ended:?}");
}

#[test]
fn typed_bytes_reach_the_guest() {
    if !kvm_is_usable("typed_bytes_reach_the_guest") {
        return;
    }
    // Echoes what comes in, until 'q'.
    let code = Code::default()
        .raw(&[0x66, 0xba])
        .raw(&SERIAL_LINE_STATUS) // again: mov dx, line status
        .raw(&[0xec, 0xa8, 1, 0x74, 0xfb]) // wait: in al, dx; test al, 1; jz wait
        .raw(&[0x66, 0xba])
        .raw(&SERIAL_DATA)
        .raw(&[0xec, 0xee, 0x3c, b'q', 0x75, 0xed]) // in al, dx; out dx, al; cmp al, 'q'; jne again
        .shutdown();
    let mut vmm = Vmm::start(&code, &[]);
    let typed = "0123456789".repeat(20) + "q";
    vmm.type_in(typed.as_bytes());
    let ended = vmm.wait();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(ended.console, typed);
}

#[test]
fn string_output_keeps_every_byte() {
    if !kvm_is_usable("string_output_keeps_every_byte") {
        return;
    }
    // mov esi, text; mov ecx, 5; mov dx, 0x3f8; cld; rep outsb
    let code = Code::default()
        .store32(0x50_0000, u32::from_le_bytes(*b"wort"))
        .store32(0x50_0004, u32::from(b'h'));
    let code = code
        .raw(&[0xbe])
        .raw(&0x50_0000u32.to_le_bytes())
        .raw(&[0xb9, 5, 0, 0, 0, 0x66, 0xba]);
    let code = code.raw(&SERIAL_DATA).raw(&[0xfc, 0xf3, 0x6e]).shutdown();
    let ended = Vmm::start(&code, &[]).wait();
    assert_eq!(ended.console, "worth", "{ended:?}");
}

#[test]
fn addresses_of_nobody_read_as_ones() {
    if !kvm_is_usable("addresses_of_nobody_read_as_ones") {
        return;
    }
    // mov ebx, 0xd0000000; mov eax, [rbx]; inc eax; jz ok; print "bad"; ok: print "ok"
    let bad = Code::default().print("bad").0;
    let code = Code::default().raw(&[
        0xbb,
        0,
        0,
        0,
        0xd0,
        0x8b,
        0x03,
        0xff,
        0xc0,
        0x74,
        bad.len() as u8,
    ]);
    let ended = Vmm::start(&code.raw(&bad).print("ok").shutdown(), &[]).wait();
    assert_eq!(ended.console, "ok", "{ended:?}");
}

#[test]
fn all_vcpus_start_on_init_and_sipi() {
    if !kvm_is_usable("all_vcpus_start_on_init_and_sipi") {
        return;
    }
    const CPUS: u8 = 4;
    // In real mode at 0x1000: xor ax, ax; mov ds, ax; lock inc byte [0x7f00]; hlt; jmp.
    let trampoline = [
        0x31, 0xc0, 0x8e, 0xd8, 0xf0, 0xfe, 0x06, 0x00, 0x7f, 0xf4, 0xeb, 0xfd,
    ];
    let code = trampoline
        .chunks(4)
        .zip((0x1000..).step_by(4))
        .fold(Code::default(), |code, (bytes, at)| {
            code.store32(at, u32::from_le_bytes(bytes.try_into().unwrap()))
        });
    let code = code
        .store32(0x7f00, 0)
        .store32(0xfee0_00f0, 0x1ff) // local APIC on
        .store32(0xfee0_0300, 0xc_4500) // INIT to all others
        .store32(0xfee0_0300, 0xc_4601) // SIPI to all others, vector 1
        .raw(&[0xf3, 0x90, 0x80, 0x3c, 0x25])
        .raw(&0x7f00u32.to_le_bytes()) // wait: pause; cmp byte [0x7f00],
        .raw(&[CPUS - 1, 0x72, 0xf4]) // CPUS - 1; jb wait
        .print("all")
        .shutdown();
    let ended = Vmm::start(&code, &["--cpus", &CPUS.to_string()]).wait();
    assert_eq!(ended.console, "all", "{ended:?}");
}

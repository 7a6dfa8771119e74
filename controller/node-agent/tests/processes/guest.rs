//! Guest kernels of a few instructions: ELF files entered in 64-bit mode.

use std::path::{Path, PathBuf};

/// Where it is loaded and entered: the first byte above the legacy megabyte.
const LOAD_ADDRESS: u64 = 0x10_0000;
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;

/// What each of these kernels writes to its console first.
pub(crate) const GREETING: &str = "hello\n";

/// Greets, then sleeps for ever.
pub(crate) fn sleeper(dir: &Path) -> PathBuf {
    write(dir, "sleeper", &[greeting(), halt()].concat())
}

/// Greets, then switches itself off.
pub(crate) fn quitter(dir: &Path) -> PathBuf {
    write(dir, "quitter", &[greeting(), power_off(), halt()].concat())
}

/// Greets, then switches itself off when a byte arrives on its console.
pub(crate) fn listener(dir: &Path) -> PathBuf {
    let wait_for_byte = [
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd (line status)
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1 (data ready)
        0x74, 0xfb, // jz back to in
    ];
    write(
        dir,
        "listener",
        &[greeting(), wait_for_byte.to_vec(), power_off(), halt()].concat(),
    )
}

/// Greets, then writes the first sector of its first disk again and again, one request at a time, and prints the
/// status of each: `0` for done, `1` for an I/O error.
pub(crate) fn disk_writer(dir: &Path) -> PathBuf {
    const ECAM: u32 = 0xe000_8000; // bus 0, device 1
    const BAR: u32 = 0xc000_0000;
    const NOTIFY: u32 = BAR + 0x3000;
    let [desc, avail, used, header, data, status] =
        [0u32, 1, 2, 3, 4, 5].map(|page| 0x20_0000 + page * 0x1000);
    let chain = |index: u32, gpa: u32, len: u32, flags: u32, next: u32| {
        let at = desc + index * 16;
        [
            (at, gpa),
            (at + 4, 0),
            (at + 8, len),
            (at + 12, next << 16 | flags),
        ]
    };
    let mut code = greeting();
    // Low enough for the identity mapping, then memory space and bus mastering on.
    code.extend([(ECAM + 0x10, BAR), (ECAM + 0x14, 0)].map(store32).concat());
    code.extend(store16((ECAM + 4, 6)));
    // Virtio 1.2 section 3.1.1: reset, acknowledge, driver, VERSION_1 alone, FEATURES_OK.
    code.extend([0, 1, 3].map(|value| store8((BAR + 0x14, value))).concat());
    let features = [(BAR + 8, 0), (BAR + 0xc, 0), (BAR + 8, 1), (BAR + 0xc, 1)];
    code.extend(features.map(store32).concat());
    code.extend(store8((BAR + 0x14, 0xb)));
    code.extend(chain(0, header, 16, 1, 1).map(store32).concat());
    code.extend(chain(1, data, 512, 1, 2).map(store32).concat());
    code.extend(chain(2, status, 1, 2, 0).map(store32).concat());
    code.extend(store32((header, 1))); // VIRTIO_BLK_T_OUT
    code.extend(store16((avail, 1))); // no interrupts
    code.extend([(BAR + 0x16, 0), (BAR + 0x18, 4)].map(store16).concat());
    let areas = [(0x20, desc), (0x28, avail), (0x30, used)];
    let areas = areas.map(|(at, gpa)| [(BAR + at, gpa), (BAR + at + 4, 0)].map(store32).concat());
    code.extend(areas.concat());
    code.extend(store16((BAR + 0x1c, 1))); // queue enable
    code.extend(store8((BAR + 0x14, 0xf)));
    code.extend([0x31, 0xdb]); // xor ebx, ebx
    let mut round = store8((status, 0xff));
    round.extend([0xff, 0xc3, 0x66, 0x89, 0x1c, 0x25]); // inc ebx; mov [avail idx], bx
    round.extend((avail + 2).to_le_bytes());
    round.extend(store16((NOTIFY, 0)));
    round.extend([0xf3, 0x90, 0x66, 0x8b, 0x0c, 0x25]); // pause; mov cx, [used idx]
    round.extend((used + 2).to_le_bytes());
    round.extend([0x66, 0x39, 0xd9, 0x75, 0xf1]); // cmp cx, bx; jne back to pause
    round.extend([0x8a, 0x04, 0x25]); // mov al, [status]
    round.extend(status.to_le_bytes());
    round.extend([0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee]); // add al, '0'; out to COM1
    round.extend([0xb9, 0x00, 0x08, 0x00, 0x00, 0xe2, 0xfe]); // mov ecx, 2048; loop to itself
    let back = -(round.len() as i32 + 5);
    round.push(0xe9); // jmp to the next round
    round.extend(back.to_le_bytes());
    code.extend(round);
    write(dir, "disk-writer", &code)
}

/// mov eax, address; mov dword [rax], value
fn store32((address, value): (u32, u32)) -> Vec<u8> {
    [
        &[0xb8][..],
        &address.to_le_bytes(),
        &[0xc7, 0x00],
        &value.to_le_bytes(),
    ]
    .concat()
}

fn store16((address, value): (u32, u16)) -> Vec<u8> {
    [
        &[0xb8][..],
        &address.to_le_bytes(),
        &[0x66, 0xc7, 0x00],
        &value.to_le_bytes(),
    ]
    .concat()
}

fn store8((address, value): (u32, u8)) -> Vec<u8> {
    [&[0xb8][..], &address.to_le_bytes(), &[0xc6, 0x00, value]].concat()
}

fn greeting() -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8 (COM1)
    for byte in GREETING.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code
}

fn power_off() -> Vec<u8> {
    vec![
        0x66, 0xba, 0x00, 0x06, // mov dx, 0x600 (ACPI sleep control)
        0xb0, 0x34, // mov al, S5 << 2 | enable
        0xee, // out dx, al
    ]
}

fn halt() -> Vec<u8> {
    vec![0xf4, 0xeb, 0xfd] // hlt; jmp back to it
}

fn write(dir: &Path, name: &str, code: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, elf(code)).unwrap();
    path
}

/// One loadable segment that holds the whole file, headers included.
fn elf(code: &[u8]) -> Vec<u8> {
    let start = HEADER_BYTES + PROGRAM_HEADER_BYTES;
    let len_bytes = (start + code.len()) as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec(); // 64 bits, little-endian
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // ET_EXEC
    file.extend(62u16.to_le_bytes()); // EM_X86_64
    file.extend(1u32.to_le_bytes());
    file.extend((LOAD_ADDRESS + start as u64).to_le_bytes()); // entry
    file.extend((HEADER_BYTES as u64).to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes()); // no sections
    file.extend(0u32.to_le_bytes());
    for size in [
        HEADER_BYTES as u16,
        PROGRAM_HEADER_BYTES as u16,
        1,
        64,
        0,
        0,
    ] {
        file.extend(size.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // PT_LOAD
    file.extend(7u32.to_le_bytes()); // read, write, execute
    for value in [0, LOAD_ADDRESS, LOAD_ADDRESS, len_bytes, len_bytes, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.extend(code);
    file
}

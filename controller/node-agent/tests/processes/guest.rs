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

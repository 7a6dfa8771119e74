//! The guest: a kernel of a few instructions that writes its disk all the time. ELF, entered in 64-bit
//! mode.
//!
//! Its n-th write goes to block n modulo [`BLOCKS`], and begins with n, in 32 bits.

use std::path::Path;

/// Where it is loaded and entered: the first byte above the legacy megabyte.
const LOAD_ADDRESS: u64 = 0x10_0000;
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// How many blocks of [`BLOCK_BYTES`] it writes in turn.
pub const BLOCKS: u32 = 256;
/// A sector.
pub const BLOCK_BYTES: usize = 512;

/// Writes the kernel to a file.
///
/// # Errors
/// When that cannot be made.
pub fn write_kernel(path: &Path) -> std::io::Result<()> {
    std::fs::write(path, elf(&code()))
}

fn code() -> Vec<u8> {
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
    let mut code = Vec::new();
    // Low enough for the identity mapping, then memory space and bus mastering on.
    code.extend([(ECAM + 0x10, BAR), (ECAM + 0x14, 0)].map(store32).concat());
    code.extend(store16((ECAM + 4, 6)));
    // Virtio 1.2 section 3.1.1: reset, acknowledge, driver, VERSION_1 alone, FEATURES_OK.
    code.extend([0, 1, 3].map(|value| store8((BAR + 0x14, value))).concat());
    let features = [(BAR + 8, 0), (BAR + 0xc, 0), (BAR + 8, 1), (BAR + 0xc, 1)];
    code.extend(features.map(store32).concat());
    code.extend(store8((BAR + 0x14, 0xb)));
    code.extend(chain(0, header, 16, 1, 1).map(store32).concat());
    code.extend(
        chain(1, data, BLOCK_BYTES as u32, 1, 2)
            .map(store32)
            .concat(),
    );
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
    round.extend([0xff, 0xc3, 0x89, 0xd8, 0x25]); // inc ebx; mov eax, ebx; and eax, ...
    round.extend((BLOCKS - 1).to_le_bytes());
    round.extend([0x89, 0x04, 0x25]); // mov [header's sector], eax
    round.extend((header + 8).to_le_bytes());
    round.extend([0x89, 0x1c, 0x25]); // mov [data], ebx
    round.extend(data.to_le_bytes());
    round.extend([0x66, 0x89, 0x1c, 0x25]); // mov [avail idx], bx
    round.extend((avail + 2).to_le_bytes());
    round.extend(store16((NOTIFY, 0)));
    round.extend([0xf3, 0x90, 0x66, 0x8b, 0x0c, 0x25]); // pause; mov cx, [used idx]
    round.extend((used + 2).to_le_bytes());
    round.extend([0x66, 0x39, 0xd9, 0x75, 0xf1]); // cmp cx, bx; jne back to pause
    round.extend([0x80, 0x3c, 0x25]); // cmp byte [status], 0
    round.extend(status.to_le_bytes());
    round.extend([0x00, 0x74, 0x03]); // je over the halt
    round.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp back to it: an error ends it
    let back = -(round.len() as i32 + 5);
    round.push(0xe9); // jmp to the next round
    round.extend(back.to_le_bytes());
    code.extend(round);
    code
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

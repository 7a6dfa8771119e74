//! Kernels made by hand, loaded into real guest RAM.

use std::io::Write;

use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::layout::{HIGH_RAM_START, PVH_START_INFO, ZERO_PAGE};
use crate::memory::MIN_SIZE_BYTES;

const CODE: &[u8] = b"\xf4kernel code";
const LOAD: u64 = 0x20_0000;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF with one segment at `LOAD`, and a PVH note if `pvh`.
fn elf(pvh: bool) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend([4u32, 4, 18].into_iter().flat_map(u32::to_le_bytes));
    note.extend(b"Xen\0");
    note.extend((LOAD as u32 + 1).to_le_bytes());
    let (note_at, code_at) = (64 + 2 * 56, 512);
    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend([2u16, 62].into_iter().flat_map(u16::to_le_bytes));
    image.extend(1u32.to_le_bytes());
    image.extend([LOAD, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    image.extend(0u32.to_le_bytes());
    image.extend(
        [64u16, 56, 2, 0, 0, 0]
            .into_iter()
            .flat_map(u16::to_le_bytes),
    );
    let mut segment = |kind: u32, offset: u64, addr: u64, len: u64| {
        image.extend([kind, 5].into_iter().flat_map(u32::to_le_bytes));
        image.extend(
            [offset, addr, addr, len, len, 4]
                .into_iter()
                .flat_map(u64::to_le_bytes),
        );
    };
    segment(1, code_at, LOAD, CODE.len() as u64);
    segment(if pvh { 4 } else { 0 }, note_at, 0, note.len() as u64);
    image.extend(note);
    image.resize(code_at as usize, 0);
    image.extend(CODE);
    image
}

/// A bzImage of protocol 2.15 with one setup sector.
fn bzimage(xloadflags: u16) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x20_0000u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image.extend(CODE);
    image
}

fn boot(
    kernel: &[u8],
    initramfs: Option<&[u8]>,
    protocol: ElfProtocol,
) -> (GuestRam, Result<Entry, BootError>) {
    let kernel = file(kernel);
    let initramfs = initramfs.map(file);
    let ram = GuestRam::new(MIN_SIZE_BYTES).unwrap();
    let entry = BootSource::open(
        kernel.path(),
        initramfs.as_ref().map(NamedTempFile::path),
        "console=ttyS0",
        protocol,
    )
    .and_then(|mut source| source.load(&ram, 0xe_0000));
    (ram, entry)
}

fn read<const N: usize>(ram: &GuestRam, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.memory()
        .read_slice(&mut bytes, GuestAddress(gpa))
        .unwrap();
    bytes
}

fn read_u64(ram: &GuestRam, gpa: u64) -> u64 {
    u64::from_le_bytes(read(ram, gpa))
}

#[test]
fn elf_with_note_boots_by_pvh_with_its_module() {
    let (ram, entry) = boot(&elf(true), Some(b"cpio"), ElfProtocol::Auto);
    let expected = Entry {
        protocol: Protocol::Pvh,
        rip: LOAD + 1,
        params: PVH_START_INFO,
    };
    assert_eq!(entry.unwrap(), expected);
    assert_eq!(read(&ram, LOAD), *CODE.first_chunk::<12>().unwrap());
    assert_eq!(read(&ram, PVH_START_INFO), 0x336e_c578u32.to_le_bytes());
    let module = read_u64(&ram, read_u64(&ram, PVH_START_INFO + 16));
    assert_eq!(&read(&ram, module), b"cpio");
    assert_eq!(
        &read(&ram, read_u64(&ram, PVH_START_INFO + 24)),
        b"console=ttyS0\0"
    );
}

#[test]
fn elf_without_note_boots_by_the_64_bit_protocol() {
    let (ram, entry) = boot(&elf(false), Some(b"cpio"), ElfProtocol::Auto);
    let expected = Entry {
        protocol: Protocol::Linux64,
        rip: LOAD,
        params: ZERO_PAGE,
    };
    assert_eq!(entry.unwrap(), expected);
    let ramdisk = u32::from_le_bytes(read(&ram, ZERO_PAGE + 0x218));
    assert_eq!(&read(&ram, ramdisk.into()), b"cpio");
    assert_eq!(read_u64(&ram, ZERO_PAGE + 0x70), 0xe_0000);
}

#[test]
fn protocol_can_be_chosen_for_an_elf() {
    assert_eq!(
        boot(&elf(true), None, ElfProtocol::Linux64)
            .1
            .unwrap()
            .protocol,
        Protocol::Linux64
    );
    assert!(matches!(
        boot(&elf(false), None, ElfProtocol::Pvh).1,
        Err(BootError::NoPvhEntry { .. })
    ));
}

#[test]
fn bzimage_enters_at_its_64_bit_entry_and_gets_its_header_back() {
    let (ram, entry) = boot(&bzimage(1), None, ElfProtocol::Auto);
    let expected = Entry {
        protocol: Protocol::Linux64,
        rip: 0x10_0200,
        params: ZERO_PAGE,
    };
    assert_eq!(entry.unwrap(), expected);
    assert_eq!(read(&ram, 0x10_0000), *CODE.first_chunk::<12>().unwrap());
    assert_eq!(&read(&ram, ZERO_PAGE + 0x202), b"HdrS");
    assert_eq!(read(&ram, ZERO_PAGE + 0x206), 0x20fu16.to_le_bytes());
    assert_eq!(
        boot(&bzimage(0), None, ElfProtocol::Auto)
            .1
            .unwrap()
            .protocol,
        Protocol::Linux32
    );
}

#[test]
fn memory_map_leaves_out_the_hole_and_the_tables() {
    let ram = GuestRam::new(MIN_SIZE_BYTES).unwrap();
    let map = memory_map(&ram);
    assert!(
        map.windows(2)
            .all(|pair| pair[0].start + pair[0].len <= pair[1].start)
    );
    assert!(map.iter().all(|entry| entry.start != HIGH_RAM_START));
    assert_eq!(map[2].start + map[2].len, MIN_SIZE_BYTES);
}

#[test]
fn bad_kernels_are_refused_by_name() {
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 2048]] {
        let err = boot(bytes, None, ElfProtocol::Auto).1.unwrap_err();
        assert!(matches!(err, BootError::NotAKernel { .. }), "{err}");
    }
    let truncated = boot(&elf(true)[..300], None, ElfProtocol::Auto)
        .1
        .unwrap_err();
    assert!(matches!(truncated, BootError::Load { .. }), "{truncated}");
    let missing = BootSource::open(Path::new("/nowhere/vmlinux"), None, "", ElfProtocol::Auto)
        .err()
        .unwrap();
    assert!(
        missing
            .to_string()
            .contains("cannot read kernel /nowhere/vmlinux"),
        "{missing}"
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let huge = vec![0; MIN_SIZE_BYTES as usize];
    let err = boot(&elf(true), Some(&huge), ElfProtocol::Auto)
        .1
        .unwrap_err();
    assert!(
        matches!(
            err,
            BootError::InitramfsTooLarge {
                size_mib: 16,
                memory_mib: 16,
                ..
            }
        ),
        "{err}"
    );
    let mut kernel = bzimage(1);
    kernel[0x260..0x264].copy_from_slice(&0x1000_0000u32.to_le_bytes());
    let err = boot(&kernel, None, ElfProtocol::Auto).1.unwrap_err();
    assert!(
        matches!(
            err,
            BootError::KernelTooLarge {
                needed_mib: 258,
                ..
            }
        ),
        "{err}"
    );
    let long = "x".repeat(70_000);
    let kernel = file(&elf(true));
    assert!(matches!(
        BootSource::open(kernel.path(), None, &long, ElfProtocol::Auto),
        Err(BootError::Cmdline(_))
    ));
}

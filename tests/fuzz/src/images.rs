//! A file that claims to be a qcow2 image: it is opened or refused, and what is read of it is bounded.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use qcow2::{Format, Image, Layer, Repair};

use crate::input::Input;

const READ_BYTES: u64 = 4096;
const MAX_WRITES: u32 = 4;

/// What is done to the image, and the image.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.byte();
    let places = [input.word(), input.word()];
    let file: File = memfd_create(c"image", MFdFlags::MFD_CLOEXEC)
        .expect("memory")
        .into();
    file.write_all_at(input.0, 0).expect("it is memory");
    if flags & 1 != 0 {
        let repair = if flags & 2 != 0 {
            Repair::Leaks
        } else {
            Repair::Nothing
        };
        let _ = qcow2::check(&file, repair);
    }
    let layer = Layer {
        file: Arc::new(file),
        format: Format::Qcow2,
        mem_align_bytes: None,
    };
    let read_only = flags & 4 != 0;
    let Ok(image) = Image::open(vec![layer], read_only) else {
        return;
    };
    let mut buffer = [0; READ_BYTES as usize];
    for (write, place) in places
        .into_iter()
        .cycle()
        .take(MAX_WRITES as usize)
        .enumerate()
    {
        let last = image.capacity_bytes().saturating_sub(READ_BYTES);
        let offset = (place % (last + 1)) & !511;
        let _ = image.read(offset, &mut &mut buffer[..]);
        if !read_only && write % 2 == 0 {
            let _ = image.write(offset, &&buffer[..]);
        }
    }
    if flags & 8 != 0 {
        let _ = image.settle();
    }
}

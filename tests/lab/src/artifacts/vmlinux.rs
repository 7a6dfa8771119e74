//! Takes the ELF `vmlinux` out of a bzImage.
//!
//! Booting the ELF saves a guest its own decompressor, which is most of a boot's time where
//! instructions are emulated. Layout: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".

use anyhow::{Context, Result, bail, ensure};

use crate::tool::filter;

/// The uncompressed kernel of a bzImage.
///
/// # Errors
/// When the image is no bzImage of boot protocol 2.08 or later, or its payload is damaged.
pub(crate) fn extract(bzimage: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        bzimage.len() > 0x260 && &bzimage[0x202..0x206] == b"HdrS",
        "not a bzImage"
    );
    let version = u16::from_le_bytes([bzimage[0x206], bzimage[0x207]]);
    ensure!(
        version >= 0x0208,
        "boot protocol {version:#x} is older than 2.08"
    );
    let setup_sects = if bzimage[0x1f1] == 0 {
        4
    } else {
        usize::from(bzimage[0x1f1])
    };
    let payload_offset = read_u32(bzimage, 0x248)? as usize;
    let payload_len = read_u32(bzimage, 0x24c)? as usize;
    let start = (setup_sects + 1) * 512 + payload_offset;
    let payload = start
        .checked_add(payload_len)
        .and_then(|end| bzimage.get(start..end))
        .context("the bzImage is shorter than its header says")?;
    let elf = decompress(payload)?;
    ensure!(
        elf.starts_with(b"\x7fELF"),
        "the bzImage's payload is not an ELF kernel"
    );
    Ok(elf)
}

/// The payload ends with its uncompressed length, four bytes that belong to no compressed format.
fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let body = payload.len().checked_sub(4).context("empty payload")?;
    match payload {
        [0x7f, b'E', b'L', b'F', ..] => Ok(payload.to_vec()),
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(&payload[4..body]),
        [0x1f, 0x8b, ..] => filter("gzip", &["-dc"], payload),
        [0xfd, b'7', b'z', ..] => filter("xz", &["-dc", "--single-stream"], payload),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", &["-dc"], &payload[..body]),
        [0x5d, 0x00, 0x00, ..] => filter("xz", &["-dc", "--format=lzma"], payload),
        _ => bail!("the kernel is compressed in a way this tool does not know"),
    }
}

/// lz4's legacy frame: blocks of at most 8 MiB uncompressed, each with its compressed length.
fn lz4_legacy(mut blocks: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    while !blocks.is_empty() {
        let len = read_u32(blocks, 0)? as usize;
        let block = blocks.get(4..4 + len).context("lz4: a block is cut off")?;
        lz4_block(block, &mut out)?;
        blocks = &blocks[4 + len..];
    }
    Ok(out)
}

/// One block; matches never reach before the block's own start.
fn lz4_block(block: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let start = out.len();
    let mut bytes = block.iter().copied();
    let mut next = || bytes.next().context("lz4: a sequence is cut off");
    let mut consumed = 0;
    while consumed < block.len() {
        let token = next()?;
        consumed += 1;
        let mut literals = usize::from(token >> 4);
        if literals == 15 {
            consumed += extend(&mut literals, &mut next)?;
        }
        out.reserve(literals);
        for _ in 0..literals {
            out.push(next()?);
        }
        consumed += literals;
        if consumed == block.len() {
            break;
        }
        let offset = usize::from(u16::from_le_bytes([next()?, next()?]));
        consumed += 2;
        let mut len = usize::from(token & 15);
        if len == 15 {
            consumed += extend(&mut len, &mut next)?;
        }
        ensure!(
            offset != 0 && offset <= out.len() - start,
            "lz4: a match reaches outside"
        );
        let from = out.len() - offset;
        for index in from..from + len + 4 {
            out.push(out[index]);
        }
    }
    Ok(())
}

/// Adds the length bytes that follow a nibble of 15; returns how many there were.
fn extend(len: &mut usize, next: &mut impl FnMut() -> Result<u8>) -> Result<usize> {
    let mut count = 0;
    loop {
        let byte = next()?;
        *len += usize::from(byte);
        count += 1;
        if byte != 255 {
            return Ok(count);
        }
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Result<u32> {
    let field = bytes.get(at..at + 4).context("a field is cut off")?;
    Ok(u32::from_le_bytes(field.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&0_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn lz4_literals_and_overlapping_match_decompress() {
        // "\x7fELF", then 8 bytes from 4 back, then the literal "!".
        let block = [0x44, 0x7f, b'E', b'L', b'F', 4, 0, 0x10, b'!'];
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend_from_slice(&(block.len() as u32).to_le_bytes());
        payload.extend_from_slice(&block);
        payload.extend_from_slice(&13_u32.to_le_bytes());
        assert_eq!(
            extract(&bzimage(&payload)).unwrap(),
            b"\x7fELF\x7fELF\x7fELF!"
        );
    }

    #[test]
    fn lz4_match_before_the_start_is_refused() {
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend_from_slice(&4_u32.to_le_bytes());
        payload.extend_from_slice(&[0x10, b'a', 9, 0]);
        payload.extend_from_slice(&0_u32.to_le_bytes());
        let error = extract(&bzimage(&payload)).unwrap_err();
        assert!(error.to_string().contains("outside"), "{error}");
    }

    #[test]
    fn a_length_beyond_the_image_is_refused() {
        let mut image = bzimage(b"\x7fELF");
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(extract(&image).is_err());
        assert!(extract(b"MZ").is_err());
    }
}

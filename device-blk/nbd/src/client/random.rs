//! Random bytes, for a process that may open no file.

use std::io;

/// Of the kernel. (The usual crates open a file where libc is linked statically, and this process
/// may open none.)
pub(super) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: `bytes` is N bytes to write to.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Cannot fail for so few bytes, as getrandom(2) says.
    assert_eq!(got, N as isize, "getrandom: {}", io::Error::last_os_error());
    bytes
}

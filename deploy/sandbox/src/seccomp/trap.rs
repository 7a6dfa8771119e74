//! `MORTISE_SECCOMP=trap`: says which system call was forbidden, then dies of it.

use std::io::Write;
use std::mem;
use std::ptr;

/// Replaces the handler of SIGSYS.
pub(super) fn install_handler() {
    // SAFETY: an all-zero sigaction is a valid one; the handler below is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction = report as *const () as usize;
        libc::sigaction(libc::SIGSYS, &action, ptr::null_mut());
    }
}

extern "C" fn report(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Where `si_syscall` stands: three ints, padding, `si_call_addr`, then `si_syscall`.
    const SI_SYSCALL_OFFSET_BYTES: usize = 24;
    // SAFETY: the kernel passes a valid siginfo_t of 128 bytes to an SA_SIGINFO handler.
    let syscall = unsafe {
        info.cast::<u8>()
            .add(SI_SYSCALL_OFFSET_BYTES)
            .cast::<i32>()
            .read_unaligned()
    };
    let mut line = [0_u8; 64];
    let mut rest = &mut line[..];
    // Writing into a slice allocates nothing; 64 bytes always suffice.
    let _ = writeln!(rest, "sandbox: forbidden system call {syscall}");
    let unused_bytes = rest.len();
    // SAFETY: `line` is live and this long; write and _exit are async-signal-safe.
    unsafe {
        libc::write(2, line.as_ptr().cast(), line.len() - unused_bytes);
        libc::_exit(128 + libc::SIGSYS);
    }
}

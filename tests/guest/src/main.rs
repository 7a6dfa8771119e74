//! Process 1 of test guests.
//!
//! Says "mortise-guest: userspace up" first, then does what `mortise.*` on the kernel command
//! line asks for, then powers off.

fn main() {
    println!("mortise-guest: userspace up");
    // SAFETY: ends this guest; there is nothing to keep.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
}

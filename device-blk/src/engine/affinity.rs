//! Which CPU a queue's thread runs on.

use std::io;

/// Binds the calling thread to one of `cpus`: queue `index` has the one in its turn. With none to
/// choose from it runs anywhere.
///
/// # Errors
/// The process may not use that CPU, or there is no such CPU.
pub(crate) fn pin_this_thread(cpus: &[usize], index: u16) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let cpu = cpus[usize::from(index) % cpus.len()];
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: a CPU set is plain data, for which all zeroes is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours, and the CPU was just found to fit.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is a valid value of the size given; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(
            error.kind(),
            format!("queue {index} cannot run on CPU {cpu}: {error}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_take_cpus_in_turn() {
        // On a thread of its own: the binding stays.
        std::thread::spawn(|| {
            pin_this_thread(&[], 3).unwrap();
            // SAFETY: sched_getcpu takes nothing.
            let cpu = unsafe { libc::sched_getcpu() } as usize;
            pin_this_thread(&[usize::MAX, cpu], 1).unwrap();
            // SAFETY: as above.
            assert_eq!(unsafe { libc::sched_getcpu() } as usize, cpu);
            assert!(pin_this_thread(&[usize::MAX, cpu], 2).is_err());
        })
        .join()
        .unwrap();
    }
}

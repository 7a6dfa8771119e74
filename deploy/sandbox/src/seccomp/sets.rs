//! Sets of system calls that profiles are composed of.

use super::{Arg, Syscalls};

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// What any Rust program with static glibc and threads needs: memory that is never executable,
/// locks, clocks, signals to itself, descriptors that are open already, waiting on them, starting
/// and ending threads, ending itself. Opening files fails with EACCES.
pub fn base() -> Syscalls {
    Syscalls::new()
        .allow(&[
            // Descriptors
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_readv,
            libc::SYS_preadv2,
            libc::SYS_writev,
            libc::SYS_close,
            libc::SYS_dup,
            libc::SYS_dup3,
            libc::SYS_fcntl,
            libc::SYS_fstat,
            libc::SYS_lseek,
            libc::SYS_pipe2,
            libc::SYS_eventfd2,
            libc::SYS_timerfd_create,
            libc::SYS_timerfd_settime,
            libc::SYS_epoll_create1,
            libc::SYS_epoll_ctl,
            libc::SYS_epoll_wait,
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_pwait2,
            libc::SYS_poll,
            libc::SYS_ppoll,
            // Memory
            libc::SYS_brk,
            libc::SYS_munmap,
            libc::SYS_mremap,
            libc::SYS_madvise,
            // Threads and locks
            libc::SYS_futex,
            libc::SYS_set_robust_list,
            libc::SYS_rseq,
            libc::SYS_sched_yield,
            libc::SYS_sched_getaffinity,
            libc::SYS_gettid,
            libc::SYS_getpid,
            libc::SYS_membarrier,
            libc::SYS_exit,
            libc::SYS_exit_group,
            // Time and chance
            libc::SYS_nanosleep,
            libc::SYS_clock_nanosleep,
            libc::SYS_clock_gettime,
            libc::SYS_clock_getres,
            libc::SYS_gettimeofday,
            libc::SYS_getrandom,
            libc::SYS_restart_syscall,
            // Signals
            libc::SYS_rt_sigaction,
            libc::SYS_rt_sigprocmask,
            libc::SYS_rt_sigreturn,
            libc::SYS_rt_sigtimedwait,
            libc::SYS_sigaltstack,
        ])
        .allow_if(libc::SYS_mmap, &[without(2, PROT_EXEC)])
        .allow_if(libc::SYS_mprotect, &[without(2, PROT_EXEC)])
        // Threads, never processes or namespaces. The flags of clone3 cannot be inspected, so
        // that glibc is made to fall back to clone.
        .allow_if(libc::SYS_clone, &[with(0, libc::CLONE_THREAD as u64)])
        .refuse(&[libc::SYS_clone3], libc::ENOSYS)
        // abort() and pthread_kill(): this process only.
        .allow_if(libc::SYS_tgkill, &[Arg::Int(0, std::process::id())])
        .allow_if(libc::SYS_prctl, &[Arg::Int(0, libc::PR_SET_NAME as u32)])
        .allow_if(libc::SYS_prctl, &[Arg::Int(0, libc::PR_SET_VMA as u32)])
        // By descriptor, not by path: fstat of newer C libraries, File::metadata.
        .refuse_if(
            libc::SYS_newfstatat,
            &[without(3, libc::AT_EMPTY_PATH as u64)],
            libc::EACCES,
        )
        .refuse_if(
            libc::SYS_statx,
            &[without(2, libc::AT_EMPTY_PATH as u64)],
            libc::EACCES,
        )
        .allow_ioctls(&[libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD, libc::TCGETS])
        // glibc's allocator and Rust's runtime look into /proc and /sys on the side.
        .refuse(
            &[
                libc::SYS_open,
                libc::SYS_openat,
                libc::SYS_access,
                libc::SYS_faccessat,
                libc::SYS_readlink,
                libc::SYS_readlinkat,
                libc::SYS_stat,
                libc::SYS_lstat,
                libc::SYS_getcwd,
                libc::SYS_unlink,
                libc::SYS_unlinkat,
            ],
            libc::EACCES,
        )
}

/// Unix stream sockets: to create, bind, listen, connect and accept, with descriptors in messages.
/// Creating a socket of any other family or type kills.
///
/// Landlock does not restrict connecting to a path, so a process with this set can talk to every
/// service whose socket its user may open. Processes that connect to nobody use [`tokio`].
pub fn unix_sockets() -> Syscalls {
    Syscalls::new()
        .allow_if(libc::SYS_socket, &unix_stream())
        .allow(&[libc::SYS_bind, libc::SYS_listen, libc::SYS_connect])
        .with(tokio())
}

/// Serving sockets that exist already, of whatever family: accept, send, receive, options.
pub fn open_sockets() -> Syscalls {
    Syscalls::new().allow(&[
        libc::SYS_accept4,
        libc::SYS_sendto,
        libc::SYS_recvfrom,
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        libc::SYS_shutdown,
    ])
}

/// A tokio runtime that serves open sockets and catches signals (through a socket pair). It
/// reaches nobody who did not connect to it: no socket can be created, bound or connected.
pub fn tokio() -> Syscalls {
    Syscalls::new()
        .allow_if(libc::SYS_socketpair, &unix_stream())
        .with(open_sockets())
}

/// Memory shared by descriptor: memfds and their seals, file-backed mappings of any size.
pub fn shared_memory() -> Syscalls {
    Syscalls::new().allow(&[
        libc::SYS_memfd_create,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_msync,
        libc::SYS_mlock,
        libc::SYS_mlock2,
        libc::SYS_munlock,
    ])
}

/// Opening, creating, renaming and removing files, as far as landlock lets.
pub fn files() -> Syscalls {
    Syscalls::new()
        .allow(&[
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_access,
            libc::SYS_faccessat,
            libc::SYS_readlink,
            libc::SYS_readlinkat,
            libc::SYS_stat,
            libc::SYS_lstat,
            libc::SYS_newfstatat,
            libc::SYS_statx,
            libc::SYS_getcwd,
            libc::SYS_getdents64,
            libc::SYS_mkdir,
            libc::SYS_mkdirat,
            libc::SYS_rename,
            libc::SYS_renameat,
            libc::SYS_renameat2,
            libc::SYS_unlink,
            libc::SYS_unlinkat,
            libc::SYS_umask,
        ])
        .with(file_io())
}

/// Reading and writing open files at offsets, and making them durable.
pub fn file_io() -> Syscalls {
    Syscalls::new().allow(&[
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_sync_file_range,
        libc::SYS_fallocate,
        libc::SYS_ftruncate,
    ])
}

/// io_uring.
pub fn io_uring() -> Syscalls {
    Syscalls::new().allow(&[
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
    ])
}

/// Not datagrams: even a connected one can be sent to any path.
fn unix_stream() -> [Arg; 2] {
    /// `SOCK_TYPE_MASK` of the kernel; the bits above are flags.
    const TYPE_MASK: u64 = 0xf;
    [
        Arg::Int(0, libc::AF_UNIX as u32),
        Arg::Bits {
            index: 1,
            mask: TYPE_MASK,
            value: libc::SOCK_STREAM as u64,
        },
    ]
}

/// The bits `bits` of argument `index` are all clear.
fn without(index: u8, bits: u64) -> Arg {
    Arg::Bits {
        index,
        mask: bits,
        value: 0,
    }
}

/// The bits `bits` of argument `index` are all set.
fn with(index: u8, bits: u64) -> Arg {
    Arg::Bits {
        index,
        mask: bits,
        value: bits,
    }
}

//! Loading a kernel and handing over to it.
//!
//! | kernel | protocol |
//! |---|---|
//! | ELF with a PVH note | PVH: 32-bit entry, `hvm_start_info` |
//! | ELF without | Linux 64-bit: entry in long mode, zero page |
//! | bzImage, 64 bit | Linux 64-bit at its offset 0x200 |
//! | bzImage, older | Linux 32-bit |
//!
//! Files are opened once: a reset boots what was started, even if the path holds something else
//! by then. [`BootSource::load`] writes everything that the boot protocol asks for to guest
//! memory and answers where the boot vCPU starts.

mod bzimage;
mod elf;
mod initramfs;
mod long_mode;
mod memory_map;
mod pvh;
mod zero_page;

#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use memory_map::memory_map;

use self::initramfs::Placement;
use crate::layout::{BOOT_GDT, CMDLINE, CMDLINE_CAPACITY};
use crate::memory::GuestRam;
use crate::vcpu::regs::boot_gdt;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Xen's PVH: protected mode without paging, `rbx` = start info.
    Pvh,
    /// Linux 64-bit: long mode with identity-mapped memory, `rsi` = zero page.
    Linux64,
    /// Linux 32-bit: protected mode without paging, `rsi` = zero page.
    Linux32,
}

/// Where the boot vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How.
    pub protocol: Protocol,
    /// First instruction.
    pub rip: u64,
    /// Start info or zero page.
    pub params: u64,
}

/// Which protocol an ELF kernel gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ElfProtocol {
    /// PVH if the kernel has the note, else Linux 64-bit.
    #[default]
    Auto,
    /// PVH only.
    Pvh,
    /// Linux 64-bit, even with a PVH note.
    Linux64,
}

/// Kernel, initramfs and command line, ready to be loaded any number of times.
pub struct BootSource {
    kernel: File,
    kernel_path: PathBuf,
    kind: KernelKind,
    elf_protocol: ElfProtocol,
    initramfs: Option<(File, PathBuf)>,
    cmdline: CString,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KernelKind {
    Elf,
    BzImage,
}

/// A kernel in guest memory.
struct LoadedKernel {
    protocol: Protocol,
    rip: u64,
    /// One past what it occupies while it starts.
    end: u64,
    /// The setup header of a bzImage as it is in the file.
    setup_header: Option<bzimage::SetupHeader>,
}

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {what} {path}: check the path and its permissions")]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system call's error.
        #[source]
        source: io::Error,
    },
    /// Neither an ELF nor a bzImage.
    #[error("{path} is no kernel: give an x86-64 ELF vmlinux or a bzImage (as in /boot/vmlinuz-*)")]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// It looks like a kernel, but cannot be loaded.
    #[error(
        "kernel {path} cannot be loaded: it is corrupt, not for x86-64, or needs more --memory"
    )]
    Load {
        /// The file.
        path: PathBuf,
        /// The loader's error.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// PVH was asked for, and the kernel has no such entry.
    #[error(
        "kernel {path} has no PVH entry: use --boot-protocol auto, or a kernel with CONFIG_PVH"
    )]
    NoPvhEntry {
        /// The file.
        path: PathBuf,
    },
    /// It needs more memory than there is.
    #[error(
        "kernel {path} needs memory up to {needed_mib} MiB, the machine has {memory_mib} MiB: give more --memory"
    )]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// End of the kernel.
        needed_mib: u64,
        /// RAM below the PCI hole.
        memory_mib: u64,
    },
    /// The initramfs does not fit above the kernel.
    #[error(
        "initramfs {path} ({size_mib} MiB) does not fit beside the kernel in {memory_mib} MiB: give more --memory"
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size, rounded up.
        size_mib: u64,
        /// RAM below the PCI hole.
        memory_mib: u64,
    },
    /// The command line is too long or has a zero byte.
    #[error("the kernel command line {0}")]
    Cmdline(&'static str),
    /// A boot structure could not be written.
    #[error("cannot write boot structures to guest memory")]
    Memory(#[from] GuestMemoryError),
}

impl BootSource {
    /// Opens the files and looks at what they are.
    ///
    /// # Errors
    /// A file is missing or no kernel, or the command line is impossible.
    pub fn open(
        kernel: &Path,
        initramfs: Option<&Path>,
        cmdline: &str,
        elf_protocol: ElfProtocol,
    ) -> Result<Self, BootError> {
        let cmdline = CString::new(cmdline)
            .map_err(|_| BootError::Cmdline("contains a zero byte: remove it"))?;
        if cmdline.as_bytes_with_nul().len() > CMDLINE_CAPACITY {
            return Err(BootError::Cmdline("is longer than 65535 bytes: shorten it"));
        }
        let kernel_path = kernel.to_path_buf();
        let kernel = open_file("kernel", kernel)?;
        let kind = KernelKind::detect(&kernel).ok_or_else(|| BootError::NotAKernel {
            path: kernel_path.clone(),
        })?;
        let initramfs = match initramfs {
            Some(path) => Some((open_file("initramfs", path)?, path.to_path_buf())),
            None => None,
        };
        Ok(Self {
            kernel,
            kernel_path,
            kind,
            elf_protocol,
            initramfs,
            cmdline,
        })
    }

    /// Writes kernel, initramfs, command line and boot parameters to `ram`; the ACPI tables, whose
    /// root pointer is at `rsdp`, are there already.
    ///
    /// # Errors
    /// A file changed, or there is too little memory.
    pub fn load(&mut self, ram: &GuestRam, rsdp: u64) -> Result<Entry, BootError> {
        let kernel = match self.kind {
            KernelKind::Elf => {
                elf::load(&mut self.kernel, &self.kernel_path, self.elf_protocol, ram)?
            }
            KernelKind::BzImage => bzimage::load(&mut self.kernel, &self.kernel_path, ram)?,
        };
        if kernel.end > ram.low_end() {
            return Err(BootError::KernelTooLarge {
                path: self.kernel_path.clone(),
                needed_mib: kernel.end.div_ceil(1 << 20),
                memory_mib: ram.low_end() >> 20,
            });
        }
        let initramfs = match &mut self.initramfs {
            Some((file, path)) => Some(initramfs::load(file, path, &kernel, ram)?),
            None => None,
        };
        self.write_parameters(&kernel, initramfs, ram, rsdp)
    }

    fn write_parameters(
        &self,
        kernel: &LoadedKernel,
        initramfs: Option<Placement>,
        ram: &GuestRam,
        rsdp: u64,
    ) -> Result<Entry, BootError> {
        let memory = ram.memory();
        memory.write_slice(self.cmdline.as_bytes_with_nul(), GuestAddress(CMDLINE))?;
        let gdt: Vec<u8> = boot_gdt(kernel.protocol)
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        memory.write_slice(&gdt, GuestAddress(BOOT_GDT))?;
        let params = match kernel.protocol {
            Protocol::Pvh => pvh::write_start_info(ram, initramfs, rsdp)?,
            Protocol::Linux64 => {
                long_mode::write_page_tables(memory)?;
                zero_page::write(
                    kernel.setup_header.as_ref(),
                    &self.cmdline,
                    initramfs,
                    ram,
                    rsdp,
                )?
            }
            Protocol::Linux32 => zero_page::write(
                kernel.setup_header.as_ref(),
                &self.cmdline,
                initramfs,
                ram,
                rsdp,
            )?,
        };
        Ok(Entry {
            protocol: kernel.protocol,
            rip: kernel.rip,
            params,
        })
    }
}

impl KernelKind {
    fn detect(file: &File) -> Option<Self> {
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, 0).ok()?;
        if &magic == b"\x7fELF" {
            return Some(Self::Elf);
        }
        file.read_exact_at(&mut magic, 0x202).ok()?;
        (&magic == b"HdrS").then_some(Self::BzImage)
    }
}

fn open_file(what: &'static str, path: &Path) -> Result<File, BootError> {
    let failed = |source| BootError::Read {
        what,
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if meta.is_file() {
        Ok(file)
    } else {
        Err(failed(io::Error::other("not a regular file")))
    }
}

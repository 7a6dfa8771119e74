//! Images made, read and checked by QEMU's own tools: what either side writes, the other reads.

mod chains;
mod checking;
mod hostile;
mod qemu;
mod workload;
mod writing;

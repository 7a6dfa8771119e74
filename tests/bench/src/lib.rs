//! Load that benches put on disks and NICs.
//!
//! Disks: one thread that keeps a number of requests in flight for a while, either through a
//! vhost-user daemon ([`vhost_user`]) or on the file itself ([`uring`]). Both run the same
//! [`load::Load`] and are measured by the same [`meter::Meter`], so that their figures can be
//! divided by one another.
//!
//! NICs: most load comes from DPDK's testpmd. What it does not do is here: [`tap`]s used as fast
//! as one thread can.

pub mod buffer;
pub mod load;
pub mod meter;
pub mod packet;
pub mod tap;
pub mod uring;
pub mod vhost_user;

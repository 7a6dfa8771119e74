//! qcow2 images: where guest bytes lie, and how the map is changed safely.
//!
//! An [`Image`] is a chain: a qcow2 image and what it is based on, raw or qcow2, all of whose
//! files are open already. Two kinds of callers use it at the same time:
//!
//! - a disk's queues [`locate`](Image::locate) bytes, without waiting and without a lock, and do
//!   the I/O of what is in a file by themselves;
//! - worker threads do the rest, which blocks: [`read`](Image::read), [`write`](Image::write),
//!   [`discard`](Image::discard), [`write_zeroes`](Image::write_zeroes), ...
//!
//! ```text
//!           locate                     read, write, discard, ...
//!             │                                   │
//!        ┌────▼────┐  page missing   ┌────────────▼───────────┐
//!        │  flat   │◄────────────────┤ layer: walk the chain  │
//!        │ (cache) │◄──────┐         └───┬──────────────┬─────┘
//!        └─────────┘ shown │             │ top          │ below: read_slice
//!                     ┌────┴────┐   ┌────▼────┐
//!      write, discard │ publish ├──►│   map   │ L1 table, slices of L2 tables
//!              └─────►│         │   └─────────┘
//!                     └────┬────┘
//!                     ┌────▼────┐   ┌─────────┐
//!                     │  alloc  ├──►│  epoch  │ who still uses freed clusters
//!                     └─────────┘   └─────────┘
//! ```
//!
//! # What a crash leaves
//!
//! Nothing that matters is in memory alone: when a call returns, data and map are in the file.
//! So when the process is killed, whatever was completed is there for its successor, flushed or
//! not, once the I/O of the dead process is over (which the image's lock tells). The order of
//! writes makes every instant a good one:
//!
//! | step | killed before the next one |
//! |---|---|
//! | clusters are counted, in batches, and the counts are flushed | leaked clusters |
//! | data is written to them, with what surrounds it | leaked clusters |
//! | a new L2 table is written and flushed, then its L1 entry | leaked clusters |
//! | the L2 entries are written: the data is there from now on | nothing |
//! | clusters that are no longer named wait until nobody uses them, then for a flush | leaked clusters |
//! | their counts go down | nothing |
//!
//! An L2 entry is written with its 4 KiB slice at once, an L1 entry and the header's fields with
//! their sector. Requests may run twice: the second time finds its clusters in place.
//!
//! The same order holds for a power failure, because a flush stands wherever a later write must
//! not overtake an earlier one: counts before entries, and entries before counts go down; also
//! data that was *copied* (from the backing image, or zeroes around a small write) before the
//! entry that makes it visible, since it was flushed where it came from. Threads that need a flush
//! at the same time share it. Data that the guest has not flushed is not waited for.
//!
//! Leaks are found and repaired by [`check`]; [`Image::settle`] avoids them at a clean end.
//!
//! # Images are input
//!
//! Headers and tables may be anything. Every offset is checked before it is used, tables that
//! overlap are refused for writing, an entry that points at a table or behind the end yields EIO,
//! memory is bounded whatever the tables say, and names of backing images are only reported.
//!
//! # What is not served
//!
//! External data files, extended L2 entries, compression by zstd, encryption, and writing images
//! that are dirty, corrupt, or have internal snapshots: [`Error`] names the feature and what
//! removes it. Persistent bitmaps are marked out of date by the first open for writing, as the
//! format demands. Compressed clusters are read, and written anew uncompressed.
#![forbid(unsafe_code)]

mod alloc;
mod check;
mod commit;
mod compressed;
mod create;
mod data;
mod discard;
mod entry;
mod epoch;
mod error;
mod flat;
mod header;
mod image;
mod layer;
mod map;
mod publish;
mod ranges;
mod refcount;
mod resize;
mod storage;
mod write;

pub use check::{CheckReport, Repair, check};
pub use commit::{Base, TopExtent};
pub use create::{CreateOptions, Preallocation, create};
pub use data::{Sink, Source};
pub use epoch::Ticket;
pub use error::Error;
pub use header::{BackingRef, Header};
pub use image::{Access, Image, Info, MAX_LAYERS, Place};
pub use layer::{Format, Layer};

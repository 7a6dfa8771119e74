//! qcow2 images: where guest bytes lie, and how the map is changed safely.
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

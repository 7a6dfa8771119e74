//! The `vmm-core` program, started with hand-written guests.

mod bad_input;
mod control;
mod guests;
mod tiny_guest;

//! What test guests are told and what they answer: shared by the guest and by those who boot it.
//!
//! [`plan`] is the kernel command line, [`report`] the lines on the console, [`pattern`] the data
//! that both sides derive from a seed, [`oracle`] what a disk promised under a load, [`journal`] what one
//! guest after the other wrote, and [`exchange`] and [`datagrams`] what they say over a network.

pub mod datagrams;
pub mod exchange;
pub mod journal;
pub mod oracle;
pub mod pattern;
pub mod plan;
pub mod report;

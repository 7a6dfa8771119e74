//! [`fuzz::block_request`] for libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::block_request::run(data));

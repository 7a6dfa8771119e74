//! [`fuzz::inflight`] for libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::inflight::run(data));

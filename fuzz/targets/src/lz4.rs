//! See `multifd_fuzz::lz4`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| multifd_fuzz::lz4(bytes));

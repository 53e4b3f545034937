//! See `multifd_fuzz::zstd`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| multifd_fuzz::zstd(bytes));

//! See `multifd_fuzz::zlib`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| multifd_fuzz::zlib(bytes));

//! See `multifd_fuzz::wire`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| multifd_fuzz::wire(bytes));

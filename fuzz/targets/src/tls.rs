//! See `multifd_fuzz::tls`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| multifd_fuzz::tls(bytes));

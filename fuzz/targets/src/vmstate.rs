//! See `multifd_fuzz::vmstate`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| multifd_fuzz::vmstate(bytes));

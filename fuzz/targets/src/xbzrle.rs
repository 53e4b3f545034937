//! See `multifd_fuzz::xbzrle`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| multifd_fuzz::xbzrle(bytes));

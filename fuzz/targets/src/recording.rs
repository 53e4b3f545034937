//! See `multifd_fuzz::recording`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| { multifd_fuzz::recording(bytes, multifd_fuzz::TIMEOUT); });

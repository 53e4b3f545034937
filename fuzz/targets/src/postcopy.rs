//! See `multifd_fuzz::postcopy`.
#![no_main]

use std::sync::Arc;

libfuzzer_sys::fuzz_target!(
    init: {
        // libFuzzer's main is not Rust's, which would have had it ignored.
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::default()).expect("a handler");
    },
    |bytes: &[u8]| multifd_fuzz::postcopy(bytes)
);

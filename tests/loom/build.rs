//! Leaves the unit tests out of the files that this crate borrows from the engine: they know
//! nothing of loom.

fn main() {
    println!("cargo:rustc-check-cfg=cfg(multifd_loom)");
    println!("cargo:rustc-cfg=multifd_loom");
}

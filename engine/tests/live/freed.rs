//! What a migration held is given back when it has ended, well or not.

use std::fs::{File, read_to_string};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

/// A block in memory that `/proc/self/maps` shows by `name`.
fn shown_as(name: &str) -> RamBlock {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, (64 * PAGE) as u64).unwrap();
    let block =
        RamBlock::new("guest.ram".try_into().unwrap(), HostMemory::map_file(file, 64 * PAGE).unwrap());
    block.memory().slice(0, 64 * PAGE).unwrap().copy_from(&[7_u8; 64 * PAGE]);
    block
}

fn is_mapped(name: &str) -> bool {
    read_to_string("/proc/self/maps").unwrap().contains(name)
}

#[test]
fn memory_is_let_go_after_a_migration() {
    for (channels, arrives) in [(0, true), (0, false), (2, true), (2, false)] {
        let names = ["source", "destination"].map(|end| format!("{end}-{channels}-{arrives}"));
        let destination = Destination::builder(vec![shown_as(&names[1])]).timeout(SOON);
        let destination = destination.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let to = destination.endpoint();
        let end = move |arrived: Arrived| if arrives { arrived.accept().is_ok() } else { false };
        let receiving =
            std::thread::Builder::new().spawn(move || destination.receive().is_ok_and(end)).unwrap();
        let source = Source::builder(vec![shown_as(&names[0])], Configuration::new("test-10.0"));
        let source = source.paused_guest().channels(channels).timeout(SOON).build().unwrap();
        assert!(names.iter().all(|name| is_mapped(name)));
        let mut precopy = source.connect(&to).unwrap();
        precopy.round().unwrap();
        let sent = precopy.stop_copy().unwrap().commit(&no_devices());
        assert_eq!((sent.is_ok(), receiving.join().unwrap()), (arrives, arrives));
        drop(sent);
        assert!(!names.iter().any(|name| is_mapped(name)), "{}", read_to_string("/proc/self/maps").unwrap());
    }
}

//! Device state that is read when it is sent, and such as has descriptions.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use multifd_engine::wire::{SectionId, VmDescription};
use multifd_engine::{
    Configuration, DescribedSection, Destination, DeviceState, Endpoint, Error, ErrorKind, HostMemory, PAGE,
    RamBlock, Report, SectionHead, Source,
};

use crate::SOON;

const MIB: usize = 1 << 20;

/// Blocks of 64 KiB that begin with their number, up to where they fail; notes the longest read.
struct Numbers {
    at: usize,
    fails_at: usize,
    longest: Arc<AtomicUsize>,
}

const BLOCK: usize = 64 << 10;

fn block(number: usize) -> [u8; BLOCK] {
    let mut block = [0x55; BLOCK];
    block[..8].copy_from_slice(&number.to_le_bytes());
    block
}

impl Read for Numbers {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.fails_at {
            return Err(io::Error::other("the device has gone"));
        }
        self.longest.fetch_max(into.len(), Ordering::Relaxed);
        let (number, within) = (self.at / BLOCK, self.at % BLOCK);
        let from = &block(number)[within..];
        let len = from.len().min(into.len());
        into[..len].copy_from_slice(&from[..len]);
        self.at += len;
        Ok(len)
    }
}

fn ram() -> Vec<RamBlock> {
    vec![RamBlock::new("ram".try_into().unwrap(), HostMemory::anonymous(PAGE).unwrap())]
}

/// What the embedder of the destination finds.
type Found = Result<(u32, usize, bool), Error>;

fn receive() -> (Endpoint, JoinHandle<Found>) {
    let destination =
        Destination::builder(ram()).timeout(SOON).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = destination.endpoint();
    let run = move || {
        let arrived = destination.receive()?;
        let (version, state) = arrived.opaque_state("vmm").unwrap();
        let as_sent =
            state.chunks(BLOCK).enumerate().all(|(number, part)| *part == block(number)[..part.len()]);
        let found = (version, state.len(), as_sent);
        arrived.accept().map(|_| found)
    };
    (endpoint, std::thread::Builder::new().spawn(run).unwrap())
}

fn send(to: &Endpoint, state: &DeviceState) -> Result<Report, Error> {
    let source = Source::builder(ram(), Configuration::new("my-vmm-1.0")).paused_guest().timeout(SOON);
    source.build().unwrap().connect(to)?.stop_copy()?.commit(state)
}

fn numbers(fails_at: usize) -> (Numbers, Arc<AtomicUsize>) {
    let longest = Arc::new(AtomicUsize::new(0));
    (Numbers { at: 0, fails_at, longest: Arc::clone(&longest) }, longest)
}

fn available_mib() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() / 1024
}

#[test]
fn device_state_of_any_size_is_sent_without_being_in_memory() {
    // Of the size that once was refused, if there is room: the destination has it in memory.
    let len = if available_mib() > 4096 { 600 * MIB + 17 } else { 20 * MIB + 17 };
    let (to, there) = receive();
    let (state, longest) = numbers(usize::MAX);
    let state = DeviceState::opaque_from("vmm", 7, len as u64, state);
    send(&to, &state).unwrap();
    assert_eq!(there.join().unwrap().unwrap(), (7, len, true));
    assert!(longest.load(Ordering::Relaxed) <= MIB, "{longest:?}");
    // What was read once is not there for another attempt.
    let (to, there) = receive();
    let error = send(&to, &state).unwrap_err();
    assert!(error.kind() == ErrorKind::ApiMisuse && error.source_may_resume(), "{error}");
    assert!(there.join().unwrap().is_err());
}

#[test]
fn a_reader_of_device_state_that_fails_or_ends_early_leaves_the_guest_here() {
    let (failing, _) = numbers(3 * MIB);
    let failing = DeviceState::opaque_from("vmm", 7, 4 * MIB as u64, failing);
    let short = DeviceState::opaque_from("vmm", 7, 4 * MIB as u64, &[1; 1000][..]);
    let cases = [
        (failing, "after 3145728 of 4194304 bytes: the device has gone"),
        (short, "after 1000 of 4194304 bytes"),
    ];
    for (state, says) in cases {
        let (to, there) = receive();
        let error = send(&to, &state).unwrap_err();
        assert!(error.kind() == ErrorKind::Storage && error.source_may_resume(), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(there.join().unwrap().is_err());
    }
}

/// A section of `name` with a payload that looks like the end of it.
fn described(name: &str, payload: &[u8]) -> DescribedSection {
    let (size, instance) = (payload.len() as u64, 3);
    let json = format!(
        r#"{{"devices": [{{"name": "{name}", "instance_id": {instance}, "vmsd_name": "card", "version": 2,
        "fields": [{{"name": "data", "type": "buffer", "size": {size}}}]}}]}}"#
    );
    let description = VmDescription::parse(json.as_bytes()).unwrap().devices.remove(0);
    let head =
        SectionHead { id: SectionId(99), idstr: name.to_owned(), instance_id: instance, version_id: 2 };
    DescribedSection { head, payload: payload.to_vec(), description }
}

#[test]
fn described_sections_come_back_one_by_one() {
    let sections = [described("bus/card", b"\x7e\0\0\0\x02\x04\0\0\0\x03\x01x"), described("other", b"")];
    let destination = Destination::builder(ram()).listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let to = destination.endpoint();
    let there = std::thread::Builder::new().spawn(move || {
        let arrived = destination.receive()?;
        let own = |(head, payload): &(SectionHead, &[u8])| (head.clone(), payload.to_vec());
        let found: Vec<_> = arrived.sections()?.iter().map(own).collect();
        let described = arrived.description().map(|description| description.devices.len());
        arrived.accept().map(|_| (found, described))
    });
    send(&to, &DeviceState::described(&sections)).unwrap();
    let (found, devices) = there.unwrap().join().unwrap().unwrap();
    assert_eq!(devices, Some(2));
    for (section, (head, payload)) in sections.iter().zip(&found) {
        let expected = (&section.head.idstr, section.head.instance_id, section.head.version_id);
        assert_eq!((&head.idstr, head.instance_id, head.version_id), expected);
        assert_eq!(*payload, section.payload);
    }
    assert_eq!(found.len(), 2);
}

#[test]
fn a_described_section_with_a_name_that_does_not_fit_is_refused() {
    let (to, there) = receive();
    let error = send(&to, &DeviceState::described(&[described(&"n".repeat(256), b"")])).unwrap_err();
    assert!(error.kind() == ErrorKind::ApiMisuse && error.source_may_resume(), "{error}");
    assert!(error.to_string().contains("a device's name has 256 bytes, expected 1..=255"), "{error}");
    assert!(there.join().unwrap().is_err());
}

//! The package of a post-copy: a stream of its own, with the state of the devices, whose length the
//! source says beforehand. Spec: docs/wire.md §15.1.

use std::io;

use multifd_wire::{Command, Item, SectionHead};

use crate::error::{Error, ErrorKind, Phase, Result};
use crate::stream::{ByteSource, ItemReader, MainReader, SeekError};

/// The items of a package, all of whose bytes are here.
pub(in crate::destination) struct Package(ItemReader<Bytes>);

struct Bytes(Vec<u8>);

/// Bytes of main that are taken at a time.
const PIECE: usize = 64 << 10;

impl Package {
    /// Reads `len` bytes of main.
    pub(in crate::destination) fn read(main: &mut MainReader, len: usize) -> Result<Self> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let piece = PIECE.min(len - bytes.len());
            bytes.extend_from_slice(main.take(Phase::Device, "the package of a post-copy", piece)?);
        }
        Ok(Self::of(bytes))
    }

    fn of(bytes: Vec<u8>) -> Self {
        Self(ItemReader::new(Bytes(bytes), 0))
    }

    /// The next item.
    pub(in crate::destination) fn item(&mut self) -> Result<Item> {
        self.0.next(Phase::Device, "an item of the package", Item::parse)
    }

    /// The sections of all devices, of which the first `head` was read. They have no lengths; what
    /// ends them is what a source puts behind the last: PINGs and RUN.
    pub(in crate::destination) fn devices(&mut self, head: SectionHead) -> Result<Vec<u8>> {
        let (begin, package) = (self.0.position(), &self.0.source().0);
        let rest = usize::try_from(begin).ok().and_then(|begin| package.get(begin..));
        let rest = rest.ok_or_else(|| Error::bug(Phase::Device, "a package that was read past its end"))?;
        let devices = devices_len(rest).and_then(|len| rest.get(..len)).ok_or_else(|| {
            let len = package.len();
            let detail =
                format!("a package of {len} bytes, whose devices do not end in a footer with RUN behind it");
            Error::new(ErrorKind::InvalidStream, Phase::Device, detail)
        })?;
        let mut sections = Vec::new();
        Item::SectionFull(head).encode(&mut sections);
        sections.extend_from_slice(devices);
        let end = begin + devices.len() as u64;
        self.0.seek(end, || "the devices of a package".to_owned())?;
        Ok(sections)
    }

    /// Checks that nothing is left.
    pub(in crate::destination) fn end(self) -> Result<()> {
        let (read, len) = (self.0.position(), self.0.source().0.len() as u64);
        if read == len {
            return Ok(());
        }
        let detail = format!("{} bytes of the package follow RUN", len - read);
        Err(Error::misbehaved(Phase::Device, detail))
    }
}

/// How much of `rest` belongs to devices.
fn devices_len(rest: &[u8]) -> Option<usize> {
    const FOOTER: u8 = multifd_wire::ItemType::Footer.byte();
    let encoded = |command| {
        let mut bytes = Vec::new();
        Item::Command(command).encode(&mut bytes);
        bytes
    };
    let (run, ping) = (encoded(Command::PostcopyRun), encoded(Command::Ping(0)));
    let head_len = ping.len().checked_sub(size_of::<u32>())?;
    let ping_head = ping.get(..head_len)?;
    let mut devices = rest.strip_suffix(&run[..])?;
    // A footer is no end of a PING: where it has its first byte, the PING has another.
    while let Some((before, last)) =
        devices.len().checked_sub(ping.len()).and_then(|at| devices.split_at_checked(at))
    {
        if !last.starts_with(ping_head) {
            break;
        }
        devices = before;
    }
    let footer = devices.len().checked_sub(multifd_wire::Footer::LEN)?;
    (devices.get(footer) == Some(&FOOTER)).then_some(devices.len())
}

impl ByteSource for Bytes {
    fn read(&mut self, position: u64, into: &mut [u8]) -> io::Result<usize> {
        let from = usize::try_from(position).ok().and_then(|position| self.0.get(position..));
        let from = from.unwrap_or_default();
        let len = from.len().min(into.len());
        if let (Some(into), Some(from)) = (into.get_mut(..len), from.get(..len)) {
            into.copy_from_slice(from);
        }
        Ok(len)
    }

    fn seek(&mut self, position: u64) -> Result<(), SeekError> {
        let len = self.0.len() as u64;
        if position <= len { Ok(()) } else { Err(SeekError::EndsAt(len)) }
    }

    fn name(&self) -> String {
        "the package on main".to_owned()
    }

    fn failed(&self, phase: Phase, what: &str, position: u64, error: io::Error) -> Error {
        Error::io(phase, format_args!("waiting for {what} at byte {position} of the package"), error)
    }

    fn ended(&self, phase: Phase, what: &str, _begin: u64, end: u64) -> Error {
        Error::misbehaved(phase, format!("the package ended after {end} bytes, {what} was expected"))
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::{Footer, SectionId};

    use super::*;

    fn head() -> SectionHead {
        SectionHead { id: SectionId(4), idstr: "cpu".to_owned(), instance_id: 0, version_id: 1 }
    }

    fn package(payload: &[u8], behind: &[Command]) -> Package {
        let mut bytes = Vec::new();
        Item::Command(Command::PostcopyListen).encode(&mut bytes);
        Item::SectionFull(head()).encode(&mut bytes);
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(&Footer(SectionId(4)).to_bytes());
        behind.iter().for_each(|command| Item::Command(command.clone()).encode(&mut bytes));
        Package::of(bytes)
    }

    fn read_devices(package: &mut Package) -> Result<Vec<u8>> {
        assert_eq!(package.item().unwrap(), Item::Command(Command::PostcopyListen));
        let Item::SectionFull(head) = package.item().unwrap() else { panic!("no section") };
        package.devices(head)
    }

    #[test]
    fn the_devices_of_a_package_end_before_the_pings_and_run() {
        // The payload ends in what looks like the commands behind it.
        let payload = [&[8, 0, 2, 0, 4, 0, 0, 0, 3][..], &[8, 0, 5, 0, 0]].concat();
        for pings in [vec![], vec![3], vec![3, 0x42]] {
            let behind: Vec<_> =
                pings.iter().copied().map(Command::Ping).chain([Command::PostcopyRun]).collect();
            let mut package = package(&payload, &behind);
            let devices = read_devices(&mut package).unwrap();
            assert!(devices.ends_with(&Footer(SectionId(4)).to_bytes()), "{pings:?}");
            for command in &behind {
                assert_eq!(package.item().unwrap(), Item::Command(command.clone()));
            }
            package.end().unwrap();
        }
    }

    #[test]
    fn a_package_without_run_at_its_end_is_refused() {
        for behind in [vec![], vec![Command::Ping(3)], vec![Command::PostcopyRun, Command::Ping(3)]] {
            let error = read_devices(&mut package(b"state", &behind)).unwrap_err();
            assert!(error.to_string().contains("do not end in a footer with RUN behind it"), "{error}");
        }
        let mut cut = package(b"state", &[]);
        assert_eq!(cut.item().unwrap(), Item::Command(Command::PostcopyListen));
        let mut empty = Package::of(Vec::new());
        let error = empty.item().unwrap_err();
        assert!(error.to_string().contains("the package ended after 0 bytes"), "{error}");
    }
}

//! A device of a VMM, whose state goes from one release to the next and back.
//!
//! `cargo run --release --example versioned_device`
//!
//! ```text
//!  release 1: Mailer v1            sends what release 2 reads
//!  release 2: Mailer v2, a field more, and a subsection for what is rare
//!             sends what release 1 refuses, by name and version, and the guest runs on at the source
//! ```

use std::error::Error;
use std::thread;

use multifd_engine::wire::Configuration;
use multifd_engine::{Destination, DeviceState, HostMemory, PAGE, RamBlock, Source};
use multifd_vmstate::{Description, Device, Devices, Fields, Hook, Section, Subsections, Timer, layout};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The device as the first release had it. Plain fields need no more than a list.
mod release_1 {
    use super::layout;

    layout! {
        /// Letters from the guest to the host.
        pub struct Mailer = "mailer", version 1 {
            control: u32;
            letters: u8;
            sizes: [u16; 8];
        }
    }
}

/// The device as it is now.
///
/// * `priority` came with version 2: state of version 1 does not have it, and `pre_load` says what
///   that means.
/// * `held` is rare. A subsection goes only if it is there: releases that do not know it can be
///   sent every guest without.
#[derive(Clone, Debug, Default, PartialEq)]
struct Mailer {
    control: u32,
    letters: u8,
    sizes: [u16; 8],
    priority: u8,
    held: Option<Held>,
    /// Not in the stream: follows from `control`.
    is_on: bool,
}

layout! {
    /// Letters that the host has not taken yet.
    pub struct Held = "mailer/held", version 1 {
        until: Timer;
        count: u32;
    }
}

impl Device for Mailer {
    const DESCRIPTION: Description = Description::new("mailer", 2).minimum(1);

    fn pre_load(&mut self) -> Hook {
        self.priority = 1;
        self.held = None;
        Ok(())
    }

    fn fields(&mut self, f: &mut Fields<'_>) -> std::result::Result<(), multifd_vmstate::Error> {
        f.field("control", &mut self.control)?;
        f.field("letters", &mut self.letters)?;
        f.validate("letters in range", self.letters, self.letters <= 8)?;
        f.field("sizes", &mut self.sizes)?;
        f.since(2, "priority", &mut self.priority)
    }

    fn subsections(
        &mut self,
        s: &mut Subsections<'_, '_>,
    ) -> std::result::Result<(), multifd_vmstate::Error> {
        s.optional(&mut self.held)
    }

    fn post_load(&mut self, _version: u32) -> Hook {
        self.is_on = self.control & 1 != 0;
        match self.held {
            Some(_) if !self.is_on => Err("letters are held, but the mailer is off".to_owned()),
            _ => Ok(()),
        }
    }
}

/// Moves a guest of one page and one device: what the destination says of it.
fn moved<A: Device, B: Device + Send>(source: &mut A, here: &mut B) -> Result<()> {
    let ram = || -> Result<RamBlock> { Ok(RamBlock::new("ram".try_into()?, HostMemory::anonymous(PAGE)?)) };
    let destination = Destination::builder(vec![ram()?]).listen(&"tcp:127.0.0.1:0".parse()?)?;
    let to = destination.endpoint();
    thread::scope(|scope| {
        let receiving = scope.spawn(move || -> Result<()> {
            let arrived = destination.receive()?;
            let loaded = {
                let sections = arrived.sections()?;
                let sections = sections.iter().map(|(head, payload)| Section::of(head, payload));
                Devices::new().with("mailer", 0, here).load(sections)
            };
            match loaded {
                Ok(()) => arrived.accept().map(drop)?,
                Err(error) => {
                    arrived.refuse(&error);
                    return Err(error.into());
                }
            }
            Ok(())
        });
        let state = DeviceState::described(&Devices::new().with("mailer", 0, source).save()?);
        let precopy = Source::builder(vec![ram()?], Configuration::new("my-vmm-1.0")).paused_guest();
        let precopy = precopy.build()?.connect(&to)?;
        let sent = precopy.stop_copy()?.commit(&state);
        let loaded = receiving.join().map_err(|_| "the destination panicked")?;
        if let (Err(_), Err(error)) = (&loaded, &sent) {
            assert!(error.source_may_resume(), "{error}");
        }
        loaded?;
        sent?;
        Ok(())
    })
}

fn main() -> Result<()> {
    let mut old = release_1::Mailer { control: 1, letters: 2, sizes: [7; 8] };
    let mut now = Mailer::default();
    moved(&mut old, &mut now)?;
    assert_eq!((now.letters, now.priority, now.is_on), (2, 1, true));
    println!("release 1 to release 2: {now:?}");

    now.held = Some(Held { until: Timer(1_000), count: 2 });
    let mut there = Mailer::default();
    moved(&mut now, &mut there)?;
    assert_eq!(there, now);
    println!("release 2 to release 2: with a subsection");

    let refused = moved(&mut now, &mut old).err().ok_or("release 1 read version 2")?.to_string();
    assert_eq!(refused, "mailer: version 2, expected 1");
    println!("release 2 to release 1: {refused}");

    now.control = 0;
    let refused = moved(&mut now, &mut there).err().ok_or("held letters of a mailer that is off")?;
    println!("a state that is inconsistent: {refused}");
    assert!(there.is_on, "a refused state changes nothing");
    println!("versioned_device: state went between releases, and what cannot be read was named");
    Ok(())
}

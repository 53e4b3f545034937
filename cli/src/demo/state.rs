//! The state of the demo's one device: a card that says how large the guest is.

use multifd_engine::{DeviceState, SectionHead};
use multifd_vmstate::{Devices, Section, layout};

use super::Result;

const NAME: &str = "demo-card";

layout! {
    /// What the guest would read of its machine.
    pub struct Card = "demo-card", version 1 {
        pages: u64;
    }
}

/// The state of a guest of so many pages.
pub(super) fn of(pages: usize) -> Result<DeviceState> {
    let mut card = Card { pages: pages.try_into()? };
    Ok(DeviceState::described(&Devices::new().with(NAME, 0, &mut card).save()?))
}

/// Loads the state at the destination, and compares it with the RAM that came.
pub(super) fn load(sections: &[(SectionHead, &[u8])], pages: usize) -> Result<()> {
    let mut card = Card::default();
    let sections = sections.iter().map(|(head, payload)| Section::of(head, payload));
    Devices::new().with(NAME, 0, &mut card).load(sections)?;
    if u64::try_from(pages) == Ok(card.pages) {
        return Ok(());
    }
    Err(format!("{pages} pages of RAM came, the guest has {}", card.pages).into())
}

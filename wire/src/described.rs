use crate::{DeviceDescription, Footer, Item, SectionHead};

/// A device section with what the stream's vmdescription says of it, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedSection {
    /// Its head.
    pub head: SectionHead,
    /// The bytes between head and footer.
    pub payload: Vec<u8>,
    /// What they consist of.
    pub description: DeviceDescription,
}

impl DescribedSection {
    /// Appends the section: head, payload and footer.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Item::SectionFull(self.head.clone()).encode(out);
        out.extend_from_slice(&self.payload);
        Footer(self.head.id).encode(out);
    }
}

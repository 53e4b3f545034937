//! Values as the encoders take them.

use multifd_wire::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// 1..=255 bytes, often short, sometimes the longest, sometimes not ASCII.
pub(crate) fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9/@:._-]{1,24}", "[a-z]{255}", "[a-zäß漢]{1,60}"]
}

pub(crate) fn block_name() -> impl Strategy<Value = BlockName> {
    text().prop_map(|name| BlockName::try_from(name.as_str()).unwrap())
}

pub(crate) fn page_size() -> impl Strategy<Value = PageSize> {
    (12..=16_u32).prop_map(|bits| PageSize::from_bits(bits).unwrap())
}

pub(crate) fn configuration() -> impl Strategy<Value = Configuration> {
    let uuid = option::of(any::<[u8; 16]>());
    (text(), option::of(12..=16_u32), vec(text(), 0..4), uuid).prop_map(
        |(machine, page_bits, capabilities, uuid)| {
            let mut configuration = Configuration::new(machine).with_capabilities(capabilities);
            (configuration.page_bits, configuration.uuid) = (page_bits, uuid);
            configuration
        },
    )
}

fn section_head() -> impl Strategy<Value = SectionHead> {
    (any::<u32>(), text(), any::<u32>(), any::<u32>()).prop_map(|(id, idstr, instance_id, version_id)| {
        SectionHead { id: SectionId(id), idstr, instance_id, version_id }
    })
}

fn command() -> impl Strategy<Value = Command> {
    let advise = any::<(u64, u64)>().prop_map(|(page_sizes, target_page)| Advise { page_sizes, target_page });
    let range =
        any::<(u32, u64)>().prop_map(|(offset, len)| DiscardRange { offset: offset.into(), len: len >> 1 });
    prop_oneof![
        Just(Command::EnableColo),
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Packaged),
        any::<u32>().prop_map(Command::Ping),
        option::of(advise).prop_map(Command::PostcopyAdvise),
        Just(Command::PostcopyListen),
        Just(Command::PostcopyResume),
        Just(Command::PostcopyRun),
        (block_name(), vec(range, 1..=MAX_DISCARD_RANGES))
            .prop_map(|(block, ranges)| Command::RamDiscard { block, ranges }),
        block_name().prop_map(Command::RecvBitmap),
        Just(Command::SwitchoverStart),
        Just(Command::PostcopyChannels),
        any::<[u8; 32]>().prop_map(Command::Resumable),
        any::<[u8; 32]>().prop_map(Command::Proof),
        (block_name(), any::<u64>()).prop_map(|(block, digest)| Command::Digest { block, digest }),
    ]
}

pub(crate) fn item() -> impl Strategy<Value = Item> {
    let id = || any::<u32>().prop_map(SectionId);
    prop_oneof![
        command().prop_map(Item::Command),
        Just(Item::Eof),
        id().prop_map(Item::SectionEnd),
        section_head().prop_map(Item::SectionFull),
        id().prop_map(Item::SectionPart),
        section_head().prop_map(Item::SectionStart),
    ]
}

fn aligned(page: PageSize) -> impl Strategy<Value = u64> {
    any::<u64>().prop_map(move |offset| offset & !(page.bytes_u64() - 1))
}

fn block_ref() -> impl Strategy<Value = BlockRef> {
    prop_oneof![Just(BlockRef::Same), block_name().prop_map(BlockRef::Named)]
}

pub(crate) fn ram_record() -> impl Strategy<Value = (RamRecord, PageSize)> {
    page_size().prop_flat_map(|page| {
        let place = || (aligned(page), block_ref());
        let max_delta = u16::try_from(page.bytes()).unwrap_or(u16::MAX);
        let record = prop_oneof![
            Just(RamRecord::EndOfSection),
            Just(RamRecord::Flush),
            aligned(page).prop_map(|total| RamRecord::MemSize { total }),
            place().prop_map(|(offset, block)| RamRecord::Page { offset, block }),
            (place(), 1..=max_delta).prop_map(|((offset, block), len)| RamRecord::Xbzrle {
                offset,
                block,
                len
            }),
            place().prop_map(|(offset, block)| RamRecord::Zero { offset, block }),
            (place(), 1..=4110_u32).prop_map(|((offset, block), len)| RamRecord::Compressed {
                offset,
                block,
                len
            }),
        ];
        (record, Just(page))
    })
}

pub(crate) fn block_entry() -> impl Strategy<Value = (BlockEntry, BlockListFormat)> {
    let optional = || option::of(any::<u64>());
    let mapped = any::<(u64, u64, u64)>().prop_map(|(page_size, bitmap_offset, pages_offset)| {
        MappedRamHeader { page_size, bitmap_offset, pages_offset }
    });
    (block_name(), any::<u64>(), optional(), optional(), option::of(mapped)).prop_map(
        |(name, used_len, page_size, guest_address, mapped_ram)| {
            let format = BlockListFormat {
                page_sizes: page_size.is_some(),
                guest_addresses: guest_address.is_some(),
                mapped_ram: mapped_ram.is_some(),
            };
            (BlockEntry { name, used_len, page_size, guest_address, mapped_ram }, format)
        },
    )
}

pub(crate) fn return_message() -> impl Strategy<Value = ReturnMessage> {
    let request = (option::of(block_name()), any::<(u64, u32)>());
    let extension = (0x4d55_u16..=0x4dff, vec(any::<u8>(), 0..=512));
    prop_oneof![
        Just(ReturnMessage::Alive),
        extension.prop_map(|(kind, body)| ReturnMessage::Extension { kind, body }),
        (any::<u8>(), "[ -~]{0,511}")
            .prop_map(|(phase, reason)| ReturnMessage::Failure(Failure { phase, reason })),
        any::<u64>().prop_map(ReturnMessage::Loaded),
        any::<[u8; 32]>().prop_map(ReturnMessage::ResumeKey),
        any::<[[u8; 32]; 2]>().prop_map(|[nonce, proof]| ReturnMessage::Challenge { nonce, proof }),
        any::<u32>().prop_map(ReturnMessage::Standing),
        Just(ReturnMessage::NotKnown),
        any::<[u8; 16]>().prop_map(|id| ReturnMessage::Id(MigrationId(id))),
        any::<(u16, u64)>().prop_map(|(version, features)| ReturnMessage::Hello(Hello { version, features })),
        any::<u32>().prop_map(ReturnMessage::Pong),
        block_name().prop_map(ReturnMessage::RecvBitmap),
        request.prop_map(|(block, (offset, len))| ReturnMessage::RequestPages { block, offset, len }),
        Just(ReturnMessage::ResumeAck(1)),
        any::<u32>().prop_map(ReturnMessage::Shut),
        Just(ReturnMessage::SwitchoverAck),
    ]
}

/// What a [`RamPacketHeader`] borrows.
#[derive(Clone, Debug)]
pub(crate) struct OwnedPacket {
    pub(crate) page: PageSize,
    pub(crate) codec: u8,
    pub(crate) sync: bool,
    pub(crate) packet_num: u64,
    pub(crate) block: BlockName,
    pub(crate) normal: Vec<u64>,
    pub(crate) zero: Vec<u64>,
    pub(crate) payload_len: u32,
}

impl OwnedPacket {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let flags = u32::from(self.codec) | u32::from(self.sync);
        let has_pages = !(self.normal.is_empty() && self.zero.is_empty());
        let header = RamPacketHeader {
            flags: PacketFlags::try_from(flags).unwrap(),
            packet_num: self.packet_num,
            block: has_pages.then_some(&self.block),
            normal: &self.normal,
            zero: &self.zero,
            payload_len: self.payload_len,
        };
        let mut out = Vec::new();
        header.encode(self.page, &mut out);
        out
    }
}

pub(crate) fn ram_packet() -> impl Strategy<Value = OwnedPacket> {
    let counts = page_size().prop_flat_map(|page| {
        let pages = pages_per_packet(page);
        (Just(page), 0..=pages).prop_flat_map(move |(page, normal)| {
            let zero = vec(aligned(page), 0..=pages - normal);
            (Just(page), vec(aligned(page), normal), zero)
        })
    });
    let codec = prop::sample::select(vec![0, 2, 4, 8, 0x10, 0x20]);
    (counts, codec, any::<bool>(), any::<u64>(), block_name(), 1..=MAX_PAYLOAD).prop_map(
        |((page, normal, zero), codec, sync, packet_num, block, payload_len)| {
            let payload_len = if codec == 0 { normal.len() * page.bytes() } else { payload_len };
            let payload_len = u32::try_from(payload_len).unwrap();
            OwnedPacket { page, codec, sync, packet_num, block, normal, zero, payload_len }
        },
    )
}

pub(crate) fn device_state_packet() -> impl Strategy<Value = DeviceStatePacket> {
    (text(), any::<u32>(), 1..=MAX_DEVICE_STATE_PAYLOAD)
        .prop_map(|(idstr, instance_id, payload_len)| DeviceStatePacket { idstr, instance_id, payload_len })
}

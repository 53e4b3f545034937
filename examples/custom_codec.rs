//! A compression method of your own, plugged in without touching our crates: between two multifd
//! ends that both know it.
//!
//! `cargo run --release --example custom_codec`

use std::error::Error;
use std::sync::Arc;
use std::thread;

use multifd_codecs::{
    Codec, CodecError, CodecId, Codecs, DecodeFailed, Decoder, EncodeFailed, Encoder, conformance,
};
use multifd_engine::wire::Configuration;
use multifd_engine::{Destination, DeviceState, HostMemory, PAGE, RamBlock, Source};

/// Runs of equal bytes as (length, byte): good for memory that was filled, bad for everything else.
#[derive(Debug)]
struct RunLength;

/// One of the ids that are free for codecs of one's own: several bits, from 0x18 on.
const ID: u8 = 0x18;

impl Codec for RunLength {
    fn id(&self) -> CodecId {
        CodecId::new(ID).unwrap_or(CodecId::NONE)
    }

    fn name(&self) -> &str {
        "run-length"
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>, CodecError> {
        Ok(Box::new(RunEncoder))
    }

    fn decoder(&self) -> Result<Box<dyn Decoder>, CodecError> {
        Ok(Box::new(RunDecoder { dead: false }))
    }
}

/// No state from packet to packet.
struct RunEncoder;

/// None either, but for the rule that nothing is decoded after an error.
struct RunDecoder {
    dead: bool,
}

impl Encoder for RunEncoder {
    fn prepare(&mut self, pages: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeFailed> {
        for run in pages.chunk_by(|a, b| a == b).flat_map(|run| run.chunks(255)) {
            out.extend([run.len() as u8, run[0]]);
        }
        Ok(())
    }
}

impl Decoder for RunDecoder {
    fn recv_pages(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
        if self.dead {
            return Err(DecodeFailed::corrupt("after an error"));
        }
        let result = unpack(payload, pages);
        self.dead = result.is_err();
        result
    }
}

fn unpack(payload: &[u8], pages: &mut [u8]) -> Result<(), DecodeFailed> {
    let (runs, []) = payload.as_chunks::<2>() else { return Err(DecodeFailed::corrupt("half a run")) };
    let mut left = pages;
    for [len, byte] in runs {
        if *len == 0 {
            return Err(DecodeFailed::corrupt("an empty run"));
        }
        let (run, rest) = left
            .split_at_mut_checked(usize::from(*len))
            .ok_or_else(|| DecodeFailed::corrupt("more bytes than the packet has pages for"))?;
        run.fill(*byte);
        left = rest;
    }
    if left.is_empty() {
        Ok(())
    } else {
        Err(DecodeFailed::corrupt("fewer bytes than the packet has pages for"))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The suite that our own codecs pass.
    conformance::check(&RunLength);

    const PAGES: usize = 1024;
    let here = RamBlock::new("ram".try_into()?, HostMemory::anonymous(PAGES * PAGE)?);
    for page in 0..PAGES {
        let slice = here.memory().slice(page * PAGE, PAGE).ok_or("outside")?;
        slice.copy_from(&[(page % 251) as u8; PAGE][..]);
    }
    let there = RamBlock::new("ram".try_into()?, HostMemory::anonymous(PAGES * PAGE)?);

    let destination = Destination::builder(vec![there.clone()])
        .codecs(Codecs::default().with(Arc::new(RunLength)))
        .listen(&"tcp:127.0.0.1:0".parse()?)?;
    let endpoint = destination.endpoint();
    let receiving = thread::spawn(move || destination.receive()?.accept());

    let configuration = Configuration::new("example");
    let mut precopy = Source::builder(vec![here.clone()], configuration)
        .paused_guest()
        .channels(2)
        .codec(Arc::new(RunLength))
        .build()?
        .connect(&endpoint)?;
    precopy.round()?;
    let report = precopy.stop_copy()?.commit(&DeviceState::none())?;
    receiving.join().map_err(|_| "the destination panicked")??;

    let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
    let equal =
        (0..PAGES).all(|page| here.read_page(page, &mut a) && there.read_page(page, &mut b) && a == b);
    assert!(equal, "memory differs");
    println!("{report}");
    println!("custom_codec: {PAGES} pages arrived equal through {}", report.codec);
    Ok(())
}

//! The parsers and encoders of `multifd-wire`.

#[path = "../../../wire/tests/wire/every_parser.rs"]
mod every_parser;

use multifd_wire::PageSize;

use crate::Input;
pub(crate) use every_parser::visit;

/// Every parser on the same bytes; what was parsed is encoded and parsed again.
///
/// Input: page size (12 bits and this modulo 5), length of the pieces that the tail scanner gets,
/// the bytes.
pub fn wire(input: &[u8]) {
    let mut input = Input(input);
    let page = PageSize::from_bits(12 + u32::from(input.u8() % 5)).expect("12 to 16 bits");
    let piece = usize::from(input.u8()) + 1;
    every_parser::check(input.0, page, piece);
}

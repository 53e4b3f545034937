//! Capability dirty-bitmaps of a QEMU whose disks have none.

use super::*;

/// Pieces before, between and behind RAM's.
#[test]
fn a_live_section_of_dirty_bitmaps_that_has_none_is_passed_over() {
    let id = SectionId(1);
    let begins = || Input::Item(Item::SectionStart(head("dirty-bitmap", id)));
    let piece_of = |item: Item| [Input::Item(item), Input::NoBitmaps(id)];
    let mut session = Session::new(true);
    session.run([configuration("pc-q35-10.0"), begins(), Input::NoBitmaps(id)]).unwrap();
    session.run(start()).unwrap();
    session.run(piece_of(Item::SectionPart(id))).unwrap();
    session.run(part()).unwrap();
    session.run(piece(Item::SectionEnd(RAM))).unwrap();
    session.run(piece_of(Item::SectionEnd(id))).unwrap();
    session.main(device(3)).unwrap();
    assert!(session.is_done());

    let open = |with: &[Input]| {
        let mut session = Session::new(true);
        session.run([configuration("pc-q35-10.0")].into_iter().chain(with.iter().cloned())).unwrap_err()
    };
    let other = Input::NoBitmaps(SectionId(9));
    assert!(open(&[begins(), other]).to_string().contains("footer of section 9 in section 1"));
    let twice = open(&[begins(), Input::NoBitmaps(id), begins()]);
    assert!(twice.to_string().contains("only ram is supported"), "{twice}");
}

use multifd_engine::{PAGE, PageContent, PageRecord};
use multifd_wire::{Structure, VmDescription};
use serde_json::json;

use super::findings::{Block, Held, Pages};
use super::sample::Sample;
use super::survey::Survey;
use super::values::{self, Budget};

const DATA: [u8; PAGE] = [7; PAGE];
const ZEROS: [u8; PAGE] = [0; PAGE];

fn record(block: usize, page: u64, content: PageContent<'_>) -> PageRecord<'_> {
    PageRecord { block, page, content }
}

fn finish(survey: Survey) -> (Vec<Block>, Pages) {
    let held = |counts: &super::survey::Counts| Held::Sent {
        normal: counts.normal,
        zero: counts.zero,
        xbzrle: counts.xbzrle,
        repeated: counts.repeated,
    };
    survey.finish(["a", "b"].map(str::to_owned).into_iter(), held).unwrap()
}

#[test]
fn the_last_record_of_a_page_counts() {
    let mut survey = Survey::new(&[4 * 4096, 4096], PAGE);
    let zero = PageContent::Zero { pages: 1 };
    for (page, content) in [
        (0, PageContent::Data(&DATA)),
        (1, zero),
        (2, PageContent::Data(&ZEROS)),
        (1, PageContent::Data(&DATA)),
        (0, PageContent::Xbzrle(&[1])),
        (0, PageContent::Xbzrle(&[2])),
        (2, zero),
    ] {
        survey.sent(&record(0, page, content)).unwrap();
    }
    let (blocks, pages) = finish(survey);
    let counts = json!(blocks[0]);
    assert_eq!(counts["sent"], json!({"normal": 3, "zero": 2, "xbzrle": 2, "repeated": 3}));
    assert_eq!((blocks[0].zero_pages, blocks[0].absent_pages, blocks[1].absent_pages), (1, 1, 1));
    assert_eq!((pages.total, pages.absent, pages.zero, pages.data), (5, 2, 1, 2));
    // Page 0 and not page 1: of each page, the first record is looked at.
    assert_eq!(pages.sampled, 1);
    assert_eq!(pages.zero_share, Some(1.0 / 3.0));
}

#[test]
fn stored_zeros_are_zero_pages_whatever_the_file_has_there() {
    let mut survey = Survey::new(&[4 * 4096, 4096], PAGE);
    survey.stored(&record(0, 0, PageContent::Zero { pages: 2 }));
    survey.stored(&record(0, 2, PageContent::Data(&ZEROS)));
    survey.stored(&record(0, 3, PageContent::Data(&DATA)));
    survey.stored(&record(1, 0, PageContent::Data(&DATA)));
    let (blocks, pages) = finish(survey);
    assert_eq!((blocks[0].zero_pages, blocks[0].absent_pages), (3, 0));
    assert_eq!((pages.zero, pages.data, pages.sampled), (3, 2, 2));
}

#[test]
fn a_guest_without_data_has_no_ratio() {
    let (_, pages) = finish(Survey::new(&[4096, 4096], PAGE));
    assert!(pages.compression.is_empty() && pages.zero_share.is_none());
}

#[test]
fn a_sample_is_spread_over_all_pages_and_no_larger_than_it_may_be() {
    for (count, expected) in
        [(1, 1..=1), (4095, 4095..=4095), (4096, 4096..=4096), (4097, 2048..=4096), (100_000, 2048..=4096)]
    {
        let mut sample = Sample::new(PAGE);
        for page in 0..count {
            // A page shows its number.
            let mut content = DATA;
            content[..4].copy_from_slice(&u32::to_be_bytes(page));
            sample.offer(usize::from(page >= count / 2), &content);
        }
        assert!(expected.contains(&sample.pages()), "{} of {count}", sample.pages());
        let numbers: Vec<_> =
            sample.page_starts().map(|start| u32::from_be_bytes(start[..4].try_into().unwrap())).collect();
        assert!(numbers.is_sorted());
        let (first, last) = (numbers[0], numbers[numbers.len() - 1]);
        assert!(first == 0 && last + 16 * 128 > count - 1, "{first} to {last} of {count}");
        let widest = numbers.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
        assert!(widest <= count / 128 + 16, "{widest} of {count}");
    }
}

#[test]
fn ratios_are_those_of_the_codecs() {
    let mut sample = Sample::new(PAGE);
    let mut state = 1_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    for _ in 0..300 {
        let page: Vec<u8> = (0..PAGE).map(|_| noise()).collect();
        sample.offer(0, &page);
    }
    let ratios = sample.compress().unwrap();
    assert_eq!(ratios.iter().map(|by| by.codec.as_str()).collect::<Vec<_>>(), ["zlib:1", "zstd:1"]);
    let values: Vec<_> = ratios.iter().map(|by| by.ratio).collect();
    // Level 1 of zlib has one code for all bytes, which is longer than they are.
    assert!(values.iter().all(|ratio| (0.9..1.01).contains(ratio)), "{values:?} for noise");

    let mut sample = Sample::new(PAGE);
    (0..300).for_each(|_| sample.offer(0, &DATA));
    assert!(sample.compress().unwrap().iter().all(|by| by.ratio > 100.0));
}

/// The JSON of a device's fields, and the note.
fn view(fields: &str, payload: &[u8]) -> (serde_json::Value, Option<String>) {
    let json = format!(r#"{{"devices": [{{"name": "d", "instance_id": 0, "fields": [{fields}]}}]}}"#);
    let description = VmDescription::parse(json.as_bytes()).unwrap();
    let structure = Structure::of_device(&description.devices[0], payload);
    let (view, note) = values::view(structure, &mut Budget::default());
    (json!(view), note)
}

#[test]
fn fields_of_all_sorts() {
    let (view, note) = view(
        r#"{"name": "on", "type": "bool", "size": 1}, {"name": "n", "type": "int16", "size": 2},
           {"name": "t", "type": "buffer", "size": 8}, {"name": "p", "type": "nullptr", "size": 1, "index": 3},
           {"name": "a", "type": "uint8", "size": 1, "array_len": 3}"#,
        b"\x01\xff\xferunning\x000\x05\x05\x06",
    );
    assert_eq!(note, None);
    assert_eq!(
        view["fields"],
        json!([
            {"name": "on", "type": "bool", "size": 1, "value": true},
            {"name": "n", "type": "int16", "size": 2, "value": -2, "hex": "0xfffe"},
            {"name": "t", "type": "buffer", "size": 8, "bytes": "72 75 6e 6e 69 6e 67 00", "text": "running"},
            {"name": "p", "type": "nullptr", "size": 1, "index": 3, "value": null},
            {"name": "a", "type": "uint8", "size": 3, "array_len": 3, "omitted_elements": 0, "elements": [
                {"first": 0, "count": 2, "value": 5, "hex": "0x05"},
                {"first": 2, "count": 1, "value": 6, "hex": "0x06"},
            ]},
        ])
    );
}

#[test]
fn long_arrays_and_buffers_are_cut_short() {
    let payload: Vec<u8> = (0..100).collect();
    let (array, _) = view(r#"{"name": "a", "type": "uint8", "size": 1, "array_len": 100}"#, &payload);
    assert_eq!(array["fields"][0]["elements"].as_array().unwrap().len(), 16);
    assert_eq!(array["fields"][0]["omitted_elements"], 84);
    let (buffer, _) = view(r#"{"name": "b", "type": "buffer", "size": 100}"#, &payload);
    assert_eq!(buffer["fields"][0]["bytes"], "00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f ...");
}

#[test]
fn a_description_that_does_not_fit_is_said_so() {
    let (view, note) = view(r#"{"name": "a", "type": "uint8", "size": 1}"#, &[1, 2]);
    assert_eq!(view["fields"], json!([]));
    assert!(note.unwrap().contains("does not fit the section"));
}

#[test]
fn more_fields_than_anyone_reads_are_left_out() {
    // Each structure holds 16 of the next: 16^6 fields from a description of a few hundred bytes.
    let mut field = r#"{"name": "x", "type": "uint8", "size": 1}"#.to_owned();
    let mut size = 1;
    for _ in 0..6 {
        field = format!(
            r#"{{"name": "s", "type": "struct", "size": {size}, "array_len": 16, "struct":
                {{"vmsd_name": "s", "version": 1, "fields": [{field}]}}}}"#
        );
        size *= 16;
    }
    let payload: Vec<u8> = (0..size)
        .map(|n: u32| n.to_be_bytes().iter().fold(0, |sum: u8, b| sum.wrapping_mul(31).wrapping_add(*b)))
        .collect();
    let (_, note) = view(&field, &payload);
    assert!(note.unwrap().contains("the rest is left out"));
}

//! The page as a whole. In a browser it is tested by `tests/src/page.rs`.

use multifd_codecs::CodecChoice;
use multifd_tests::{During, Outcome, Scratch, skip_without_browser};
use proptest::prelude::*;
use roxmltree::{Document, Node, ParsingOptions};

use super::{fixture, html, series};
use crate::findings::{Curve, DirtyOrigin, Findings, PageKinds};

fn parsed(page: &str) -> Document<'_> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    Document::parse_with_options(page, options).unwrap_or_else(|error| panic!("{error}\n{page}"))
}

fn named<'a>(document: &'a Document<'a>, name: &'a str) -> Vec<Node<'a, 'a>> {
    document.descendants().filter(|node| node.has_tag_name(name)).collect()
}

fn words(node: Node<'_, '_>) -> String {
    node.descendants().filter_map(|node| node.is_text().then(|| node.text()).flatten()).collect()
}

/// The attributes of a drawing that hold coordinates.
const COORDINATES: [&str; 11] =
    ["x", "y", "x1", "x2", "y1", "y2", "width", "height", "d", "points", "viewBox"];

fn check(findings: &Findings) {
    let page = html(findings);
    let document = parsed(&page);
    for node in document.descendants() {
        for attribute in node.attributes().filter(|attribute| COORDINATES.contains(&attribute.name())) {
            let numbers = attribute.value().split(['M', 'L', ',', ' ']).filter(|number| !number.is_empty());
            for number in numbers {
                let value = number.parse::<f64>();
                assert!(value.is_ok_and(|value| value.abs() < 1e4), "{}: {number}", attribute.name());
            }
        }
    }
    let text = words(document.root_element());
    assert!(!text.contains("NaN") && !text.contains("inf "), "{text}");
    let mut ids: Vec<_> = document.descendants().filter_map(|node| node.attribute("id")).collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "an id is there twice");
    let named = |name: &'static str| document.descendants().filter(move |node| node.has_tag_name(name));
    for svg in named("svg") {
        assert_eq!(svg.attribute("role"), Some("img"));
        for (name, attribute) in [("title", "aria-labelledby"), ("desc", "aria-describedby")] {
            let child = svg.children().find(|child| child.has_tag_name(name)).unwrap();
            assert_eq!(child.attribute("id"), svg.attribute(attribute));
            assert!(!words(child).is_empty());
        }
    }
    assert!(named("th").all(|head| head.attribute("scope").is_some()));
    for node in document.descendants().filter(|node| node.is_element()) {
        let loads =
            node.attributes().find(|attribute| ["src", "href", "srcset", "data"].contains(&attribute.name()));
        assert!(
            loads.is_none_or(|loads| loads.value() == "data:," || loads.value().starts_with('#')),
            "{loads:?}"
        );
        assert!(!["script", "img", "iframe", "object"].contains(&node.tag_name().name()), "{node:?}");
        assert!(node.attributes().all(|attribute| !attribute.name().starts_with("on")), "{node:?}");
    }
}

#[test]
fn the_page_of_a_guest_is_complete() {
    let findings = fixture::realistic();
    check(&findings);
    let page = html(&findings);
    let document = parsed(&page);
    assert!(
        !page.contains("http:")
            && !page.contains("https:")
            && !page.contains("url(")
            && !page.contains("@import")
    );
    assert_eq!(document.root_element().attribute("lang"), Some("en"));
    assert_eq!(named(&document, "svg").len(), 8, "four plots, each for wide and for narrow screens");
    let text = words(document.root_element());
    for codec in &findings.codecs {
        assert!(text.contains(&codec.codec.to_string()), "{}", codec.codec);
    }
    for advice in &findings.advice {
        assert!(text.contains(&advice.flags) && text.contains(&advice.reason), "{advice:?}");
        assert!(advice.qmp.iter().all(|command| text.contains(&command.to_string())));
    }
    assert!(findings.notes.iter().all(|note| text.contains(note)));
    let rows: Vec<_> = named(&document, "tr").into_iter().map(words).collect();
    assert!(rows.len() > findings.predictions.len() + findings.codecs.len());
    assert_eq!(rows.iter().filter(|row| row.contains("★")).count(), findings.advice.len());
}

#[test]
fn every_chosen_codec_is_a_line_with_its_name() {
    let findings = fixture::realistic();
    let page = html(&findings);
    let document = parsed(&page);
    for plot in ["total-wide", "total-narrow", "downtime-wide", "downtime-narrow"] {
        let id = format!("{plot}-title");
        let svgs = named(&document, "svg");
        let svg = svgs.iter().find(|svg| svg.attribute("aria-labelledby") == Some(id.as_str())).unwrap();
        for series in series::chosen(&findings) {
            let of = |name: &'static str, class: &str| {
                let class = format!("{class} s{}", series.look);
                let mut all = svg.descendants().filter(move |node| node.has_tag_name(name));
                all.any(|node| {
                    node.attribute("class") == Some(class.as_str()) && words(node) == series.codec.to_string()
                })
            };
            assert!(of("path", "line") && of("text", "name"), "{plot} {series:?}");
        }
    }
    let marks = named(&document, "polygon").into_iter().map(words).collect::<Vec<_>>();
    for facts in findings.codecs.iter().filter(|facts| facts.encode_bytes_per_s.is_some()) {
        let start = format!("{}: ", facts.codec);
        assert!(marks.iter().any(|mark| mark.starts_with(&start) && mark.contains("±")), "{start}");
    }
}

#[test]
fn headings_are_in_order() {
    let page = html(&fixture::realistic());
    let document = parsed(&page);
    let level = |node: Node<'_, '_>| node.tag_name().name().strip_prefix('h')?.parse::<u8>().ok();
    let levels: Vec<u8> = document.descendants().filter_map(level).collect();
    assert_eq!(levels.first(), Some(&1));
    assert!(levels.windows(2).all(|pair| pair[1] <= pair[0] + 1), "{levels:?}");
}

#[test]
fn text_from_outside_stays_text() {
    let findings = fixture::hostile();
    check(&findings);
    let page = html(&findings);
    assert!(!page.contains("<script") && !page.contains("<img"));
    assert_eq!(page.matches("</title>").count(), page.matches("<title").count());
    assert!(!page.contains(['\u{0}', '\u{1b}', '\u{202e}']));
}

#[test]
fn empty_findings_are_a_page_too() {
    check(&fixture::empty());
}

/// The plots of each page of [`samples`], in its order.
const PLOTS: [u64; 5] = [4, 3, 4, 4, 0];

#[test]
fn the_pages_stand_in_a_browser() -> Outcome {
    skip_without_browser!();
    let scratch = Scratch::new()?;
    for ((name, findings), plots) in samples().into_iter().zip(PLOTS) {
        let path = scratch.path(&format!("{name}.html"));
        std::fs::write(&path, html(&findings))?;
        multifd_tests::page::check(&path, plots).during(name)?;
    }
    Ok(())
}

/// What the browser sees.
fn samples() -> Vec<(&'static str, Findings)> {
    let mut still = fixture::realistic();
    still.dirty.origin = DirtyOrigin::Still;
    still.advice.truncate(1);
    still.codecs.truncate(1);
    still.curves.total_by_link.truncate(1);
    still.curves.downtime_by_dirty_rate.truncate(1);
    still.xbzrle = None;
    vec![
        ("realistic", fixture::realistic()),
        ("one", still),
        ("crowded", crowded()),
        ("hostile", fixture::hostile()),
        ("empty", fixture::empty()),
    ]
}

/// All lines end in one place, all points coincide, over ten decades; the guest hardly writes.
fn crowded() -> Findings {
    let mut findings = fixture::realistic();
    for curve in &mut findings.curves.total_by_link {
        curve.points = vec![(1.25e6, 90_000.0), (12.5e9, 0.004)];
    }
    for curve in &mut findings.curves.downtime_by_dirty_rate {
        curve.points = vec![(1e2, 0.001), (1e12, 0.002)];
    }
    for facts in findings.codecs.iter_mut().filter(|facts| facts.encode_bytes_per_s.is_some()) {
        (facts.ratio, facts.encode_bytes_per_s) = (1.01, Some(999e6));
    }
    findings.dirty.bytes_per_s = 101;
    findings.pages =
        PageKinds { zero: 0.001, duplicate: 0.0005, incompressible: 0.9975, text: 0.0005, other: 0.0005 };
    findings
}

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(0.0),
        Just(-1.0),
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(1e-300),
        Just(1e300),
        0.0..1.0,
        1.0..1e12,
    ]
}

fn curves() -> impl Strategy<Value = Vec<Curve>> {
    let codec = prop_oneof![
        Just(CodecChoice::None),
        Just(CodecChoice::zlib::<1>()),
        Just(CodecChoice::zstd::<1>()),
        Just(CodecChoice::zstd::<3>()),
        Just(CodecChoice::zstd::<20>()),
    ];
    let points = proptest::collection::vec((number(), number()), 0..8);
    let curve = (codec, points).prop_map(|(codec, points)| Curve { codec, points });
    proptest::collection::vec(curve, 0..9)
}

prop_compose! {
    fn any_findings()(
        numbers in proptest::collection::vec(number(), 40),
        total in curves(),
        downtime in curves(),
        codecs in 0_usize..20,
        predictions in 0_usize..6,
        links in 0_usize..5,
        indices in proptest::collection::vec(0_usize..8, 3),
        integers in proptest::collection::vec(prop_oneof![Just(0), Just(1), Just(u64::MAX), any::<u64>()], 9),
        limited in any::<bool>(),
    ) -> Findings {
        let mut findings = fixture::realistic();
        findings.curves.total_by_link = total;
        findings.curves.downtime_by_dirty_rate = downtime;
        findings.codecs.truncate(codecs);
        findings.predictions.truncate(predictions);
        findings.advice.truncate(links);
        let mut numbers = numbers.into_iter().cycle();
        let mut number = || numbers.next().unwrap();
        for facts in &mut findings.codecs {
            (facts.ratio, facts.ratio_error) = (number(), number());
            facts.encode_bytes_per_s = limited.then(&mut number);
            facts.decode_bytes_per_s = Some(number());
        }
        for prediction in &mut findings.predictions {
            (prediction.total_ms, prediction.qemu_total_ms) = (integers[0], integers[1]);
            (prediction.wire_bytes, prediction.downtime_ms) = (integers[2], integers[3]);
            (prediction.cpu_source_s, prediction.cpu_destination_s) = (number(), number());
        }
        for advice in &mut findings.advice {
            (advice.best, advice.runner_up, advice.plain) = (indices[0], Some(indices[1]), indices[2]);
        }
        (findings.ram_bytes, findings.sample.bytes, findings.sample.pages) = (integers[4], integers[5], integers[6]);
        (findings.dirty.bytes_per_s, findings.downtime_limit_ms) = (integers[7], integers[8]);
        (findings.pages.zero, findings.pages.text, findings.pages.other) = (number(), number(), number());
        (findings.machine.send_byte_s, findings.machine.land_byte_s) = (number(), number());
        findings.sample.share = number();
        findings
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_findings_break_the_page(findings in any_findings()) {
        check(&findings);
    }
}

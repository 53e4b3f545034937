//! A scenario as a picture: a bar for each way, from nothing to the median, and a line from the
//! fastest run to the slowest.

use std::fmt::Write as _;

use crate::scenario::Way;
use crate::table::{Results, seconds};

const BAR: f64 = 26.0;
const GAP: f64 = 10.0;
const LABELS: f64 = 150.0;
const WIDTH: f64 = 640.0;
const TOP: f64 = 44.0;

/// The picture as SVG; light and dark follow the reader's setting.
pub(crate) fn svg(results: &Results<'_>) -> String {
    let ways: Vec<Way> = results.costs.iter().map(|(way, _)| *way).collect();
    let times = |way: Way| results.costs.iter().find(|(found, _)| *found == way).map(|(_, costs)| costs);
    let longest = results.costs.iter().flat_map(|(_, costs)| costs).map(seconds).fold(0.0, f64::max);
    let scale = (WIDTH - LABELS - 90.0) / longest.max(f64::MIN_POSITIVE);
    let height = TOP + ways.len() as f64 * (BAR + GAP) + GAP;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\">\n{STYLE}\
         <title>{name}: seconds to move the guest</title>\n\
         <text class=\"ink\" x=\"12\" y=\"26\" font-size=\"16\">{name}: seconds, median of the runs</text>\n",
        name = results.scenario.name
    );
    for (index, way) in ways.into_iter().enumerate() {
        let Some(median) = results.median(way, seconds) else { continue };
        let y = TOP + index as f64 * (BAR + GAP);
        let middle = y + BAR / 2.0;
        let class = if way.is_ours() { "ours" } else { "other" };
        let (least, most) = times(way)
            .into_iter()
            .flatten()
            .map(seconds)
            .fold((f64::MAX, 0.0), |(least, most), time| (f64::min(least, time), f64::max(most, time)));
        // Writing to a string cannot fail.
        let _ = writeln!(
            svg,
            "<text class=\"ink\" x=\"{label}\" y=\"{text}\" text-anchor=\"end\">{name}</text>\n\
             <rect class=\"{class}\" x=\"{LABELS}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>\n\
             <line class=\"spread\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle}\" y2=\"{middle}\"/>\n\
             <text class=\"ink\" x=\"{value:.1}\" y=\"{text}\">{median:.3}</text>",
            label = LABELS - 8.0,
            text = middle + 4.5,
            name = way.name().replace('>', "&gt;"),
            width = median * scale,
            from = LABELS + least * scale,
            to = LABELS + most * scale,
            value = LABELS + most * scale + 8.0,
        );
    }
    svg.push_str("</svg>\n");
    svg
}

const STYLE: &str = "<style>\
.ink{fill:#1b1b1b}.ours{fill:#1f6feb}.other{fill:#9aa4b1}.spread{stroke:#1b1b1b;stroke-width:1.5}\
@media(prefers-color-scheme:dark){.ink{fill:#e8e8e8}.spread{stroke:#e8e8e8}.other{fill:#6b7684}}\
</style>\n";

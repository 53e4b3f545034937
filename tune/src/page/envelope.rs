//! Which curve is lowest where.

use crate::tune::findings::Curve;

/// Where one codec is the fastest.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stretch {
    pub(super) codec: String,
    pub(super) from: f64,
    pub(super) to: f64,
}

/// Narrower than this factor between its ends, a stretch is left to its neighbour: nobody chooses a codec for it.
const NARROW: f64 = 1.12;

/// The points of a curve that have a place on logarithmic axes.
pub(super) fn drawable(curve: &Curve) -> Vec<(f64, f64)> {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    curve.points.iter().copied().filter(|(x, y)| positive(*x) && positive(*y)).collect()
}

/// The height of a curve at `x`, on a straight line of the logarithms; `None` beyond its ends.
pub(super) fn height(points: &[(f64, f64)], x: f64) -> Option<f64> {
    if let [only] = points {
        return (only.0 == x).then_some(only.1);
    }
    points.windows(2).find_map(|pair| {
        let [(x0, y0), (x1, y1)] = pair else { return None };
        if !(*x0..=*x1).contains(&x) {
            return None;
        }
        let share = if x1 > x0 { (x / x0).ln() / (x1 / x0).ln() } else { 0.0 };
        Some(y0 * (y1 / y0).powf(share))
    })
}

/// The lower envelope of these curves, from left to right, without gaps that a reader could see.
pub(super) fn lowest(curves: &[&Curve]) -> Vec<Stretch> {
    let curves: Vec<_> = curves.iter().map(|curve| (curve.codec.as_str(), drawable(curve))).collect();
    let mut all: Vec<f64> =
        curves.iter().flat_map(|(_, points)| points.iter().map(|point| point.0)).collect();
    all.sort_by(f64::total_cmp);
    all.dedup();
    let mut stretches: Vec<Stretch> = Vec::new();
    let best = |x: f64| {
        let heights = curves.iter().filter_map(|(codec, points)| Some((*codec, height(points, x)?)));
        heights.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(codec, _)| codec)
    };
    for pair in all.windows(2) {
        let [from, to] = pair else { continue };
        let (Some(left), Some(right)) = (best(*from), best(*to)) else { continue };
        let turn = if left == right { *to } else { crossing(&curves, (left, right), (*from, *to)) };
        extend(&mut stretches, left, *from, turn);
        extend(&mut stretches, right, turn, *to);
    }
    without_narrow(stretches)
}

/// Where the second gets below the first, by halving: curves are straight between points, but there may be others below.
fn crossing(curves: &[(&str, Vec<(f64, f64)>)], (left, right): (&str, &str), ends: (f64, f64)) -> f64 {
    let points = |codec| curves.iter().find(|curve| curve.0 == codec).map_or(&[][..], |curve| &curve.1);
    let (left, right) = (points(left), points(right));
    let (mut from, mut to) = ends;
    // 40 halvings of a step between two points of a curve are finer than a f64 needs for any plot.
    for _ in 0..40 {
        let middle = (from * to).sqrt();
        let (Some(first), Some(second)) = (height(left, middle), height(right, middle)) else { return from };
        if first <= second { from = middle } else { to = middle }
    }
    from
}

fn extend(stretches: &mut Vec<Stretch>, codec: &str, from: f64, to: f64) {
    match stretches.last_mut() {
        _ if to <= from => {}
        Some(last) if last.codec == codec => last.to = to,
        _ => stretches.push(Stretch { codec: codec.to_owned(), from, to }),
    }
}

fn without_narrow(mut stretches: Vec<Stretch>) -> Vec<Stretch> {
    let narrow = |stretch: &Stretch| stretch.to / stretch.from < NARROW;
    while stretches.len() > 1 {
        let Some(index) = stretches.iter().position(narrow) else { break };
        let gone = stretches.remove(index);
        // Its place goes to the one before, which has been looked at, or to the one after.
        if let Some(before) = index.checked_sub(1).and_then(|before| stretches.get_mut(before)) {
            before.to = gone.to;
        } else if let Some(after) = stretches.first_mut() {
            after.from = gone.from;
        }
    }
    let mut joined = Vec::new();
    for stretch in stretches {
        extend(&mut joined, &stretch.codec, stretch.from, stretch.to);
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(codec: &str, points: &[(f64, f64)]) -> Curve {
        Curve { codec: codec.to_owned(), points: points.to_vec() }
    }

    #[test]
    fn the_crossing_is_where_the_lines_meet() {
        // 100/x and 10, as lines of logarithms: they meet at 10.
        let falling = curve("none", &[(1.0, 100.0), (100.0, 1.0)]);
        let flat = curve("zstd:1", &[(1.0, 10.0), (100.0, 10.0)]);
        let stretches = lowest(&[&falling, &flat]);
        assert_eq!(stretches.iter().map(|s| s.codec.as_str()).collect::<Vec<_>>(), ["zstd:1", "none"]);
        assert!(
            (stretches[0].to - 10.0).abs() < 1e-6 && stretches[1].from == stretches[0].to,
            "{stretches:?}"
        );
        assert_eq!((stretches[0].from, stretches[1].to), (1.0, 100.0));
    }

    #[test]
    fn a_stretch_that_nobody_would_see_is_left_out() {
        let flat = curve("a", &[(1.0, 10.0), (50.0, 10.0), (51.0, 10.0), (52.0, 10.0), (100.0, 10.0)]);
        let dip = curve("b", &[(1.0, 20.0), (50.0, 20.0), (51.0, 9.0), (52.0, 20.0), (100.0, 20.0)]);
        assert_eq!(lowest(&[&flat, &dip]), [Stretch { codec: "a".into(), from: 1.0, to: 100.0 }]);
    }

    #[test]
    fn curves_may_be_empty_short_or_no_numbers() {
        assert!(lowest(&[]).is_empty());
        let odd = curve("a", &[(0.0, 1.0), (f64::NAN, 1.0), (1.0, f64::INFINITY), (2.0, 0.0), (3.0, -1.0)]);
        assert!(lowest(&[&odd, &curve("b", &[]), &curve("c", &[(5.0, 5.0)])]).is_empty());
        let short = curve("short", &[(1.0, 1.0), (10.0, 1.0)]);
        let long = curve("long", &[(1.0, 2.0), (10.0, 2.0), (100.0, 2.0)]);
        let names: Vec<_> = lowest(&[&short, &long]).into_iter().map(|s| (s.codec, s.to)).collect();
        assert_eq!(names, [("short".to_owned(), 10.0), ("long".to_owned(), 100.0)]);
    }
}

//! The lower envelope of curves: which is lowest where.

use multifd_codecs::CodecChoice;

use crate::findings::Curve;

/// A range in which one codec is the fastest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stretch {
    pub(super) codec: CodecChoice,
    pub(super) from: f64,
    pub(super) to: f64,
}

/// A stretch narrower than this factor between its ends is left to its neighbour: too narrow to
/// choose by.
const NARROW: f64 = 1.12;

/// The points of a curve that logarithmic axes can show.
pub(super) fn drawable(curve: &Curve) -> Vec<(f64, f64)> {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    curve.points.iter().copied().filter(|(x, y)| positive(*x) && positive(*y)).collect()
}

/// The height of a curve at `x`, interpolated between logarithms; `None` beyond its ends.
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

/// The lower envelope of these curves, from left to right, without visible gaps.
pub(super) fn lowest(curves: &[&Curve]) -> Vec<Stretch> {
    let curves: Vec<_> = curves.iter().map(|curve| (curve.codec, drawable(curve))).collect();
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

/// Where the second curve gets below the first, by bisection.
fn crossing(
    curves: &[(CodecChoice, Vec<(f64, f64)>)],
    (left, right): (CodecChoice, CodecChoice),
    ends: (f64, f64),
) -> f64 {
    let points = |codec| curves.iter().find(|curve| curve.0 == codec).map_or(&[][..], |curve| &curve.1);
    let (left, right) = (points(left), points(right));
    let (mut from, mut to) = ends;
    // 40 halvings of a step between two points are far finer than a pixel.
    for _ in 0..40 {
        let middle = (from * to).sqrt();
        let (Some(first), Some(second)) = (height(left, middle), height(right, middle)) else { return from };
        if first <= second { from = middle } else { to = middle }
    }
    from
}

fn extend(stretches: &mut Vec<Stretch>, codec: CodecChoice, from: f64, to: f64) {
    match stretches.last_mut() {
        _ if to <= from => {}
        Some(last) if last.codec == codec => last.to = to,
        _ => stretches.push(Stretch { codec, from, to }),
    }
}

fn without_narrow(mut stretches: Vec<Stretch>) -> Vec<Stretch> {
    let narrow = |stretch: &Stretch| stretch.to / stretch.from < NARROW;
    while stretches.len() > 1 {
        let Some(index) = stretches.iter().position(narrow) else { break };
        let gone = stretches.remove(index);
        // Its range goes to the stretch before, which is wide enough, or to the one after.
        if let Some(before) = index.checked_sub(1).and_then(|before| stretches.get_mut(before)) {
            before.to = gone.to;
        } else if let Some(after) = stretches.first_mut() {
            after.from = gone.from;
        }
    }
    let mut joined = Vec::new();
    for stretch in stretches {
        extend(&mut joined, stretch.codec, stretch.from, stretch.to);
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: CodecChoice = CodecChoice::None;
    const B: CodecChoice = CodecChoice::zstd::<1>();
    const C: CodecChoice = CodecChoice::zstd::<3>();

    fn curve(codec: CodecChoice, points: &[(f64, f64)]) -> Curve {
        Curve { codec, points: points.to_vec() }
    }

    #[test]
    fn the_crossing_is_where_the_lines_meet() {
        // 100/x and 10, as lines of logarithms: they meet at 10.
        let falling = curve(A, &[(1.0, 100.0), (100.0, 1.0)]);
        let flat = curve(B, &[(1.0, 10.0), (100.0, 10.0)]);
        let stretches = lowest(&[&falling, &flat]);
        assert_eq!(stretches.iter().map(|s| s.codec).collect::<Vec<_>>(), [B, A]);
        assert!(
            (stretches[0].to - 10.0).abs() < 1e-6 && stretches[1].from == stretches[0].to,
            "{stretches:?}"
        );
        assert_eq!((stretches[0].from, stretches[1].to), (1.0, 100.0));
    }

    #[test]
    fn a_stretch_too_narrow_to_see_is_left_out() {
        let flat = curve(A, &[(1.0, 10.0), (50.0, 10.0), (51.0, 10.0), (52.0, 10.0), (100.0, 10.0)]);
        let dip = curve(B, &[(1.0, 20.0), (50.0, 20.0), (51.0, 9.0), (52.0, 20.0), (100.0, 20.0)]);
        assert_eq!(lowest(&[&flat, &dip]), [Stretch { codec: A, from: 1.0, to: 100.0 }]);
    }

    #[test]
    fn curves_may_be_empty_short_or_no_numbers() {
        assert!(lowest(&[]).is_empty());
        let odd = curve(A, &[(0.0, 1.0), (f64::NAN, 1.0), (1.0, f64::INFINITY), (2.0, 0.0), (3.0, -1.0)]);
        assert!(lowest(&[&odd, &curve(B, &[]), &curve(C, &[(5.0, 5.0)])]).is_empty());
        let short = curve(A, &[(1.0, 1.0), (10.0, 1.0)]);
        let long = curve(B, &[(1.0, 2.0), (10.0, 2.0), (100.0, 2.0)]);
        let names: Vec<_> = lowest(&[&short, &long]).into_iter().map(|s| (s.codec, s.to)).collect();
        assert_eq!(names, [(A, 10.0), (B, 100.0)]);
    }
}

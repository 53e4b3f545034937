//! Axes: values to coordinates.

/// One axis of a plot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    logarithmic: bool,
    /// Range of values; rises.
    from: f64,
    to: f64,
    /// Range of coordinates; falls where the axis goes up.
    first: f64,
    last: f64,
}

impl Axis {
    /// An axis for values above 0.
    pub(super) fn logarithmic((from, to): (f64, f64), (first, last): (f64, f64)) -> Self {
        let from = if from.is_finite() && from > 0.0 { from } else { 1.0 };
        let to = if to.is_finite() && to > from { to } else { from * 10.0 };
        Self { logarithmic: true, from, to, first, last }
    }

    pub(super) fn linear((from, to): (f64, f64), (first, last): (f64, f64)) -> Self {
        let from = if from.is_finite() { from } else { 0.0 };
        let to = if to.is_finite() && to > from { to } else { from + 1.0 };
        Self { logarithmic: false, from, to, first, last }
    }

    /// Coordinate of `value`; at the edge if it is outside.
    pub(super) fn place(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value / self.from).log10() / (self.to / self.from).log10()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) };
        self.first + (self.last - self.first) * share
    }

    /// Whether `value` is on the axis.
    pub(super) fn holds(&self, value: f64) -> bool {
        (self.from..=self.to).contains(&value)
    }

    /// Round values for grid lines and their numbers, each with this much room.
    pub(super) fn ticks(&self, room: f64) -> Vec<f64> {
        let count = ((self.last - self.first).abs() / room).max(1.0);
        if self.logarithmic { self.decades(count) } else { self.steps(count) }
    }

    fn decades(&self, count: f64) -> Vec<f64> {
        let of = |factors: &[f64], every: i32| {
            let decades = DECADES.filter(|power| power.rem_euclid(every) == 0);
            let all =
                decades.flat_map(|power| factors.iter().map(move |factor| factor * f64::powi(10.0, power)));
            // Tolerance of 0.05 %: a decade is not lost to rounding of a logarithm.
            all.filter(|tick| (self.from * 0.9995..=self.to * 1.0005).contains(tick)).collect::<Vec<_>>()
        };
        let finer =
            [of(&[1.0, 2.0, 5.0], 1), of(&[1.0, 3.0], 1), of(&[1.0], 1), of(&[1.0], 2), of(&[1.0], 3)];
        finer.into_iter().find(|ticks| ticks.len() as f64 <= count).unwrap_or_default()
    }

    fn steps(&self, count: f64) -> Vec<f64> {
        let rough = (self.to - self.from) / count;
        let decade = f64::powf(10.0, rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * decade);
        let Some(step) = steps.into_iter().find(|step| *step >= rough * 0.999) else { return Vec::new() };
        let first = (self.from / step - 0.001).ceil();
        let all = (0..MOST_STEPS).map(|number| (first + f64::from(number)) * step);
        all.filter(|tick| *tick <= self.to + step * 0.001).collect()
    }
}

/// Limit of ticks: more than any plot has room for.
const MOST_STEPS: u32 = 50;

/// Powers of ten that values can have: from a nanosecond to an exabyte.
const DECADES: std::ops::Range<i32> = -9..19;

/// The decades at or below, and at or above, these values; `None` if none of them is above 0.
pub(super) fn decades_around(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = extent(values.filter(|value| *value > 0.0))?;
    let low = f64::powf(10.0, low.log10().floor());
    let high = f64::powf(10.0, high.log10().ceil());
    Some((low, if high > low { high } else { low * 10.0 }))
}

/// The least and the greatest finite value.
pub(super) fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|value| value.is_finite()).fold(None, |extent, value| match extent {
        None => Some((value, value)),
        Some((low, high)) => Some((low.min(value), high.max(value))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decades_are_equally_far_apart() {
        let axis = Axis::logarithmic((1.0, 100.0), (0.0, 200.0));
        assert_eq!([1.0, 10.0, 100.0].map(|value| axis.place(value)), [0.0, 100.0, 200.0]);
        assert_eq!(axis.ticks(20.0), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(axis.ticks(60.0), [1.0, 10.0, 100.0]);
    }

    #[test]
    fn a_linear_axis_has_round_ticks() {
        let axis = Axis::linear((0.0, 345.0), (100.0, 0.0));
        assert_eq!(axis.place(345.0), 0.0);
        assert_eq!(axis.ticks(25.0), [0.0, 100.0, 200.0, 300.0]);
    }

    #[test]
    fn nothing_leaves_the_axis() {
        for axis in [
            Axis::logarithmic((0.0, 0.0), (0.0, 100.0)),
            Axis::logarithmic((f64::NAN, f64::INFINITY), (0.0, 100.0)),
            Axis::linear((5.0, 5.0), (0.0, 100.0)),
            Axis::linear((f64::NAN, f64::NAN), (0.0, 100.0)),
        ] {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0, 1e300, 1e-300] {
                let place = axis.place(value);
                assert!((0.0..=100.0).contains(&place), "{axis:?} {value}: {place}");
            }
            assert!(axis.ticks(20.0).iter().all(|tick| tick.is_finite()));
        }
    }

    #[test]
    fn decades_around_what_is_known() {
        assert_eq!(decades_around([3.0, 250.0].into_iter()), Some((1.0, 1000.0)));
        assert_eq!(decades_around([10.0].into_iter()), Some((10.0, 100.0)));
        assert_eq!(decades_around([0.0, f64::NAN, f64::INFINITY].into_iter()), None);
    }
}

//! Placement of labels, so that none covers another.

/// Places for labels of these sizes along a line, near the wanted ones: in order, without overlap,
/// within `from..to` if there is room, otherwise side by side from `from` on.
pub(super) fn spread(wanted: &[f64], sizes: &[f64], (from, to): (f64, f64)) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    let of = |values: &[f64], index: usize| values.get(index).copied().unwrap_or_default();
    order.sort_by(|a, b| of(wanted, *a).total_cmp(&of(wanted, *b)));
    let mut places = vec![from; wanted.len()];
    // Away from the start, then back from the end.
    let mut free = from;
    for &index in &order {
        let half = of(sizes, index) / 2.0;
        let place = of(wanted, index).max(free + half);
        set(&mut places, index, place);
        free = place + half;
    }
    let mut free = to;
    for &index in order.iter().rev() {
        let half = of(sizes, index) / 2.0;
        let place = of(&places, index).min(free - half);
        set(&mut places, index, place);
        free = place - half;
    }
    // There is not enough room for all.
    if free < from - 0.01 {
        let mut free = from;
        for &index in &order {
            let half = of(sizes, index) / 2.0;
            set(&mut places, index, free + half);
            free += 2.0 * half;
        }
    }
    places
}

fn set(places: &mut [f64], index: usize, value: f64) {
    if let Some(place) = places.get_mut(index) {
        *place = value;
    }
}

/// An upright rectangle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rect {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
}

impl Rect {
    fn touches(&self, other: &Self) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }

    fn within(&self, outer: &Self) -> bool {
        self.left >= outer.left
            && self.right <= outer.right
            && self.top >= outer.top
            && self.bottom <= outer.bottom
    }
}

/// The free area of a plot.
#[derive(Clone, Debug)]
pub(super) struct Room {
    bounds: Rect,
    taken: Vec<Rect>,
}

impl Room {
    pub(super) fn new(bounds: Rect) -> Self {
        Self { bounds, taken: Vec::new() }
    }

    /// Reserves this area.
    pub(super) fn take(&mut self, rect: Rect) {
        self.taken.push(rect);
    }

    /// Reserves the first free one of these; `None` if all overlap something.
    pub(super) fn first_free(&mut self, candidates: &[Rect]) -> Option<Rect> {
        let free =
            |rect: &&Rect| rect.within(&self.bounds) && !self.taken.iter().any(|taken| taken.touches(rect));
        let found = candidates.iter().find(free).copied();
        self.taken.extend(found);
        found
    }
}

/// A name shortened to the length of a codec's.
pub(super) fn brief(name: &str) -> String {
    /// Most characters: `zstd:19`.
    const MOST: usize = 7;
    match name.char_indices().nth(MOST) {
        None => name.to_owned(),
        Some(_) => name.chars().take(MOST - 1).chain(['…']).collect(),
    }
}

/// Upper bound of a text's width at this font size, over the usual system fonts.
pub(super) fn text_width(text: &str, font: f64) -> f64 {
    let width = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | ':' | '/' | ' ' | '|' => 0.38,
        'm' | 'w' | 'M' | 'W' | '%' => 0.95,
        _ => 0.66,
    };
    text.chars().map(width).sum::<f64>() * font
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn labels_with_room_stay_where_they_are() {
        assert_eq!(spread(&[50.0, 10.0], &[10.0, 10.0], (0.0, 100.0)), [50.0, 10.0]);
    }

    #[test]
    fn labels_at_one_place_are_pushed_apart() {
        assert_eq!(spread(&[50.0, 50.0], &[10.0, 10.0], (0.0, 100.0)), [50.0, 60.0]);
        assert_eq!(spread(&[99.0, 99.0], &[10.0, 10.0], (0.0, 100.0)), [85.0, 95.0]);
    }

    proptest! {
        #[test]
        fn labels_never_cover_each_other(wanted in proptest::collection::vec(-50.0..150.0, 0..12), size in 1.0..20.0) {
            let mut places = spread(&wanted, &vec![size; wanted.len()], (0.0, 100.0));
            prop_assert_eq!(places.len(), wanted.len());
            places.sort_by(f64::total_cmp);
            prop_assert!(places.windows(2).all(|pair| pair[1] - pair[0] > size - 0.02), "{:?}", places);
            if size * wanted.len() as f64 <= 100.0 {
                prop_assert!(places.iter().all(|place| (size / 2.0 - 0.02..=100.02 - size / 2.0).contains(place)));
            }
        }
    }

    #[test]
    fn only_long_names_are_cut() {
        assert_eq!(brief("zstd:19"), "zstd:19");
        assert_eq!(brief("<script>alert"), "<scrip…");
    }

    #[test]
    fn a_room_is_given_once() {
        let square = |left: f64| Rect { left, top: 0.0, right: left + 10.0, bottom: 10.0 };
        let mut room = Room::new(Rect { left: 0.0, top: 0.0, right: 25.0, bottom: 10.0 });
        room.take(square(0.0));
        assert_eq!(room.first_free(&[square(5.0), square(12.0)]).map(|rect| rect.left), Some(12.0));
        assert!(room.first_free(&[square(12.0), square(20.0)]).is_none());
    }
}

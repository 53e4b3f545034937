//! A stream that is sound but for one lie in it: what a hostile source sends that gets past the
//! first checks.
#![expect(clippy::indexing_slicing, reason = "positions are chosen from the list that they index")]

use super::{Ending, Recording, Step};
use crate::fill::Random;

/// Values at which lengths, counts and offsets break.
const NASTY: [u64; 12] =
    [0, 1, 2, 0x7f, 0x80, 0xff, 0x1000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 63, u64::MAX];

impl Recording {
    /// Changes one thing that one message says, or one message's place; gives what was done, too.
    /// The same `seed` does the same.
    #[must_use]
    pub fn with_a_lie(mut self, seed: u64) -> (Self, String) {
        let mut random = Random(seed);
        let sends: Vec<usize> = (0..self.steps.len()).filter(|at| self.steps[*at].is_send()).collect();
        // Long streams have many pages and few heads: messages of each name have the same chance.
        let mut names: Vec<&str> = sends.iter().map(|at| self.steps[*at].name()).collect();
        names.sort_unstable();
        names.dedup();
        let name = pick(&mut random, &names);
        let of_name: Vec<usize> =
            sends.iter().copied().filter(|at| Some(self.steps[*at].name()) == name.copied()).collect();
        let (Some(name), Some(&at)) = (name, pick(&mut random, &of_name)) else {
            return (self, "nothing to lie about".to_owned());
        };
        let other = pick(&mut random, &sends).copied().unwrap_or(at);
        let done = self.lie(at, other, &mut random);
        if random.below(4) > 0 {
            self.ending = Ending::HangUp;
        }
        (self, format!("seed {seed}: {name}, step {at}: {done}"))
    }

    fn lie(&mut self, at: usize, other: usize, random: &mut Random) -> String {
        match random.below(8) {
            0 => {
                self.steps.remove(at);
                "left out".to_owned()
            }
            1 => {
                let again = self.steps[at].clone();
                self.steps.insert(at, again);
                "twice".to_owned()
            }
            2 => {
                self.steps.swap(at, other);
                format!("in the place of step {other}")
            }
            3 => {
                let lane = self.steps[other].lane();
                if let (Step::Send { lane: of, .. }, Some(lane)) = (&mut self.steps[at], lane) {
                    *of = lane;
                }
                format!("on the connection of step {other}")
            }
            4 => {
                let bytes = self.steps[other].bytes().to_vec();
                if let Step::Send { bytes: of, .. } = &mut self.steps[at] {
                    *of = bytes;
                }
                format!("with the bytes of step {other}")
            }
            _ => self.lie_in_a_field(at, random),
        }
    }

    /// A number of the message, big-endian as all of them are.
    fn lie_in_a_field(&mut self, at: usize, random: &mut Random) -> String {
        let Step::Send { bytes, .. } = &mut self.steps[at] else { return String::new() };
        let width = *pick(random, &[1, 2, 4, 8]).unwrap_or(&1);
        // Heads are at the beginning.
        let most = if random.below(4) == 0 { bytes.len() } else { bytes.len().min(384) };
        let offset = random.below(most);
        let old =
            bytes.iter().skip(offset).take(width).fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        let new = match random.below(4) {
            0 => old.wrapping_add(1),
            1 => old.wrapping_sub(1),
            2 => old ^ 1 << random.below(width * 8),
            _ => *pick(random, &NASTY).unwrap_or(&0),
        };
        let new_bytes = new.to_be_bytes();
        let field = bytes.iter_mut().skip(offset).take(width);
        field.zip(&new_bytes[8 - width..]).for_each(|(to, from)| *to = *from);
        format!("{width} bytes at {offset} are {new:#x}, not {old:#x}")
    }
}

fn pick<'a, T>(random: &mut Random, from: &'a [T]) -> Option<&'a T> {
    from.get(random.below(from.len()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::{Memory, Recorder, Style};

    #[test]
    fn lies_are_of_every_kind_and_repeatable() {
        let sound = Recorder::migration(Style::multifd(2), &mut Memory::small(1));
        let told: Vec<_> = (0..400).map(|seed| sound.clone().with_a_lie(seed)).collect();
        let again = sound.clone().with_a_lie(7);
        assert_eq!(format!("{:?}", told[7].0.steps), format!("{:?}", again.0.steps));
        for kind in ["left out", "twice", "in the place", "on the connection", "with the bytes", " bytes at "]
        {
            assert!(told.iter().any(|(_, done)| done.contains(kind)), "no lie {kind}");
        }
        let names: HashSet<_> = told.iter().filter_map(|(_, done)| done.split([':', ',']).nth(1)).collect();
        assert!(names.len() > 10, "{names:?}");
    }
}

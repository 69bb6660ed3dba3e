//! Which rows ranks that divide experts send each other: a pure function of how many rows each of them has for each expert. A rank
//! sorts its rows by expert; those of all ranks for an expert meet at its owner, sorted by the rank that they come from. What
//! exceeds a rank's room goes in further rounds, in which all ranks take part.

use std::ops::Range;

/// How many rows each rank has for each expert, and who owns which experts: rank `r` those from `r * own` on.
#[derive(Debug)]
pub(super) struct Routes {
    /// The number of this rank.
    pub(super) rank: usize,
    /// Experts of a rank.
    pub(super) own: usize,
    /// By rank, `[experts + 1]`: where its rows for each expert begin.
    pub(super) offsets: Vec<Vec<usize>>,
    /// Rows that a rank has room for.
    pub(super) capacity: usize,
}

/// What a rank sends, receives and computes at a time.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Round {
    /// By rank: which of this one's rows it is sent, in their order: a range for each of its experts that gets any.
    pub(super) sends: Vec<Vec<Range<usize>>>,
    /// By rank: places in the round of the rows that come from it, in the order in which it sends them, and in as many ranges.
    pub(super) receives: Vec<Vec<Range<usize>>>,
    /// `[own + 1]`: where the rows of each of this rank's experts begin in the round.
    pub(super) offsets: Vec<i32>,
    /// Rows of the longest message between any two ranks.
    pub(super) longest: usize,
}

/// Rows of one rank for one expert that a round takes.
struct Piece {
    /// Among its owner's.
    expert: usize,
    from: usize,
    /// Among those of the rank that they come from.
    rows: Range<usize>,
    /// In the round.
    place: Range<usize>,
}

impl Round {
    /// Rows that this rank computes.
    pub(super) fn rows(&self) -> usize {
        self.offsets.last().map_or(0, |&rows| rows as usize)
    }
}

impl Routes {
    /// How many rounds all rows take.
    pub(super) fn rounds(&self) -> usize {
        let ranks = 0..self.offsets.len();
        ranks.map(|rank| self.total(rank).div_ceil(self.capacity.max(1))).max().unwrap_or(0)
    }

    /// A round of this rank.
    pub(super) fn round(&self, number: usize) -> Round {
        let ranks = self.offsets.len();
        let mut round = Round {
            sends: vec![Vec::new(); ranks],
            receives: vec![Vec::new(); ranks],
            offsets: vec![0; self.own + 1],
            longest: 0,
        };
        for to in 0..ranks {
            let mut lengths = vec![0; ranks];
            for Piece { expert, from, rows, place } in self.pieces(to, number) {
                lengths[from] += rows.len();
                if to == self.rank {
                    round.offsets[expert + 1] += rows.len() as i32;
                    round.receives[from].push(place);
                }
                if from == self.rank {
                    round.sends[to].push(rows);
                }
            }
            round.longest = lengths.into_iter().max().unwrap_or(0).max(round.longest);
        }
        for expert in 0..self.own {
            round.offsets[expert + 1] += round.offsets[expert];
        }
        round
    }

    /// Rows that the experts of a rank get.
    fn total(&self, rank: usize) -> usize {
        let (first, end) = (rank * self.own, (rank + 1) * self.own);
        self.offsets.iter().map(|offsets| offsets[end] - offsets[first]).sum()
    }

    /// What the experts of rank `to` get in a round, by expert, then by the rank that it comes from.
    fn pieces(&self, to: usize, round: usize) -> impl Iterator<Item = Piece> {
        let start = round * self.capacity;
        let end = start + self.capacity;
        let all = (0..self.own).flat_map(move |expert| (0..self.offsets.len()).map(move |from| (expert, from)));
        let mut next = 0;
        all.filter_map(move |(expert, from)| {
            let offsets = &self.offsets[from][to * self.own + expert..];
            let (first, at) = (offsets[0], next);
            next += offsets[1] - first;
            let (low, high) = (at.max(start), next.min(end));
            let piece =
                || Piece { expert, from, rows: first + low - at..first + high - at, place: low - start..high - start };
            (low < high).then(piece)
        })
    }
}

/// Of elements that ranges hold, one behind the other, those from `start` on, `len` at most: as ranges.
pub(super) fn part(ranges: &[Range<usize>], start: usize, len: usize) -> Vec<Range<usize>> {
    let mut before = 0;
    let cut = |range: &Range<usize>| {
        let (low, high) = (start.max(before), (start + len).min(before + range.len()));
        let cut = (low < high).then(|| range.start + low - before..range.start + high - before);
        before += range.len();
        cut
    };
    ranges.iter().filter_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The routes of every rank; `counts` are each rank's rows by expert.
    fn routes(counts: &[Vec<usize>], capacity: usize) -> Vec<Routes> {
        let own = counts[0].len() / counts.len();
        let running = |counts: &Vec<usize>| {
            let mut total = 0;
            std::iter::once(0)
                .chain(counts.iter().map(|count| {
                    total += count;
                    total
                }))
                .collect::<Vec<usize>>()
        };
        let offsets: Vec<_> = counts.iter().map(running).collect();
        (0..counts.len()).map(|rank| Routes { rank, own, offsets: offsets.clone(), capacity }).collect()
    }

    /// Even, skewed, with experts and ranks without rows, one expert with all, and nothing at all.
    fn cases() -> Vec<Vec<Vec<usize>>> {
        vec![
            vec![vec![2, 2, 2, 2], vec![2, 2, 2, 2]],
            vec![vec![5, 0, 1, 3], vec![0, 0, 7, 2]],
            vec![vec![0; 4], vec![9, 0, 0, 4]],
            vec![vec![8, 0, 0, 0], vec![13, 0, 0, 0], vec![1, 0, 0, 0], vec![0, 0, 0, 0]],
            vec![vec![0; 6], vec![0; 6], vec![0; 6]],
            vec![vec![1, 2, 3, 4, 5, 6], vec![6, 5, 4, 3, 2, 1], vec![0, 9, 0, 9, 0, 9]],
        ]
    }

    #[test]
    fn every_row_reaches_its_expert_once_sorted_by_expert_and_rank_in_any_room() {
        for counts in cases() {
            let experts = counts[0].len();
            for capacity in [1, 2, 5, 1000] {
                let routes = routes(&counts, capacity);
                // Each rank's rows for its experts, over all rounds, as (expert, rank, row).
                let mut received = vec![Vec::new(); counts.len()];
                for number in 0..routes[0].rounds() {
                    let rounds: Vec<Round> = routes.iter().map(|routes| routes.round(number)).collect();
                    let messages =
                        |to: usize, from: usize| rounds[from].sends[to].iter().map(|rows| rows.len()).sum::<usize>();
                    let longest = (0..counts.len()).flat_map(|to| (0..counts.len()).map(move |from| (to, from)));
                    let longest = longest.map(|(to, from)| messages(to, from)).max().unwrap();
                    for (to, round) in rounds.iter().enumerate() {
                        assert_eq!(routes[to].rounds(), routes[0].rounds(), "ranks agree");
                        assert!(round.rows() <= capacity);
                        assert_eq!(round.longest, longest);
                        let mut places = vec![None; round.rows()];
                        for (from, other) in rounds.iter().enumerate() {
                            let rows = other.sends[to].iter().cloned().flatten();
                            let into: Vec<usize> = round.receives[from].iter().cloned().flatten().collect();
                            assert_eq!(into.len(), messages(to, from));
                            // What goes from device to device is a message for each range.
                            let lengths = |ranges: &[Range<usize>]| ranges.iter().map(Range::len).collect::<Vec<_>>();
                            assert_eq!(lengths(&round.receives[from]), lengths(&other.sends[to]));
                            for (place, row) in into.into_iter().zip(rows) {
                                assert_eq!(places[place].replace((from, row)), None);
                            }
                        }
                        for (expert, pair) in round.offsets.windows(2).enumerate() {
                            for place in &places[pair[0] as usize..pair[1] as usize] {
                                let (from, row) = place.unwrap();
                                received[to].push((to * routes[to].own + expert, from, row));
                            }
                        }
                    }
                }
                let all: Vec<_> = received.concat();
                let expected: Vec<_> = (0..experts)
                    .flat_map(|expert| (0..counts.len()).map(move |from| (expert, from)))
                    .flat_map(|(expert, from)| {
                        let first: usize = counts[from][..expert].iter().sum();
                        (0..counts[from][expert]).map(move |row| (expert, from, first + row))
                    })
                    .collect();
                assert_eq!(all, expected);
            }
        }
    }

    #[test]
    fn parts_of_ranges_are_the_ranges() {
        let ranges = [3..5, 9..9, 10..14, 20..21];
        let all: Vec<usize> = ranges.iter().cloned().flatten().collect();
        for len in 1..9 {
            let parts = (0..all.len()).step_by(len).flat_map(|start| part(&ranges, start, len));
            assert_eq!(parts.flatten().collect::<Vec<_>>(), all);
        }
        assert!(part(&ranges, all.len(), 3).is_empty());
    }
}

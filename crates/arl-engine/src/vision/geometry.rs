//! Where patches are: their order, rows and columns, the windows of attention, and the taps of learned positions. Pure; knows
//! grids alone. Patches come by merge blocks: `merge * merge` in a row make one token of the decoder.

use arl_model::VisionConfig;

/// What the places of patches follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Patches in a row, and in a column, of a merge block.
    pub(crate) merge: usize,
    /// Merge blocks in a row, and in a column, of a window; none: no block has windows.
    pub(crate) window: Option<usize>,
    /// Height and width of the table of learned positions, if there is one.
    pub(crate) side: Option<usize>,
}

/// The places of all patches of a micro-batch's images. `N` patches, `M` merge blocks.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Places {
    /// `[M]`: which of the images' merge blocks is at each place of the tower's order. Windows are contiguous there.
    pub(crate) order: Vec<usize>,
    /// `[segments + 1]`: where each image begins, in patches, and `N`.
    pub(crate) images: Vec<i32>,
    /// `[segments + 1]`: where each window begins, in patches, and `N`; empty without windows.
    pub(crate) windows: Vec<i32>,
    /// `[3, N]`: zeros, rows and columns of the patches in the tower's order.
    pub(crate) axes: Vec<i32>,
    /// `[N, 4]` each: rows of the table of learned positions, and their weights; empty without one.
    pub(crate) taps: Vec<i32>,
    pub(crate) weights: Vec<f32>,
}

/// Patches of the longest segment.
pub(crate) fn longest(segments: &[i32]) -> usize {
    segments.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
}

impl Geometry {
    pub(crate) fn of(config: &VisionConfig) -> Self {
        Geometry {
            merge: config.spatial_merge_size,
            window: config.window_side(),
            side: config.position_side().map(usize::from),
        }
    }

    /// Patches of a merge block.
    pub(crate) fn unit(self) -> usize {
        self.merge * self.merge
    }

    /// The places of the patches of images with these grids: (time, height, width) in patches, whole merge blocks.
    pub(crate) fn places(self, grids: &[[u32; 3]]) -> Places {
        let mut places = Places { images: vec![0], ..Places::default() };
        if self.window.is_some() {
            places.windows.push(0);
        }
        let (mut rows, mut columns) = (Vec::new(), Vec::new());
        for &grid in grids {
            let [frames, height, width] = grid.map(|side| side as usize);
            let (down, across) = (height / self.merge, width / self.merge);
            for _ in 0..frames {
                let first = places.order.len();
                for (row, column) in self.blocks(down, across, &mut places.windows) {
                    places.order.push(first + row * across + column);
                    for y in 0..self.merge {
                        for x in 0..self.merge {
                            rows.push((row * self.merge + y) as i32);
                            columns.push((column * self.merge + x) as i32);
                        }
                    }
                }
                places.images.push(rows.len() as i32);
                if let Some(side) = self.side {
                    let patches = rows.len() - height * width..rows.len();
                    for (&row, &column) in rows[patches.clone()].iter().zip(&columns[patches]) {
                        places.add_taps(side, (row as usize, height), (column as usize, width));
                    }
                }
            }
        }
        places.axes = [vec![0; rows.len()], rows, columns].concat();
        places
    }

    /// The merge blocks of a frame in the tower's order; adds where its windows end. Windows at the edges may be smaller.
    fn blocks(self, down: usize, across: usize, windows: &mut Vec<i32>) -> Vec<(usize, usize)> {
        let Some(window) = self.window else {
            return (0..down).flat_map(|row| (0..across).map(move |column| (row, column))).collect();
        };
        let mut blocks = Vec::with_capacity(down * across);
        let mut end = windows.last().copied().unwrap_or(0);
        for top in (0..down).step_by(window) {
            for left in (0..across).step_by(window) {
                let before = blocks.len();
                for row in top..down.min(top + window) {
                    blocks.extend((left..across.min(left + window)).map(|column| (row, column)));
                }
                end += ((blocks.len() - before) * self.unit()) as i32;
                windows.push(end);
            }
        }
        blocks
    }
}

impl Places {
    /// The four rows around a place in a table of `side` by `side` positions that covers the image, corner to corner.
    fn add_taps(&mut self, side: usize, row: (usize, usize), column: (usize, usize)) {
        let ((top, below, down), (left, right, across)) = (taps(side, row), taps(side, column));
        for (row, by_row) in [(top, 1.0 - down), (below, down)] {
            for (column, by_column) in [(left, 1.0 - across), (right, across)] {
                self.taps.push((row * side + column) as i32);
                self.weights.push(by_row * by_column);
            }
        }
    }
}

/// The two places of a table of `side` around place `at` of `of`, and how far it is from the first; in f32, as transformers
/// does.
fn taps(side: usize, (at, of): (usize, usize)) -> (usize, usize, f32) {
    let place = (at * (side - 1)) as f32 / of.saturating_sub(1).max(1) as f32;
    let first = (place.floor() as usize).min(side - 1);
    (first, (first + 1).min(side - 1), place - first as f32)
}

#[cfg(test)]
#[path = "geometry_tests.rs"]
mod tests;

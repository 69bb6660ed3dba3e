//! Bicubic resizing of 8-bit RGB with antialiasing, equal in every bit to what torchvision's `resize` computes for u8 on a
//! processor with AVX2 (PyTorch's `UpSampleKernel.cpp`): along the width first, then along the height, with u8 between the
//! two, each with 16-bit integer weights. Rows are kept between the two only as long as they are needed.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;
mod weights;

use weights::Weights;

/// The loops over pixels, for a kind of processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Kernel {
    /// The fastest that this processor has.
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if avx2::available() {
            return Kernel::Avx2;
        }
        Kernel::Scalar
    }

    /// Each row of `from` along the width, into the same row of `to`.
    fn across(self, weights: &Weights, from: [&[u8]; 2], to: [&mut [u8]; 2]) {
        match self {
            Kernel::Scalar => from.into_iter().zip(to).for_each(|(from, to)| scalar::across(weights, 0, from, to)),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::across(weights, from, to),
        }
    }

    /// One row `to` of the rows that `weights` has for row `y`.
    fn down(self, weights: &Weights, y: usize, rows: &[&[u8]], to: &mut [u8]) {
        match self {
            Kernel::Scalar => scalar::down(weights, y, 0, rows, to),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::down(weights, y, rows, to),
        }
    }
}

/// `pixels` (RGB, `[height, width, 3]` of `from = (height, width)`) resized to `to = (height, width)`.
///
/// # Panics
///
/// Where `pixels` has another length, or a side is 0.
pub fn resize(pixels: Vec<u8>, from: (u32, u32), to: (u32, u32)) -> Vec<u8> {
    if from == to {
        assert_eq!(pixels.len(), 3 * from.0 as usize * from.1 as usize, "pixels of {from:?}");
        return pixels;
    }
    resize_with(Kernel::best(), &pixels, from, to)
}

/// Bytes that [`resize`] allocates at most.
pub(crate) fn resize_memory(from: (u32, u32), to: (u32, u32)) -> u64 {
    let (height, width) = (u64::from(to.0), u64::from(to.1));
    let kept = Weights::most_taps(from.0, to.0) as u64 + 2;
    let weights = |from: u32, to: u32| u64::from(to) * (2 * Weights::most_taps(from, to) as u64 + 16);
    3 * width * (height + kept) + weights(from.0, to.0) + weights(from.1, to.1)
}

fn resize_with(kernel: Kernel, pixels: &[u8], from: (u32, u32), to: (u32, u32)) -> Vec<u8> {
    let (height, row_len) = (from.0 as usize, 3 * from.1 as usize);
    assert_eq!(pixels.len(), height * row_len, "pixels of {from:?}");
    let (to_height, to_row_len) = (to.0 as usize, 3 * to.1 as usize);
    let across = Weights::new(from.1, to.1);
    let down = Weights::new(from.0, to.0);
    let mut resized = vec![0; to_height * to_row_len];
    let mut kept = KeptRows::new(down.taps() + 1, to_row_len);
    let stored = |y: usize| &pixels[y * row_len..(y + 1) * row_len];
    for (y, to) in resized.chunks_exact_mut(to_row_len).enumerate() {
        let rows = down.range(y);
        while kept.next < rows.end {
            // Two rows at a time, so that weights are loaded once for both; the last one may be alone.
            let (first, second) = (kept.next, (kept.next + 1).min(height - 1));
            let [to_first, to_second] = kept.two(first);
            kernel.across(&across, [stored(first), stored(second)], [to_first, to_second]);
            kept.next += 1 + usize::from(second > first);
        }
        let rows: Vec<&[u8]> = rows.map(|row| kept.row(row)).collect();
        kernel.down(&down, y, &rows, to);
    }
    resized
}

/// The last rows that are resized along the width, each in its number's place modulo how many there are.
struct KeptRows {
    rows: Vec<u8>,
    row_len: usize,
    /// The first that is not resized yet.
    next: usize,
}

impl KeptRows {
    fn new(rows: usize, row_len: usize) -> Self {
        Self { rows: vec![0; rows.max(2) * row_len], row_len, next: 0 }
    }

    fn place(&self, row: usize) -> usize {
        row % (self.rows.len() / self.row_len) * self.row_len
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.rows[self.place(row)..][..self.row_len]
    }

    /// The places of `row` and of the one after it.
    fn two(&mut self, row: usize) -> [&mut [u8]; 2] {
        let (first, second) = (self.place(row), self.place(row + 1));
        let (before, after) = self.rows.split_at_mut(first.max(second));
        let (low, high) = (&mut before[first.min(second)..][..self.row_len], &mut after[..self.row_len]);
        if first < second { [low, high] } else { [high, low] }
    }
}

#[cfg(test)]
mod tests;

//! Repeatable random shapes and values. Knows no leaf.

use arl_engine::backend::Heads;

/// The head sizes that are drawn: those of tensor cores most often.
const HEAD_SIZES: [usize; 11] = [64, 128, 64, 128, 64, 128, 32, 72, 80, 10, 256];
/// Query heads, and key and value heads.
const HEAD_COUNTS: [(usize, usize); 8] = [(1, 1), (2, 1), (4, 2), (3, 1), (8, 2), (6, 2), (2, 2), (14, 2)];

/// How large what is drawn may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// What the host can emulate.
    Host,
    /// Any shape, of sizes that a GPU checks in milliseconds.
    Chip,
    /// The very sizes of a training step, which fill a GPU.
    Step,
}

impl Size {
    pub(crate) fn of(large: bool) -> Self {
        if large { Size::Chip } else { Size::Host }
    }
}

/// Tokens of a micro-batch at [`Size::Step`], in sequences of [`SEQUENCE`].
pub(crate) const TOKENS: usize = 8192;
const SEQUENCE: usize = 2048;

/// A stream of random numbers (xorshift), and how large what is drawn from it may be.
#[derive(Clone, Debug)]
pub(crate) struct Draw {
    state: u64,
    pub(crate) size: Size,
}

impl Draw {
    pub(crate) fn new(seed: u64, size: Size) -> Self {
        let mut draw = Draw { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, size };
        // Seeds that differ in a bit begin alike.
        for _ in 0..8 {
            draw.next();
        }
        draw
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound
    }

    /// A number from `least` to `most`.
    pub(crate) fn between(&mut self, least: usize, most: usize) -> usize {
        least + self.below(most - least + 1)
    }

    /// Heads or tails.
    pub(crate) fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Whether sizes are those of a step.
    pub(crate) fn as_in_a_step(&self) -> bool {
        self.size == Size::Step
    }

    /// What the size is to be bounded by, in the order of [`Size`].
    pub(crate) fn scaled(&self, host: usize, chip: usize, step: usize) -> usize {
        match self.size {
            Size::Host => host,
            Size::Chip => chip,
            Size::Step => step,
        }
    }

    /// A size from `least` to `most`: small, next to a multiple of 64, or any. In a step `most` itself.
    pub(crate) fn extent(&mut self, least: usize, most: usize) -> usize {
        if self.as_in_a_step() {
            return most;
        }
        let size = match self.below(3) {
            0 => self.between(least, most.min(least + 40)),
            1 => (64 * self.between(1, (most / 64).max(1)) + self.below(3)).saturating_sub(1),
            _ => self.between(least, most),
        };
        size.clamp(least, most)
    }

    /// A value of about unit variance.
    pub(crate) fn value(&mut self) -> f64 {
        let uniform = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        (uniform - 0.5) * 3.46
    }

    pub(crate) fn values(&mut self, len: usize) -> Vec<f64> {
        // Repeated where there are very many: drawing them would take longer than what they are for. A prime number, so that
        // no two rows of a matrix are alike.
        const DISTINCT: usize = 4_194_301;
        let drawn: Vec<f64> = (0..len.min(DISTINCT)).map(|_| self.value()).collect();
        if len <= DISTINCT { drawn } else { drawn.into_iter().cycle().take(len).collect() }
    }

    pub(crate) fn heads(&mut self) -> Heads {
        if self.as_in_a_step() {
            return Heads { query: 16, key_value: 8, dim: 128 };
        }
        let (query, key_value) = self.pick(&HEAD_COUNTS[..self.scaled(6, 8, 8)]);
        Heads { query, key_value, dim: self.pick(&HEAD_SIZES) }
    }

    /// Bounds of sequences, of which some are empty: from 0 to at most `most` tokens, at least 8.
    pub(crate) fn sequences(&mut self, most: usize) -> Vec<usize> {
        if self.as_in_a_step() {
            return (0..=most.div_ceil(SEQUENCE)).map(|s| (s * SEQUENCE).min(most)).collect();
        }
        let mut bounds = vec![0];
        let mut tokens = 0;
        for _ in 0..self.between(1, 6) {
            let empty = self.below(6) == 0;
            tokens += if empty { 0 } else { self.extent(1, most / 3) };
            bounds.push(tokens.min(most));
        }
        if tokens < 8 {
            bounds.push(tokens + 8);
        }
        bounds
    }

    /// The numbers below `count` in a random order.
    pub(crate) fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

//! The memory of a micro-batch: a stack of buffers in [`Pool::Step`], counted by category.
//! Knows nothing of what the buffers hold; a dry run of the step against it gives the memory plan.

use crate::backend::{Buffer, DType, Pool};

/// Every buffer begins at a multiple of this many bytes.
pub(crate) const ALIGNMENT: usize = 64;

/// What memory is used for; the memory plan is shown in these terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    /// Ids, targets, rows of the rotary embedding's tables, statistics.
    Inputs,
    /// What the forward pass leaves for the backward pass, and the residual stream.
    Activations,
    /// The chunk of logits, and the rows that belong to it.
    LogitsChunk,
    /// What a layer needs only while it is computed.
    Workspace,
    /// Keys and values of earlier tokens, in generation.
    Cache,
    /// Weights that rank 0 computes alone with, where no rank has all of them.
    WholeLayers,
}

impl Category {
    /// All categories, in the order in which a plan lists them.
    pub const ALL: [Category; 6] = [
        Category::Inputs,
        Category::Activations,
        Category::LogitsChunk,
        Category::Workspace,
        Category::Cache,
        Category::WholeLayers,
    ];

    /// The category's name in a plan.
    pub fn name(self) -> &'static str {
        match self {
            Category::Inputs => "inputs",
            Category::Activations => "activations",
            Category::LogitsChunk => "logits chunk",
            Category::Workspace => "workspace",
            Category::Cache => "key-value cache",
            Category::WholeLayers => "whole layers",
        }
    }
}

/// A stack allocator over the step's pool.
#[derive(Clone, Debug)]
pub(crate) struct Arena {
    used: usize,
    capacity: usize,
    current: [usize; Category::ALL.len()],
    peak: usize,
    at_peak: [usize; Category::ALL.len()],
}

/// A height of the stack to return to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    used: usize,
    current: [usize; Category::ALL.len()],
}

impl Arena {
    /// An empty stack over `capacity` bytes; `usize::MAX` for a dry run.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { used: 0, capacity, current: [0; Category::ALL.len()], peak: 0, at_peak: [0; Category::ALL.len()] }
    }

    /// `len` elements of `dtype` on top of the stack.
    ///
    /// The capacity was found by a dry run of the same code, so that running out of it is a defect of this program.
    pub(crate) fn take(&mut self, category: Category, dtype: DType, len: usize) -> Buffer {
        let offset = self.used;
        let bytes = (len * dtype.bytes()).next_multiple_of(ALIGNMENT);
        self.used += bytes;
        assert!(self.used <= self.capacity, "{} bytes needed of a step's {} planned", self.used, self.capacity);
        self.current[category as usize] += bytes;
        if self.used > self.peak {
            self.peak = self.used;
            self.at_peak = self.current;
        }
        Buffer { pool: Pool::Step, offset, len, dtype }
    }

    /// The present height.
    pub(crate) fn mark(&self) -> Mark {
        Mark { used: self.used, current: self.current }
    }

    /// Sets the height: frees all that was taken since `mark`, or returns to a height once reached.
    pub(crate) fn release(&mut self, mark: Mark) {
        self.used = mark.used;
        self.current = mark.current;
    }

    /// Empties the stack. The peak stays.
    pub(crate) fn clear(&mut self) {
        self.release(Mark { used: 0, current: [0; Category::ALL.len()] });
    }

    /// Bytes at the highest point so far.
    pub(crate) fn peak(&self) -> usize {
        self.peak
    }

    /// Bytes of each category at the highest point, in the order of [`Category::ALL`].
    pub(crate) fn at_peak(&self) -> [usize; Category::ALL.len()] {
        self.at_peak
    }
}

/// The higher of two marks: where scratch of several kinds of layers shares one place.
pub(crate) fn higher(a: Mark, b: Mark) -> Mark {
    if b.used > a.used { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_memory_is_taken_again_and_the_peak_keeps_its_categories() {
        let mut arena = Arena::new(1024);
        let kept = arena.take(Category::Activations, DType::F32, 10);
        let mark = arena.mark();
        let first = arena.take(Category::LogitsChunk, DType::F32, 100);
        arena.release(mark);
        let second = arena.take(Category::Workspace, DType::Bf16, 3);
        assert_eq!((kept.offset, first.offset, second.offset), (0, 64, 64));
        assert_eq!(arena.peak(), 64 + 448);
        assert_eq!(arena.at_peak(), [0, 64, 448, 0, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "planned")]
    fn a_stack_never_grows_past_its_plan() {
        Arena::new(64).take(Category::Inputs, DType::F32, 17);
    }
}

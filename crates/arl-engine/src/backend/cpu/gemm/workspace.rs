//! Memory for packed operands, kept from one product to the next by the thread that used it.

use std::cell::RefCell;

/// A cache line of words.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

thread_local! {
    // A stack, because a thread that waits for others may start another product meanwhile.
    static KEPT: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Words of memory, at the start of a cache line. Their content is arbitrary.
pub(in super::super) struct Workspace {
    lines: Vec<Line>,
}

impl Workspace {
    /// At least `words` words; the largest kept piece, grown where it is too small.
    pub(in super::super) fn take(words: usize) -> Workspace {
        let mut lines = KEPT
            .with_borrow_mut(|kept| {
                let largest = (0..kept.len()).max_by_key(|&i| kept[i].len())?;
                let fitting = (0..kept.len()).filter(|&i| kept[i].len() * 16 >= words).min_by_key(|&i| kept[i].len());
                Some(kept.swap_remove(fitting.unwrap_or(largest)))
            })
            .unwrap_or_default();
        if lines.len() * 16 < words {
            lines = vec![Line([0; 16]); words.div_ceil(16)];
        }
        Workspace { lines }
    }

    /// All of it as numbers; what they are is arbitrary.
    pub(in super::super) fn floats(&mut self) -> &mut [f32] {
        // SAFETY: every bit pattern is an f32, lines have no padding, and the borrow is this one's.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * 16) }
    }

    pub(super) fn words(&mut self) -> *mut u32 {
        self.lines.as_mut_ptr().cast()
    }
}

/// The first `len` elements of `memory`, which keeps the rest.
pub(in super::super) fn carve<'m>(memory: &mut &'m mut [f32], len: usize) -> &'m mut [f32] {
    let (first, rest) = std::mem::take(memory).split_at_mut(len);
    *memory = rest;
    first
}

impl Drop for Workspace {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // A thread that ends has nothing left to keep it in.
        let _ = KEPT.try_with(|kept| kept.borrow_mut().push(lines));
    }
}

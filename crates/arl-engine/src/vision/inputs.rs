//! The images of a micro-batch in the step's memory, and their way there. `N` patches, `M` merge blocks.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::Tower;
use super::geometry::{Places, longest};
use super::images::Images;
use crate::backend::{Angles, Backend, Buffer, DType, Sequences};
use crate::batch::BatchSize;
use crate::placement::arena::{Arena, Category};
use crate::token_slice::Slicing;

/// Images in the step's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImageInputs {
    /// `N`.
    pub(crate) patches: usize,
    /// `M`: the tokens of all images.
    pub(crate) tokens: usize,
    /// `[N, channels * frames * patch * patch]`, in the tower's order.
    pub(crate) pixels: Buffer,
    /// i32 `[M]`: the token of each merge block, in the tower's order; of a slice of a micro-batch, of those blocks
    /// alone whose tokens are in it.
    pub(crate) rows: Buffer,
    /// i32, as long: which blocks these are. None: all.
    pub(crate) picks: Option<Buffer>,
    /// The images, in patches.
    pub(crate) segments: Sequences,
    /// The windows of attention, in patches.
    pub(crate) windows: Option<Sequences>,
    /// One row a row or column of patches; every patch has three, of which the first counts for nothing.
    pub(crate) angles: Angles,
    /// i32 and f32 `[N, 4]`: rows of the table of learned positions, and their weights.
    pub(crate) taps: Option<(Buffer, Buffer)>,
}

impl ImageInputs {
    /// Takes the memory for the images of a slice of a micro-batch of `size`, which are those of the whole; none: it has no images, or
    /// another stage of the pipeline sees them.
    pub(crate) fn take(arena: &mut Arena, tower: &Tower, size: BatchSize, slicing: Slicing) -> Option<Self> {
        if size.patches == 0 || !tower.here {
            return None;
        }
        let mut take = |dtype, len| arena.take(Category::Inputs, dtype, len);
        let (n, half) = (size.patches, tower.config.head_dim() / 2);
        let tokens = n / tower.geometry.unit();
        let mut sequences = |count| Sequences { cu_seqlens: take(DType::I32, count + 1), count, max_len: n };
        let segments = sequences(size.images);
        let windows = tower.geometry.window.map(|_| sequences(tokens));
        let table = tower.most_places(n) * half;
        let rows = if slicing.divides() { tokens.min(slicing.own(size.tokens)) } else { tokens };
        Some(ImageInputs {
            patches: n,
            tokens,
            pixels: take(tower.dtype, n * tower.config.patch_elements()),
            rows: take(DType::I32, rows),
            picks: slicing.divides().then(|| take(DType::I32, rows)),
            segments,
            windows,
            angles: Angles {
                cos: take(DType::F32, table),
                sin: take(DType::F32, table),
                rows: take(DType::I32, 3 * n),
                axes: Some(take(DType::I32, half)),
            },
            taps: tower.geometry.side.map(|_| (take(DType::I32, 4 * n), take(DType::F32, 4 * n))),
        })
    }

    /// Fills it with valid `images`, whose tokens are at `places`, of which this rank has those of `own`.
    pub(crate) fn upload<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        tower: &Tower,
        images: &Images,
        places: &[i32],
        own: &Range<usize>,
    ) {
        let found = tower.geometry.places(&images.grids);
        let blocks = found.order.iter().map(|&block| places[block] as usize).zip(0..);
        let (rows, picks): (Vec<i32>, Vec<i32>) = blocks
            .filter(|(token, _)| own.contains(token))
            .map(|(token, pick)| ((token - own.start) as i32, pick))
            .unzip();
        self.rows = self.rows.slice(0, rows.len());
        backend.upload(bytemuck::cast_slice(&rows), self.rows);
        self.picks = self.picks.map(|room| room.slice(0, picks.len()));
        if let Some(target) = self.picks {
            backend.upload(bytemuck::cast_slice(&picks), target);
        }
        self.segments = upload_segments(backend, self.segments, &found.images);
        self.windows = self.windows.map(|windows| upload_segments(backend, windows, &found.windows));
        self.upload_angles(backend, tower, &found);
        if let Some((taps, weights)) = self.taps {
            backend.upload(bytemuck::cast_slice(&found.taps), taps);
            backend.upload(bytemuck::cast_slice(&found.weights), weights);
        }
        self.upload_pixels(backend, tower, images, &found);
    }

    fn upload_angles<B: Backend + ?Sized>(&mut self, backend: &mut B, tower: &Tower, found: &Places) {
        let half = tower.config.head_dim() / 2;
        let used = found.axes.iter().max().map_or(0, |most| *most as usize + 1);
        let (cos, sin): (Vec<f32>, Vec<f32>) = (0..used)
            .flat_map(|place| (0..half).map(move |column| (place, column)))
            .map(|(place, column)| {
                let angle = place as f32 * tower.frequency(column % (half / 2));
                (angle.cos(), angle.sin())
            })
            .unzip();
        // Columns of the first half follow the patch's row, the others its column.
        let axes: Vec<i32> = (0..half).map(|column| if column < half / 2 { 1 } else { 2 }).collect();
        let table = |buffer: Buffer| buffer.slice(0, used * half);
        (self.angles.cos, self.angles.sin) = (table(self.angles.cos), table(self.angles.sin));
        backend.upload(bytemuck::cast_slice(&cos), self.angles.cos);
        backend.upload(bytemuck::cast_slice(&sin), self.angles.sin);
        backend.upload(bytemuck::cast_slice(&found.axes), self.angles.rows);
        if let Some(target) = self.angles.axes {
            backend.upload(bytemuck::cast_slice(&axes), target);
        }
    }

    /// Pixels in the tower's order and the activations' type.
    fn upload_pixels<B: Backend + ?Sized>(&self, backend: &mut B, tower: &Tower, images: &Images, found: &Places) {
        let block = tower.geometry.unit() * tower.config.patch_elements();
        match self.pixels.dtype {
            DType::F32 if found.order.is_sorted() => {
                backend.upload(bytemuck::cast_slice(&images.pixel_values), self.pixels);
            }
            DType::F32 => upload_ordered(backend, images, &found.order, block, self.pixels, |value| value),
            DType::F16 => upload_ordered(backend, images, &found.order, block, self.pixels, f16::from_f32),
            _ => upload_ordered(backend, images, &found.order, block, self.pixels, bf16::from_f32),
        }
    }
}

/// Merge blocks of `block` numbers in another order and type.
fn upload_ordered<B: Backend + ?Sized, T: bytemuck::Pod + Send + Sync>(
    backend: &mut B,
    images: &Images,
    order: &[usize],
    block: usize,
    target: Buffer,
    convert: impl Fn(f32) -> T + Sync,
) {
    let mut ordered = vec![T::zeroed(); images.pixel_values.len()];
    ordered.par_chunks_mut(block).zip(order).for_each(|(out, &at)| {
        let source = &images.pixel_values[at * block..(at + 1) * block];
        out.iter_mut().zip(source).for_each(|(out, &value)| *out = convert(value));
    });
    backend.upload(bytemuck::cast_slice(&ordered), target);
}

/// Uploads where segments begin; there are no more than were planned for.
fn upload_segments<B: Backend + ?Sized>(backend: &mut B, planned: Sequences, bounds: &[i32]) -> Sequences {
    let cu_seqlens = planned.cu_seqlens.slice(0, bounds.len());
    backend.upload(bytemuck::cast_slice(bounds), cu_seqlens);
    Sequences { cu_seqlens, count: bounds.len() - 1, max_len: longest(bounds) }
}

//! The norm of gradients that exist in pieces: block by block as over whole ones, so that it has the same bits. Each block of
//! the optimizer's arena is summed by the rank that owns its first element; the others send it what they have of the block.

use std::ops::Range;

use arl_model::Result;

use super::{read, read_f32};
use crate::backend::cpu::DOT_BLOCK;
use crate::backend::{Backend, Buffer};
use crate::engine::Engine;
use crate::placement::cut::Cut;

/// An interval of the optimizer's arena and who owns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    elements: Range<usize>,
    rank: usize,
    /// First element in its owner's arrays.
    own: usize,
    /// The elements at its beginning that belong to a block of another rank, and that rank.
    away: Option<(usize, usize)>,
}

/// All pieces in the order of the arena, where all ranks have the same parameters.
pub(super) fn pieces(cut: &Cut, block: usize) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for bucket in &cut.buckets {
        let owners = (0..cut.ranks(bucket)).map(|piece| cut.place.owner(bucket.axis, piece));
        for rank in owners {
            let elements = cut.piece(bucket, rank);
            if elements.is_empty() {
                continue;
            }
            let start = elements.start / block * block;
            let owner =
                pieces.iter().rev().find(|piece| piece.elements.start <= start).map_or(rank, |piece| piece.rank);
            let head = (start + block).min(elements.end) - elements.start;
            let away = (start < elements.start && owner != rank).then_some((head, owner));
            pieces.push(Piece { elements, rank, own: bucket.own, away });
        }
    }
    pieces
}

/// The blocks that a rank sums, in the order of the arena: all those whose first element it owns.
pub(super) fn blocks_of(pieces: &[Piece], rank: usize, block: usize) -> Vec<usize> {
    let own = pieces.iter().filter(|piece| piece.rank == rank);
    own.flat_map(|piece| piece.elements.start.div_ceil(block)..piece.elements.end.div_ceil(block)).collect()
}

/// Bytes that rank `from` sends to each rank.
pub(super) fn lengths(pieces: &[Piece], from: usize, ranks: usize) -> Vec<usize> {
    let mut lengths = vec![0; ranks];
    for piece in pieces.iter().filter(|piece| piece.rank == from) {
        if let Some((head, owner)) = piece.away {
            lengths[owner] += head * size_of::<f32>();
        }
    }
    lengths
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Sets `norm_squared` to the sum of squares of all gradients, of which `sums` are this rank's pieces.
    pub(crate) fn norm_of_pieces(&mut self, sums: Buffer, norm_squared: Buffer) -> Result<()> {
        let Some(cut) = self.model.cut.clone() else { return Ok(()) };
        if cut.place.mesh.divides_model() {
            return self.norm_of_slices(&cut, sums, norm_squared);
        }
        let pieces = pieces(&cut, DOT_BLOCK);
        let received = self.exchange_heads(&pieces, sums)?;
        let own_rank = cut.place.rank;
        let mut taken = vec![0; cut.place.world()];
        let mut values: Vec<f64> = Vec::new();
        for (i, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.rank == own_rank) {
            let first = piece.elements.start.next_multiple_of(DOT_BLOCK).min(piece.elements.end);
            if first == piece.elements.end {
                continue;
            }
            let (start, len) = (first - piece.elements.start, piece.elements.end - first);
            let own = sums.slice(piece.own + start, len);
            let mut tail = Vec::new();
            // What is left of its last block is in the pieces that follow.
            let end = piece.elements.end.next_multiple_of(DOT_BLOCK);
            for other in pieces[i + 1..].iter().take_while(|other| other.elements.start < end) {
                let head = end.min(other.elements.end) - other.elements.start;
                if other.rank == own_rank {
                    tail.extend(read_f32(&mut *self.backend, sums.slice(other.own, head))?);
                } else {
                    tail.extend_from_slice(&received[other.rank][taken[other.rank]..][..head]);
                    taken[other.rank] += head;
                }
            }
            values.extend(self.backend.block_squares(own, &tail)?);
        }
        let total = self.sum_blocks(&pieces, &values)?;
        self.backend.upload(&total.to_ne_bytes(), norm_squared);
        Ok(())
    }

    /// As [`Engine::norm_of_pieces`], where ranks have different parameters: each adds the squares of its own pieces, which together
    /// are every element once.
    fn norm_of_slices(&mut self, cut: &Cut, sums: Buffer, norm_squared: Buffer) -> Result<()> {
        let mut own = 0.0;
        for bucket in cut.buckets.iter().filter(|bucket| !bucket.copied) {
            let len = cut.own_piece(bucket).len();
            if len > 0 {
                own += self.backend.block_squares(sums.slice(bucket.own, len), &[])?.iter().sum::<f64>();
            }
        }
        let all: Vec<f64> = read(&self.ranks.gather(&own.to_ne_bytes(), |sent| &mut sent.figures)?);
        self.backend.upload(&(0.0 + all.iter().sum::<f64>()).to_ne_bytes(), norm_squared);
        Ok(())
    }

    /// Sets `norm_squared` to the sum of squares of whole gradients, block by block, as of pieces.
    pub(crate) fn norm_of_whole(&mut self, gradients: Buffer, norm_squared: Buffer) -> Result<()> {
        let blocks = self.backend.block_squares(gradients, &[])?;
        self.backend.upload(&(0.0 + blocks.iter().sum::<f64>()).to_ne_bytes(), norm_squared);
        Ok(())
    }

    /// Sends every rank what this one has of its blocks; gives what came from each, in the order of the arena.
    fn exchange_heads(&mut self, pieces: &[Piece], sums: Buffer) -> Result<Vec<Vec<f32>>> {
        let (ranks, rank) = (self.ranks.size, self.ranks.rank);
        let mut sends: Vec<Vec<f32>> = vec![Vec::new(); ranks];
        for piece in pieces.iter().filter(|piece| piece.rank == rank) {
            if let Some((head, owner)) = piece.away {
                sends[owner].extend(read_f32(&mut *self.backend, sums.slice(piece.own, head))?);
            }
        }
        let sends: Vec<&[u8]> = sends.iter().map(|values| bytemuck::cast_slice(values)).collect();
        let incoming: Vec<usize> = (0..ranks).map(|from| lengths(pieces, from, ranks)[rank]).collect();
        let received = self.ranks.exchange(&sends, &incoming, |sent| &mut sent.figures)?;
        Ok(received.iter().map(|bytes| read(bytes)).collect())
    }

    /// The sum of all blocks' sums in the order of the arena, of which `values` are this rank's.
    fn sum_blocks(&mut self, pieces: &[Piece], values: &[f64]) -> Result<f64> {
        let blocks: Vec<Vec<usize>> = (0..self.ranks.size).map(|rank| blocks_of(pieces, rank, DOT_BLOCK)).collect();
        let most = blocks.iter().map(Vec::len).max().unwrap_or(0);
        let mut padded = values.to_vec();
        padded.resize(most, 0.0);
        let all: Vec<f64> = read(&self.ranks.figures(bytemuck::cast_slice(&padded))?);
        let mut in_order = vec![0.0; blocks.iter().map(Vec::len).sum()];
        for (rank, of_rank) in blocks.iter().enumerate() {
            for (i, &block) in of_rank.iter().enumerate() {
                in_order[block] = all[rank * most + i];
            }
        }
        // From zero on, as the leaf that sums whole gradients adds to a zero.
        Ok(0.0 + in_order.iter().sum::<f64>())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arl_model::ModelConfig;

    use super::*;
    use crate::mesh::{Mesh, Place};
    use crate::placement::Placement;

    #[test]
    fn every_block_is_summed_once_and_from_all_its_elements() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden/moe-balance");
        let config = ModelConfig::from_dir(&dir).unwrap();
        for ranks in [1, 2, 3, 4, 7] {
            let place = Place::new(Mesh::default(), ranks, 0).unwrap();
            let placement = Placement::new(&config, &[], false, &place).unwrap();
            for block in [32, 96, 1000, 16_384, 1 << 20] {
                let cut = Cut::new(&placement, true);
                let pieces = pieces(&cut, block);
                let mut blocks: Vec<usize> = (0..ranks).flat_map(|rank| blocks_of(&pieces, rank, block)).collect();
                blocks.sort_unstable();
                assert_eq!(blocks, (0..placement.optimizer.div_ceil(block)).collect::<Vec<_>>());
                // Elements that stay and elements that are sent are all of them, each at the owner of its block.
                let mut owners = vec![None; placement.optimizer];
                for piece in &pieces {
                    let head = piece.away.map_or(0, |(head, _)| head);
                    for (i, element) in piece.elements.clone().enumerate() {
                        let owner = piece.away.filter(|_| i < head).map_or(piece.rank, |(_, owner)| owner);
                        assert_eq!(owners[element].replace(owner), None);
                    }
                }
                for rank in 0..ranks {
                    for at in blocks_of(&pieces, rank, block) {
                        let end = ((at + 1) * block).min(placement.optimizer);
                        assert!(owners[at * block..end].iter().all(|owner| *owner == Some(rank)));
                    }
                }
            }
        }
    }
}

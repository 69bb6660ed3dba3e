//! Experts of which each rank has some: rows of tokens go to the ranks that have their experts, and what these make of them comes
//! back. Which rows go where is [`Routes`]' business; what experts compute is [`Experts`]'.
//!
//! A rank has room for twice the rows that it gets where all experts get equally many. Where any rank gets more, all of them
//! exchange and compute in rounds, in both passes, and the backward pass computes again what the room could not keep.

use std::ops::Range;

use super::Context;
use super::expert_adapter::Sorted;
use super::experts::{Buffers, Experts, Rows};
use super::routes::{Round, Routes, part};
use crate::backend::comm::EXCHANGED;
use crate::backend::{Backend, Buffer, DType, DeviceKind};
use crate::mesh::{Axis, Place};
use crate::options::Recompute;

/// How ranks divide the experts of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Division {
    pub(super) ranks: usize,
    /// The number of this one.
    pub(super) rank: usize,
    /// Experts that each has.
    pub(super) own: usize,
}

impl Division {
    /// None: every rank has all of them.
    pub(super) fn new(place: &Place, experts: usize) -> Option<Self> {
        let (ranks, rank) = (place.size(Axis::Expert), place.index(Axis::Expert));
        (ranks > 1).then_some(Division { ranks, rank, own: place.experts(experts).len() })
    }

    /// The first and the last expert of this rank.
    pub(super) fn ends(self) -> (usize, usize) {
        (self.rank * self.own, (self.rank + 1) * self.own - 1)
    }

    /// What the ranks need for a micro-batch each, of `tokens` tokens together.
    pub(super) fn room(self, tokens: usize, top_k: usize) -> Room {
        let most = tokens * top_k.min(self.own);
        let capacity = most.min(2 * top_k * tokens.div_ceil(self.ranks));
        Room { division: self, capacity, may_repeat: capacity < most }
    }
}

/// The room of a rank's experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    division: Division,
    /// Rows at a time: twice the even share, or the most that a rank's experts can get.
    pub(super) capacity: usize,
    /// Whether a rank's experts can get more.
    may_repeat: bool,
}

impl Room {
    /// Elements of [`Divided::offsets`].
    pub(super) fn offsets(self, experts: usize) -> usize {
        self.division.ranks * (experts + 1)
    }
}

/// What a rank with some of the experts keeps of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Divided {
    pub(super) room: Room,
    /// i32 `[ranks, experts + 1]`: where each rank's rows for each expert begin. Kept at every level.
    pub(super) offsets: Buffer,
}

impl Experts {
    /// Sends each row of `routed` `[rows, H]`, sorted by expert, to its expert's owner, and fills `at.out` with what the experts
    /// give. `first`: for the first time in this micro-batch.
    pub(super) fn compute_divided<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        divided: Divided,
        routed: Buffer,
        first: bool,
    ) {
        if first {
            cx.all_gather(Axis::Expert, at.permutation.offsets, divided.offsets);
        }
        let routes = self.routes(cx, at, divided, first);
        let top = cx.arena.mark();
        let results = cx.workspace(cx.dtype, at.routed.len);
        let offsets = cx.workspace(DType::I32, routes.own + 1);
        for number in 0..routes.rounds() {
            let round = routes.round(number);
            self.send(cx, &round, routed, at.routed);
            if let Some(rows) = self.rows_of(cx, at, &round, offsets) {
                self.inner_forward(cx, &rows);
                self.outer_forward(cx, &rows, results.slice(0, rows.routed.len));
            }
            self.send_back(cx, &round, results, at.out);
        }
        cx.arena.release(top);
    }

    /// Computes again what is not kept where products are: the inputs of own experts, and SwiGLU. Leaves it to the backward pass where
    /// that takes rounds.
    pub(super) fn receive_again<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        divided: Divided,
        routed: Buffer,
    ) {
        let routes = self.routes(cx, at, divided, false);
        let top = cx.arena.mark();
        let offsets = cx.workspace(DType::I32, routes.own + 1);
        if routes.rounds() == 1 {
            let round = routes.round(0);
            self.send(cx, &round, routed, at.routed);
            if let Some(rows) = self.rows_of(cx, at, &round, offsets) {
                cx.backend.swiglu(rows.gate_up, self.width, rows.act);
            }
        }
        cx.arena.release(top);
    }

    /// From `d_rows` `[rows, H]`, the gradient of the experts' outputs, to that of their inputs, in its place; gradients of own
    /// experts are added to. `input` is the block's.
    pub(super) fn backward_divided<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        divided: Divided,
        input: Buffer,
        d_rows: Buffer,
    ) {
        let routes = self.routes(cx, at, divided, false);
        let top = cx.arena.mark();
        let d_received = cx.workspace(cx.dtype, at.routed.len);
        let d_act = cx.workspace(cx.dtype, at.act.len);
        let offsets = cx.workspace(DType::I32, routes.own + 1);
        let routed = cx.workspace(cx.dtype, if divided.room.may_repeat { d_rows.len } else { 0 });
        let repeated = routes.rounds() > 1;
        if repeated {
            self.gather(cx, at, input, routed);
        }
        for number in 0..routes.rounds() {
            let round = routes.round(number);
            if repeated {
                self.send(cx, &round, routed, at.routed);
            }
            self.send(cx, &round, d_rows, d_received);
            if let Some(rows) = self.rows_of(cx, at, &round, offsets) {
                if repeated {
                    self.inner_forward(cx, &rows);
                }
                let (d_rows, d_act) = (d_received.slice(0, rows.routed.len), d_act.slice(0, rows.act.len));
                self.rows_backward(cx, &rows, d_rows, d_act);
            }
            self.send_back(cx, &round, d_received, d_rows);
        }
        cx.arena.release(top);
    }

    /// The forward pass of a rank that has no tokens itself.
    pub(super) fn serve<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers) {
        let Some(divided) = at.divided else { return };
        cx.backend.zero(at.permutation.offsets);
        self.compute_divided(cx, at, divided, at.out, true);
    }

    /// What [`Experts::recompute`] is to other ranks, by one that has no tokens itself.
    pub(super) fn serve_again<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, level: Recompute) {
        let Some(divided) = at.divided else { return };
        match level {
            Recompute::Off => {}
            Recompute::Norms => self.receive_again(cx, at, divided, at.out),
            Recompute::Mlp | Recompute::Block => self.compute_divided(cx, at, divided, at.out, false),
        }
    }

    /// The backward pass of a rank that has no tokens itself.
    pub(super) fn serve_backward<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers) {
        let Some(divided) = at.divided else { return };
        self.backward_divided(cx, at, divided, at.out, at.out);
    }

    /// Who sends what. Nothing is sent once an exchange has failed; in a dry run all experts get equally many rows. The host waits
    /// for the device to know it, and so asks once in a micro-batch, the `first` time.
    fn routes<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        divided: Divided,
        first: bool,
    ) -> Routes {
        let Room { division: Division { ranks, rank, own }, capacity, .. } = divided.room;
        let Some(all) = cx.ranks.as_deref_mut() else {
            let rows = at.out.len / self.hidden;
            let even: Vec<usize> = (0..=self.experts).map(|expert| rows * expert / self.experts).collect();
            return Routes { rank, own, offsets: vec![even; ranks], capacity };
        };
        // Each layer has a place of its own for its offsets.
        let key = divided.offsets.offset;
        if let Some(offsets) = all.routes.get(&key).filter(|_| !first && cx.failure.is_none()) {
            return Routes { rank, own, offsets: offsets.clone(), capacity };
        }
        let mut offsets = vec![0_i32; divided.offsets.len];
        if cx.failure.is_none()
            && let Err(error) = cx.backend.read_back(divided.offsets, bytemuck::cast_slice_mut(&mut offsets))
        {
            *cx.failure = Some(error);
        }
        let of_rank = |offsets: &[i32]| offsets.iter().map(|&row| row as usize).collect();
        let offsets: Vec<Vec<usize>> = offsets.chunks_exact(divided.offsets.len / ranks).map(of_rank).collect();
        all.routes.insert(key, offsets.clone());
        Routes { rank, own, offsets, capacity }
    }

    /// The rows of a round, which this rank's experts compute; none: it has none. `offsets`, i32 `[own + 1]`, are filled.
    fn rows_of<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        round: &Round,
        offsets: Buffer,
    ) -> Option<Rows> {
        let rows = round.rows();
        cx.backend.upload(bytemuck::cast_slice(&round.offsets), offsets);
        let part = |buffer: Buffer, width: usize| buffer.slice(0, rows * width);
        (rows > 0).then(|| Rows {
            sorted: Sorted { experts: offsets.len - 1, offsets, rows, room: at.routed.len / self.hidden },
            routed: part(at.routed, self.hidden),
            gate_up: part(at.gate_up, 2 * self.width),
            act: part(at.act, self.width),
        })
    }

    /// Sends rows to the owners of their experts.
    fn send<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, round: &Round, rows: Buffer, received: Buffer) {
        self.exchange(cx, round.longest, (rows, &round.sends), (received, &round.receives));
    }

    /// Sends rows back to where they came from.
    fn send_back<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, round: &Round, received: Buffer, rows: Buffer) {
        self.exchange(cx, round.longest, (received, &round.receives), (rows, &round.sends));
    }

    /// Exchanges rows of the hidden size, by rank; no message has more than `longest`. Where they travel through host memory, some at
    /// a time.
    fn exchange<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        longest: usize,
        (from, sends): (Buffer, &[Vec<Range<usize>>]),
        (to, receives): (Buffer, &[Vec<Range<usize>>]),
    ) {
        let h = self.hidden;
        let step = match cx.backend.kind() {
            DeviceKind::Cpu => (4 * EXCHANGED / (h * from.dtype.bytes())).max(1),
            DeviceKind::Cuda => longest.max(1),
        };
        for start in (0..longest).step_by(step) {
            let parts = |buffer: Buffer, rows: &[Range<usize>]| -> Vec<Buffer> {
                part(rows, start, step).into_iter().map(|rows| buffer.slice(rows.start * h, rows.len() * h)).collect()
            };
            let sends: Vec<_> = sends.iter().map(|rows| parts(from, rows)).collect();
            let receives: Vec<_> = receives.iter().map(|rows| parts(to, rows)).collect();
            cx.exchange_parts(Axis::Expert, &sends, &receives);
        }
    }
}

//! How ranks divide a model and its tokens, and which of them do something together. Pure: numbers of ranks, no messages.
//!
//! Rank `((p D + d) C + c) T + t` has place `p` of the pipeline, `d` of data, `c` of context and `t` of tensor parallelism; the
//! experts of a stage are divided among `E` neighbours.

use arl_model::{Error, ErrorCode, Result};

/// How many ranks divide what, besides the micro-batches of a step, which [`EngineOptions::data_parallel`](crate::EngineOptions)
/// ranks divide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Ranks that divide heads and feed-forward columns, and between these the tokens of a micro-batch.
    pub tp: usize,
    /// Ranks that divide the tokens of a micro-batch, and in attention its heads.
    pub cp: usize,
    /// Ranks that divide experts.
    pub ep: usize,
    /// Ranks that divide layers.
    pub pp: usize,
    /// Replicas: groups of neighbours among the data-parallel ranks. Where ranks divide weights, each group has all of them. Gradients,
    /// moments and masters are divided among the ranks of all groups.
    pub dp_replicate: usize,
}

impl Default for Mesh {
    fn default() -> Self {
        Mesh { tp: 1, cp: 1, ep: 1, pp: 1, dp_replicate: 1 }
    }
}

impl Mesh {
    /// Ranks that divide the tokens of a micro-batch.
    pub fn slices(&self) -> usize {
        self.cp * self.tp
    }

    /// Whether ranks divide weights by what they are: heads, columns, experts or layers.
    pub fn divides_model(&self) -> bool {
        self.tp * self.ep * self.pp > 1
    }
}

/// Ranks that do something together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Axis {
    /// All of a stage of the pipeline.
    #[default]
    Stage,
    /// Those that have slices of one micro-batch.
    Tokens,
    /// Of these, those that have the same heads and columns: they exchange tokens for heads in attention.
    Context,
    /// Of these, those that have the same tokens between blocks' products: neighbours.
    Tensor,
    /// All of a stage that have the same heads and columns.
    SameTensor,
    /// Those that divide all experts among them: neighbours.
    Expert,
    /// All of a stage that have the same experts.
    SameExperts,
    /// Those with the same place in every stage.
    Pipeline,
}

impl Axis {
    /// Those whose ranks have the same of a parameter.
    pub(crate) const SAME: [Axis; 3] = [Axis::Stage, Axis::SameTensor, Axis::SameExperts];

    const ALL: [Axis; 8] = [
        Axis::Stage,
        Axis::Tokens,
        Axis::Context,
        Axis::Tensor,
        Axis::SameTensor,
        Axis::Expert,
        Axis::SameExperts,
        Axis::Pipeline,
    ];
}

/// A rank's place in a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) mesh: Mesh,
    /// Data-parallel ranks.
    pub(crate) data: usize,
    /// The number of this rank, among all.
    pub(crate) rank: usize,
}

impl Place {
    /// # Errors
    /// `ARL_CONFIG` for a mesh that cannot be, and for a rank that is not in it.
    pub(crate) fn new(mesh: Mesh, data: usize, rank: usize) -> Result<Self> {
        let refused = |what: String, hint: &str| Err(Error::new(ErrorCode::Config, what).hint(hint));
        let place = Place { mesh, data, rank };
        if [data, mesh.tp, mesh.cp, mesh.ep, mesh.pp, mesh.dp_replicate].contains(&0) {
            return refused("a mesh has 0 ranks along an axis".into(), "one is the least");
        }
        if !place.stage().is_multiple_of(mesh.ep) {
            let what = format!("ep_size is {}, and does not divide the {} ranks of a stage", mesh.ep, place.stage());
            return refused(what, "ranks of a stage: dp_size x cp_size x tp_size");
        }
        let replicas = mesh.dp_replicate;
        if !data.is_multiple_of(replicas) {
            let what = format!("dp_replicate_size is {replicas}, and does not divide dp_size {data}");
            return refused(what, "take a divisor, or start more ranks");
        }
        if !(place.stage() / replicas).is_multiple_of(mesh.ep) {
            let ranks = place.stage() / replicas;
            let what = format!("ep_size is {}, and does not divide the {ranks} ranks of a replica", mesh.ep);
            return refused(what, "ranks of a replica: dp_size / dp_replicate_size x cp_size x tp_size");
        }
        if rank >= place.world() {
            return refused(format!("rank {rank} of {} ranks", place.world()), "ranks count from 0");
        }
        Ok(place)
    }

    /// All ranks.
    pub(crate) fn world(&self) -> usize {
        self.stage() * self.mesh.pp
    }

    /// Ranks of a stage of the pipeline.
    pub(crate) fn stage(&self) -> usize {
        self.data * self.mesh.slices()
    }

    /// Whether this rank's stage of the pipeline has the embedding.
    pub(crate) fn is_first_stage(&self) -> bool {
        self.index(Axis::Pipeline) == 0
    }

    /// Whether this rank's stage of the pipeline has the final norm and the head, and so the losses.
    pub(crate) fn is_last_stage(&self) -> bool {
        self.index(Axis::Pipeline) + 1 == self.mesh.pp
    }

    /// The ranks along an axis that this one is on, ascending.
    pub(crate) fn members(&self, axis: Axis) -> Vec<usize> {
        let Mesh { tp, ep, pp, .. } = self.mesh;
        let (stage, slices) = (self.stage(), self.mesh.slices());
        let within = self.rank % stage;
        let first = self.rank - within;
        let of_stage = |from: usize, step: usize, count: usize| -> Vec<usize> {
            (0..count).map(|i| first + from + i * step).collect()
        };
        match axis {
            Axis::Stage => of_stage(0, 1, stage),
            Axis::Tokens => of_stage(within / slices * slices, 1, slices),
            Axis::Context => of_stage(within / slices * slices + within % tp, tp, slices / tp),
            Axis::Tensor => of_stage(within / tp * tp, 1, tp),
            Axis::SameTensor => of_stage(within % tp, tp, stage / tp),
            Axis::Expert => of_stage(within / ep * ep, 1, ep),
            Axis::SameExperts => of_stage(within % ep, ep, stage / ep),
            Axis::Pipeline => (0..pp).map(|p| p * stage + within).collect(),
        }
    }

    /// The ranks along an axis that divide weights with this one: those of its replica.
    pub(crate) fn sharers(&self, axis: Axis) -> Vec<usize> {
        let sharing = self.sharing(axis);
        self.members(axis)[self.replica() * sharing..][..sharing].to_vec()
    }

    /// The ranks along an axis that keep the same weights as this one: one of each replica.
    pub(crate) fn counterparts(&self, axis: Axis) -> Vec<usize> {
        self.members(axis).into_iter().skip(self.share(axis)).step_by(self.sharing(axis)).collect()
    }

    /// How many ranks along an axis divide weights among them.
    pub(crate) fn sharing(&self, axis: Axis) -> usize {
        self.size(axis) / self.mesh.dp_replicate
    }

    /// The place of this rank among them.
    pub(crate) fn share(&self, axis: Axis) -> usize {
        self.index(axis) % self.sharing(axis)
    }

    /// The number of this rank's replica.
    pub(crate) fn replica(&self) -> usize {
        self.index(Axis::Stage) / self.sharing(Axis::Stage)
    }

    /// The number of the piece that a rank owns of what those along an axis divide, by its place there: pieces of counterparts are
    /// neighbours, and together what each of these keeps.
    pub(crate) fn piece(&self, axis: Axis, index: usize) -> usize {
        index % self.sharing(axis) * self.mesh.dp_replicate + index / self.sharing(axis)
    }

    /// The place along an axis of the rank that owns a piece.
    pub(crate) fn owner(&self, axis: Axis, piece: usize) -> usize {
        piece % self.mesh.dp_replicate * self.sharing(axis) + piece / self.mesh.dp_replicate
    }

    /// The ranks that do something together and are not all, this one among them, each list once. Every rank has as many lists, and
    /// those of one place in them divide all ranks.
    pub(crate) fn groups(&self) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let replicas = Axis::SAME.iter().flat_map(|axis| [self.sharers(*axis), self.counterparts(*axis)]);
        for members in Axis::ALL.iter().map(|axis| self.members(*axis)).chain(replicas) {
            if members.len() > 1 && members.len() < self.world() && !groups.contains(&members) {
                groups.push(members);
            }
        }
        groups
    }

    /// How many ranks there are along an axis.
    pub(crate) fn size(&self, axis: Axis) -> usize {
        let Mesh { tp, cp, ep, pp, .. } = self.mesh;
        match axis {
            Axis::Stage => self.stage(),
            Axis::Tokens => self.mesh.slices(),
            Axis::Context => cp,
            Axis::Tensor => tp,
            Axis::SameTensor => self.stage() / tp,
            Axis::Expert => ep,
            Axis::SameExperts => self.stage() / ep,
            Axis::Pipeline => pp,
        }
    }

    /// The place of this rank along an axis.
    pub(crate) fn index(&self, axis: Axis) -> usize {
        let Mesh { tp, ep, .. } = self.mesh;
        let within = self.rank % self.stage();
        match axis {
            Axis::Stage => within,
            Axis::Tokens => within % self.mesh.slices(),
            Axis::Context => within % self.mesh.slices() / tp,
            Axis::Tensor => within % tp,
            Axis::SameTensor => within / tp,
            Axis::Expert => within % ep,
            Axis::SameExperts => within / ep,
            Axis::Pipeline => self.rank / self.stage(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_agree_on_who_is_with_them_and_each_knows_its_place() {
        let mesh = Mesh { tp: 2, cp: 3, ep: 4, pp: 2, dp_replicate: 2 };
        let world = 2 * 4 * 3 * 2;
        for rank in 0..world {
            let place = Place::new(mesh, 4, rank).unwrap();
            assert_eq!(place.world(), world);
            for axis in Axis::ALL {
                let members = place.members(axis);
                assert_eq!((members.len(), members[place.index(axis)]), (place.size(axis), rank), "{axis:?}");
                assert!(members.is_sorted());
                for &other in &members {
                    assert_eq!(Place { rank: other, ..place }.members(axis), members, "{axis:?} of {rank} and {other}");
                }
            }
            for axis in Axis::SAME {
                let (sharers, counterparts) = (place.sharers(axis), place.counterparts(axis));
                assert_eq!((sharers.len(), sharers[place.share(axis)]), (place.sharing(axis), rank), "{axis:?}");
                assert_eq!((counterparts.len(), counterparts[place.replica()]), (2, rank), "{axis:?}");
                assert_eq!(place.owner(axis, place.piece(axis, place.index(axis))), place.index(axis), "{axis:?}");
            }
        }
        let place = Place::new(mesh, 4, 24 + 12 + 5).unwrap();
        assert_eq!(place.sharers(Axis::SameTensor), [37, 39, 41, 43, 45, 47]);
        assert_eq!(place.counterparts(Axis::SameTensor), [29, 41]);
        let place = Place::new(mesh, 4, 24 + 6 + 5).unwrap();
        assert_eq!(place.members(Axis::Tokens), (30..36).collect::<Vec<_>>());
        assert_eq!(place.members(Axis::Context), [31, 33, 35]);
        assert_eq!(place.members(Axis::Tensor), [34, 35]);
        assert_eq!(place.members(Axis::Expert), [32, 33, 34, 35]);
        assert_eq!(place.members(Axis::Pipeline), [11, 35]);
    }

    #[test]
    fn the_groups_of_a_place_in_the_lists_divide_all_ranks() {
        let mesh = |tp, cp, ep, pp| Mesh { tp, cp, ep, pp, dp_replicate: 1 };
        let replicated = |mesh| Mesh { dp_replicate: 2, ..mesh };
        for (mesh, data, count) in [
            (mesh(1, 1, 1, 1), 4, 0),
            (mesh(2, 1, 1, 1), 1, 0),
            (mesh(2, 1, 1, 1), 2, 2),
            (mesh(1, 2, 2, 2), 2, 4),
            (mesh(2, 3, 4, 2), 4, 8),
            (mesh(2, 2, 4, 3), 1, 4),
            (replicated(mesh(1, 1, 1, 1)), 4, 2),
            (replicated(mesh(1, 1, 1, 1)), 2, 0),
            (replicated(mesh(2, 1, 1, 1)), 4, 5),
        ] {
            let groups = |rank| Place::new(mesh, data, rank).unwrap().groups();
            let world = Place::new(mesh, data, 0).unwrap().world();
            assert_eq!(groups(0).len(), count, "{mesh:?}");
            for number in 0..count {
                for rank in 0..world {
                    let own = &groups(rank)[number];
                    assert!(own.contains(&rank) && own.iter().all(|&other| groups(other)[number] == *own), "{mesh:?}");
                }
            }
        }
    }

    #[test]
    fn a_mesh_that_cannot_be_is_refused() {
        let message = |mesh, data, rank| Place::new(mesh, data, rank).unwrap_err().message;
        let five = Mesh { ep: 4, cp: 2, ..Mesh::default() };
        assert_eq!(message(five, 3, 0), "ep_size is 4, and does not divide the 6 ranks of a stage");
        assert_eq!(message(Mesh { tp: 0, ..Mesh::default() }, 1, 0), "a mesh has 0 ranks along an axis");
        assert_eq!(message(Mesh::default(), 2, 2), "rank 2 of 2 ranks");
    }
}

//! Bytes that all ranks can compute, and sequences of collectives among changing groups of ranks, which all ranks know as well: each
//! follows those that it is one of.

use arl_comm::{Group, Part};

/// Numbers that follow from a seed.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn of(seed: u64) -> Self {
        Numbers(seed | 1)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// What `from` sends to `to`.
pub(crate) fn noise(from: usize, to: usize, length: usize) -> Vec<u8> {
    let mut numbers = Numbers::of((from * 31 + to * 7 + length) as u64);
    (0..length).map(|_| numbers.below(256) as u8).collect()
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Gather,
    Broadcast,
    Exchange,
}

/// What some of the ranks do together.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) kind: Kind,
    /// Ascending.
    pub(crate) members: Vec<usize>,
    pub(crate) length: usize,
}

impl Call {
    /// Bytes from one member to another: every pair has a length of its own, some nothing at all.
    pub(crate) fn of_pair(&self, from: usize, to: usize) -> usize {
        self.length * ((from + 2 * to) % 3) / 2
    }
}

/// How many sequences are followed.
pub(crate) const SEQUENCES: u64 = 1000;

/// A sequence of calls of `size` ranks.
pub(crate) fn sequence(seed: u64, size: usize) -> Vec<Call> {
    let mut numbers = Numbers::of(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let calls = 2 + numbers.below(9);
    let mut call = || {
        let kind = [Kind::Gather, Kind::Broadcast, Kind::Exchange][numbers.below(3)];
        let among = 1 + numbers.below((1 << size) - 1);
        let members = (0..size).filter(|rank| among >> rank & 1 == 1).collect();
        let length = [0, 1, 3, 128, 4097][numbers.below(5)] + numbers.below(2);
        Call { kind, members, length }
    };
    (0..calls).map(|_| call()).collect()
}

/// Follows all sequences, and checks what comes.
#[allow(dead_code, reason = "devices follow them in their own way")]
pub(crate) fn follow(whole: &dyn Group) {
    let rank = whole.rank();
    for seed in 0..SEQUENCES {
        for call in sequence(seed, whole.size()) {
            if !call.members.contains(&rank) {
                continue;
            }
            let (what, part) = (format!("sequence {seed}, {call:?}"), Part::new(whole, call.members.clone()).unwrap());
            let (members, length) = (&call.members, call.length);
            match call.kind {
                Kind::Gather => {
                    let mut all = vec![0; members.len() * length];
                    part.all_gather(&noise(rank, 0, length), &mut all).unwrap();
                    assert!(
                        all == members.iter().flat_map(|&from| noise(from, 0, length)).collect::<Vec<_>>(),
                        "{what}"
                    );
                }
                Kind::Broadcast => {
                    let root = length % members.len();
                    let mut bytes = if part.rank() == root { noise(rank, 1, length) } else { vec![0; length] };
                    part.broadcast(root, &mut bytes).unwrap();
                    assert!(bytes == noise(members[root], 1, length), "{what}");
                }
                Kind::Exchange => {
                    let sends: Vec<Vec<u8>> =
                        members.iter().map(|&to| noise(rank, to, call.of_pair(rank, to))).collect();
                    let mut receives: Vec<Vec<u8>> =
                        members.iter().map(|&from| vec![0; call.of_pair(from, rank)]).collect();
                    part.exchange(&sends.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut receives).unwrap();
                    for (&from, bytes) in members.iter().zip(&receives) {
                        assert!(*bytes == noise(from, rank, call.of_pair(from, rank)), "{what}: from {from}");
                    }
                }
            }
        }
    }
}

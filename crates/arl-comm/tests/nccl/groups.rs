//! Some of the ranks, without the rest: communicators of their own, and messages between pairs within one.

use arl_comm::{Groups, Part};

use super::*;

/// What each of four threads gives, which are also two pairs of neighbours and two of others.
fn in_pairs<T: Send>(work: impl Fn(&mut Groups, usize) -> T + Sync) -> Vec<T> {
    let nccl = fake();
    let [near, far] = [0, 1].map(|_| [0, 1].map(|_| nccl.unique_id().unwrap()));
    ranks(4, |_, rank| {
        let mut groups = Groups::default();
        for (id, members) in
            [(near[rank / 2], [rank / 2 * 2, rank / 2 * 2 + 1]), (far[rank % 2], [rank % 2, rank % 2 + 2])]
        {
            groups.join(gpus(&nccl, id), &members, rank).unwrap();
        }
        work(&mut groups, rank)
    })
}

#[test]
fn some_of_the_ranks_move_bytes_without_the_rest() {
    in_pairs(|groups, rank| {
        for members in [[rank / 2 * 2, rank / 2 * 2 + 1], [rank % 2, rank % 2 + 2]] {
            let (mut own, mut all) = (noise(rank, 9, 100), vec![0; 200]);
            let gather = Collective::AllGather { source: place(&mut own), target: place(&mut all) };
            queue(groups.of(&members).unwrap(), &gather).unwrap();
            assert!(all == members.map(|member| noise(member, 9, 100)).concat(), "{members:?}");
        }
        assert_eq!(groups.of(&[0, 1, 2]).err().unwrap().code, ErrorCode::Internal);
        groups.poll().unwrap();
    });
    // Within one communicator a rank need not call what others send each other.
    ranks(3, |communicator, rank| {
        for round in 0..3 {
            if rank == 2 - round {
                continue;
            }
            let other = 3 - (2 - round) - rank;
            let (mut own, mut theirs) = (noise(rank, other, 5000), vec![0; 5000]);
            let (sends, receives) = (vec![(other, place(&mut own))], vec![(other, place(&mut theirs))]);
            queue(communicator, &Collective::Exchange { sends, receives }).unwrap();
            assert!(theirs == noise(other, rank, 5000), "{round}: {other} to {rank}");
        }
    });
}

/// Queues a call of ranks that have a communicator of their own, and checks what comes.
fn call(communicator: &mut Communicator, rank: usize, call: &Call, what: &str) {
    let (members, length) = (&call.members, call.length);
    let own = members.iter().position(|&member| member == rank).unwrap();
    match call.kind {
        Kind::Gather => {
            let (mut bytes, mut all) = (noise(rank, 0, length), vec![0; members.len() * length]);
            let gather = Collective::AllGather { source: place(&mut bytes), target: place(&mut all) };
            queue(communicator, &gather).unwrap();
            assert!(all == members.iter().flat_map(|&from| noise(from, 0, length)).collect::<Vec<_>>(), "{what}");
        }
        Kind::Broadcast => {
            let root = length % members.len();
            let mut bytes = if own == root { noise(rank, 1, length) } else { vec![0; length] };
            queue(communicator, &Collective::Broadcast { root, place: place(&mut bytes) }).unwrap();
            assert!(bytes == noise(members[root], 1, length), "{what}");
        }
        Kind::Exchange => {
            let others: Vec<usize> = (0..members.len()).filter(|&other| other != own).collect();
            let mut outgoing: Vec<Vec<u8>> =
                others.iter().map(|&to| noise(rank, members[to], call.of_pair(rank, members[to]))).collect();
            let mut incoming: Vec<Vec<u8>> =
                others.iter().map(|&from| vec![0; call.of_pair(members[from], rank)]).collect();
            let list = |all: &mut [Vec<u8>]| others.iter().copied().zip(all.iter_mut().map(|one| place(one))).collect();
            let (sends, receives) = (list(&mut outgoing), list(&mut incoming));
            queue(communicator, &Collective::Exchange { sends, receives }).unwrap();
            for (&from, bytes) in others.iter().zip(&incoming) {
                assert!(*bytes == noise(members[from], rank, call.of_pair(members[from], rank)), "{what}: from {from}");
            }
        }
    }
}

#[test]
fn sequences_of_calls_among_changing_ranks_finish_with_the_right_bytes() {
    let (nccl, size) = (fake(), 4);
    let several: Vec<Vec<usize>> = (1..1 << size)
        .map(|among: usize| (0..size).filter(|rank| among >> rank & 1 == 1).collect::<Vec<_>>())
        .filter(|members| members.len() > 1)
        .collect();
    let ids: Vec<[u8; 128]> = several.iter().map(|_| nccl.unique_id().unwrap()).collect();
    ranks(size, |_, rank| {
        let mut groups = Groups::default();
        for (members, id) in several.iter().zip(&ids).filter(|(members, _)| members.contains(&rank)) {
            groups.join(gpus(&nccl, *id), members, rank).unwrap();
        }
        for seed in 0..SEQUENCES {
            let own = |call: &Call| call.members.len() > 1 && call.members.contains(&rank);
            for one in sequence(seed, size).iter().filter(|call| own(call)) {
                call(groups.of(&one.members).unwrap(), rank, one, &format!("sequence {seed}, {one:?}"));
            }
        }
        groups.poll().unwrap();
    });
}

#[test]
fn calls_of_some_of_the_ranks_that_do_not_fit_are_an_error_of_these_alone() {
    let errors = in_pairs(|groups, rank| {
        let (mut bytes, members) = (vec![0; 64], [rank / 2 * 2, rank / 2 * 2 + 1]);
        // Ranks 0 and 1 agree; rank 2 sends less than rank 3 receives.
        let (sent, received) = if rank == 3 { (16, 9) } else { (if rank == 2 { 8 } else { 16 }, 16) };
        let (own, theirs) = bytes.split_at_mut(32);
        let peer = 1 - rank % 2;
        let sends = vec![(peer, place(&mut own[..sent]))];
        let receives = vec![(peer, place(&mut theirs[..received]))];
        queue(groups.of(&members).unwrap(), &Collective::Exchange { sends, receives }).err()
    });
    assert!(errors[..2].iter().all(Option::is_none));
    for error in &errors[2..] {
        let message = &error.as_ref().unwrap().message;
        assert!(message.contains("send(1, 8)") && message.contains("receive(0, 9)"), "{message}");
    }
}

#[test]
fn a_part_of_ranks_with_gpus_names_its_own() {
    let gpus = gpus(&fake(), [7; 128]);
    let group = with_gpus(local_groups(3).remove(1), gpus);
    let members = |part: &[usize]| {
        let part = Part::new(&*group, part.to_vec()).unwrap();
        assert_eq!(part.gpus().map(|gpus| gpus.id[0]), Some(7));
        part.members().map(<[usize]>::to_vec)
    };
    assert_eq!(members(&[1, 2]), Some(vec![1, 2]));
    assert_eq!(members(&[0, 1, 2]), None);
    assert_eq!(group.members(), None);
}

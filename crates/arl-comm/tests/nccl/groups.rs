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

//! The order in which a stage computes and passes on: one micro-batch forward, one backward (1F1B; Narayanan et al., 2019,
//! PipeDream, and 2021, arXiv 2104.04473). Pure. A round is a micro-batch of every data-parallel rank.

/// What a stage does next. Two stages that pass something between them do it at once: each gives and takes in one exchange, so
/// that none has to keep what the other is not ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The forward pass of a round alone, of which nothing is kept but its input.
    Forward(usize),
    /// The forward pass with all that the backward pass needs, and the backward pass.
    Backward(usize),
    /// With the stage before: `gives` is the round whose input's gradient it gets, `takes` the one whose output it passes.
    Before { gives: Option<usize>, takes: Option<usize> },
    /// With the stage behind: `gives` is the round whose output it gets, `takes` the one whose gradient it passes.
    Behind { gives: Option<usize>, takes: Option<usize> },
}

/// The order of `stage` of `stages` over so many rounds. It has at most `stages - stage` rounds that went forward and not
/// yet backward. The last stage computes each round once, in [`Action::Backward`].
pub(super) fn schedule(stages: usize, stage: usize, rounds: usize) -> Vec<Action> {
    let (first, last) = (stage == 0, stage + 1 == stages);
    let ahead = rounds.min(stages - 1 - stage);
    let mut actions = Vec::new();
    let mut add = |action: Action| {
        let left_out = match action {
            Action::Before { gives, takes } => first || gives.or(takes).is_none(),
            Action::Behind { gives, takes } => last || gives.or(takes).is_none(),
            Action::Forward(_) => last,
            Action::Backward(_) => false,
        };
        if !left_out {
            actions.push(action);
        }
    };
    let within = |round: usize| (round < rounds).then_some(round);
    for round in 0..ahead {
        add(Action::Before { gives: None, takes: Some(round) });
        add(Action::Forward(round));
        add(Action::Behind { gives: Some(round), takes: None });
    }
    add(Action::Before { gives: None, takes: within(ahead) });
    for round in 0..rounds {
        let next = within(round + ahead);
        if let Some(next) = next {
            add(Action::Forward(next));
        }
        add(Action::Behind { gives: next, takes: Some(round) });
        add(Action::Backward(round));
        add(Action::Before { gives: Some(round), takes: within(round + ahead + 1) });
    }
    actions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs all stages, which wait for each other wherever they pass something on.
    fn run(stages: usize, rounds: usize) {
        let mut left: Vec<_> =
            (0..stages).map(|stage| schedule(stages, stage, rounds).into_iter().peekable()).collect();
        let mut inputs = vec![Vec::new(); stages];
        let mut outputs = vec![None; stages];
        let mut gradients = vec![None; stages];
        let mut back = vec![Vec::new(); stages];
        loop {
            let mut moved = false;
            for stage in 0..stages {
                match left[stage].peek().copied() {
                    None => {}
                    Some(Action::Forward(round)) => {
                        assert!(stage == 0 || inputs[stage].contains(&round));
                        assert_eq!(outputs[stage].replace(round), None);
                        left[stage].next();
                        moved = true;
                    }
                    Some(Action::Backward(round)) => {
                        let last = stage + 1 == stages;
                        assert!(last || gradients[stage].take() == Some(round), "stage {stage}, round {round}");
                        let held = inputs[stage].iter().position(|input| *input == round);
                        held.map(|at| inputs[stage].remove(at));
                        assert!(stage == 0 || held.is_some());
                        back[stage].push(round);
                        left[stage].next();
                        moved = true;
                    }
                    Some(Action::Behind { gives, takes }) => {
                        let Some(Action::Before { gives: gradient, takes: wanted }) = left[stage + 1].peek().copied()
                        else {
                            continue;
                        };
                        assert_eq!((gives, takes), (wanted, gradient), "stage {stage} of {stages}, {rounds} rounds");
                        assert!(gives.is_none() || outputs[stage].take() == gives);
                        assert!(gradient.is_none() || back[stage + 1].last().copied() == gradient);
                        inputs[stage + 1].extend(gives);
                        assert!(inputs[stage + 1].len() < stages - stage, "rounds in flight");
                        gradients[stage] = takes.or(gradients[stage]);
                        left[stage].next();
                        left[stage + 1].next();
                        moved = true;
                    }
                    Some(Action::Before { .. }) => assert!(stage > 0),
                }
            }
            if !moved {
                break;
            }
        }
        assert!(
            left.iter_mut().all(|actions| actions.peek().is_none()),
            "{stages} stages, {rounds} rounds stand still"
        );
        assert!(back.iter().all(|order| *order == (0..rounds).collect::<Vec<_>>()));
    }

    #[test]
    fn stages_that_wait_for_each_other_finish_and_go_back_in_order() {
        for stages in 1..7 {
            for rounds in 0..10 {
                run(stages, rounds);
            }
        }
    }
}

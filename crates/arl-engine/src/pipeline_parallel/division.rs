//! Which layers a stage has: neighbours, so that no stage takes much longer than another.

use std::ops::Range;

use arl_model::ModelConfig;

use crate::flops::{head_products, layer_products};

/// Passes over a layer for a micro-batch, in forward ones: all stages but the last compute their forward pass a second time.
const PASSES: [usize; 2] = [4, 3];

/// The layers of stage `stage` of `stages`, which are no more than layers. The first stage has the embedding too, whose look-up costs
/// next to nothing, and the last one the head.
pub(crate) fn layers_of_stage(config: &ModelConfig, stages: usize, stage: usize) -> Range<usize> {
    let layers: Vec<usize> = config.layers.iter().map(|layer| layer_products(config, layer)).collect();
    let starts = divide(&layers, head_products(config), stages);
    starts[stage]..starts.get(stage + 1).copied().unwrap_or(layers.len())
}

/// The first layer of each stage: the costliest stage costs as little as can be, and of such divisions the most even one is
/// taken.
fn divide(layers: &[usize], head: usize, stages: usize) -> Vec<usize> {
    let cost = |from: usize, to: usize, last: bool| {
        let products: usize = layers[from..to].iter().sum();
        let [most, least] = PASSES;
        (if last { least * (products + head) } else { most * products }) as u128
    };
    // By stages: for each number of layers that it and those before it have, the greatest cost, the sum of squares, and where the
    // stage begins.
    let mut best: Vec<Vec<Option<(u128, u128, usize)>>> = Vec::with_capacity(stages);
    for stage in 0..stages {
        let of = |end: usize| {
            let from = |start: usize| {
                let (most, squares) = match best.last() {
                    None => (start == 0).then_some((0, 0))?,
                    Some(before) => before[start].map(|(most, squares, _)| (most, squares))?,
                };
                let own = cost(start, end, stage + 1 == stages);
                Some((most.max(own), squares + own * own, start))
            };
            (0..end).filter_map(from).min()
        };
        let of_stage = (0..=layers.len()).map(of).collect();
        best.push(of_stage);
    }
    let mut end = layers.len();
    let mut starts: Vec<usize> = best
        .iter()
        .rev()
        .map(|of_stage| {
            end = of_stage[end].map_or(0, |(_, _, start)| start);
            end
        })
        .collect();
    starts.reverse();
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_as_even_as_can_be_and_the_last_has_fewer_layers_for_its_head() {
        assert_eq!(divide(&[3; 8], 0, 1), [0]);
        // The last one computes nothing twice.
        assert_eq!(divide(&[3; 8], 0, 2), [0, 3]);
        assert_eq!(divide(&[3; 14], 0, 2), [0, 6]);
        assert_eq!(divide(&[3; 14], 2 * 7, 2), [0, 8]);
        assert_eq!(divide(&[1, 1, 1, 9], 0, 3), [0, 1, 3]);
        assert_eq!(divide(&[5, 5, 5], 1000, 3), [0, 1, 2]);
    }

    #[test]
    fn every_division_has_all_layers_once_and_none_is_empty() {
        for count in 1..9 {
            let layers: Vec<usize> = (0..count).map(|l| 1 + (l * 7) % 5).collect();
            for stages in 1..=count {
                let starts = divide(&layers, 3, stages);
                assert_eq!((starts.len(), starts[0]), (stages, 0));
                assert!(starts.windows(2).all(|pair| pair[0] < pair[1]) && starts[stages - 1] < count);
            }
        }
    }
}

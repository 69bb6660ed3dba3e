//! Weights in NF4: each is its code's value times its block's scale, rounded once.

use arl_model::{Nf4Builder, Nf4Scales, nf4_scale_values};

use super::*;
use crate::backend::{Nf4Nested, Nf4Weights};

#[test]
fn weights_in_nf4_are_values_times_scales_rounded_once() {
    let mut random = Random(61);
    for dtype in TYPES {
        for len in [1, 63, 64, 129, 70_001] {
            for is_nested in [false, true] {
                let mut fixture = Fixture::new();
                let values: Vec<f32> = random.values(len, DType::F32).iter().map(|x| *x as f32).collect();
                let mut builder = Nf4Builder::default();
                builder.push(&values);
                let nf4 = builder.finish(is_nested);
                let mut expected = vec![0f32; len];
                nf4.read(0, &mut expected);
                let wide = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
                let bytes = |values: &[u8]| values.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
                let codes = fixture.put(&bytes(&nf4.codes), DType::U8);
                let (scales, nested) = match &nf4.scales {
                    Nf4Scales::Plain(scales) => (fixture.put(&wide(scales), DType::F32), None),
                    Nf4Scales::Nested { codes, largest, offset } => {
                        let scales = fixture.put(&bytes(codes), DType::U8);
                        let largest = [&[*offset], largest.as_slice()].concat();
                        let largest = fixture.put(&wide(&largest), DType::F32);
                        let values = fixture.put(&wide(nf4_scale_values()), DType::F32);
                        (scales, Some(Nf4Nested { largest, values }))
                    }
                };
                let all = fixture.put(&vec![7.0; len + 2], dtype);
                fixture.backend.dequantize(&Nf4Weights { len, codes, scales, nested }, all.slice(1, len));
                let expected: Vec<f64> = expected.iter().map(|x| round(f64::from(*x), dtype)).collect();
                let actual = fixture.get(all);
                assert_eq!((actual[0], actual[len + 1]), (7.0, 7.0));
                assert_eq!(actual[1..=len], expected, "{dtype:?} {len} {is_nested}");
            }
        }
    }
}

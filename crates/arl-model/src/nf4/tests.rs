//! NF4 against bitsandbytes' own numbers, where its cases are there, and against its definition.

use std::path::Path;

use super::*;
use crate::weights::SafetensorsFile;

fn quantized(values: &[f32], nested: bool) -> Nf4 {
    let mut builder = Nf4Builder::default();
    builder.push(values);
    builder.finish(nested)
}

/// Numbers from -1 to 1.
fn scattered(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn back(nf4: &Nf4, len: usize) -> Vec<f32> {
    let mut out = vec![0f32; len];
    nf4.read(0, &mut out);
    out
}

#[test]
#[allow(clippy::print_stderr, reason = "a counted notice")]
fn codes_scales_and_values_are_those_of_bitsandbytes() {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let shared = std::env::var_os("ARL_SHARED").map_or_else(default, Into::into);
    let path = shared.join("golden/lora/nf4/single.safetensors");
    let Ok(file) = SafetensorsFile::open(&path) else {
        eprintln!("SKIPPED: {} is not there", path.display());
        return;
    };
    let floats = |name: &str| {
        let mut values = vec![0f32; file.info(name).unwrap().1.iter().product()];
        file.read_f32(name, &mut values).unwrap();
        values
    };
    let weight = floats("weight");
    let plain = quantized(&weight, false);
    assert_eq!(plain.codes, file.bytes("packed").unwrap());
    assert_eq!(plain.scales, Nf4Scales::Plain(floats("absmax")));
    assert_eq!(back(&plain, weight.len()), floats("plain_back"));
    assert_eq!(nf4_scale_values().as_slice(), floats("nested.nested_quant_map"));
    let nested = quantized(&weight, true);
    let Nf4Scales::Nested { codes, largest, offset } = &nested.scales else { panic!("nested") };
    assert_eq!(codes, file.bytes("nested.absmax").unwrap());
    // The mean may be summed in another order: units in the last place.
    let units = |a: f32, b: f32| (i64::from(a.to_bits()) - i64::from(b.to_bits())).unsigned_abs();
    assert!(units(*offset, floats("nested.offset")[0]) <= 2);
    assert!(largest.iter().zip(floats("nested.nested_absmax")).all(|(a, b)| units(*a, b) <= 4));
    // With bitsandbytes' own mean the values are its own.
    let scales = Nf4Scales::Nested {
        codes: codes.clone(),
        largest: floats("nested.nested_absmax"),
        offset: floats("nested.offset")[0],
    };
    assert_eq!(back(&Nf4 { codes: nested.codes.clone(), scales }, weight.len()), floats("nested_back"));
}

#[test]
fn each_value_is_the_nearest_of_its_blocks_sixteen() {
    let values = scattered(3 * NF4_BLOCK + 7);
    let nf4 = quantized(&values, false);
    assert_eq!(nf4.codes.len(), values.len().div_ceil(2));
    for (block, (values, decoded)) in
        values.chunks(NF4_BLOCK).zip(back(&nf4, values.len()).chunks(NF4_BLOCK)).enumerate()
    {
        let scale = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        for (value, decoded) in values.iter().zip(decoded) {
            let best = NF4_VALUES.iter().map(|code| (code * scale - value).abs()).fold(f32::INFINITY, f32::min);
            assert!((value - decoded).abs() <= best + 1e-6, "{block}: {value} became {decoded}");
        }
    }
}

#[test]
fn pieces_make_the_same_tensor_as_the_whole_and_parts_are_read_alike() {
    let values = scattered(300 * NF4_BLOCK + 10);
    for nested in [false, true] {
        let whole = quantized(&values, nested);
        let mut builder = Nf4Builder::default();
        values.chunks(7 * NF4_BLOCK).for_each(|piece| builder.push(piece));
        assert_eq!(builder.finish(nested), whole);
        let all = back(&whole, values.len());
        let mut part = vec![0f32; 129];
        whole.read(4001, &mut part);
        assert_eq!(part, all[4001..4130]);
        let worst = all.iter().zip(&values).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst < 0.17, "{worst}");
    }
}

#[test]
fn blocks_of_zeros_stay_zero() {
    let mut values = scattered(4 * NF4_BLOCK);
    values[NF4_BLOCK..2 * NF4_BLOCK].fill(0.0);
    for nested in [false, true] {
        assert!(back(&quantized(&values, nested), values.len())[NF4_BLOCK..2 * NF4_BLOCK].iter().all(|x| *x == 0.0));
        assert!(back(&Nf4::zeros(130, nested), 130).iter().all(|x| *x == 0.0));
    }
}

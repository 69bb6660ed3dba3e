//! The element types of activations and weights. Arithmetic is always in f32; a bf16 or f16 is widened when it is loaded
//! and rounded (to nearest, ties to even) when it is stored.

use half::{bf16, f16};

use super::gemm::Elements;
use super::memory::Plain;

/// An element that leaves compute with.
pub(super) trait Element: Plain {
    /// The value in f32.
    fn load(self) -> f32;
    /// The nearest element.
    fn store(value: f32) -> Self;
    /// A slice as an operand of matrix products.
    fn elements(slice: &[Self]) -> Elements<'_>;
    /// What `value` becomes when it is stored and loaded again.
    #[inline(always)]
    fn round(value: f32) -> f32 {
        Self::store(value).load()
    }
}

impl Element for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        value
    }

    fn elements(slice: &[Self]) -> Elements<'_> {
        Elements::F32(slice)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        // Without branches, so that loops over it are vectorised; `half` tests for NaN with a branch.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }

    fn elements(slice: &[Self]) -> Elements<'_> {
        Elements::Bf16(slice)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load(self) -> f32 {
        widen_f16(self.to_bits())
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        // Without branches, as above. Scaled so that f32's own rounding of numbers below its normal ones is f16's.
        let bits = value.to_bits();
        let (sign, size) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
        let normal = size.wrapping_sub(112 << 23).wrapping_add(0xfff + ((size >> 13) & 1)) >> 13;
        // The unit of the sum's last place is the least f16.
        let small = (f32::from_bits(size) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let infinite = 0x7c00;
        let quiet = infinite | 0x200 | ((size >> 13) & 0x3ff);
        let finite = if size < 113 << 23 { small } else { normal };
        let number = if size >= 143 << 23 { infinite } else { finite };
        f16::from_bits((sign | if value.is_nan() { quiet } else { number }) as u16)
    }

    fn elements(slice: &[Self]) -> Elements<'_> {
        Elements::F16(slice)
    }
}

/// The f32 of an f16's bits, without branches.
#[inline(always)]
pub(super) fn widen_f16(bits: u16) -> f32 {
    let (sign, size) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff) << 13);
    // As f32, the exponent is 112 too small; the product also makes the numbers below the normal ones normal.
    let number = (f32::from_bits(size) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = size | 0x7f80_0000;
    f32::from_bits(sign | if size >= 0x7c00 << 13 { special } else { number })
}

/// Evaluates an expression with `$T` standing for the Rust type of a floating-point `DType`.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::backend::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::backend::DType::Bf16 => {
                type $T = half::bf16;
                $body
            }
            $crate::backend::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => unreachable!("activations and weights are f32, bf16 or f16, not {other:?}"),
        }
    };
}
pub(super) use with_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for bits in (0..=u32::MAX).step_by(7919) {
            let value = f32::from_bits(bits);
            assert_eq!(<bf16 as Element>::store(value).to_bits(), bf16::from_f32(value).to_bits(), "{value:?}");
        }
    }

    #[test]
    fn f16_rounds_and_widens_as_the_half_crate_does() {
        // Every sign and exponent, with mantissas at, above and below each rounding.
        for top in 0..=0x7_ffff_u32 {
            for rest in [0, 1, 0xfff, 0x1000, 0x1001, 0x1fff] {
                let value = f32::from_bits((top << 13) | rest);
                assert_eq!(<f16 as Element>::store(value).to_bits(), f16::from_f32(value).to_bits(), "{value:?}");
            }
        }
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let (ours, exact) = (value.load(), value.to_f32());
            assert!(ours.to_bits() == exact.to_bits() || (ours.is_nan() && exact.is_nan()), "{bits:x}");
        }
    }
}

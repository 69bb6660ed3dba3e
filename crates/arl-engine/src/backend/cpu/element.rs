//! The element types of activations and weights. Arithmetic is always in f32; a bf16 is widened when it is loaded and
//! rounded (to nearest, ties to even) when it is stored.

use half::bf16;

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
            other => unreachable!("activations and weights are f32 or bf16, not {other:?}"),
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
}

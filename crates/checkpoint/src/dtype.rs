use candle_core::{DType, Tensor};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use tinyfusion_core::Result;

/// In which type floating-point tensors are stored, or handed over when loading. Integer tensors
/// stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DTypePolicy {
    /// Every tensor keeps its type.
    #[default]
    Keep,
    /// 32-bit floats.
    F32,
    /// 16-bit floats: values up to 65504 in magnitude.
    F16,
    /// 16-bit floats with the range of f32.
    Bf16,
}

impl DTypePolicy {
    /// The type that a tensor of type `dtype` gets.
    pub fn apply(self, dtype: DType) -> DType {
        match self {
            _ if !dtype.is_float() => dtype,
            Self::Keep => dtype,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }

    /// `tensor` in the type of the policy; the same storage if it has it already.
    pub(crate) fn cast(self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.to_dtype(self.apply(tensor.dtype()))?)
    }
}

/// The types of this crate's files, on both sides. Others (f8, bool, …) are refused by name.
pub(crate) fn from_file(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::I16 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        _ => return None,
    })
}

/// Index and value of the first NaN or infinity in little-endian `bytes` of type `dtype`.
pub(crate) fn first_non_finite(dtype: DType, bytes: &[u8]) -> Option<(usize, f64)> {
    /// Values looked at together, all of them, so that the compiler makes vectors of it: a large file has a billion.
    const BLOCK: usize = 1024;
    /// `finite` tells by the exponent's bits, which are all set in NaN and infinity.
    fn find<const N: usize>(
        bytes: &[u8],
        finite: impl Fn([u8; N]) -> bool,
        value: impl Fn([u8; N]) -> f64,
    ) -> Option<(usize, f64)> {
        let blocks = bytes.as_chunks::<N>().0.chunks(BLOCK);
        let bad = |block: &&[[u8; N]]| !block.iter().fold(true, |all, b| all & finite(*b));
        let (number, block) = blocks.enumerate().find(|(_, block)| bad(block))?;
        let at = block.iter().position(|b| !finite(*b))?;
        Some((number * BLOCK + at, value(block[at])))
    }
    match dtype {
        DType::F16 => find(
            bytes,
            |b| u16::from_le_bytes(b) & 0x7c00 != 0x7c00,
            |b| half::f16::from_le_bytes(b).to_f64(),
        ),
        DType::BF16 => find(
            bytes,
            |b| u16::from_le_bytes(b) & 0x7f80 != 0x7f80,
            |b| half::bf16::from_le_bytes(b).to_f64(),
        ),
        DType::F32 => find(
            bytes,
            |b| u32::from_le_bytes(b) & 0x7f80_0000 != 0x7f80_0000,
            |b| f64::from(f32::from_le_bytes(b)),
        ),
        DType::F64 => find(
            bytes,
            |b| u64::from_le_bytes(b) & (0x7ff << 52) != 0x7ff << 52,
            f64::from_le_bytes,
        ),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may panic
mod tests {
    use super::*;

    #[test]
    fn the_first_value_that_is_not_finite_is_found_in_every_block_and_type() {
        for (at, bad) in [
            (0, f64::NAN),
            (1023, f64::INFINITY),
            (1024, f64::NEG_INFINITY),
            (2500, f64::NAN),
        ] {
            let values: Vec<f64> = (0..3000)
                .map(|i| if i == at { bad } else { f64::from(i) - 1500.0 })
                .collect();
            let f16: Vec<u8> = values
                .iter()
                .flat_map(|v| half::f16::from_f64(*v).to_le_bytes())
                .collect();
            let bf16: Vec<u8> = values
                .iter()
                .flat_map(|v| half::bf16::from_f64(*v).to_le_bytes())
                .collect();
            let f32s: Vec<u8> = values
                .iter()
                .flat_map(|v| (*v as f32).to_le_bytes())
                .collect();
            let f64s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let all = [
                (DType::F16, f16),
                (DType::BF16, bf16),
                (DType::F32, f32s),
                (DType::F64, f64s),
            ];
            for (dtype, bytes) in all {
                let (index, value) = first_non_finite(dtype, &bytes).unwrap();
                assert_eq!(index, at as usize, "{dtype:?}");
                assert!(
                    value.is_nan() == bad.is_nan() && (bad.is_nan() || value == bad),
                    "{dtype:?}"
                );
                let width = dtype.size_in_bytes();
                assert_eq!(first_non_finite(dtype, &bytes[..at as usize * width]), None);
            }
        }
        let largest = f32::MAX.to_le_bytes();
        assert_eq!(first_non_finite(DType::F32, &largest), None);
    }
}

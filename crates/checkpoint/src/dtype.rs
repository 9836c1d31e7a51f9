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
    fn find<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f64) -> Option<(usize, f64)> {
        bytes
            .as_chunks::<N>()
            .0
            .iter()
            .map(|b| value(*b))
            .enumerate()
            .find(|(_, v)| !v.is_finite())
    }
    match dtype {
        DType::F16 => find(bytes, |b| half::f16::from_le_bytes(b).to_f64()),
        DType::BF16 => find(bytes, |b| half::bf16::from_le_bytes(b).to_f64()),
        DType::F32 => find(bytes, |b| f64::from(f32::from_le_bytes(b))),
        DType::F64 => find(bytes, f64::from_le_bytes),
        _ => None,
    }
}

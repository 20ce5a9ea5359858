//! What each operator takes on each chip, in one place: the dtypes of its tensors, which of them must be contiguous, and
//! the numbers that bound its shapes ([`numbers`] and what stands beside it). Phase-1 checks are made from these tables.
//!
//! Where public references are silent, the narrower reading stands here: what passes it, passes a wider one too.

mod bounds;

pub use bounds::*;

use crate::array::{Chip, Meta, Refusal};
use crate::constants::*;
use crate::op::{Out, Ref, Tensor};

/// Refuses with `code` unless `holds`.
pub fn need(holds: bool, code: i64, message: impl FnOnce() -> String) -> Result<(), Refusal> {
    if holds { Ok(()) } else { Err(Refusal { code: code as i32, message: message() }) }
}

/// Refuses an argument that no chip would take (161002) unless `holds`.
pub fn valid(holds: bool, message: impl FnOnce() -> String) -> Result<(), Refusal> {
    need(holds, ACLNN_ERR_PARAM_INVALID, message)
}

/// Refuses a shape that this kernel cannot do (561002) unless `holds`.
pub fn fits(holds: bool, message: impl FnOnce() -> String) -> Result<(), Refusal> {
    need(holds, ACLNN_ERR_INNER_TILING_ERROR, message)
}

/// What has a view, or is an optional tensor left out.
pub trait Seen {
    /// The view's description.
    fn meta(&self) -> Option<&Meta>;
}

impl Seen for Meta {
    fn meta(&self) -> Option<&Meta> {
        Some(self)
    }
}

impl Seen for Tensor {
    fn meta(&self) -> Option<&Meta> {
        Some(&self.meta)
    }
}

impl Seen for Out {
    fn meta(&self) -> Option<&Meta> {
        self.0.meta()
    }
}

impl Seen for Ref {
    fn meta(&self) -> Option<&Meta> {
        self.0.meta()
    }
}

impl<T: Seen> Seen for Option<T> {
    fn meta(&self) -> Option<&Meta> {
        self.as_ref().and_then(Seen::meta)
    }
}

/// What 310P takes of an operator.
enum On310 {
    /// The same without bf16.
    Same,
    /// These dtypes.
    Only(&'static str),
    /// Nothing: it has no such kernel.
    Absent,
}
use On310::{Absent, Only, Same};

/// An operator's tensors and dtypes.
struct Row {
    name: &'static str,
    /// In the order of its arguments; `!` marks what must be contiguous.
    tensors: &'static str,
    /// Combinations apart by `;`, each with a dtype for every tensor: one of those joined by `|`, or `=`, the first's.
    types: &'static str,
    on_310: On310,
}

impl Row {
    /// Whether the tensor may be in FRACTAL_NZ.
    fn blocked(&self, tensor: &str) -> bool {
        matches!((self.name, tensor), ("Mm" | "Matmul" | "MatmulWeightNz", "mat2"))
    }
}

const fn row(name: &'static str, tensors: &'static str, types: &'static str, on_310: On310) -> Row {
    Row { name, tensors, types, on_310 }
}

/// UNCONFIRMED on 310P: Add, Sub, Permute and IndexCopy, which documents deny and a public backend uses there.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    row("Embedding", "weight indices out", "any int =", Same),
    row("IndexSelect", "self index out", "any int =", Same),
    row("GatherV2", "self index out", "any int =", Same),
    row("IndexCopy", "selfRef index source outRef", "any int = =", Same),
    row("InplaceIndexCopy", "selfRef index source", "any int =", Same),
    row("Cast", "self out", "any any", Same),
    row("Add", "self other out", "number = =", Same),
    row("InplaceAdd", "selfRef other", "number =", Same),
    row("Sub", "self other out", "number = =", Same),
    row("InplaceSub", "selfRef other", "number =", Same),
    row("Mul", "self other out", "number = =", Same),
    row("InplaceMul", "selfRef other", "number =", Same),
    row("Muls", "self out", "number =", Same),
    row("InplaceMuls", "selfRef", "number", Same),
    row("InplaceCopy", "selfRef src", "any any", Same),
    row("Cat", "tensors out", "any =", Same),
    row("Permute", "self out", "any =", Same),
    row("InplaceFillScalar", "selfRef", "any", Same),
    row("InplaceZero", "selfRef", "any", Same),
    row("InplaceMaskedFillScalar", "selfRef mask", "any bool", Same),
    row("Arange", "out", "number", Same),
    row("IsFinite", "self out", "number bool", Absent),
    row("RmsNorm", "x gamma yOut rstdOut", "f16 f16|f32 = f32; bf16 bf16|f32 = f32; f32 f32 = f32", Only("f16|f32 = = f32")),
    row("GemmaRmsNorm", "x gamma yOut rstdOut", "float = = f32", Absent),
    row("AddRmsNorm", "x1 x2 gamma yOut rstdOut xOut", "float = = = f32 =", Same),
    row("InplaceAddRmsNorm", "!x1Ref !x2Ref !gamma !rstdOut", "float = = f32", Same),
    row("Mm", "self mat2 out", "float = =", Same),
    row("Matmul", "self mat2 out", "float = =", Same),
    row("MatmulWeightNz", "self mat2 out", "f16|bf16 = =", Same),
    row("BatchMatMul", "self mat2 out", "float = =", Same),
    row("TransMatmulWeight", "!mmWeightRef", "f16|bf16|i8", Same),
    row("Softmax", "self out", "float =", Same),
    row("Silu", "self out", "float =", Same),
    row("Tanh", "self out", "float =", Same),
    row("GeluV2", "x y", "float =", Same),
    row("SwiGlu", "!x out", "float =", Same),
    row("RotaryPositionEmbedding", "x cos sin !out", "float = = =", Same),
    row("ApplyRotaryPosEmbV2", "queryRef keyRef cos sin", "float = = =", Same),
    row("ArgMax", "self out", "number int", Same),
    row("Topk", "self valuesOut indicesOut", "number = i64", Same),
    row("Sort", "self valuesOut indicesOut", "number = i64", Same),
    row("Cumsum", "self out", "number number", Same),
    row("ScatterPaKvCache", "key !keyCacheRef slotMapping value !valueCacheRef", "f16|bf16|i8 = int = =", Absent),
    row("GatherPaKvCache", "!keyCache !valueCache blockTables seqLens !keyRef !valueRef seqOffset", "f16|bf16|i8 = i32 i32 = = i32", Absent),
    row("FusedInferAttentionScoreV3", "query key value attenMask blockTable queryRope keyRope attentionOut softmaxLse", "f16|bf16 = = i8|u8|bool i32 = = = f32", Absent),
    row("KvRmsNormRopeCache", "kv gamma cos sin index !kCacheRef !ckvCacheRef kRopeOut cKvOut", "f16|bf16 = = = i64 = = = =", Absent),
    row("MoeGatingTopK", "x bias yOut expertIdxOut outOut", "float = = i32 f32", Absent),
    row("MoeGatingTopKSoftmaxV2", "x finished yOut expertIdxOut softmaxResultOut", "float bool = i32 f32", Absent),
    row("MoeInitRoutingV2", "x expertIdx expandedXOut expandedRowIdxOut expertTokensCountOrCumsumOut expertTokensBeforeCapacityOut", "float i32 = i32 i32 i32", Same),
    row("MoeFinalizeRoutingV2", "expandedX expandedRowIdx x1 x2 bias scales expertIdx out", "float i32 = = = = i32 =", Same),
    row("GroupedMatmulV4", "x weight bias groupList out", "f16 = f16 i64 =; bf16 = f32 i64 =; f32 = f32 i64 =", Only("f16 = f16 i64 =")),
    row("DynamicQuant", "x smoothScales yOut scaleOut", "f16|bf16 = i8 f32", Same),
    row("QuantMatmulV4", "!x1 !x2 scale pertokenScale bias out", "i8 = f32|bf16 f32 i32|f32|bf16 bf16; i8 = f32 f32 i32|f32|f16 f16", Only("i8 = f32 f32 i32 f16")),
    row("WeightQuantBatchMatmulV2", "x weight antiquantScale antiquantOffset bias y", "f16 i8|i4|i32 = = f16 =; bf16 i8|i4|i32 = = f32 =", Only("f16 i8 = = f16 =")),
    row("ConvertWeightToINT4Pack", "!weight !weightInt4Pack", "i32 i32|i4", Absent),
];

/// Dtypes that a word of the table stands for.
fn dtypes(word: &str) -> Vec<i64> {
    match word {
        "f32" => vec![ACL_FLOAT],
        "f16" => vec![ACL_FLOAT16],
        "bf16" => vec![ACL_BF16],
        "i8" => vec![ACL_INT8],
        "u8" => vec![ACL_UINT8],
        "i4" => vec![ACL_INT4],
        "i32" => vec![ACL_INT32],
        "i64" => vec![ACL_INT64],
        "bool" => vec![ACL_BOOL],
        "int" => vec![ACL_INT32, ACL_INT64],
        "float" => vec![ACL_FLOAT, ACL_FLOAT16, ACL_BF16],
        "number" => vec![ACL_FLOAT, ACL_FLOAT16, ACL_BF16, ACL_INT32, ACL_INT64],
        "any" => vec![ACL_FLOAT, ACL_FLOAT16, ACL_BF16, ACL_INT8, ACL_UINT8, ACL_INT32, ACL_INT64, ACL_BOOL],
        _ => unreachable!("the table has no dtype {word:?}"),
    }
}

/// Whether the dtypes at hand are what `combination` says.
fn suits(combination: &str, tensors: &[&dyn Seen]) -> bool {
    let first = tensors[0].meta().map(|t| t.dtype);
    combination.split_whitespace().zip(tensors).all(|(words, tensor)| {
        let Some(dtype) = tensor.meta().map(|t| t.dtype) else { return true };
        words.split('|').any(|word| match word {
            "=" => first.is_none_or(|first| first == dtype),
            word => dtypes(word).contains(&i64::from(dtype)),
        })
    })
}

/// Checks an operator's tensors, in the order of the table, against what it takes on the chip: that it is there at all,
/// dtypes, formats and contiguity.
pub fn check(chip: Chip, name: &str, tensors: &[&dyn Seen]) -> Result<(), Refusal> {
    let row = TABLE.iter().find(|row| row.name == name).expect("every operator has its row");
    let types = match (chip, &row.on_310) {
        (Chip::A2 | Chip::A3, _) | (Chip::P310, Same) => row.types,
        (Chip::P310, Only(types)) => types,
        (Chip::P310, Absent) => {
            // UNCONFIRMED which code a call without a kernel on the chip gives.
            return need(false, ACLNN_ERR_INNER_FIND_KERNEL_ERROR, || format!("aclnn{name} has no kernel on 310P"));
        }
    };
    for (mark, tensor) in row.tensors.split_whitespace().zip(tensors) {
        let Some(tensor) = tensor.meta() else { continue };
        let what = mark.trim_start_matches('!');
        let describe = |problem: &str| format!("{what} of shape {:?} {problem}", tensor.dims);
        let nz = i64::from(tensor.format) == ACL_FORMAT_FRACTAL_NZ && !row.blocked(what);
        valid(!nz, || describe("is in FRACTAL_NZ, which only a weight may be"))?;
        let dense = !mark.starts_with('!') || tensor.is_contiguous();
        valid(dense, || describe(&format!("has strides {:?} but must be contiguous", tensor.strides)))?;
    }
    valid(types.split(';').any(|combination| suits(combination, tensors)), || {
        let given: Vec<_> = tensors.iter().map(|t| t.meta().map(|t| t.dtype)).collect();
        format!("takes ({}) as {types}, given the aclDataTypes {given:?}", row.tensors.replace('!', ""))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(chip: Chip, name: &str, tensors: &[&dyn Seen]) -> i64 {
        check(chip, name, tensors).map_or_else(|refusal| i64::from(refusal.code), |()| 0)
    }

    fn codes(chip: Chip, name: &str, tensors: &[Meta]) -> i64 {
        code(chip, name, &tensors.iter().map(|t| t as &dyn Seen).collect::<Vec<_>>())
    }

    fn meta(dims: &[i64], dtype: i64) -> Meta {
        Meta::dense(dims, dtype as i32)
    }

    #[test]
    fn every_row_has_a_dtype_for_every_tensor_and_stands_once() {
        for (i, row) in TABLE.iter().enumerate() {
            let only = if let Only(types) = row.on_310 { types } else { row.types };
            for combination in row.types.split(';').chain(only.split(';')) {
                let words: Vec<_> = combination.split_whitespace().collect();
                assert_eq!(words.len(), row.tensors.split_whitespace().count(), "{}", row.name);
                words.iter().flat_map(|w| w.split('|')).filter(|w| *w != "=").for_each(|w| drop(dtypes(w)));
            }
            assert!(TABLE[..i].iter().all(|earlier| earlier.name != row.name), "{}", row.name);
        }
    }

    #[test]
    fn an_operator_without_a_kernel_on_the_chip_is_refused() {
        let x = meta(&[4], ACL_FLOAT);
        assert_eq!(code(Chip::A3, "GemmaRmsNorm", &[&x, &x, &x, &x]), 0);
        assert_eq!(code(Chip::P310, "GemmaRmsNorm", &[&x, &x, &x, &x]), 561_003);
        assert_eq!(code(Chip::P310, "RmsNorm", &[&x, &x, &x, &x]), 0);
    }

    #[test]
    fn a_tensor_left_out_is_not_judged() {
        let (x, none) = (meta(&[4], ACL_FLOAT16), None::<Tensor>);
        let (idx, f32) = (meta(&[4], ACL_INT32), meta(&[4], ACL_FLOAT));
        assert_eq!(code(Chip::A2, "MoeGatingTopK", &[&x, &none, &x, &idx, &f32]), 0);
        assert_eq!(code(Chip::A2, "MoeGatingTopK", &[&x, &f32, &x, &idx, &f32]), 161_002);
    }

    #[test]
    fn dtypes_must_be_one_of_the_combinations() {
        let (f16, f32, bf16, i64) = (ACL_FLOAT16, ACL_FLOAT, ACL_BF16, ACL_INT64);
        for (name, types, want) in [
            ("RmsNorm", vec![f16, f16, f16, f32], 0),
            ("RmsNorm", vec![bf16, f32, bf16, f32], 0),
            ("RmsNorm", vec![f16, bf16, f16, f32], 161_002),
            ("RmsNorm", vec![f16, f16, f32, f32], 161_002),
            ("RmsNorm", vec![f16, f16, f16, f16], 161_002),
            ("Mm", vec![bf16, f16, bf16], 161_002),
            ("Embedding", vec![f16, i64, f16], 0),
            ("Embedding", vec![f16, f32, f16], 161_002),
            ("Topk", vec![f32, f32, ACL_INT32], 161_002),
        ] {
            let tensors: Vec<Meta> = types.iter().map(|&t| meta(&[4], t)).collect();
            assert_eq!(codes(Chip::A2, name, &tensors), want, "{name} {types:?}");
        }
    }

    #[test]
    fn a_strided_tensor_is_refused_where_the_kernel_needs_it_contiguous() {
        let dense = meta(&[4, 4], ACL_FLOAT);
        let turned = Meta { strides: vec![1, 4], ..dense.clone() };
        assert_eq!(code(Chip::A2, "SwiGlu", &[&turned, &dense]), 161_002);
        assert_eq!(code(Chip::A2, "SwiGlu", &[&dense, &turned]), 0);
        assert_eq!(code(Chip::A2, "Silu", &[&turned, &dense]), 0);
    }

    #[test]
    fn only_a_weight_may_be_blocked() {
        let dense = meta(&[16, 16], ACL_FLOAT16);
        let blocked = Meta { format: ACL_FORMAT_FRACTAL_NZ as i32, ..dense.clone() };
        assert_eq!(code(Chip::A2, "Mm", &[&dense, &blocked, &dense]), 0);
        assert_eq!(code(Chip::A2, "Mm", &[&blocked, &dense, &dense]), 161_002);
        assert_eq!(code(Chip::A2, "Silu", &[&blocked, &dense]), 161_002);
    }
}

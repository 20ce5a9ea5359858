//! The operators in use: for each the argument types of its first phase, from which the table of functions and a method of
//! [`Device`] are made. An argument's kind gives both its C type and the safe type that a caller passes.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::{ExecutorPtr, IntArrayPtr, ScalarPtr, Stream, Symbol, TensorListPtr, TensorPtr};
use crate::device::Device;
use crate::error::AscendError;
use crate::object::{IntArray, Scalar, Tensor, TensorList};

/// What an argument is.
pub(crate) trait Kind {
    /// As C takes it.
    type Raw;
    /// As a caller gives it; what it borrows lives until both phases are over.
    type Arg<'a>;
    /// The C value.
    fn raw<'a>(arg: &Self::Arg<'a>) -> Self::Raw;
}

macro_rules! kinds {
    ($($(#[$meta:meta])* $kind:ident($raw:ty, $arg:ty) |$name:ident| $value:expr;)*) => {
        $(
            $(#[$meta])*
            pub(crate) enum $kind {}
            impl Kind for $kind {
                type Raw = $raw;
                type Arg<'a> = $arg;
                fn raw<'a>($name: &$arg) -> $raw {
                    $value
                }
            }
        )*
    };
}

kinds! {
    /// `const aclTensor *`, read or written.
    T(TensorPtr, &'a Tensor) |tensor| tensor.as_ptr();
    /// `const aclTensor *` that may be null.
    OptT(TensorPtr, Option<&'a Tensor>) |tensor| tensor.map_or(TensorPtr::NULL, Tensor::as_ptr);
    /// `const aclScalar *`.
    S(ScalarPtr, &'a Scalar) |scalar| scalar.as_ptr();
    /// `const aclIntArray *` that may be null.
    OptInts(IntArrayPtr, Option<&'a IntArray>) |array| array.map_or(IntArrayPtr::NULL, IntArray::as_ptr);
    /// `const aclTensorList *`.
    List(TensorListPtr, &'a TensorList) |list| list.as_ptr();
    /// `const aclTensorList *` that may be null.
    OptList(TensorListPtr, Option<&'a TensorList>) |list| list.map_or(TensorListPtr::NULL, TensorList::as_ptr);
    /// `int64_t`.
    I64(i64, i64) |value| *value;
    /// `int`.
    Int(c_int, c_int) |value| *value;
    /// `int8_t`.
    I8(i8, i8) |value| *value;
    /// `double`.
    F64(f64, f64) |value| *value;
    /// `bool`.
    Bool(bool, bool) |value| *value;
    /// `aclDataType`.
    Type(i32, crate::object::DataType) |value| value.0;
    /// `char *`, which C does not write to (UNCONFIRMED that it never does); null if there is none.
    Text(*mut c_char, Option<&'static CStr>) |text| text.map_or(std::ptr::null_mut(), |text| text.as_ptr().cast_mut());
}

/// The second phase of every operator.
pub(crate) type Execute = unsafe extern "C" fn(*mut c_void, u64, ExecutorPtr, Stream) -> i32;

/// Elements that a weight of a shape takes in blocks: beside the operators, and of one phase.
pub(crate) type MatmulWeightSize = unsafe extern "C" fn(IntArrayPtr, i32, *mut u64) -> i32;
/// The name of that function.
pub(crate) const MATMUL_WEIGHT_SIZE: &str = "aclnnCalculateMatmulWeightSizeV2";

/// Both phases of an operator, of one library.
#[derive(Clone, Copy)]
pub(crate) struct Operator<F> {
    pub(crate) prepare: F,
    pub(crate) execute: Execute,
}

macro_rules! operators {
    ($($(#[$meta:meta])* $field:ident: $name:literal ($($arg:ident: $kind:ident),* $(,)?);)*) => {
        /// What the libraries have of the operators in use.
        #[derive(Default)]
        pub(crate) struct Operators {
            $(pub(crate) $field: Option<Operator<
                unsafe extern "C" fn($(<$kind as Kind>::Raw,)* *mut u64, *mut ExecutorPtr) -> i32
            >>,)*
        }

        impl Operators {
            /// Names of all operators.
            pub(crate) const NAMES: &[&str] = &[$($name),*];

            /// Takes what `find` finds.
            ///
            /// # Safety
            /// What `find` gives for a name are the addresses of its first and second phase, of one library, valid for the life
            /// of the process.
            pub(crate) unsafe fn load(find: impl Fn(&'static str) -> Option<[Symbol; 2]>) -> Self {
                // SAFETY: the caller's promise; the types are those of the list.
                unsafe {
                    Self {
                        $($field: find($name).map(|[prepare, execute]| Operator {
                            prepare: prepare.cast(), execute: execute.cast(),
                        }),)*
                    }
                }
            }

            /// Whether there is an operator of this name.
            pub(crate) fn has(&self, name: &str) -> bool {
                match name {
                    $($name => self.$field.is_some(),)*
                    _ => false,
                }
            }
        }

        /// Operators, queued on the device's stream.
        #[allow(clippy::too_many_arguments)] // as many as the ABI's
        impl Device {
            $(
                $(#[$meta])*
                pub(crate) fn $field(&mut self, $($arg: <$kind as Kind>::Arg<'_>),*) -> Result<(), AscendError> {
                    let operator = self.operators().$field.ok_or(AscendError::Missing { operator: $name })?;
                    self.two_phase($name, operator.execute, |size, executor| {
                        // SAFETY: the types are those of the list; arguments live until the second phase has returned.
                        unsafe { (operator.prepare)($(<$kind as Kind>::raw(&$arg),)* size, executor) }
                    })
                }
            )*
        }
    };
}

operators! {
    /// `out[i] = weight[indices[i]]`.
    embedding: "aclnnEmbedding" (weight: T, indices: T, out: T);
    /// Picks along `dim`.
    index_select: "aclnnIndexSelect" (x: T, dim: I64, index: T, out: T);
    /// `x[index[i]] = source[i]` along `dim`.
    index_copy_in_place: "aclnnInplaceIndexCopy" (x: T, dim: I64, index: T, source: T);
    /// See [`Backend::rms_norm`](baton_device::Backend::rms_norm); `rstd` is f32.
    rms_norm: "aclnnRmsNorm" (x: T, gamma: T, epsilon: F64, out: T, rstd: T);
    /// `sum = a + b; out = rms_norm(sum)`.
    add_rms_norm: "aclnnAddRmsNorm" (a: T, b: T, gamma: T, epsilon: F64, out: T, rstd: T, sum: T);
    /// `[M, K] x [K, N]`.
    mm: "aclnnMm" (x: T, weight: T, out: T, cube_math: I8);
    /// Brings a weight `[N, K]` into blocks, FRACTAL_NZ, where it lies.
    trans_matmul_weight: "aclnnTransMatmulWeight" (weight: T);
    /// `[B, M, K] x [B, K, N]`.
    batch_mat_mul: "aclnnBatchMatMul" (x: T, y: T, out: T, cube_math: I8);
    /// int8 or int4 weight, float activation.
    weight_quant_batch_matmul: "aclnnWeightQuantBatchMatmulV2" (
        x: T, weight: T, scale: T, offset: OptT, quant_scale: OptT, quant_offset: OptT, bias: OptT, group: Int, out: T
    );
    /// Rows in int8 with an f32 scale each.
    dynamic_quant: "aclnnDynamicQuant" (x: T, smooth: OptT, out: T, scale: T);
    /// int8 by int8.
    quant_matmul: "aclnnQuantMatmulV4" (
        x: T, weight: T, scale: T, offset: OptT, per_token: OptT, bias: OptT, transpose_x: Bool, transpose_weight: Bool, out: T
    );
    /// `silu(first half) * second half` along `dim`.
    swi_glu: "aclnnSwiGlu" (x: T, dim: I64, out: T);
    /// `x / (1 + e^-x)`.
    silu: "aclnnSilu" (x: T, out: T);
    /// `approximate` 1 is the form with tanh.
    gelu: "aclnnGeluV2" (x: T, approximate: I64, out: T);
    /// Elementwise.
    tanh: "aclnnTanh" (x: T, out: T);
    /// Along `dim`.
    softmax: "aclnnSoftmax" (x: T, dim: I64, out: T);
    /// `mode` 0 rotates pairs (i, i + D/2), 1 pairs (2i, 2i+1).
    rotary: "aclnnRotaryPositionEmbedding" (x: T, cos: T, sin: T, mode: I64, out: T);
    /// Writes keys and values to slots of a paged cache.
    scatter_pa_kv_cache: "aclnnScatterPaKvCache" (
        key: T, key_cache: T, slots: T, value: T, value_cache: T, compress_lens: OptT, compress_offset: OptT, seq_lens: OptT,
        cache_mode: Text, scatter_mode: Text, strides: OptInts, offsets: OptInts
    );
    /// Attention over a paged cache.
    fused_infer_attention: "aclnnFusedInferAttentionScoreV3" (
        query: T, key: List, value: List, pse_shift: OptT, mask: OptT, query_lengths: OptInts, kv_lengths: OptInts,
        dequant_scale1: OptT, quant_scale1: OptT, dequant_scale2: OptT, quant_scale2: OptT, quant_offset2: OptT,
        antiquant_scale: OptT, antiquant_offset: OptT, block_table: OptT, query_padding: OptT, kv_padding: OptT,
        key_antiquant_scale: OptT, key_antiquant_offset: OptT, value_antiquant_scale: OptT, value_antiquant_offset: OptT,
        key_shared_prefix: OptT, value_shared_prefix: OptT, shared_prefix_lengths: OptInts, query_rope: OptT, key_rope: OptT,
        key_rope_antiquant_scale: OptT, heads: I64, scale: F64, pre_tokens: I64, next_tokens: I64, layout: Text,
        kv_heads: I64, sparse_mode: I64, inner_precise: I64, block_size: I64, antiquant_mode: I64, softmax_lse: Bool,
        key_antiquant_mode: I64, value_antiquant_mode: I64, out: T, lse: OptT
    );
    /// Sigmoid or softmax scores, groups, a correction bias.
    moe_gating_top_k: "aclnnMoeGatingTopK" (
        x: T, bias: OptT, k: I64, k_group: I64, groups: I64, group_select: I64, renorm: I64, norm_type: I64, out_flag: Bool,
        scaling: F64, eps: F64, weights: T, experts: T, scores: T
    );
    /// Softmax then top-k, or the reverse.
    moe_gating_top_k_softmax: "aclnnMoeGatingTopKSoftmaxV2" (
        x: T, finished: OptT, k: I64, renorm: I64, softmax_result: Bool, weights: T, experts: T, result: OptT
    );
    /// Rows in the order of their experts.
    moe_init_routing: "aclnnMoeInitRoutingV2" (
        x: T, experts: T, active: I64, capacity: I64, expert_count: I64, drop_pad: I64, counts_flag: I64, before_capacity: Bool,
        expanded: T, row_index: T, counts: OptT, counts_before: OptT
    );
    /// One product for each group of rows.
    grouped_matmul: "aclnnGroupedMatmulV4" (
        x: List, weight: List, bias: OptList, scale: OptList, offset: OptList, antiquant_scale: OptList,
        antiquant_offset: OptList, per_token_scale: OptList, groups: OptT, activation_input: OptList,
        activation_quant_scale: OptList, activation_quant_offset: OptList, split: I64, group_type: I64, group_list_type: I64,
        activation: I64, out: List, activation_out: OptList, dynamic_scale_out: OptList
    );
    /// Weighted sum of the experts' rows.
    moe_finalize_routing: "aclnnMoeFinalizeRoutingV2" (
        expanded: T, row_index: T, x1: OptT, x2: OptT, bias: OptT, scales: OptT, experts: OptT, drop_pad: I64, out: T
    );
    /// Index of the largest along `dim`.
    arg_max: "aclnnArgMax" (x: T, dim: I64, keep_dim: Bool, out: T);
    /// The `k` largest along `dim`; `sorted` must be true, indices are int64.
    topk: "aclnnTopk" (x: T, k: I64, dim: I64, largest: Bool, sorted: Bool, values: T, indices: T);
    /// Conversion.
    cast: "aclnnCast" (x: T, dtype: Type, out: T);
    /// `x += alpha * y`.
    add_in_place: "aclnnInplaceAdd" (x: T, y: T, alpha: S);
    /// `out = x * y`.
    mul: "aclnnMul" (x: T, y: T, out: T);
    /// `x *= y`.
    mul_in_place: "aclnnInplaceMul" (x: T, y: T);
    /// `out = x * factor`.
    muls: "aclnnMuls" (x: T, factor: S, out: T);
    /// `x *= factor`.
    muls_in_place: "aclnnInplaceMuls" (x: T, factor: S);
    /// Any view to any view, with broadcast and conversion.
    copy: "aclnnInplaceCopy" (x: T, source: T);
}

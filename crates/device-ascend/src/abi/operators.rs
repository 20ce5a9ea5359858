//! The operators in use: for each the argument types of its first phase, from which the table of functions, a method of
//! [`Device`] and the issue of a call are made. An argument's kind gives its C type, the safe type that a caller passes, and how
//! it is kept meanwhile.
//!
//! Invariant: a call that is issued has nothing but its values, so equal calls do the same.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::runtime::Meta;
use super::{ExecutorPtr, IntArrayPtr, ScalarPtr, Stream, Symbol, TensorListPtr, TensorPtr};
use crate::device::Device;
use crate::error::AscendError;
use crate::graphs::Call;
use crate::object::{
    DataType, IntArray, IntArrayHandle, Scalar, ScalarHandle, Tensor, TensorHandle, TensorList, TensorListHandle,
};

/// An argument as it is kept: by its contents, addresses among them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Value {
    Tensor(Option<Tensor>),
    Tensors(Option<TensorList>),
    Scalar(Option<Scalar>),
    Ints(Option<IntArray>),
    /// A number of any type.
    Bits(u64),
    Text(Option<&'static CStr>),
}

/// What an argument is.
pub(crate) trait Kind {
    /// As C takes it.
    type Raw;
    /// As a caller gives it.
    type Arg<'a>;
    /// What the C value points to: lives until both phases are over.
    type Held;
    /// To be kept.
    fn value(arg: Self::Arg<'_>) -> Value;
    /// Made of what was kept.
    fn hold(value: &Value, meta: &'static Meta) -> Result<Self::Held, AscendError>;
    /// The C value.
    fn raw(held: &Self::Held) -> Self::Raw;
}

/// Kinds that are handles: `Kind(C type, caller's type, variant of Value, handle)`, and the caller's argument as what may be
/// missing.
macro_rules! handle_kinds {
    ($($(#[$meta:meta])* $kind:ident($raw:ident, $arg:ty, $variant:ident, $handle:ident) |$name:ident| $value:expr;)*) => {
        $(
            $(#[$meta])*
            pub(crate) enum $kind {}
            impl Kind for $kind {
                type Raw = $raw;
                type Arg<'a> = $arg;
                type Held = Option<$handle>;
                fn value<'a>($name: $arg) -> Value {
                    Value::$variant($value.cloned())
                }
                fn hold(value: &Value, meta: &'static Meta) -> Result<Self::Held, AscendError> {
                    let Value::$variant(value) = value else { unreachable!("a value is of its argument's kind") };
                    value.as_ref().map(|value| $handle::new(meta, value)).transpose()
                }
                fn raw(held: &Self::Held) -> $raw {
                    held.as_ref().map_or($raw::NULL, $handle::as_ptr)
                }
            }
        )*
    };
}

handle_kinds! {
    /// `const aclTensor *`, read or written.
    T(TensorPtr, &'a Tensor, Tensor, TensorHandle) |tensor| Some(tensor);
    /// `const aclTensor *` that may be null.
    OptT(TensorPtr, Option<&'a Tensor>, Tensor, TensorHandle) |tensor| tensor;
    /// `const aclScalar *`.
    S(ScalarPtr, &'a Scalar, Scalar, ScalarHandle) |scalar| Some(scalar);
    /// `const aclIntArray *` that may be null.
    OptInts(IntArrayPtr, Option<&'a IntArray>, Ints, IntArrayHandle) |array| array;
    /// `const aclTensorList *`.
    List(TensorListPtr, &'a TensorList, Tensors, TensorListHandle) |list| Some(list);
    /// `const aclTensorList *` that may be null.
    OptList(TensorListPtr, Option<&'a TensorList>, Tensors, TensorListHandle) |list| list;
}

/// Kinds that are numbers: `Kind(C type, caller's type)`, to bits and back.
macro_rules! number_kinds {
    ($($(#[$meta:meta])* $kind:ident($raw:ty, $arg:ty) |$name:ident| $to:expr, |$bits:ident| $from:expr;)*) => {
        $(
            $(#[$meta])*
            pub(crate) enum $kind {}
            impl Kind for $kind {
                type Raw = $raw;
                type Arg<'a> = $arg;
                type Held = $raw;
                fn value($name: $arg) -> Value {
                    Value::Bits($to)
                }
                fn hold(value: &Value, _: &'static Meta) -> Result<$raw, AscendError> {
                    let Value::Bits($bits) = *value else { unreachable!("a value is of its argument's kind") };
                    Ok($from)
                }
                fn raw(held: &$raw) -> $raw {
                    *held
                }
            }
        )*
    };
}

number_kinds! {
    /// `int64_t`.
    I64(i64, i64) |value| value as u64, |bits| bits as i64;
    /// `int`.
    Int(c_int, c_int) |value| value as u64, |bits| bits as c_int;
    /// `int8_t`.
    I8(i8, i8) |value| value as u64, |bits| bits as i8;
    /// `double`.
    F64(f64, f64) |value| value.to_bits(), |bits| f64::from_bits(bits);
    /// `bool`.
    Bool(bool, bool) |value| u64::from(value), |bits| bits != 0;
    /// `aclDataType`.
    Type(i32, DataType) |value| value.0 as u64, |bits| bits as i32;
}

/// `char *`, which C does not write to (UNCONFIRMED that it never does); null if there is none.
pub(crate) enum Text {}

impl Kind for Text {
    type Raw = *mut c_char;
    type Arg<'a> = Option<&'static CStr>;
    type Held = Option<&'static CStr>;
    fn value(arg: Option<&'static CStr>) -> Value {
        Value::Text(arg)
    }
    fn hold(value: &Value, _: &'static Meta) -> Result<Self::Held, AscendError> {
        let Value::Text(text) = value else { unreachable!("a value is of its argument's kind") };
        Ok(*text)
    }
    fn raw(held: &Self::Held) -> *mut c_char {
        held.map_or(std::ptr::null_mut(), |text| text.as_ptr().cast_mut())
    }
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

        /// The operators by name.
        #[allow(non_camel_case_types)] // the names of the methods
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(crate) enum OperatorName {
            $($field,)*
        }

        impl OperatorName {
            /// Both phases, with arguments of the operator's kinds.
            pub(crate) fn issue(self, device: &mut Device, values: &[Value]) -> Result<(), AscendError> {
                let (operators, meta) = (device.operators(), &device.acl().meta);
                let mut values = values.iter();
                let mut next = || values.next().expect("a value for each argument");
                match self {
                    $(Self::$field => {
                        let operator = operators.$field.ok_or(AscendError::Missing { operator: $name })?;
                        $(let $arg = <$kind as Kind>::hold(next(), meta)?;)*
                        device.two_phase($name, operator.execute, |size, executor| {
                            // SAFETY: the types are those of the list; what is held lives until the second phase has returned.
                            unsafe { (operator.prepare)($(<$kind as Kind>::raw(&$arg),)* size, executor) }
                        })
                    })*
                }
            }
        }

        /// Operators, for the device's stream.
        #[allow(clippy::too_many_arguments)] // as many as the ABI's
        impl Device {
            $(
                $(#[$meta])*
                pub(crate) fn $field(&mut self, $($arg: <$kind as Kind>::Arg<'_>),*) -> Result<(), AscendError> {
                    self.run(Call::Operator(OperatorName::$field, vec![$(<$kind as Kind>::value($arg)),*]))
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

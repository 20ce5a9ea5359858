//! Mixture of experts: how a layer's experts lie on the device, and the form that the layer takes.
//!
//! Invariant: each projection of all experts held is one block of memory, gate and up together, so that one operator
//! multiplies all of them.

use std::sync::Arc;

use baton_device::{CompressedOps, HostExperts, HostTensor, MoeOps, Result as SeamResult, Rows, Scoring, WeightFormat};

use crate::backend::AscendBackend;
use crate::device::encode;
use crate::forms;
use crate::linear::{float_bytes, stored_type};
use crate::object::{Address, DataType, View};
use crate::ops::moe::{ExpertsView, MoeForm, moe};
use crate::owner::Owner;
use crate::tensor::{Buffer, Tensor};

/// The experts of a layer that are held here.
pub struct Experts {
    view: Arc<ExpertsView>,
    form: MoeForm,
    /// What the view's windows lie on.
    _buffers: Vec<Buffer>,
}

/// One matrix of every expert, `[experts, rows, cols]`.
struct Stack {
    buffer: Buffer,
    dtype: DataType,
    /// `[rows, cols]` of one.
    shape: [usize; 2],
}

impl Stack {
    fn new(owner: &Arc<Owner>, experts: usize, shape: [usize; 2], dtype: DataType) -> SeamResult<Self> {
        let buffer = Buffer::new(owner, experts * shape[0] * shape[1] * dtype.bytes())?;
        Ok(Self { buffer, dtype, shape })
    }

    /// Writes an expert's rows from `start` on.
    fn put(&self, backend: &AscendBackend, expert: usize, start: usize, (rows, format): Matrix<'_>) -> SeamResult<()> {
        let at = (expert * self.shape[0] + start) * self.shape[1] * self.dtype.bytes();
        let to = Address(self.buffer.address().0 + at);
        let bytes = match format {
            WeightFormat::Ggml(_) => float_bytes(rows, format, self.dtype)?.1,
            _ => match float_bytes(rows, format, backend.activations)? {
                (dtype, bytes) if dtype == self.dtype => bytes,
                (_, bytes) => {
                    let values =
                        HostTensor::new(rows.name(), stored_type(format), rows.shape().to_vec(), &bytes).to_f32();
                    encode(&values, self.dtype)
                }
            },
        };
        backend.owner.call("upload of an expert", move |device| device.upload(&bytes, to))
    }

    fn view(&self, experts: usize) -> View {
        View::new(self.buffer.address(), self.dtype, &[experts, self.shape[0], self.shape[1]])
    }
}

/// An expert's matrix and as what it is to be kept.
type Matrix<'a> = (&'a HostTensor<'a>, WeightFormat);

/// The one type in which a layer's experts are kept: f32 where the formats differ, which holds them all. Blocks are kept as
/// activations are: there are no grouped products of them here.
fn stack_type(formats: [WeightFormat; 3], activations: DataType) -> DataType {
    let dtype = |format| match format {
        _ if activations == DataType::F32 => DataType::F32,
        WeightFormat::F32 => DataType::F32,
        WeightFormat::F16 => DataType::F16,
        WeightFormat::BF16 => DataType::BF16,
        WeightFormat::Ggml(_) | WeightFormat::Coded(_) => activations,
    };
    let [first, others @ ..] = formats.map(dtype);
    if others == [first; 2] { first } else { DataType::F32 }
}

/// Both stacks, gate with up and down, filled expert by expert.
fn load(backend: &AscendBackend, src: &mut HostExperts<'_>) -> SeamResult<[Stack; 2]> {
    let (held, formats) = (src.held.clone(), src.formats);
    let mut stacks: Option<[Stack; 2]> = None;
    for (i, e) in held.clone().enumerate() {
        let [gate, up, down] = src.source.expert(e)?;
        let [gate_up_stack, down_stack] = match &stacks {
            Some(stacks) => stacks,
            None => {
                let dtype = stack_type(formats, backend.activations);
                let &[inner, hidden] = gate.shape() else { panic!("{}: an expert has matrices", gate.name()) };
                let new = |shape| Stack::new(&backend.owner, held.len(), shape, dtype);
                stacks.insert([new([2 * inner, hidden])?, new([hidden, inner])?])
            }
        };
        let [hidden, inner] = down_stack.shape;
        gate.expect_shape(&[inner, hidden])?;
        up.expect_shape(&[inner, hidden])?;
        down.expect_shape(&[hidden, inner])?;
        gate_up_stack.put(backend, i, 0, (&gate, formats[0]))?;
        gate_up_stack.put(backend, i, inner, (&up, formats[1]))?;
        down_stack.put(backend, i, 0, (&down, formats[2]))?;
    }
    Ok(stacks.expect("an expert is held"))
}

impl MoeOps for AscendBackend {
    type Experts = Experts;

    fn expert_weights(&self, mut src: HostExperts<'_>) -> SeamResult<Experts> {
        assert!(src.held.end <= src.count && !src.held.is_empty(), "experts {:?} of {}", src.held, src.count);
        let [gate_up, down] = load(self, &mut src)?;
        let HostExperts { count, held, routing, limit, .. } = src;
        assert!(
            limit.is_none() && routing.by_token.is_none(),
            "no compressed attention: the capabilities do not offer it"
        );
        let bias = match &routing.scoring {
            Scoring::Softmax => None,
            Scoring::Sigmoid { correction_bias } => {
                Some(Buffer::with(&self.owner, encode(correction_bias, DataType::F32))?)
            }
            Scoring::SqrtSoftplus { .. } => panic!("no compressed attention: the capabilities do not offer it"),
        };
        let place = |e: usize| ((e + count - held.start) % count) as i32;
        let places: Vec<u8> = (0..count).flat_map(|e| place(e).to_le_bytes()).collect();
        let places = if held.start == 0 { None } else { Some(Buffer::with(&self.owner, places)?) };
        let per_expert = |buffer: &Buffer, dtype| View::new(buffer.address(), dtype, &[count]);
        let view = Arc::new(ExpertsView {
            gate_up: gate_up.view(held.len()),
            down: down.view(held.len()),
            bias: bias.as_ref().map(|buffer| per_expert(buffer, DataType::F32)),
            places: places.as_ref().map(|buffer| per_expert(buffer, DataType::I32)),
            held,
            count,
            routing,
        });
        let form = forms::experts(self, &view)?;
        let buffers = [gate_up.buffer, down.buffer].into_iter().chain(bias).chain(places).collect();
        Ok(Experts { view, form, _buffers: buffers })
    }

    fn fused_moe(&self, x: &Tensor, logits: &Tensor, experts: &Experts, out: &mut Tensor) -> SeamResult<()> {
        let Experts { view, form, .. } = experts;
        assert_eq!(
            (x.cols(), out.cols(), logits.cols()),
            (view.hidden(), view.hidden(), view.count),
            "widths of experts"
        );
        assert_eq!(x.rows(), logits.rows(), "rows of experts");
        let (rows, x, logits) = (x.rows(), x.view(), logits.view());
        let (out, view, form) = (out.output(rows, view.dtype()), view.clone(), *form);
        self.queue("fused_moe", rows, move |device| moe(device, form, &x, &logits, &view, &out))
    }
}

/// Not offered.
impl CompressedOps for AscendBackend {}

//! Mixture of experts: how a layer's experts lie on the device, and the form that the layer takes.
//!
//! Invariant: each projection of all experts held is one block of memory, gate and up together, so that one operator
//! multiplies all of them.

use std::ops::Range;
use std::sync::Arc;

use baton_device::{DeviceError, HostExperts, HostTensor, Result as SeamResult, Rows, Scoring, WeightFormat};

use crate::backend::AscendBackend;
use crate::forms;
use crate::linear::{float_bytes, float_type};
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
    fn put(&self, owner: &Owner, expert: usize, start: usize, rows: &HostTensor<'_>) -> SeamResult<()> {
        let at = (expert * self.shape[0] + start) * self.shape[1] * self.dtype.bytes();
        let (to, bytes) = (Address(self.buffer.address().0 + at), float_bytes(rows, self.dtype));
        owner.call("upload of an expert", move |device| device.upload(&bytes, to))
    }

    fn view(&self, experts: usize) -> View {
        View::new(self.buffer.address(), self.dtype, &[experts, self.shape[0], self.shape[1]])
    }
}

impl AscendBackend {
    /// See [`MoeOps::expert_weights`](baton_device::MoeOps::expert_weights).
    pub(crate) fn load_experts(&self, src: HostExperts<'_>, held: Range<usize>) -> SeamResult<Experts> {
        let HostExperts { count, source, formats, routing } = src;
        assert!(held.end <= count && !held.is_empty(), "experts {held:?} of {count}");
        let mut stacks: Option<[Stack; 2]> = None;
        for (i, e) in held.clone().enumerate() {
            let [gate, up, down] = source.expert(e)?;
            let [gate_up_stack, down_stack] = match &stacks {
                Some(stacks) => stacks,
                None => {
                    let dtype = self.stack_type(&[&gate, &up, &down], formats)?;
                    let &[inner, hidden] = gate.shape() else { panic!("{}: an expert has matrices", gate.name()) };
                    let new = |shape| Stack::new(&self.owner, held.len(), shape, dtype);
                    stacks.insert([new([2 * inner, hidden])?, new([hidden, inner])?])
                }
            };
            let [hidden, inner] = down_stack.shape;
            gate.expect_shape(&[inner, hidden])?;
            up.expect_shape(&[inner, hidden])?;
            down.expect_shape(&[hidden, inner])?;
            gate_up_stack.put(&self.owner, i, 0, &gate)?;
            gate_up_stack.put(&self.owner, i, inner, &up)?;
            down_stack.put(&self.owner, i, 0, &down)?;
        }
        let [gate_up, down] = stacks.expect("an expert is held");
        let bias = match &routing.scoring {
            Scoring::Softmax => None,
            Scoring::Sigmoid { correction_bias } => {
                Some(Buffer::with(&self.owner, crate::device::encode(correction_bias, DataType::F32))?)
            }
        };
        let places = if held.start == 0 {
            None
        } else {
            let place = |e: usize| ((e + count - held.start) % count) as i32;
            Some(Buffer::with(&self.owner, (0..count).flat_map(|e| place(e).to_le_bytes()).collect())?)
        };
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

    /// The one type in which a layer's experts are kept: f32 where the formats differ, which holds them all. Blocks are kept as
    /// activations are: the grouped products of quantised experts are not used.
    fn stack_type(&self, tensors: &[&HostTensor<'_>], formats: [WeightFormat; 3]) -> SeamResult<DataType> {
        let dtype = |(tensor, format): (&&HostTensor<'_>, WeightFormat)| match format {
            WeightFormat::Ggml(_) => {
                tensor.expect_keepable(format)?;
                Ok(self.activations)
            }
            _ => float_type(tensor, format),
        };
        let types = tensors.iter().zip(formats).map(dtype).collect::<Result<Vec<_>, DeviceError>>()?;
        Ok(if types.iter().all(|dtype| *dtype == types[0]) { types[0] } else { DataType::F32 })
    }

    /// See [`MoeOps::fused_moe`](baton_device::MoeOps::fused_moe).
    pub(crate) fn run_experts(
        &self,
        x: &Tensor,
        logits: &Tensor,
        experts: &Experts,
        out: &mut Tensor,
    ) -> SeamResult<()> {
        let Experts { view, form, .. } = experts;
        assert_eq!((x.cols(), logits.cols(), logits.rows()), (view.hidden(), view.count, x.rows()));
        let (x, logits) = (x.view(), logits.view());
        let out = out.output(x.dims[0] as usize, view.dtype());
        let (view, form) = (view.clone(), *form);
        self.owner.submit("fused_moe", move |device| moe(device, form, &x, &logits, &view, &out))
    }
}

//! Linear layers that adapters change (LoRA, arXiv 2106.09685): a row that an adapter serves gets
//! `W x + scale · B (A x)`.
//!
//! Rows are taken out adapter by adapter and what is found for them is added where they were. So a row without adapter
//! costs nothing more, and the bits of a row depend on its own adapter alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use baton_device::{Activation, Backend, Result as DeviceResult, Rows};

use crate::loader::Slot;

/// Rows that an adapter computes at once, at most: bounds the memory of [`AdapterScratch`].
const CHUNK: usize = 256;

/// A linear layer of a model.
pub(crate) struct Projection<B: Backend> {
    weight: B::Linear,
    /// Its number among the projections of the model.
    slot: usize,
}

/// What an adapter adds to one projection.
pub(crate) struct Delta<B: Backend> {
    /// `[rank, in]`; the parts of a fused layer share it.
    pub(crate) a: Arc<B::Linear>,
    /// `[out, rank]`.
    pub(crate) b: B::Linear,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

/// An adapter on a device.
pub(crate) struct AdapterWeights<B: Backend> {
    /// By slot.
    deltas: Vec<Option<Delta<B>>>,
    /// For each rank that occurs, `[CHUNK, rank]`: what lies between A and B.
    low: Mutex<BTreeMap<usize, B::Tensor>>,
}

/// Rows of a step that one adapter serves.
pub(crate) struct AdaptedRows<'a, B: Backend> {
    pub(crate) weights: &'a AdapterWeights<B>,
    /// Ascending.
    pub(crate) rows: Vec<u32>,
}

/// The adapters of a step: each row belongs to one at most.
pub(crate) struct StepAdapters<'a, B: Backend> {
    pub(crate) groups: &'a [AdaptedRows<'a, B>],
    pub(crate) scratch: &'a mut AdapterScratch<B>,
}

/// Activations for [`CHUNK`] rows, by width.
pub(crate) struct AdapterScratch<B: Backend> {
    inputs: BTreeMap<usize, B::Tensor>,
    outputs: BTreeMap<usize, B::Tensor>,
}

impl<B: Backend> Projection<B> {
    pub(crate) fn new(weight: B::Linear, slot: usize) -> Self {
        Self { weight, slot }
    }

    /// `out = x·Wᵀ + b`, and for the rows of an adapter what it adds.
    pub(super) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        backend.linear(x, &self.weight, out)?;
        self.adapt(backend, x, adapters, out)
    }

    /// [`Projection::forward`] of one input through each of a group.
    pub(super) fn forward_group<const N: usize>(
        backend: &B,
        x: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        mut group: [(&Self, &mut B::Tensor); N],
    ) -> DeviceResult<()> {
        backend.linear_group(x, &mut group.each_mut().map(|(projection, out)| (&projection.weight, &mut **out)))?;
        group.into_iter().try_for_each(|(projection, out)| projection.adapt(backend, x, adapters, out))
    }

    /// `out = activation(gate(x)) ⊙ up(x)` of `[gate, up]`, each with room for what it gives.
    pub(super) fn forward_gated(
        backend: &B,
        activation: Activation,
        x: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        group: [(&Self, &mut B::Tensor); 2],
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let [(gate, gate_out), (up, up_out)] = group;
        if !gate.is_adapted(adapters) && !up.is_adapted(adapters) {
            return backend.gated_linear(activation, x, [(&gate.weight, gate_out), (&up.weight, up_out)], out);
        }
        Self::forward_group(backend, x, adapters, [(gate, &mut *gate_out), (up, &mut *up_out)])?;
        backend.gated_activation(activation, gate_out, up_out, out)
    }

    /// Whether an adapter of the step changes this layer.
    fn is_adapted(&self, adapters: &StepAdapters<'_, B>) -> bool {
        adapters.groups.iter().any(|adapted| adapted.weights.deltas[self.slot].is_some())
    }

    /// Adds to the rows of each adapter what it has for this layer.
    fn adapt(
        &self,
        backend: &B,
        x: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        for AdaptedRows { weights, rows } in adapters.groups {
            if let Some(delta) = &weights.deltas[self.slot] {
                let mut low = weights.low.lock().unwrap_or_else(PoisonError::into_inner);
                let low = low.get_mut(&delta.rank).expect("allocated with the adapter");
                delta.add(backend, x, rows, (adapters.scratch, low), out)?;
            }
        }
        Ok(())
    }
}

impl<B: Backend> Delta<B> {
    /// `out[rows] += scale · B (A x[rows])`.
    fn add(
        &self,
        backend: &B,
        x: &B::Tensor,
        rows: &[u32],
        (scratch, low): (&mut AdapterScratch<B>, &mut B::Tensor),
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let input = scratch.inputs.get_mut(&x.cols()).expect("allocated for every slot");
        let output = scratch.outputs.get_mut(&out.cols()).expect("allocated for every slot");
        for rows in rows.chunks(CHUNK) {
            backend.gather_rows(x, rows, input)?;
            backend.linear(input, &self.a, low)?;
            backend.scale(low, self.scale)?;
            backend.linear(low, &self.b, output)?;
            backend.add_rows(output, rows, out)?;
        }
        Ok(())
    }
}

impl<B: Backend> AdapterWeights<B> {
    pub(crate) fn new(backend: &B, deltas: Vec<Option<Delta<B>>>) -> DeviceResult<Self> {
        let ranks = deltas.iter().flatten().map(|delta| delta.rank);
        let low = ranks.map(|rank| Ok((rank, backend.tensor(CHUNK, rank)?))).collect::<DeviceResult<_>>()?;
        Ok(Self { deltas, low: Mutex::new(low) })
    }
}

impl<B: Backend> AdapterScratch<B> {
    /// For the projections of a model; none for one without adapters.
    pub(crate) fn new(backend: &B, slots: &[Slot]) -> DeviceResult<Self> {
        let tensors = |width: fn(&Slot) -> usize| {
            let widths: BTreeMap<usize, ()> = slots.iter().map(|slot| (width(slot), ())).collect();
            widths.into_keys().map(|width| Ok((width, backend.tensor(CHUNK, width)?))).collect::<DeviceResult<_>>()
        };
        Ok(Self { inputs: tensors(|slot| slot.columns.len())?, outputs: tensors(|slot| slot.rows.len())? })
    }
}

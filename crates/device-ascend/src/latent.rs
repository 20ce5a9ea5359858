//! Latent attention on the device: its up-projection, and the form that a layer takes.

use baton_device::{HostLatent, LatentOps, Result, Rows};

use crate::backend::{AscendBackend, BLOCK};
use crate::cache::KvCache;
use crate::forms::{self, LatentForm, LatentShape};
use crate::linear::float_bytes;
use crate::object::View;
use crate::ops::latent::LatentView;
use crate::ops::{fused_latent, latent};
use crate::plan::{AttentionPlan, Part};
use crate::tensor::{Buffer, Tensor};

/// An up-projection split for absorption.
pub struct Latent {
    view: LatentView,
    /// Keep the memory.
    _buffers: [Buffer; 2],
}

impl LatentOps for AscendBackend {
    type Latent = Latent;

    fn latent_weight(&self, src: &HostLatent<'_>) -> Result<Latent> {
        let HostLatent { kv_b, heads, nope, rope, v, rank, format } = src;
        kv_b.expect_shape(&[heads * (nope + v), *rank])?;
        let (dtype, bytes) = float_bytes(kv_b, *format, self.activations)?;
        let row = rank * dtype.bytes();
        // Per head first the key rows, then the value rows.
        let (keys, values): (Vec<_>, Vec<_>) =
            bytes.chunks_exact((nope + v) * row).map(|head| head.split_at(nope * row)).unzip();
        let buffers = [Buffer::with(&self.owner, keys.concat())?, Buffer::with(&self.owner, values.concat())?];
        let view = LatentView {
            keys: View::new(buffers[0].address(), dtype, &[*heads, *nope, *rank]),
            values: View::new(buffers[1].address(), dtype, &[*heads, *v, *rank]),
            rope: *rope,
        };
        Ok(Latent { view, _buffers: buffers })
    }

    fn latent_attention(
        &self,
        q: &Tensor,
        latent: &Tensor,
        rope_key: &Tensor,
        weight: &Latent,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        scale: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let (step, planes, weight) = (plan.step(), cache.planes(layer), weight.view.clone());
        let [heads, nope, rank] = [0, 1, 2].map(|d| weight.keys.dims[d] as usize);
        let widths = [(q, heads * (nope + weight.rope)), (latent, rank), (rope_key, weight.rope)];
        for (x, cols) in widths {
            assert_eq!((x.rows(), x.cols()), (step.rows, cols), "shape of latent attention");
        }
        assert_eq!(out.cols(), heads * weight.values.dims[1] as usize, "width of latent attention");
        if q.rows() == 0 {
            out.output(0, q.dtype());
            return Ok(());
        }
        self.write_cache(&step, [latent, rope_key], &planes, 1, layer)?;
        let (rows, dtype) = (q.rows(), planes[0].dtype);
        let blocks = planes[0].dims[0] as usize / BLOCK;
        let out = out.output(rows, q.dtype());
        let q = q.view();
        let shape = LatentShape { heads, rank, rope: weight.rope, dtype };
        if q.dtype == dtype
            && weight.keys.dtype == dtype
            && let LatentForm::Fused { heads } = forms::latent(self, shape, layer)?
        {
            let (step, mask) = (plan.step_with(Part::Short), self.mask()?);
            return self.queue("latent_attention", rows, move |device| {
                step.calls(device, Part::Short, blocks)?.into_iter().try_for_each(|(rows, step)| {
                    let [q, out] = [&q, &out].map(|x| x.narrow(0, rows.start, rows.len()));
                    fused_latent::attention(device, &step, heads, scale, &mask, &q, &weight, &planes, &out)
                })
            });
        }
        let (step, masks) = (plan.step_with(Part::Composed), self.masks());
        self.queue("latent_attention", rows, move |device| {
            latent::attention(device, &step, scale, &masks, &q, &weight, &planes, &out)
        })
    }
}

//! What DeepSeek-V4 asks of a device, on top of the kernels.

use baton_device::{CompressedOps, Entries, Mixing, Pooling, Reads, Result, Rows, TokenIds, WindowedParams};

use super::{CpuBackend, columns, same_shape, work};
use crate::cache::{AttentionPlan, KvCache, Layer};
use crate::kernels::chosen::{Choice, Chosen, Keys};
use crate::kernels::compressed::{Reading, attend};
use crate::kernels::linear::{Prepared, Product, multiply};
use crate::kernels::moe::{self, Experts};
use crate::kernels::pooling;
use crate::kernels::rows::Clamp;
use crate::kernels::streams::{self, Join, Mix};
use crate::tensor::{Target, Tensor, View};
use crate::weight::Linear;

impl CompressedOps for CpuBackend {
    fn pool(
        &self,
        pooling: &Pooling<'_, Self>,
        entries: Entries,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
    ) -> Result<()> {
        let Layer::Windowed { pooled: Some(pooled), .. } = &mut cache.layers[layer] else {
            panic!("layer {layer} pools nothing")
        };
        let kv = match entries {
            Entries::Attended => &mut pooled.attended,
            Entries::Index => pooled.index.as_mut().unwrap_or_else(|| panic!("layer {layer} has no indexer")),
        };
        same_shape(pooling.values, pooling.gates);
        columns(pooling.values, pooled.kind.series() * kv.width);
        assert_eq!(pooling.values.rows(), plan.rows(), "rows of the step");
        assert_eq!(pooling.bias.len(), pooled.kind.rate * pooling.values.cols(), "a bias for each place in an entry");
        assert_eq!((pooling.norm.len(), pooling.layout.head_dim), (kv.width, kv.width), "an entry is one head");
        pooling::add((&self.pool, self.isa), pooling, pooled.kind, kv, plan);
        Ok(())
    }

    fn windowed_attention(
        &self,
        q: &Tensor,
        kv: &Tensor,
        params: &WindowedParams<'_, Self>,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        out: &mut Tensor,
    ) -> Result<()> {
        let &WindowedParams { window, scale, sink, ref reads } = params;
        let Layer::Windowed { rows, pooled } = &mut cache.layers[layer] else { panic!("layer {layer} has no window") };
        let width = kv.cols();
        columns(q, sink.len() * width);
        columns(out, q.cols());
        assert_eq!((q.rows(), kv.rows()), (plan.rows(), plan.rows()), "rows of the step");
        for row in 0..plan.rows() {
            rows.put(plan.passing_slot(row), 0, 0, kv.row(row));
        }
        let pooled = match reads {
            Reads::Window => None,
            Reads::All | Reads::Chosen { .. } => {
                Some(pooled.as_ref().unwrap_or_else(|| panic!("layer {layer} pools nothing")))
            }
        };
        let chosen = match (reads, pooled) {
            (&Reads::Chosen { q, weights, top_k }, Some(pooled)) => {
                let index = pooled.index.as_ref().unwrap_or_else(|| panic!("layer {layer} has no indexer"));
                columns(q, weights.cols() * index.width);
                let choice = Choice { q, weights, top_k, keys: Keys::Entries(&index.rows, pooled.kind) };
                Some(Chosen::new((&self.pool, self.isa), &choice, plan))
            }
            _ => None,
        };
        out.set_rows(q.rows());
        let target = Target::new(out.data_mut(), q.cols());
        let entries = pooled.map(|pooled| (&pooled.attended.rows, pooled.kind));
        let reading = Reading { rows, width, window, entries, chosen: chosen.as_ref(), scale, sink };
        attend((&self.pool, self.isa), q, &reading, plan, &target);
        Ok(())
    }

    fn grouped_linear(&self, x: &Tensor, weights: &[Linear], out: &mut Tensor) -> Result<()> {
        let (inputs, outputs) = (x.cols() / weights.len(), out.cols() / weights.len());
        columns(x, inputs * weights.len());
        columns(out, outputs * weights.len());
        out.set_rows(x.rows());
        let (rows, cols) = (x.rows(), out.cols());
        let target = Target::new(out.data_mut(), cols);
        let mut scratch = self.scratch();
        for (group, linear) in weights.iter().enumerate() {
            assert_eq!(linear.weight.out_features, outputs, "columns of a group");
            let x = View { start: group * inputs, width: inputs, ..x.view() };
            let input = Prepared::new((&self.pool, self.isa), x, [&linear.weight], &mut scratch.input);
            let product = Product::into(linear, target.shifted(0, group * outputs));
            multiply(&self.pool, self.isa, (input, rows), &[product]);
        }
        Ok(())
    }

    fn clamp(&self, x: &mut Tensor, low: f32, high: f32) -> Result<()> {
        self.each_row(x, work::ADD, |_, x| self.isa.run(Clamp { x, low, high }));
        Ok(())
    }

    fn fused_moe_by_token(
        &self,
        x: &Tensor,
        logits: &Tensor,
        ids: TokenIds<'_, Self::Chosen>,
        experts: &Experts,
        out: &mut Tensor,
    ) -> Result<()> {
        let ids = ids.on_host();
        assert_eq!(ids.len(), x.rows(), "a token for each row");
        self.experts(x, moe::Router { logits, ids: Some(&ids) }, experts, out)
    }

    fn fill_streams(&self, x: &Tensor, streams: &mut Tensor) -> Result<()> {
        assert_eq!(streams.cols() % x.cols(), 0, "whole streams");
        streams.set_rows(x.rows());
        self.each_row(streams, work::ADD, |row, streams| {
            streams.chunks_exact_mut(x.cols()).for_each(|stream| stream.copy_from_slice(x.row(row)));
        });
        Ok(())
    }

    fn stream_weights(&self, mixing: &Mixing<'_, Self>, x: &mut Tensor) -> Result<()> {
        let &Mixing { streams: n, base, scale, iterations, eps } = mixing;
        assert!(n <= streams::MOST, "{n} streams, of at most {}", streams::MOST);
        let parts = if x.cols() == n { 1 } else { 3 };
        columns(x, if parts == 1 { n } else { (2 + n) * n });
        assert_eq!((base.len(), scale.len()), (x.cols(), parts), "parameters of streams");
        self.each_row(x, work::EXP + iterations, |_, x| streams::weigh(x, n, (base, scale), iterations, eps));
        Ok(())
    }

    fn join_streams(&self, streams: &Tensor, weights: &Tensor, out: &mut Tensor) -> Result<()> {
        let n = streams.cols() / out.cols();
        columns(streams, n * out.cols());
        assert!(weights.cols() >= n && weights.rows() == streams.rows(), "a weight for each stream");
        out.set_rows(streams.rows());
        self.each_row(out, n * work::ADD, |row, out| {
            self.isa.run(Join { streams: streams.row(row), weights: &weights.row(row)[..n], out });
        });
        Ok(())
    }

    fn mix_streams(&self, x: &Tensor, weights: &Tensor, streams: &mut Tensor) -> Result<()> {
        let n = streams.cols() / x.cols();
        columns(streams, n * x.cols());
        columns(weights, (2 + n) * n);
        assert!(n <= streams::MOST, "{n} streams, of at most {}", streams::MOST);
        assert_eq!((x.rows(), weights.rows()), (streams.rows(), streams.rows()), "rows of the step");
        self.each_row(streams, n * work::ADD, |row, streams| {
            let (post, matrix) = weights.row(row)[n..].split_at(n);
            self.isa.run(Mix { x: x.row(row), post, matrix, streams });
        });
        Ok(())
    }
}

//! Experts of DeepSeek-V4: chosen by scores, or in the first layers by the token itself; their products and those of the shared one
//! are bounded.

use baton_device::{Activation, Backend, CompressedOps, Result as DeviceResult, Routing, Scoring, TokenIds};

use super::super::{Sizes, Specs};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{DeepseekV4Config, ModelConfig, MoeConfig, V4Layer};
use crate::loader::Loader;
use crate::split::Split;

/// Gate, up and down of an expert.
const PROJECTIONS: [&str; 3] = ["w1", "w3", "w2"];

pub(super) struct Experts<B: CompressedOps> {
    /// `[experts, hidden]`.
    router: B::Linear,
    routed: B::Experts,
    /// Whether tokens choose their experts, and not scores.
    by_token: bool,
    /// Gate, up and down of the shared ones as one network.
    shared: [B::Linear; 3],
}

/// Activations for all layers.
pub(super) struct ExpertsScratch<B: Backend> {
    /// Bound of products.
    limit: f32,
    /// `[rows, experts]`.
    router_logits: B::Tensor,
    /// Gates and ups of the shared experts, and their product, `[rows, width]` each.
    shared: [B::Tensor; 3],
    /// `[rows, hidden]`.
    shared_out: B::Tensor,
}

/// Names and shapes of a layer's tensors.
pub(super) fn specs(config: &ModelConfig, layer: &V4Layer, block: &str, specs: &mut Specs) {
    let moe = experts_of(config);
    let (hidden, width) = (config.hidden_size, moe.intermediate_size);
    specs.matrix(format!("{block}.gate"), moe.num_experts, hidden, Role::Router);
    if layer.hashed {
        specs.add(token_table(block), vec![config.vocab_size, moe.routing.top_k], Role::Table, Split::Whole);
    } else {
        specs.vector(format!("{block}.gate.bias"), moe.num_experts);
    }
    let mut network = |prefix: String, width: usize| {
        let [gate, up, down] = PROJECTIONS.map(|name| format!("{prefix}.{name}"));
        specs.linear(gate, width, hidden);
        specs.linear(up, width, hidden);
        specs.linear(down, hidden, width);
    };
    (0..moe.num_experts).for_each(|expert| network(format!("{block}.experts.{expert}"), width));
    network(format!("{block}.shared_experts"), moe.num_shared_experts * width);
}

fn token_table(block: &str) -> String {
    format!("{block}.gate.tid2eid")
}

fn experts_of(config: &ModelConfig) -> &MoeConfig {
    config.moe.as_ref().expect("every layer has experts")
}

impl<B: CompressedOps> Experts<B> {
    pub(super) fn load(
        loader: &mut Loader<'_, B>,
        (config, own): (&ModelConfig, &DeepseekV4Config),
        layer: &V4Layer,
        block: &str,
    ) -> Result<Self, LoadError> {
        let moe = experts_of(config);
        let (correction_bias, by_token) = match layer.hashed {
            true => (Vec::new(), Some(loader.token_table(&token_table(block), moe.num_experts)?)),
            false => (loader.host_vector(&format!("{block}.gate.bias"))?, None),
        };
        let routing = Routing { scoring: Scoring::SqrtSoftplus { correction_bias }, by_token, ..moe.routing.clone() };
        let [gate, up, down] = PROJECTIONS.map(|name| format!("{block}.shared_experts.{name}"));
        Ok(Self {
            // Without what is named like its bias: that chooses experts and does not weigh them.
            router: loader.named_linear(&format!("{block}.gate.weight"))?,
            routed: loader.experts(
                &format!("{block}.experts"),
                PROJECTIONS,
                moe.num_experts,
                routing,
                Some(own.expert_limit),
            )?,
            by_token: layer.hashed,
            shared: [loader.linear(&gate)?, loader.linear(&up)?, loader.linear(&down)?],
        })
    }

    pub(super) fn forward(
        &self,
        backend: &B,
        ids: TokenIds<'_, B::Chosen>,
        h: &B::Tensor,
        scratch: &mut ExpertsScratch<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let ExpertsScratch { limit, router_logits, shared, shared_out } = scratch;
        backend.linear(h, &self.router, router_logits)?;
        if self.by_token {
            backend.fused_moe_by_token(h, router_logits, ids, &self.routed, out)?;
        } else {
            backend.fused_moe(h, router_logits, &self.routed, out)?;
        }
        let ([gate, up, down], [gated, upped, product]) = (&self.shared, shared);
        backend.linear_group(h, &mut [(gate, &mut *gated), (up, &mut *upped)])?;
        backend.clamp(gated, f32::NEG_INFINITY, *limit)?;
        backend.clamp(upped, -*limit, *limit)?;
        backend.gated_activation(Activation::Silu, gated, upped, product)?;
        backend.linear(product, down, shared_out)?;
        backend.add(out, shared_out)
    }
}

impl<B: Backend> ExpertsScratch<B> {
    pub(super) fn new(config: &ModelConfig, own: &DeepseekV4Config, sizes: Sizes, backend: &B) -> DeviceResult<Self> {
        let moe = experts_of(config);
        let width = moe.num_shared_experts * moe.intermediate_size;
        let activation = |cols: usize| backend.tensor(sizes.rows, cols);
        Ok(Self {
            limit: own.expert_limit,
            router_logits: activation(moe.num_experts)?,
            shared: [activation(width)?, activation(width)?, activation(width)?],
            shared_out: activation(config.hidden_size)?,
        })
    }
}

//! The feed-forward half of a layer: a gated network, or experts that a router chooses.

use baton_device::{Activation, Backend, MoeOps, Result as DeviceResult, Routing, Scoring};

use super::{Projection, Sizes, Specs, StepAdapters};
use crate::LoadError;
use crate::checkpoint::Role;
use crate::config::{Architecture, ModelConfig, MoeConfig};
use crate::loader::Loader;
use crate::split::Split;

/// One layer's network.
pub(super) enum FeedForward<B: MoeOps> {
    Dense(Mlp<B>),
    Experts {
        /// `[experts, hidden]`.
        router: B::Linear,
        routed: B::Experts,
        /// All shared experts as one network, if there are any.
        shared: Option<Mlp<B>>,
    },
}

/// Activations for all layers of a model; what no layer needs is not there.
pub(super) struct FeedForwardScratch<B: Backend> {
    dense: Option<MlpScratch<B>>,
    /// `[rows, experts]`.
    router_logits: Option<B::Tensor>,
    shared: Option<SharedExperts<B>>,
}

struct SharedExperts<B: Backend> {
    scratch: MlpScratch<B>,
    /// `[rows, hidden]`.
    out: B::Tensor,
}

/// How a mixture of experts is named in a layer.
struct MoeNames {
    block: &'static str,
    /// Gate, up and down of an expert.
    projections: [&'static str; 3],
}

const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
const FUSED_GATE_UP: &str = "gate_up_proj";

fn moe_names(architecture: Architecture) -> MoeNames {
    match architecture {
        Architecture::Mixtral => MoeNames { block: "block_sparse_moe", projections: ["w1", "w3", "w2"] },
        _ => MoeNames { block: "mlp", projections: PROJECTIONS },
    }
}

/// The experts of a layer, if it has any.
fn moe_of(config: &ModelConfig, layer: usize) -> Option<&MoeConfig> {
    config.moe.as_ref().filter(|moe| moe.layers[layer])
}

/// Names and shapes of a layer's tensors.
pub(super) fn feed_forward_specs(config: &ModelConfig, layer: usize, specs: &mut Specs) {
    let hidden = config.hidden_size;
    let prefix = format!("model.layers.{layer}");
    let Some(moe) = moe_of(config, layer) else {
        let (mlp, width) = (format!("{prefix}.mlp"), config.intermediate_size);
        if config.fused_projections {
            specs.linear(format!("{mlp}.{FUSED_GATE_UP}"), 2 * width, hidden);
            specs.shared(format!("{mlp}.down_proj"), hidden, width, Split::Inputs(width));
        } else {
            mlp_specs(&mlp, hidden, width, specs);
            if config.mlp_bias {
                let rows = [width, width, hidden];
                PROJECTIONS.iter().zip(rows).for_each(|(name, rows)| specs.vector(format!("{mlp}.{name}.bias"), rows));
            }
        }
        return;
    };
    let names = moe_names(config.architecture);
    let block = format!("{prefix}.{}", names.block);
    specs.matrix(format!("{block}.gate"), moe.num_experts, hidden, Role::Router);
    if let Scoring::Sigmoid { .. } = moe.routing.scoring {
        specs.vector(correction_bias(&block), moe.num_experts);
    }
    for expert in 0..moe.num_experts {
        let prefix = format!("{block}.experts.{expert}");
        let [gate, up, down] = names.projections.map(|name| format!("{prefix}.{name}"));
        specs.linear(gate, moe.intermediate_size, hidden);
        specs.linear(up, moe.intermediate_size, hidden);
        specs.linear(down, hidden, moe.intermediate_size);
    }
    if moe.num_shared_experts > 0 {
        let width = moe.num_shared_experts * moe.intermediate_size;
        mlp_specs(&format!("{block}.shared_experts"), hidden, width, specs);
    }
}

fn mlp_specs(prefix: &str, hidden: usize, width: usize, specs: &mut Specs) {
    let [gate, up, down] = PROJECTIONS.map(|name| format!("{prefix}.{name}"));
    specs.shared(gate, width, hidden, Split::Outputs(width));
    specs.shared(up, width, hidden, Split::Outputs(width));
    specs.shared(down, hidden, width, Split::Inputs(width));
}

fn correction_bias(block: &str) -> String {
    format!("{block}.gate.e_score_correction_bias")
}

impl<B: MoeOps> FeedForward<B> {
    pub(super) fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, layer: usize) -> Result<Self, LoadError> {
        let prefix = format!("model.layers.{layer}");
        let Some(moe) = moe_of(config, layer) else {
            return Ok(FeedForward::Dense(Mlp::load(loader, config, &format!("{prefix}.mlp"))?));
        };
        let names = moe_names(config.architecture);
        let block = format!("{prefix}.{}", names.block);
        let routing = match &moe.routing.scoring {
            Scoring::Softmax => moe.routing.clone(),
            Scoring::Sigmoid { .. } => {
                let correction_bias = loader.host_vector(&correction_bias(&block))?;
                Routing { scoring: Scoring::Sigmoid { correction_bias }, ..moe.routing.clone() }
            }
            Scoring::SqrtSoftplus { .. } => {
                let correction_bias = loader.host_vector(&correction_bias(&block))?;
                Routing { scoring: Scoring::SqrtSoftplus { correction_bias }, ..moe.routing.clone() }
            }
        };
        Ok(FeedForward::Experts {
            router: loader.linear(&format!("{block}.gate"))?,
            routed: loader.experts(&format!("{block}.experts"), names.projections, moe.num_experts, routing, None)?,
            shared: match moe.num_shared_experts {
                0 => None,
                _ => Some(Mlp::load(loader, config, &format!("{block}.shared_experts"))?),
            },
        })
    }

    pub(super) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        scratch: &mut FeedForwardScratch<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        match self {
            FeedForward::Dense(mlp) => mlp.forward(backend, x, adapters, allocated(&mut scratch.dense), out),
            FeedForward::Experts { router, routed, shared } => {
                let logits = allocated(&mut scratch.router_logits);
                backend.linear(x, router, logits)?;
                backend.fused_moe(x, logits, routed, out)?;
                if let Some(mlp) = shared {
                    let SharedExperts { scratch, out: shared_out } = allocated(&mut scratch.shared);
                    mlp.forward(backend, x, adapters, scratch, shared_out)?;
                    backend.add(out, shared_out)?;
                }
                Ok(())
            }
        }
    }
}

fn allocated<T>(scratch: &mut Option<T>) -> &mut T {
    scratch.as_mut().expect("allocated for the layers that the config names")
}

impl<B: Backend> FeedForwardScratch<B> {
    pub(super) fn new(backend: &B, config: &ModelConfig, sizes: Sizes) -> DeviceResult<Self> {
        let moe = config.moe.as_ref().filter(|moe| moe.layers.contains(&true));
        let width = |whole| backend.world().share(whole).len();
        let has_dense = moe.is_none_or(|moe| moe.layers.contains(&false));
        let shared = moe.filter(|moe| moe.num_shared_experts > 0).map(|moe| {
            Ok(SharedExperts {
                scratch: MlpScratch::new(backend, sizes.rows, width(moe.num_shared_experts * moe.intermediate_size))?,
                out: backend.tensor(sizes.rows, config.hidden_size)?,
            })
        });
        Ok(Self {
            dense: has_dense
                .then(|| MlpScratch::new(backend, sizes.rows, width(config.intermediate_size)))
                .transpose()?,
            router_logits: moe.map(|moe| backend.tensor(sizes.rows, moe.num_experts)).transpose()?,
            shared: shared.transpose()?,
        })
    }
}

/// `down(activation(gate(x)) ⊙ up(x))`.
pub(super) struct Mlp<B: Backend> {
    activation: Activation,
    gate: Projection<B>,
    up: Projection<B>,
    down: Projection<B>,
}

/// Activations of [`Mlp`], `[rows, width]` each.
struct MlpScratch<B: Backend> {
    gate: B::Tensor,
    up: B::Tensor,
    product: B::Tensor,
}

impl<B: Backend> Mlp<B> {
    fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, prefix: &str) -> Result<Self, LoadError> {
        let part = |name: &str| format!("{prefix}.{name}");
        let [gate, up] = if config.fused_projections {
            let width = config.intermediate_size;
            loader.split_projection(&part(FUSED_GATE_UP), [(width, Split::Outputs(width)); 2])?
        } else {
            [loader.projection(&part("gate_proj"))?, loader.projection(&part("up_proj"))?]
        };
        Ok(Self { activation: config.hidden_act, gate, up, down: loader.projection(&part("down_proj"))? })
    }

    fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        adapters: &mut StepAdapters<'_, B>,
        scratch: &mut MlpScratch<B>,
        out: &mut B::Tensor,
    ) -> DeviceResult<()> {
        let MlpScratch { gate, up, product } = scratch;
        let group = [(&self.gate, &mut *gate), (&self.up, &mut *up)];
        Projection::forward_gated(backend, self.activation, x, adapters, group, product)?;
        self.down.forward(backend, product, adapters, out)
    }
}

impl<B: Backend> MlpScratch<B> {
    fn new(backend: &B, rows: usize, width: usize) -> DeviceResult<Self> {
        let tensor = || backend.tensor(rows, width);
        Ok(Self { gate: tensor()?, up: tensor()?, product: tensor()? })
    }
}

"""Makes the goldens of `models/golden` that no published set covers: tiny checkpoints with random weights,
and what Hugging Face transformers computes from them.

    python -m venv v && v/bin/pip install torch transformers safetensors numpy
    v/bin/python models/golden/make/architectures.py

Run by hand; the outputs are committed, the versions recorded in each golden.json. The same versions give the
same checkpoints, and numbers that are equal within rounding.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).resolve().parent.parent
GREEDY = 48
CANDIDATES = 24
PROMPTS = {"one": 1, "short": 20, "mid": 100, "long": 160}
# Half of this must stay above the rounding errors of float32.
MARGIN = 0.02

COMMON = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "vocab_size": 256, "hidden_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
CASES = {
    "mixtral": (1, {
        **COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": 48,
        "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 40, "rope_theta": 1000000.0,
    }),
    "llama-bias": (4, {
        **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
        "intermediate_size": 96, "attention_bias": True, "mlp_bias": True,
    }),
    "deepseek-v2-bias": (5, {
        **COMMON, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_hidden_layers": 2,
        "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "kv_lora_rank": 24, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "moe_layer_freq": 1,
        "attention_bias": True,
    }),
    # Full attention below max_window_layers, a window above.
    "qwen2-window": (2, {
        **COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "intermediate_size": 96,
        "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
    }),
    # A dense layer for each of the two reasons, and expert weights that are not normalised.
    "qwen3-moe-sparse": (3, {
        **COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 4,
        "head_dim": 24, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 7,
        "num_experts_per_tok": 3, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False,
        "sliding_window": None, "use_sliding_window": False, "attention_bias": False,
    }),
}


class Weights:
    """Tensors under the names of published checkpoints; linear layers keep the size of their inputs times `gain`."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.tensors = {}

    def add(self, name, values):
        self.tensors[name] = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)

    def linear(self, name, rows, cols, gain=1.0, bias=False):
        self.add(f"{name}.weight", self.rng.standard_normal((rows, cols)) * gain / math.sqrt(cols))
        if bias:
            self.add(f"{name}.bias", self.rng.standard_normal(rows) * 0.5)

    def norm(self, name, cols, mean=1.0):
        self.add(f"{name}.weight", mean + self.rng.standard_normal(cols) * 0.25)


def weights(seed, config):
    w, kind, hidden = Weights(seed), config["model_type"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    w.add("model.embed_tokens.weight", w.rng.standard_normal((config["vocab_size"], hidden)))
    w.linear("lm_head", config["vocab_size"], hidden, 3.0)
    w.norm("model.norm", hidden)

    bias = config.get("attention_bias", False)

    def mlp(prefix, names, width, bias=False):
        gate, up, down = names
        w.linear(f"{prefix}.{gate}", width, hidden, bias=bias)
        w.linear(f"{prefix}.{up}", width, hidden, bias=bias)
        w.linear(f"{prefix}.{down}", hidden, width, 1.8, bias)

    def grouped_query_attention(prefix):
        for name, rows, gain in (("q_proj", heads, 1.5), ("k_proj", kv_heads, 1.5), ("v_proj", kv_heads, 1.0)):
            w.linear(f"{prefix}.{name}", rows * head_dim, hidden, gain, bias or kind == "qwen2")
        w.linear(f"{prefix}.o_proj", hidden, heads * head_dim, bias=bias)
        if kind == "qwen3_moe":
            w.norm(f"{prefix}.q_norm", head_dim, 1.4)
            w.norm(f"{prefix}.k_norm", head_dim, 1.4)

    def latent_attention(prefix):
        q_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]
        nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        w.linear(f"{prefix}.q_a_proj", q_rank, hidden, bias=bias)
        w.norm(f"{prefix}.q_a_layernorm", q_rank)
        w.linear(f"{prefix}.q_b_proj", heads * (nope + rope), q_rank, 1.5)
        w.linear(f"{prefix}.kv_a_proj_with_mqa", rank + rope, hidden, 1.5, bias)
        w.norm(f"{prefix}.kv_a_layernorm", rank)
        w.linear(f"{prefix}.kv_b_proj", heads * (nope + v), rank, 1.2)
        w.linear(f"{prefix}.o_proj", hidden, heads * v, bias=bias)

    named = ("gate_proj", "up_proj", "down_proj")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        w.norm(f"{prefix}.input_layernorm", hidden)
        w.norm(f"{prefix}.post_attention_layernorm", hidden)
        (latent_attention if kind == "deepseek_v2" else grouped_query_attention)(f"{prefix}.self_attn")
        if kind == "mixtral":
            w.linear(f"{prefix}.block_sparse_moe.gate", config["num_local_experts"], hidden, 2.0)
            for e in range(config["num_local_experts"]):
                mlp(f"{prefix}.block_sparse_moe.experts.{e}", ("w1", "w3", "w2"), config["intermediate_size"])
        elif kind == "qwen3_moe" and layer not in config["mlp_only_layers"] \
                and (layer + 1) % config["decoder_sparse_step"] == 0:
            w.linear(f"{prefix}.mlp.gate", config["num_experts"], hidden, 2.0)
            for e in range(config["num_experts"]):
                mlp(f"{prefix}.mlp.experts.{e}", named, config["moe_intermediate_size"])
        elif kind == "deepseek_v2" and layer >= config["first_k_dense_replace"]:
            w.linear(f"{prefix}.mlp.gate", config["n_routed_experts"], hidden, 2.0)
            for e in range(config["n_routed_experts"]):
                mlp(f"{prefix}.mlp.experts.{e}", named, config["moe_intermediate_size"])
            shared = config["n_shared_experts"] * config["moe_intermediate_size"]
            mlp(f"{prefix}.mlp.shared_experts", named, shared)
        else:
            mlp(f"{prefix}.mlp", named, config["intermediate_size"], config.get("mlp_bias", False))
    return w.tensors


class Wide(TorchFunctionMode):
    """Turns the casts to float32 inside the model code (norms, softmax, router) into casts to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def load(folder, dtype):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval().to(dtype)


def logits(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model, prompts):
    """For prompts of one length: the continuation of each by argmax, and the smallest distance of its best logit
    from the second."""
    ids, margins = torch.tensor(prompts), torch.full([len(prompts)], math.inf)
    for _ in range(GREEDY):
        best = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].topk(2)
        ids = torch.cat([ids, best.indices[:, :1]], 1)
        margins = torch.minimum(margins, best.values[:, 0] - best.values[:, 1])
    return list(zip(prompts, ids[:, len(prompts[0]):].tolist(), margins.tolist()))


def rounded(values):
    return [round(float(v), 7) for v in values]


def make(name, seed, config):
    folder = GOLDEN / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    save_file(weights(seed, config), folder / "model.safetensors", metadata={"format": "pt"})

    narrow, wide = load(folder, torch.float32), load(folder, torch.float64)
    rng = np.random.default_rng(seed + 1000)
    prompts, tensors, smallest = [], {}, math.inf
    for prompt_name, length in PROMPTS.items():
        candidates = [rng.integers(3, config["vocab_size"], length).tolist() for _ in range(CANDIDATES)]
        # A varied text whose choices are the clearest.
        ids, output, margin = max(greedy(narrow, candidates), key=lambda run: run[2] * min(1.0, len(set(run[1])) / 16))
        assert margin > MARGIN, (name, prompt_name, margin)
        smallest = min(smallest, margin)
        whole = ids + output[:-1]
        with Wide():
            exact = logits(wide, whole)
        assert exact.dtype == torch.float64
        error = float((logits(narrow, whole).double() - exact).abs().max())
        assert error < 2e-4, (name, prompt_name, error)  # a flipped routing decision would be far more
        logprobs = torch.log_softmax(exact, -1)
        generated = logprobs[len(ids) - 1:]
        assert generated.argmax(-1).tolist() == output
        prompt = {"name": prompt_name, "ids": ids, "greedy_ids": output,
                  "greedy_logprobs": rounded(generated[torch.arange(GREEDY), output])}
        tensors[f"{prompt_name}.last_logits.f64"] = exact[len(ids) - 1].clone()
        if prompt_name == "short":
            tensors["short.all_logits.f32"] = exact[:len(ids)].float().clone()
            top = logprobs[:len(ids)].topk(20)
            prompt["top20_logprobs"] = [[[int(i), round(float(v), 7)] for i, v in zip(*row)]
                                        for row in zip(top.indices, top.values)]
            prompt["prompt_logprobs"] = rounded(logprobs[torch.arange(len(ids) - 1), ids[1:]])
        prompts.append(prompt)
    golden = {
        "case": name, "model_type": config["model_type"], "stored_dtype": config["torch_dtype"],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)},
        "computed_in": "float64 from the stored weights, eager attention, batch 1",
        "min_margin": smallest, "prompts": prompts,
    }
    (folder / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    save_file(tensors, folder / "golden.safetensors")
    print(f"{name}: smallest margin {smallest:.3f}, last error of float32 {error:.1e}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    for case, (seed, config) in CASES.items():
        make(case, seed, config)

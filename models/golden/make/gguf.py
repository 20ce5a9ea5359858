"""Makes `models/golden/gguf/layouts.json`: how llama.cpp's converter lays out the golden checkpoints as GGUF.

    python -m venv v && v/bin/pip install gguf==0.19.0
    v/bin/python -P models/golden/make/gguf.py

Run by hand; the output is committed. Keys and names are those of the Python package gguf, which the converter
itself uses; which keys it writes and what it does to tensors follows its source (`conversion/*.py` of llama.cpp).
Tests write the files by this and compare what they compute with the checkpoints they came from.

Per case: `from`, the checkpoint; `config`, fields of its config to change first (what a GGUF file cannot say);
`keys`, metadata as [type, value]; `tensors`, as [name in the file, how it is made, name in the checkpoint]:

    plain         as it is
    permute:N     rows of each of N heads: those of its halves by turns
    plus-one      1 added
    stack:N       the tensors of N experts (`*` in the name) one after the other
    latent-key:HEADS:NOPE:V     per head the first NOPE of NOPE + V rows, transposed
    latent-value:HEADS:NOPE:V   per head the last V rows
"""

import json
import re
import struct
from pathlib import Path

import gguf

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "phi3": gguf.MODEL_ARCH.PHI3, "gemma2": gguf.MODEL_ARCH.GEMMA2, "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2, "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
}
VALUE_TYPES = {gguf.GGUFValueType.UINT32: "u32", gguf.GGUFValueType.FLOAT32: "f32", gguf.GGUFValueType.BOOL: "bool",
               gguf.GGUFValueType.STRING: "str"}


def names_of(folder):
    """The names of a checkpoint's tensors, from the headers of its files."""
    names = []
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            names += [name for name in json.loads(file.read(length)) if name != "__metadata__"]
    return sorted(names)


def keys(config, arch, joint):
    """What `set_gguf_parameters` of the converter's classes writes."""
    w = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    latent, heads = arch == gguf.MODEL_ARCH.DEEPSEEK2, config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(1 if latent and not joint else config["num_key_value_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_theta"])
    w.add_vocab_size(config["vocab_size"])
    w.add_eos_token_id(config["eos_token_id"])
    if config.get("head_dim"):
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    rope = config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(kind))
        w.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        w.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        w.add_sliding_window(config["sliding_window"])
    if config.get("sliding_window_pattern"):
        w.add_uint32(gguf.Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=w.arch), config["sliding_window_pattern"])
    if config.get("attn_logit_softcapping"):
        w.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch == gguf.MODEL_ARCH.PHI3:
        w.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    if arch == gguf.MODEL_ARCH.LLAMA or arch == gguf.MODEL_ARCH.PHI3:
        w.add_rope_dimension_count(head_dim)
    experts = [config[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if name in config]
    if experts:
        w.add_expert_count(experts[0])
        w.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        w.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if latent:
        nope, rank = config["qk_nope_head_dim"], config["kv_lora_rank"]
        key, rotary, value = nope + config["qk_rope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        w.add_expert_group_count(config["n_group"])
        w.add_expert_group_used_count(config["topk_group"])
        w.add_expert_gating_func(gguf.ExpertGatingFuncType[config["scoring_func"].upper()])
        w.add_leading_dense_block_count(config["first_k_dense_replace"])
        if config["q_lora_rank"] is not None:
            w.add_q_lora_rank(config["q_lora_rank"])
        w.add_kv_lora_rank(rank)
        w.add_key_length(key if joint else rank + rotary)
        w.add_value_length(value if joint else rank)
        if not joint:
            w.add_key_length_mla(key)
            w.add_value_length_mla(value)
        w.add_expert_shared_count(config["n_shared_experts"])
        w.add_expert_weights_scale(config["routed_scaling_factor"])
        if config["norm_topk_prob"]:
            w.add_expert_weights_norm(True)
        w.add_rope_dimension_count(rotary)
        if "mscale_all_dim" in rope:
            w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    (data,) = w.kv_data
    return {key: [VALUE_TYPES[value.type], value.value] for key, value in data.items()}


def tensors(config, arch, names, joint, apart):
    """What `modify_tensors` of the converter's classes makes of each tensor."""
    mapping = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    gemma = arch in (gguf.MODEL_ARCH.GEMMA2, gguf.MODEL_ARCH.GEMMA3)
    done = {}

    def add(source, how, name):
        stem, kind = name.rsplit(".", 1)
        target = mapping.get_name(stem)
        assert target is not None, name
        done[f"{target}.{kind}"] = [how, source]

    for name in names:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config["num_hidden_layers"]:
            continue  # multi-token prediction
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+\.weight)", name)
        if expert and apart:
            number, projection = expert[2], {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}[expert[3][:2]]
            done[f"blk.{layer[1]}.{projection}.{number}.weight"] = ["plain", name]
        elif expert:
            count = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
            add(f"{expert[1]}.*.{expert[3]}", f"stack:{count}", f"{expert[1]}.{expert[3]}")
        elif name.endswith("kv_b_proj.weight") and not joint:
            sizes = f"{heads}:{config['qk_nope_head_dim']}:{config['v_head_dim']}"
            add(name, f"latent-key:{sizes}", name.replace("kv_b_proj", "k_b_proj"))
            add(name, f"latent-value:{sizes}", name.replace("kv_b_proj", "v_b_proj"))
        elif name.endswith("e_score_correction_bias"):
            add(name, "plain", name.replace("correction_bias", "correction.bias"))
        elif arch == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
            add(name, f"permute:{heads}", name)
        elif arch == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
            add(name, f"permute:{kv_heads}", name)
        elif gemma and name.endswith("norm.weight"):
            add(name, "plus-one", name)
        else:
            add(name, "plain", name)
    return [[name, *rest] for name, rest in sorted(done.items())]


def case(source, joint=False, apart=False, **edits):
    folder = ROOT / source
    config = json.loads((folder / "config.json").read_text()) | edits
    arch = ARCHITECTURES[config["model_type"]]
    return {
        "from": source, "config": edits, "keys": keys(config, arch, joint),
        "tensors": tensors(config, arch, names_of(folder), joint, apart),
    }


CASES = {
    **{name: case(name) for name in (
        "llama-256", "llama-bias", "mistral-window", "mixtral", "qwen2-untied", "qwen3", "qwen3-moe", "phi3",
        "deepseek-v2", "deepseek-v2-lite", "deepseek-v3",
    )},
    "gemma2": case("gemma2", query_pre_attn_scalar=32),
    "gemma3": case("gemma3", query_pre_attn_scalar=32),
    # Layouts of older files.
    "deepseek-v2-lite, attn_kv_b": case("deepseek-v2-lite", joint=True),
    "deepseek-v3, attn_kv_b": case("deepseek-v3", joint=True),
    "mixtral, a tensor per expert": case("mixtral", apart=True),
}


def line(value):
    return json.dumps(value, ensure_ascii=False)


# A key or a tensor a line.
parts = []
for name, value in CASES.items():
    rows = [f'    {line(key)}: {line(entry)}' for key, entry in value["keys"].items()]
    listed = [f"    {line(entry)}" for entry in value["tensors"]]
    parts.append(
        f'{line(name)}: {{\n  "from": {line(value["from"])},\n  "config": {line(value["config"])},\n'
        + '  "keys": {\n' + ",\n".join(rows) + '\n  },\n  "tensors": [\n' + ",\n".join(listed) + "\n  ]\n}"
    )
(ROOT / "gguf" / "layouts.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")

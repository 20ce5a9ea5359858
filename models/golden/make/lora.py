"""Makes `models/golden/lora`: small random adapters for checkpoints of `models/golden`, written by peft, and what
peft's own forward, not a merged weight, computes with them.

    python -m venv v && v/bin/pip install torch transformers peft safetensors numpy
    v/bin/python models/golden/make/lora.py [CASE ...]

Run by hand; the outputs are committed, the versions recorded in each golden.json.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from architectures import CANDIDATES, GOLDEN, GREEDY, MARGIN, Wide, greedy, logits, rounded

OUT = GOLDEN / "lora"
PROMPTS = {"one": 1, "short": 20, "mid": 70}
# Per case: base checkpoint, seed, stored type, settings of peft.
CASES = {
    "llama-all": ("llama-rope3", 1, torch.float32, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    # By a regular expression, which stays one in the file, with a scale that is no power of two.
    "llama-rslora": ("llama-rope3", 2, torch.bfloat16, {
        "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": r".*\.(q_proj|v_proj|down_proj)"}),
    # In the upper layer only, in float16.
    "qwen2-upper": ("qwen2-tied", 3, torch.float16, {
        "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "o_proj"], "layers_to_transform": [1]}),
    "qwen3-patterns": ("qwen3", 4, torch.float32, {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 9, r".*\.v_proj": 3}}),
    "gemma2-mlp": ("gemma2", 7, torch.bfloat16, {
        "r": 2, "lora_alpha": 3, "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}),
    "mixtral-attention": ("mixtral", 8, torch.float16, {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "phi3-fused": ("phi3", 5, torch.bfloat16, {
        "r": 4, "lora_alpha": 4, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "deepseek-v3": ("deepseek-v3", 6, torch.bfloat16, {
        "r": 4, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"q_b_proj": 5, "o_proj": 2},
        "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "shared_experts.up_proj",
                           "shared_experts.down_proj", "layers.0.mlp.gate_proj"]}),
}


def base(name, dtype):
    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=dtype, attn_implementation="eager", experts_implementation="eager")
    if name.startswith("deepseek"):
        # By this name peft would take gate_proj, up_proj and down_proj of any layer for those of routed experts.
        model.config.model_type = "none"
    return model.eval().to(dtype)


def write_adapter(folder, name, seed, dtype, settings):
    """An adapter as peft saves it, with random A and B in place of trained ones."""
    model = get_peft_model(base(name, torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings))
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # Not the path of this machine.
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    file = folder / "adapter_model.safetensors"
    rng = np.random.default_rng(seed)
    tensors = {}
    for key, tensor in sorted(load_file(file).items()):
        # A keeps the size of its inputs, B gives a quarter of it.
        scale = tensor.shape[1] ** -0.5 * (0.25 if ".lora_B." in key else 1.0)
        tensors[key] = torch.tensor(rng.standard_normal(tuple(tensor.shape)) * scale).to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})


def adapted(folder, name, dtype):
    model = PeftModel.from_pretrained(base(name, dtype), folder, autocast_adapter_dtype=False)
    return model.eval().to(dtype)


def make(case, name, seed, dtype, settings):
    folder = OUT / case
    write_adapter(folder, name, seed, dtype, settings)
    narrow, wide, bare = adapted(folder, name, torch.float32), adapted(folder, name, torch.float64), \
        base(name, torch.float32)
    vocab = narrow.config.vocab_size
    rng = np.random.default_rng(seed + 1000)
    prompts, tensors, smallest = [], {}, float("inf")
    for prompt_name, length in PROMPTS.items():
        candidates = [rng.integers(3, vocab, length).tolist() for _ in range(CANDIDATES)]
        # A varied text whose choices are the clearest.
        ids, output, margin = max(greedy(narrow, candidates), key=lambda run: run[2] * min(1.0, len(set(run[1])) / 16))
        assert margin > MARGIN, (case, prompt_name, margin)
        smallest = min(smallest, margin)
        whole = ids + output[:-1]
        with Wide():
            exact = logits(wide, whole)
        assert exact.dtype == torch.float64
        error = float((logits(narrow, whole).double() - exact).abs().max())
        assert error < 2e-4, (case, prompt_name, error)
        change = float((logits(bare, ids)[-1].double() - exact[len(ids) - 1]).abs().max())
        assert change > 0.1, (case, prompt_name, change)  # an adapter that were ignored would show
        logprobs = torch.log_softmax(exact, -1)[len(ids) - 1:]
        assert logprobs.argmax(-1).tolist() == output
        prompts.append({"name": prompt_name, "ids": ids, "greedy_ids": output,
                        "greedy_logprobs": rounded(logprobs[torch.arange(GREEDY), output])})
        tensors[f"{prompt_name}.last_logits.f64"] = exact[len(ids) - 1].clone()
    golden = {
        "case": case, "base": name, "stored_dtype": str(dtype).removeprefix("torch."),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, np)},
        "computed_in": "float64 from the stored weights, adapter not merged, eager attention, batch 1",
        "min_margin": smallest, "prompts": prompts,
    }
    (folder / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    save_file(tensors, folder / "golden.safetensors")
    print(f"{case}: smallest margin {smallest:.3f}, last change of logits {change:.2f}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    for case in sys.argv[1:] or CASES:
        make(case, *CASES[case])

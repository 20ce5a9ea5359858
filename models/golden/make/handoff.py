"""Makes `models/golden/handoff`: a tiny signed bundle with random weights.

    python -m venv v && v/bin/pip install torch transformers safetensors numpy cryptography
    v/bin/python models/golden/make/handoff.py

Run by hand. The same versions give the same bundle, but each run signs with a new key: `trusted.pub` is its public half,
`other.pub` belongs to a key that signed nothing, and both secret keys are thrown away.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from architectures import COMMON, GOLDEN, weights

EXPORT = GOLDEN.parent / "export" / "baton_export.py"
OUT = GOLDEN / "handoff"
CONFIG = {
    **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 506, "eos_token_id": 510,
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 512,
}
USER = {"role": "user", "content": "What is the weather in Oslo?"}
WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "In °C \"now\".",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}}
PROMPTS = [
    {"name": "chat", "messages": [USER]},
    {"name": "system", "messages": [{"role": "system", "content": "Be brief."}, USER]},
    {"name": "date", "messages": [USER], "template_kwargs": {"date_string": "1 Jan 2026"}},
    {"name": "tools", "messages": [USER], "tools": [WEATHER]},
    {"name": "turns", "messages": [USER, {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "And in Rome?"}]},
    {"name": "text", "text": "Plain text,  with é and\n newlines."},
    {"name": "ids", "ids": [506, 17, 300, 42, 42, 99], "max_new_tokens": 24},
]


def main():
    folder = OUT / "tiny"
    shutil.rmtree(OUT, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    ends = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends) + "\n")
    save_file(weights(16, CONFIG), folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / "tokenizers" / "llama3" / name, folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in PROMPTS))
    with tempfile.TemporaryDirectory() as keys:
        for name in ("trusted", "other"):
            subprocess.run([sys.executable, EXPORT, "keygen", Path(keys, name)], check=True)
            shutil.copyfile(Path(keys, f"{name}.pub"), OUT / f"{name}.pub")
        subprocess.run([
            sys.executable, EXPORT, folder, "--prompts", folder / "prompts.jsonl", "--out", folder, "--license", "Apache-2.0",
            "--max-new-tokens", "16", "--threads", "1", "--sign", Path(keys, "trusted.key")], check=True)


if __name__ == "__main__":
    main()

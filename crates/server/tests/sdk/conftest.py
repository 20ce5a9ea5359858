"""The server that all suites share, and what they ask it.

BATON names the binary (default: target/release/baton). A suite's packages are in the requirements.txt beside it.
"""

import contextlib
import json
import os
import pathlib
import random
import socket
import struct
import subprocess
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[4]
KEY = "sdk-test-key"
ADMIN_KEY = "sdk-test-admin-key"
SUM = [{"role": "user", "content": "What is 347 + 286?"}]
# The model is so sure of its sums that even hot sampling repeats them; of this it is not sure.
VAGUE = [{"role": "user", "content": "hm"}]
# Too big to do without the tool, so the model calls it.
PRODUCT = [{"role": "user", "content": "what is the product of 57258 and 6278"}]
PRODUCT_CALL = {"expression": "57258*6278"}
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
CALCULATOR = {
    "type": "function",
    "function": {"name": "calculator", "description": "Calculate the value of an expression.", "parameters": PARAMETERS},
}


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """A small random LoRA adapter for the output projections of the bundled model's attention."""
    folder, rng, rank = tmp_path_factory.mktemp("adapter"), random.Random(1), 2
    config = json.loads((ROOT / "models/abacus/config.json").read_text())
    hidden, width = config["hidden_size"], config["num_attention_heads"] * config["v_head_dim"]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    header, data = {}, b""
    for layer in range(config["num_hidden_layers"]):
        for side, shape in (("A", [rank, width]), ("B", [hidden, rank])):
            values = [rng.gauss(0, 0.1) for _ in range(shape[0] * shape[1])]
            name = f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{side}.weight"
            span = [len(data), len(data) + 4 * len(values)]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": span}
            data += struct.pack(f"<{len(values)}f", *values)
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@contextlib.contextmanager
def served(*flags):
    """The base of a server of the bundled model with these flags, without /v1; it must end well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    binary = os.environ.get("BATON", str(ROOT / "target/release/baton"))
    command = [binary, "serve", "--port", str(port), "--api-key", KEY, "--admin-api-key", ADMIN_KEY, *flags]
    server = subprocess.Popen([*command, "--log-level", "warn"], cwd=ROOT)
    try:
        for _ in range(6000):
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
                break
            except OSError:
                time.sleep(0.01)
        else:
            raise AssertionError("not ready after 60 s")
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        assert server.wait(timeout=40) == 0, "SIGTERM must end in exit code 0"
    finally:
        server.kill()


@pytest.fixture(scope="session")
def url(adapter, tmp_path_factory):
    """The server that the suites share, with an adapter and a place to keep things in."""
    adapters = ["--enable-lora", "--lora-modules", f"tuned={adapter}"]
    with served(*adapters, "--state-dir", str(tmp_path_factory.mktemp("state"))) as url:
        yield url


@pytest.fixture(scope="session")
def client(url):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

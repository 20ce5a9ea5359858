"""Makes `models/golden/quantized`: one tiny random Llama in the quantised layouts that checkpoints come in.

    python -m venv v && v/bin/pip install numpy
    v/bin/python models/golden/make/quantized.py

Run by hand, and `libraries.py` after it; the outputs are committed. numpy alone is used: each layout is written here from its
published description, and the libraries judge whether that is right. Matrices are
quantised first, to codes, zero points and scales; `values/<name>.safetensors` holds in float32 what these
mean, computed before anything is packed, and several layouts share one such file.
"""

import json
import struct
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "quantized"
HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, GROUP = 64, 96, 48, 4, 2, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": VOCAB,
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "eos_token_id": 2,
}
HEAD_DIM = HIDDEN // HEADS
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
TYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64"}
rng = np.random.default_rng(3)
# An outlier per row now and then, and a mean off zero, so that zero points and groups differ.
WEIGHTS = {
    f"model.layers.0.{name}": (rng.standard_normal(shape) * 0.2 + 0.03 + (rng.random(shape) < 0.01)).astype(np.float32)
    for name, shape in SHAPES.items()
}
PLAIN = {
    "model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16),
    "model.norm.weight": (1 + rng.standard_normal(HIDDEN) * 0.1).astype(np.float16),
    "model.layers.0.input_layernorm.weight": (1 + rng.standard_normal(HIDDEN) * 0.1).astype(np.float16),
    "model.layers.0.post_attention_layernorm.weight": (1 + rng.standard_normal(HIDDEN) * 0.1).astype(np.float16),
    "lm_head.weight": (rng.standard_normal((VOCAB, HIDDEN)) * 0.3).astype(np.float16),
}


def save(path, tensors):
    """Tensors by name: arrays, or (safetensors dtype, array of bytes) for types numpy lacks."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        dtype, array = tensor if isinstance(tensor, tuple) else (TYPES[str(tensor.dtype)], tensor)
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def values(name, by_module):
    save(OUT / "values" / f"{name}.safetensors", {f"{m}.weight": v.astype(np.float32) for m, v in by_module.items()})


def case(name, expected, quantization, tensors):
    folder = OUT / name
    save(folder / "model.safetensors", {**PLAIN, **tensors})
    config = {**CONFIG, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "values").write_text(expected + "\n")


def integers(weight, bits, group_of, symmetric):
    """Codes 0 .. 2^bits - 1 [out, in], zero points and float16 scales [out, groups]."""
    groups, top = group_of.max() + 1, 2**bits - 1
    codes = np.zeros(weight.shape, np.int64)
    zeros, scales = np.zeros((len(weight), groups), np.int64), np.zeros((len(weight), groups), np.float16)
    for g in range(groups):
        part = weight[:, group_of == g]
        if symmetric:
            scale = (np.abs(part).max(1) / (2 ** (bits - 1) - 1)).astype(np.float16)
            zero = np.full(len(weight), 2 ** (bits - 1))
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = ((high - low) / top).astype(np.float16)
            zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, top).astype(np.int64)
        q = np.rint(part / scale.astype(np.float32)[:, None]) + zero[:, None]
        codes[:, group_of == g] = np.clip(q, 0, top)
        zeros[:, g], scales[:, g] = zero, scale
    return codes, zeros, scales


def meant(codes, zeros, scales, group_of):
    return (codes - zeros[:, group_of]).astype(np.float32) * scales.astype(np.float32)[:, group_of]


def pack(array, bits, axis, order=None):
    """Unsigned integers along an axis into int32 words, the first lowest, the last word padded."""
    per_word = 32 // bits
    array = np.moveaxis(array, axis, -1).astype(np.uint64)
    array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % per_word)])
    array = array.reshape(*array.shape[:-1], -1, per_word)
    order = range(per_word) if order is None else order
    words = sum(array[..., element] << np.uint64(bits * place) for place, element in enumerate(order))
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


def gptq(codes, zeros, scales, group_of, bits, offset):
    return {
        "qweight": pack(codes.T, bits, 0), "qzeros": pack((zeros.T - offset) % 2**bits, bits, 1), "scales": scales.T,
        "g_idx": group_of.astype(np.int32),
    }


def awq(codes, zeros, scales, group_of):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": pack(codes.T, 4, 1, order), "qzeros": pack(zeros.T, 4, 1, order), "scales": scales.T}


def packed(codes, zeros, scales, group_of, bits, symmetric, ordered):
    tensors = {
        "weight_packed": pack(codes, bits, 1), "weight_scale": scales,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(zeros, bits, 0)
    if ordered:
        tensors["weight_g_idx"] = group_of.astype(np.int32)
    return tensors


def in_order(cols):
    return np.arange(cols) // GROUP


def shuffled(cols):
    return np.random.default_rng(cols).permutation(in_order(cols))


def one_group(cols):
    return np.zeros(cols, np.int64)


def named(make):
    return {f"{module}.{suffix}": t for module in WEIGHTS for suffix, t in make(module).items()}


def compressed(fmt, weights, inputs=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": group},
    }


def integer_cases():
    for name, bits, groups, symmetric in [
        ("int4-groups", 4, in_order, False), ("int4-shuffled", 4, shuffled, False), ("int4-channel", 4, one_group, True),
        ("int8-groups", 8, in_order, False), ("int8-channel", 8, one_group, True),
        ("int8-channel-zeros", 8, one_group, False),
    ]:
        group_of = {m: groups(w.shape[1]) for m, w in WEIGHTS.items()}
        q = {m: integers(w, bits, group_of[m], symmetric) for m, w in WEIGHTS.items()}
        values(name, {m: meant(*q[m], group_of[m]) for m in q})
        arguments = lambda m: (*q[m], group_of[m])
        args = {"num_bits": bits, "type": "int", "symmetric": symmetric}
        grouped, shuffle = groups is not one_group, groups is shuffled
        args |= {"strategy": "group", "group_size": GROUP} if grouped else {"strategy": "channel"}
        if shuffle:
            args["actorder"] = "group"
        case(f"packed-{name}", name, compressed("pack-quantized", args),
             named(lambda m: packed(*arguments(m), bits, symmetric, shuffle)))
        own = {"quant_method": "gptq", "bits": bits, "group_size": GROUP if grouped else -1, "desc_act": shuffle,
               "sym": symmetric, "lm_head": False}
        case(f"gptq-{name}", name, own, named(lambda m: gptq(*arguments(m), bits, 1)))
        if name == "int4-groups":
            case(f"gptq-v2-{name}", name, {**own, "checkpoint_format": "gptq_v2"},
                 named(lambda m: gptq(*arguments(m), bits, 0)))
            case(f"awq-{name}", name, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
                 "version": "gemm", "modules_to_not_convert": None}, named(lambda m: awq(*arguments(m))))
        if name.startswith("int8-channel"):
            inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}

            def signed(m):
                codes, zeros, scales, _ = arguments(m)
                tensors = {"weight": (codes - 128).astype(np.int8), "weight_scale": scales}
                return tensors if symmetric else {**tensors, "weight_zero_point": (zeros - 128).astype(np.int8)}
            case(f"int-{name}", name, compressed("int-quantized", args, inputs), named(signed))


def minifloat(exponent_bits, mantissa_bits, bias):
    """Values of all codes as if every one were finite."""
    def value(code):
        sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
        exponent, mantissa = code >> mantissa_bits & (2**exponent_bits - 1), code & (2**mantissa_bits - 1)
        if exponent == 0:
            return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
        return sign * (2**mantissa_bits + mantissa) * 2.0 ** (exponent - bias - mantissa_bits)
    return np.array([value(code) for code in range(2 ** (1 + exponent_bits + mantissa_bits))], np.float32)


def nearest(x, table, usable):
    """Codes of the nearest values; of the two zeros the first."""
    return usable[np.abs(x[..., None] - table[usable]).argmin(-1)].astype(np.uint8)


def float_cases():
    e4m3, e5m2 = minifloat(4, 3, 7), minifloat(5, 2, 15)
    finite = {"e4m3": np.array([c for c in range(256) if c & 127 != 127]),
              "e5m2": np.array([c for c in range(256) if c >> 2 & 31 != 31])}
    for name, kind, per_row in [("fp8-tensor", "e4m3", False), ("fp8-channel", "e4m3", True), ("fp8-e5m2", "e5m2", False)]:
        table = e4m3 if kind == "e4m3" else e5m2
        codes, scales = {}, {}
        for m, w in WEIGHTS.items():
            largest = np.abs(w).max(1, keepdims=True) if per_row else np.abs(w).max().reshape(1)
            scales[m] = (largest / table[finite[kind]].max()).astype(np.float32)
            codes[m] = nearest(w / scales[m], table, finite[kind])
        values(name, {m: table[codes[m]] * scales[m] for m in codes})
        dtype = "F8_E4M3" if kind == "e4m3" else "F8_E5M2"
        tensors = named(lambda m: {"weight": (dtype, codes[m]), "weight_scale": scales[m]})
        if not per_row:
            case(name, name, {"quant_method": "fp8", "fmt": kind, "activation_scheme": "dynamic"}, tensors)
        if kind == "e4m3":
            args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel" if per_row else "tensor"}
            inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
            case(f"float-{name}", name, compressed("float-quantized", args, inputs), tensors)
    e2m1, codes, exponents = minifloat(2, 1, 1), {}, {}
    for m, w in WEIGHTS.items():
        blocks = w.reshape(len(w), -1, 32)
        exponents[m] = (np.floor(np.log2(np.abs(blocks).max(-1))) - 2).astype(np.int64)
        codes[m] = nearest(blocks / 2.0 ** exponents[m][..., None], e2m1, np.arange(16))
    values("mxfp4", {m: (e2m1[codes[m]] * (2.0 ** exponents[m][..., None]).astype(np.float32)).reshape(WEIGHTS[m].shape)
                     for m in codes})

    def microscaled(m):
        flat = codes[m].reshape(len(codes[m]), -1)
        return {"weight_packed": flat[:, ::2] | flat[:, 1::2] << 4, "weight_scale": (exponents[m] + 127).astype(np.uint8)}
    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    case("mxfp4", "mxfp4", compressed("mxfp4-pack-quantized", args), named(microscaled))


integer_cases()
float_cases()
(OUT / "versions.json").write_text(json.dumps({"numpy": np.__version__}) + "\n")

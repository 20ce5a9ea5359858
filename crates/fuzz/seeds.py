"""Writes the seeds of crates/fuzz/corpus: one small valid input of every form that a target reads.

    python -m venv v && v/bin/pip install numpy
    v/bin/python crates/fuzz/seeds.py

Run by hand; the outputs are committed, beside inputs that a run found.
"""

import base64
import contextlib
import hashlib
import json
import struct
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent.parent / "models"
SEPARATOR = b"\n\x1e\n"


def seed(target, name, *parts):
    path = HERE / "corpus" / target / f"seed-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(SEPARATOR.join(p if isinstance(p, bytes) else p.encode() for p in parts))


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def shard(tensors):
    """A header, then data, as the target takes them apart: {name: (dtype, shape, bytes)}."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return compact(header).encode() + b"\n" + data


def split_file(raw):
    (size,) = struct.unpack_from("<Q", raw)
    return raw[8 : 8 + size] + b"\n" + raw[8 + size :]


def checkpoints():
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 6,
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 2,
    }
    shapes = {"model.embed_tokens.weight": [6, 8], "model.norm.weight": [8]}
    for name, shape in [
        ("input_layernorm", [8]), ("post_attention_layernorm", [8]), ("self_attn.q_proj", [8, 8]),
        ("self_attn.k_proj", [4, 8]), ("self_attn.v_proj", [4, 8]), ("self_attn.o_proj", [8, 8]),
        ("mlp.gate_proj", [12, 8]), ("mlp.up_proj", [12, 8]), ("mlp.down_proj", [8, 12]),
    ]:
        shapes[f"model.layers.0.{name}.weight"] = shape
    def size(shape):
        return shape[0] * (shape[1] if len(shape) > 1 else 1)
    tensors = {name: ("BF16", shape, b"\x80\x3f" * size(shape)) for name, shape in shapes.items()}
    seed("safetensors_index", "single", compact(config), "", shard(tensors))
    names = sorted(tensors)
    halves = [names[:5], names[5:]]
    index = {"metadata": {}, "weight_map": {n: f"{'ab'[n in halves[1]]}.safetensors" for n in names}}
    seed("safetensors_index", "shards", compact(config), compact(index), *[shard({n: tensors[n] for n in h}) for h in halves])
    raw = shard(tensors).split(b"\n", 1)
    seed("safetensors_index", "raw", compact(config), "", struct.pack("<Q", len(raw[0])) + raw[0] + raw[1])

    # The quantised layouts, from their own maker at half its size.
    source = (MODELS / "golden/make/quantized.py").read_text()
    source = source.replace("= 64, 96, 48, 4, 2, 32", "= 32, 32, 4, 2, 1, 16")
    with tempfile.TemporaryDirectory() as folder:
        space = {"__name__": "__main__", "__file__": f"{folder}/make/quantized.py"}
        with contextlib.redirect_stdout(None):
            exec(compile(source, "quantized.py", "exec"), space)
        for name in ["awq-int4-groups", "float-fp8-channel", "fp8-tensor", "gptq-int4-shuffled", "gptq-int8-groups",
                     "int-int8-channel-zeros", "mxfp4", "packed-int4-shuffled"]:
            case = Path(folder) / "quantized" / name
            config = compact(json.loads((case / "config.json").read_text()))
            seed("safetensors_index", name, config, "", split_file((case / "model.safetensors").read_bytes()))


def gguf():
    def text(s):
        return struct.pack("<Q", len(s.encode())) + s.encode()

    def key(name, kind, raw):
        return text(name) + struct.pack("<I", kind) + raw

    def array(kind, items):
        return struct.pack("<IQ", kind, len(items)) + b"".join(items)

    # number, elements and bytes of a block
    types = {"F32": (0, 1, 4), "Q4_0": (2, 32, 18), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "IQ4_NL": (20, 32, 18)}
    for matrix in ["Q8_0", "Q4_0", "Q5_1", "IQ4_NL"]:
        arch, width = "llama", 32
        keys = [key("general.architecture", 8, text(arch))]
        for k, v in [("context_length", 64), ("embedding_length", width), ("block_count", 1),
                     ("feed_forward_length", 32), ("attention.head_count", 2)]:
            keys.append(key(f"{arch}.{k}", 4, struct.pack("<I", v)))
        keys.append(key(f"{arch}.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)))
        keys.append(key("tokenizer.ggml.model", 8, text("llama")))
        pieces = ["<unk>", "<s>", "▁", "a"]
        keys.append(key("tokenizer.ggml.tokens", 9, array(8, [text(p) for p in pieces])))
        keys.append(key("tokenizer.ggml.scores", 9, array(6, [struct.pack("<f", -i) for i in range(4)])))
        keys.append(key("tokenizer.ggml.token_type", 9, array(5, [struct.pack("<i", t) for t in [2, 3, 1, 1]])))
        keys.append(key("tokenizer.ggml.add_bos_token", 7, b"\1"))
        tensors, data = [], b""
        shapes = [("token_embd", [width, 4]), ("output_norm", [width]), ("blk.0.attn_norm", [width]),
                  ("blk.0.ffn_norm", [width]), ("blk.0.ffn_down", [32, width])]
        shapes += [(f"blk.0.attn_{n}", [width, width]) for n in ["q", "k", "v", "output"]]
        shapes += [(f"blk.0.ffn_{n}", [width, 32]) for n in ["gate", "up"]]
        for tensor, dims in shapes:
            number, block, size = types[matrix if len(dims) == 2 else "F32"]
            elements = dims[0] * (dims[1] if len(dims) == 2 else 1)
            tensors.append(text(f"{tensor}.weight") + struct.pack("<I", len(dims))
                           + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", number, len(data)))
            data += b"\x01\x20" * (elements // block * size // 2)
            data += bytes(-len(data) % 32)
        raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
        seed("gguf", matrix.lower(), raw + bytes(-len(raw) % 32) + data)


def configs():
    for case in sorted((MODELS / "golden").glob("*/config.json")):
        generation = case.parent / "generation_config.json"
        parts = [compact(json.loads(p.read_text())) for p in [case, generation] if p.exists()]
        seed("config", case.parent.name, *parts)


def templates():
    for folder in sorted((MODELS / "golden/tokenizers").iterdir()):
        if (folder / "chat_template.jinja").exists():
            seed("template", folder.name, (folder / "chat_template.jinja").read_text())
        elif (folder / "tokenizer_config.json").exists():
            template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
            if template:
                seed("template", folder.name, template)


def tokenizers():
    added = [{"id": 9, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False}]
    config = compact({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True})
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = {c: i for i, c in enumerate(["H", "e", "l", "o", "Ġ", "ll", "lo", "He", "llo", "<s>"])}
    merges = [["l", "l"], ["l", "o"], ["H", "e"], ["ll", "o"]]
    bpe = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": False, "byte_fallback": False}
    forms = {
        "bytes": {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
                  "post_processor": level, "decoder": level, "model": bpe},
        "fallback": {
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "▁a": 4, "<s>": 9},
                      "merges": ["▁ a"], "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}},
        "unigram": {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"},
                           {"type": "Strip", "strip_left": False, "strip_right": True}]},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                      "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["▁hello", -3.5]]}},
        "pieces": {"normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                                  "strip_accents": None, "lowercase": True},
                   "pre_tokenizer": {"type": "BertPreTokenizer"},
                   "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
                   "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                             "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "hello": 1, "##o": 2}}},
    }
    for name, form in forms.items():
        tokenizer = {"version": "1.0", "added_tokens": added if name in ("bytes", "fallback") else [], **form}
        seed("tokenizer", name, config, "j" + compact(tokenizer))
    pieces = ["<unk>", "<s>", "<0x0A>", "▁", "a", "▁a", "<x>"]
    spm = {"model": "llama", "tokens": pieces, "scores": [0, 0, 0, -1, -2, -3, 0], "token_types": [2, 3, 6, 1, 1, 1, 4],
           "bos": 1, "eos": 1, "add_bos": True, "add_space_prefix": True, "chat_template": "{{ messages }}"}
    seed("tokenizer", "gguf-spm", "", "g" + compact(spm))
    for pre in ["llama-bpe", "qwen2", "deepseek-v3", "deepseek-llm", "default"]:
        tokens = list(vocab)
        gpt2 = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_types": [1] * 9 + [3],
                "merges": [" ".join(m) for m in merges], "bos": 9}
        seed("tokenizer", f"gguf-{pre}", "", "g" + compact(gpt2))


def conversions():
    def varint(n):
        n %= 1 << 64
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(tag, value):
        """One field of a protocol buffer: a number, a float, or bytes."""
        if isinstance(value, float):
            return varint(tag << 3 | 5) + struct.pack("<f", value)
        if isinstance(value, int):
            return varint(tag << 3) + varint(value)
        return varint(tag << 3 | 2) + varint(len(value)) + value

    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x0A>": 6, "<x>": 4}
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<x>", "▁", "H", "e", "l", "o", "ll", "▁H", "▁He", "llo"]
    def model(model_type, charsmap):
        out = b""
        for i, piece in enumerate(pieces):
            out += field(1, field(1, piece.encode()) + field(2, float(-i)) + field(3, kinds.get(piece, 1)))
        out += field(2, field(3, model_type) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2) + field(43, -1))
        return out + field(3, field(2, charsmap) + field(3, 1) + field(4, model_type == 1))
    # A trie without a leaf, and no replacements.
    charsmap = struct.pack("<I", 8) + struct.pack("<2I", 0x400, 0) + b"\0"
    added = {"14": {"content": "<|x|>", "special": True}}
    llama = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "added_tokens_decoder": added}
    seed("tokenizer", "sentencepiece-bpe", compact(llama), b"s" + model(2, b""))
    seed("tokenizer", "sentencepiece-unigram", "", b"s" + model(1, charsmap))
    ranks = [bytes([i]) for i in range(256)] + [b"ll", b"He", b"llo", b" w"]
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    for file, config in [("qwen.tiktoken", ""), ("tiktoken.model", compact({"tokenizer_class": "TikTokenTokenizer"})),
                         ("o200k_base.tiktoken", "")]:
        seed("tokenizer", file, config, "t" + file + "\n" + lines)


def manifests():
    signed = HERE.parent / "handoff/tests/data"
    seed("manifest", "signed", *[(signed / name).read_bytes() for name in
                                 ["signed/handoff.json", "signed/handoff.json.minisig", "first.pub"]], b"")
    page = (MODELS / "HANDOFF.md").read_text()
    seed("manifest", "page", page.split("```json\n")[1].split("```")[0], b"", b"", b"")

    def sha256(raw):
        return hashlib.sha256(raw).hexdigest()
    raw = {"a": ("BF16", [2, 3], bytes(range(12))), "b": ("BF16", [3, 2], bytes(range(12, 24)))}
    head, data = shard(raw).split(b"\n", 1)
    weights = struct.pack("<Q", len(head)) + head + data
    # Swapped, so that differences have to be explained.
    tensors = {"a": ("BF16", [3, 2], raw["b"][2]), "b": ("BF16", [2, 3], raw["a"][2])}
    tensors = {name: {"dtype": dtype, "shape": shape, "sha256": sha256(raw)} for name, (dtype, shape, raw) in tensors.items()}
    files = {"model.safetensors": {"bytes": len(weights), "sha256": sha256(weights)}}
    lines = "".join(f"{file['sha256']}  {name}\n" for name, file in sorted(files.items()))
    case = {"name": "x", "chat": {"messages": [{"role": "user", "content": ""}], "tools": [{}], "template_kwargs": {"t": 1}},
            "prompt": "", "prompt_ids": [1, 2], "greedy_ids": [3], "margins": [0.5], "logprobs": [-1, -2],
            "top": {"0": [[1, -1.5], [2, -2]], "1": [[3, -0.5], [4, -1.5]]}}
    bounds = {"max_abs_logprob_diff": 1, "mean_abs_logprob_diff": 1, "p99_abs_logprob_diff": 1, "kl": 1, "top1_agreement": 1, "perplexity_ratio": 1}
    seed("manifest", "tensors", compact({
        "format": "baton-handoff", "version": 1, "model": {"name": "x", "license": "y", "lineage": {"a": [{"b": None}]}},
        "generation": sha256(lines.encode()), "files": files, "tensors": tensors,
        "trained": {"dtype": "bfloat16", "quantization": "fp8", "framework": "z", "commit": None},
        "computed": {"dtype": "float32", "device": "cpu"}, "requires": ["fp8", "latent_attention"],
        "tolerances": {"float32": bounds, "int4": bounds}, "cases": [case],
    }), b"", b"", weights)


def grammars():
    schema = {
        "type": "object", "required": ["n"], "additionalProperties": False, "$defs": {"t": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "properties": {"n": {"type": "integer", "minimum": -3, "multipleOf": 2}, "s": {"type": "string", "pattern": "^a+$", "maxLength": 4},
                       "l": {"type": "array", "prefixItems": [{"enum": ["x", 1, None]}], "items": {"const": {"k": [True]}}, "maxItems": 3},
                       "t": {"$ref": "#/$defs/t"}, "d": {"type": "string", "format": "date"}},
    }
    seed("grammar", "schema", "s" + compact(schema))
    seed("grammar", "regex", r"r^([a-f]{2,3}|\d+(\.\d*)?)-\p{Greek}[^\]x]$")
    seed("grammar", "lark", 'gstart: "a" rule | TOKEN\nrule: /x+/ [start] ("," rule)~1..2\nTOKEN: "b".."d" /[0-9]/\n%ignore / /\n')
    seed("grammar", "gbnf", 'groot ::= "{" ws (pair ("," ws pair)*)? "}" # all\npair ::= [a-z]+ ":" ws root | \'\\x41\'{1,2}\nws ::= [ \\t\\n]*\n')


def requests():
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    def send(route, name, body, headers=(trace, "an-id")):
        letter = "abcdefghij"[["chat", "completions", "responses", "messages", "count", "render", "tokenize", "detokenize", "batches", "rerank"].index(route)]
        seed("request", f"{route}-{name}", letter + headers[0], headers[1], compact(body))
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}
    text = [{"type": "text", "text": "a"}]
    user = {"role": "user", "content": "Why?", "name": "n"}
    send("chat", "plain", {"model": "tiny", "messages": [user], "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 1, "n": 2,
                           "logit_bias": {"5": -1}, "logprobs": True, "top_logprobs": 3, "presence_penalty": 1, "frequency_penalty": -1, "user": "u",
                           "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "metadata": {"a": "b"}, "cache_salt": "s", "priority": 1})
    send("chat", "stream", {"messages": [{"role": "system", "content": text}, user, {"role": "assistant", "content": "Yes", "reasoning_content": "r"}, user],
                            "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "max_completion_tokens": 5, "deadline_ms": 5000})
    send("chat", "tools", {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "2"}],
                           "tools": [{"type": "function", "function": function}], "tool_choice": "none", "parallel_tool_calls": False, "max_tokens": 3})
    send("chat", "form", {"messages": [user], "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {
        "type": "object", "properties": {"a": {"enum": [1, "b", None]}}, "required": ["a"], "additionalProperties": False}}}, "max_tokens": 9,
        "chat_template_kwargs": {"enable_thinking": False}})
    send("completions", "text", {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 2, "best_of": 2, "suffix": None, "stop": "x"}, ("", ""))
    send("completions", "ids", {"prompt": [[5, 6], [7]], "max_tokens": 2, "stop_token_ids": [9], "bad_words": ["q"], "allowed_token_ids": [5, 6],
                                "prompt_logprobs": 1, "return_token_ids": True, "structured_outputs": {"regex": "a+"}})
    send("responses", "text", {"input": "Why?", "instructions": "Be brief.", "max_output_tokens": 5, "store": False, "temperature": 0})
    send("responses", "items", {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Why?"}]},
                                          {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                                          {"type": "function_call_output", "call_id": "c", "output": "2"}], "stream": True, "max_output_tokens": 5,
                                "store": False, "tools": [{"type": "function", **function}], "tool_choice": "none", "reasoning": {"effort": "low"}})
    anthropic = {"max_tokens": 5, "system": text, "messages": [{"role": "user", "content": [*text, {"type": "tool_result", "tool_use_id": "c", "content": "2"}]},
                                                               {"role": "assistant", "content": text}, {"role": "user", "content": "b"}]}
    send("messages", "text", {**anthropic, "messages": [{"role": "user", "content": text}], "stop_sequences": ["x"], "top_k": 3, "stream": True})
    send("count", "text", {"model": "tiny", "messages": [{"role": "user", "content": "a"}]})
    send("render", "text", {"messages": [user]})
    send("tokenize", "text", {"prompt": "a b", "add_special_tokens": False})
    send("tokenize", "chat", {"messages": [user], "add_generation_prompt": True})
    send("detokenize", "ids", {"tokens": [5, 6, 7]})

    def upload(name, lines):
        head = "--x\r\nContent-Disposition: form-data; name=\"{}\"{}\r\n\r\n"
        form = head.format("purpose", "") + "batch\r\n" + head.format("file", "; filename=\"a.jsonl\"\r\nContent-Type: application/jsonl")
        seed("upload", name, form + "\n".join(lines) + "\r\n--x--\r\n")
    line = {"method": "POST", "url": "/v1/chat/completions", "body": {"messages": [user], "max_tokens": 2}}
    upload("two", [compact({"custom_id": f"l{i}", **line}) for i in range(2)])
    upload("bad-line", [compact({"custom_id": "a", **line, "body": {"messages": [user], "temperature": 9}}), "", "no JSON"])


checkpoints()
gguf()
configs()
templates()
tokenizers()
conversions()
manifests()
grammars()
requests()

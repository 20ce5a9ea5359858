"""Writes a bundle for Baton: a checkpoint with `handoff.json` beside its weights, which says what the checkpoint
holds and what the trainer's own model computes, so that whoever serves it can prove to compute the same.

    python baton_export.py CHECKPOINT --prompts FILE --out DIR [--sign KEY]
    python baton_export.py keygen NAME

or, from a training program: `export(model, tokenizer, prompts, out)`. Needs torch and transformers 5, and cryptography to
sign. The same checkpoint, prompts, versions, threads and machine give the same bytes: nothing of the clock is written.

PROMPTS is a JSON list, or one JSON object a line. A prompt is one of
    {"messages": [...], "tools": [...], "template_kwargs": {...}, "add_generation_prompt": true}    all but messages optional
    {"text": "..."}     encoded with the tokenizer's special tokens, as `tokenizer(text)` does
    {"ids": [1, 2]}     token ids
each with an optional "name" and "max_new_tokens".
"""

import argparse
import base64
import getpass
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

MANIFEST, SIGNATURE = "handoff.json", "handoff.json.minisig"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Fields of a prompt, with the type of each.
CHAT = {"messages": list, "tools": list, "template_kwargs": dict, "add_generation_prompt": bool}
FIELDS = {"name": str, "max_new_tokens": int, "text": str, "ids": list, **CHAT}
CLASSES = ("float32", "half", "int8", "int4")
LIMITS = {"max_abs_logprob_diff", "mean_abs_logprob_diff", "p99_abs_logprob_diff", "kl", "top1_agreement", "perplexity_ratio"}
# Logits this close to each other may come out in either order from decoding with a cache and from a single pass.
NEAR_TIE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
# Positions inside each prompt whose likeliest tokens are stored.
INSIDE = 8


class Refused(Exception):
    """What cannot be exported, in one line."""


# ------------------------------------------------------------------------------------------------ what is handed over


def scan(folder, hidden=True):
    """The files of a bundle by name, in byte order of the names. Without `hidden`, those that a copy leaves out are left out."""
    found = {}
    for root, folders, names in os.walk(folder):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
            names = [name for name in names if not name.startswith(".")]
        for path in (Path(root, name) for name in folders + names):
            name = path.relative_to(folder).as_posix()
            check_name(name)
            if path.is_symlink():
                # The hub cache's own form, and no other: snapshots/<revision>/<name> -> blobs/<digest>.
                blob = re.escape("../" * (name.count("/") + 2)) + "blobs/[0-9a-f]+"
                if not re.fullmatch(blob, os.readlink(path)) or not path.is_file():
                    raise Refused(f"{name} is a link: only files are handed over")
            elif path.is_dir():
                continue
            elif not path.is_file():
                raise Refused(f"{name} is not a regular file")
            if name.lower().endswith(PICKLED):
                raise Refused(f"{name} is pickled data, which runs code when it is read: keep weights as safetensors alone")
            if name not in (MANIFEST, SIGNATURE):
                found[name] = path
    if not any(name.endswith(".safetensors") for name in found):
        raise Refused(f"{folder} has no weights as safetensors")
    if "config.json" not in found:
        raise Refused(f"{folder} has no config.json")
    return dict(sorted(found.items(), key=lambda item: item[0].encode()))


def check_name(name):
    """Names that the format allows: plain segments, at most 8, of at most 255 bytes."""
    segments = name.split("/")
    try:
        plain = all(len(segment.encode()) <= 255 for segment in segments)
    except UnicodeEncodeError:
        plain = False
    if not plain or len(segments) > 8 or re.search(r"[\x00-\x1f\x7f-\x9f\\]", name):
        raise Refused(f"the file name {name!r} is not allowed: at most 8 plain segments of at most 255 bytes")


def digest(path):
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def generation(files):
    """Names what is served: SHA-256 of the lines that `sha256sum` prints for all files."""
    return hashlib.sha256("".join(f"{file['sha256']}  {name}\n" for name, file in files.items()).encode()).hexdigest()


def tensors(files):
    """Type, shape and digest of every tensor, as the headers of the safetensors files have them."""
    found = {}
    for name, path in files.items():
        if not name.endswith(".safetensors"):
            continue
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for tensor, entry in header.items():
                if tensor in found:
                    raise Refused(f"the tensor {tensor} is stored twice")
                begin, end = entry["data_offsets"]
                file.seek(8 + size + begin)
                sha256 = hashlib.sha256(file.read(end - begin)).hexdigest()
                found[tensor] = {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": sha256}
    return dict(sorted(found.items(), key=lambda item: item[0].encode()))


def trained_dtype(config, files):
    """The type that config.json states, else that of most of the weights."""
    stated = config.get("dtype") or config.get("torch_dtype")
    if stated is None:
        elements = {}
        for entry in tensors(files).values():
            elements[entry["dtype"]] = elements.get(entry["dtype"], 0) + math.prod(entry["shape"])
        words = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        stated = words.get(max(elements, key=elements.get), "float32")
    if stated not in NEAR_TIE:
        raise Refused(f"config.json states the type {stated}; known are {', '.join(sorted(NEAR_TIE))}")
    return stated


def quantization(config):
    """Word for the format of quantised weights, and the feature that a device needs for it, if there is one."""
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method")
    if method is None:
        return None, None
    if "fp8" in method or method == "mxfp4":
        return method, "mxfp4" if method == "mxfp4" else "fp8"
    groups = list(settings.get("config_groups", {}).values())
    weights = (groups[0].get("weights") if groups else None) or {}
    bits = settings.get("bits") or weights.get("num_bits") or (4 if settings.get("load_in_4bit") else 8)
    return method, "fp8" if weights.get("type") == "float" and bits == 8 else f"int{bits}"


def requires(config):
    """What a device must be able to compute, by config.json."""
    text = config.get("text_config", config)
    window = text.get("sliding_window") and text.get("use_sliding_window", True)
    features = {
        "latent_attention": text.get("kv_lora_rank"),
        "mixture_of_experts": any(text.get(key) for key in ("n_routed_experts", "num_experts", "num_local_experts")),
        "sliding_window": window or "sliding_attention" in text.get("layer_types", []),
    }
    needed = [name for name, wanted in features.items() if wanted]
    return sorted(needed + [feature for feature in [quantization(config)[1]] if feature])


# ---------------------------------------------------------------------------------------------------- golden cases


def read_prompts(path):
    """The prompts of a JSON list, or of JSON lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from None


def checked_prompts(prompts):
    """The prompts with their names; refused where one is not of the form above."""
    if not isinstance(prompts, list) or not prompts:
        raise Refused("there are no prompts")
    names = set()
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, dict):
            raise Refused(f"prompt {number} is not an object")
        name = prompt.get("name", f"case-{number}")
        kinds = [kind for kind in ("messages", "text", "ids") if kind in prompt]
        if len(kinds) != 1:
            raise Refused(f"{name}: a prompt has one of messages, text and ids")
        allowed = {"name", "max_new_tokens", *(CHAT if kinds == ["messages"] else kinds)}
        if unknown := sorted(prompt.keys() - allowed):
            raise Refused(f"{name}: unknown field {unknown[0]}; a prompt of {kinds[0]} has {', '.join(sorted(allowed))}")
        for field, value in prompt.items():
            if type(value) is not FIELDS[field]:
                raise Refused(f"{name}: {field} is not a JSON {FIELDS[field].__name__}")
        if name in names:
            raise Refused(f"two prompts are named {name}")
        names.add(name)
        try:
            json.dumps(prompt, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Refused(f"{name}: half of a surrogate pair is no text") from None
        yield name, prompt


def encoded(tokenizer, name, prompt):
    """The case as far as the tokenizer makes it: chat, rendered prompt, ids."""
    if "ids" in prompt:
        return {"prompt_ids": prompt["ids"]}
    if "text" in prompt:
        return {"prompt": prompt["text"], "prompt_ids": tokenizer(prompt["text"])["input_ids"]}
    chat = {
        "messages": prompt["messages"],
        "tools": prompt.get("tools", []),
        "template_kwargs": prompt.get("template_kwargs", {}),
        "add_generation_prompt": prompt.get("add_generation_prompt", True),
    }
    text = rendered(tokenizer, name, chat)
    return {"chat": chat, "prompt": text, "prompt_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def rendered(tokenizer, name, chat):
    """The text of a chat; refused if it would be another one tomorrow."""
    from transformers.utils import chat_template_utils

    def text():
        return tokenizer.apply_chat_template(
            chat["messages"], tools=chat["tools"] or None, tokenize=False,
            add_generation_prompt=chat["add_generation_prompt"], **chat["template_kwargs"])

    clock = chat_template_utils.datetime
    try:
        today = text()
        chat_template_utils.datetime = SimpleNamespace(now=lambda: clock(1999, 12, 31, 23, 59))
        if text() != today:
            raise Refused(f"{name}: the template writes the date; set it in template_kwargs")
        return today
    except (ValueError, TypeError, KeyError, chat_template_utils.jinja2.TemplateError) as error:
        raise Refused(f"{name}: the template refuses the chat: {error}") from None
    finally:
        chat_template_utils.datetime = clock


def greedy(model, prompt, limit, ends):
    """The model's greedy continuation, decoded with a cache; an end token is its last."""
    import torch

    tokens, ids, cache = [], prompt, None
    while len(tokens) < limit and not (tokens and tokens[-1] in ends):
        output = model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, [int(output.logits[0, -1].float().argmax())]
        tokens += ids
    return tokens


def measured(model, name, prompt, tokens, top_k):
    """What one pass over prompt and continuation gives. Where it has a near tie in another order than decoding had, the
    continuation ends."""
    import torch

    ids = prompt + tokens
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].to("cpu", torch.float32)
    margins = []
    for i, token in enumerate(tokens):
        row = logits[len(prompt) - 1 + i].double()
        first, second = row.topk(2).values.tolist()
        if int(row.argmax()) != token:
            if not first - float(row[token]) <= NEAR_TIE[dtype_of(model)]:
                raise Refused(f"{name}: decoding with a cache and a single pass disagree at token {i} of the answer: "
                              f"{token} is {first - float(row[token]):.3g} nats behind")
            tokens = tokens[:i]
            break
        margins.append(rounded(first - second))
    ids = prompt + tokens
    logprobs, top = [], {}
    inside = {len(prompt) * i // (INSIDE + 1) for i in range(1, INSIDE + 1)}
    chosen = inside | set(range(len(prompt) - 1, max(len(prompt), len(ids) - 1)))
    for position in range(len(ids)):
        row = logits[position].double().log_softmax(-1)
        if position + 1 < len(ids):
            logprobs.append(rounded(row[ids[position + 1]]))
        if position in chosen:
            best = row.sort(descending=True, stable=True).indices[:top_k].tolist()
            top[str(position)] = [[token, rounded(row[token])] for token in best]
    figures = logprobs + [value for best in top.values() for _, value in best]
    if not all(map(math.isfinite, figures)):
        raise Refused(f"{name}: the model computes NaN or infinite logits")
    return {"greedy_ids": tokens, "margins": margins, "logprobs": logprobs, "top": top}


def rounded(value):
    return round(float(value), 6) + 0.0  # -0.0 becomes 0.0


def dtype_of(model):
    return str(model.dtype).removeprefix("torch.")


def golden_cases(model, tokenizer, prompts, max_new_tokens=64, top_k=8):
    """What the model computes for the prompts, one at a time."""
    import torch

    config, generation_config = model.config.get_text_config(), model.generation_config
    context = getattr(config, "max_position_embeddings", None) or math.inf
    ends = generation_config.eos_token_id if generation_config is not None else config.eos_token_id
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    cases, training = [], model.training
    model.eval()
    try:
        for name, prompt in checked_prompts(prompts):
            case = {"name": name, **encoded(tokenizer, name, prompt)}
            ids, limit = case["prompt_ids"], prompt.get("max_new_tokens", max_new_tokens)
            if not ids or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
                raise Refused(f"{name}: a prompt has at least one token, each below the vocabulary's {config.vocab_size}")
            if len(ids) > context:
                raise Refused(f"{name}: a prompt of {len(ids)} tokens; the model's context has {context}")
            with torch.inference_mode():
                tokens = greedy(model, ids, min(limit, context - len(ids)), ends)
                cases.append(case | measured(model, name, ids, tokens, top_k))
            print(f"{name}: {len(ids)} tokens, {len(cases[-1]['greedy_ids'])} of answer", file=sys.stderr)
    finally:
        model.train(training)
    return cases


# ---------------------------------------------------------------------------------------------------------- the bundle


def manifest(folder, cases, computed, *, name=None, license=None, lineage=None, framework=None, commit=None, tolerances=None,
             digest_tensors=True):
    """`handoff.json` as values, for a folder that is complete but for it."""
    files = scan(folder)
    try:
        config = json.loads(files["config.json"].read_bytes())
    except ValueError as error:
        raise Refused(f"config.json: {error}") from None
    digests = {file: digest(path) for file, path in files.items()}
    return {
        "format": "baton-handoff",
        "version": 1,
        "model": {"name": name or Path(folder).resolve().name, "license": license, "lineage": lineage or {}},
        "generation": generation(digests),
        "files": digests,
        "tensors": tensors(files) if digest_tensors else {},
        "trained": {
            "dtype": trained_dtype(config, files), "quantization": quantization(config)[0],
            "framework": framework, "commit": commit,
        },
        "computed": computed,
        "requires": requires(config),
        "tolerances": tolerances or {},
        "cases": cases,
    }


def written(values):
    """The text of `handoff.json`: a line for each file, tensor and case."""

    def line(value):
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def lines(value):
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"  {line(key)}: {line(entry)}" for key, entry in value.items()) + "\n }"
        return "[\n" + ",\n".join(f"  {line(entry)}" for entry in value) + "\n ]"

    long = {"files", "tensors", "cases"}
    entries = (f' {line(key)}: {lines(value) if key in long and value else line(value)}' for key, value in values.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def write(folder, values, sign=None):
    """Writes `handoff.json`, signed by `sign(bytes, trusted comment)` if there is one."""
    folder, content = Path(folder), written(values).encode()
    (folder / SIGNATURE).unlink(missing_ok=True)
    replace(folder / MANIFEST, content)
    if sign is not None:
        replace(folder / SIGNATURE, sign(content, f"{values['format']}\tgeneration:{values['generation']}").encode())


def replace(path, content):
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def copied(checkpoint, out):
    """Fills the new folder `out` with the files of `checkpoint`, as hard links where the file system has them."""
    for name, path in scan(checkpoint, hidden=False).items():
        target = Path(out, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(path), target)
        except OSError:
            shutil.copyfile(path, target)


def versions():
    import torch
    import transformers

    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def export(model, tokenizer, prompts, out, *, sign=None, max_new_tokens=64, top_k=8, **facts):
    """Saves a live model and its tokenizer to the new folder `out`, as a bundle.

    The golden values are those of the model as it is: its type, its device, its attention. For values in float32, save
    it and call the command on the checkpoint. `prompts`: a file, or a list of objects, as above. `sign`: a
    `SecretKey`. `facts`: name, license, lineage, framework, commit, tolerances, digest_tensors.
    """
    fresh(out)
    prompts = prompts if isinstance(prompts, list) else read_prompts(prompts)
    cases = golden_cases(model, tokenizer, prompts, max_new_tokens, top_k)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    computed = {"dtype": dtype_of(model), "framework": versions(), "device": model.device.type}
    write(out, manifest(out, cases, computed, **{"framework": "torch", **facts}), sign)


def export_checkpoint(checkpoint, prompts, out, *, dtype="float32", device="cpu", sign=None, max_new_tokens=64, top_k=8, **facts):
    """Makes the saved `checkpoint` a bundle: in place if `out` is the same folder, else in the new folder `out`."""
    checkpoint, out = Path(checkpoint), Path(out)
    in_place = out.exists() and out.samefile(checkpoint)
    scan(checkpoint, hidden=in_place)
    if not in_place:
        fresh(out)
    prompts = read_prompts(prompts)
    list(checked_prompts(prompts))
    model, tokenizer = loaded(checkpoint, dtype, device)
    cases = golden_cases(model, tokenizer, prompts, max_new_tokens, top_k)
    if not in_place:
        copied(checkpoint, out)
    computed = {"dtype": dtype, "framework": versions(), "device": device.split(":")[0]}
    write(out, manifest(out, cases, computed, **{"name": checkpoint.resolve().name, **facts}), sign)


def fresh(out):
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise Refused(f"{out} exists already")


def loaded(checkpoint, dtype, device):
    """Model and tokenizer of a checkpoint, from its files alone; quantised weights as the values they stand for."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()  # it lists layers that only drafting uses as unexpected
    transformers.utils.logging.disable_progress_bar()
    settings = {"local_files_only": True, "trust_remote_code": False}
    if not any((checkpoint / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")):
        raise Refused(f"{checkpoint} has no tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **settings)
        config = transformers.AutoConfig.from_pretrained(checkpoint, **settings)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method in ("fp8", "mxfp4"):
            kind = transformers.FineGrainedFP8Config if method == "fp8" else transformers.Mxfp4Config
            settings["quantization_config"] = kind(dequantize=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager",
            use_safetensors=True, output_loading_info=True, **settings)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise Refused(f"transformers cannot load {checkpoint}: {str(error).strip().splitlines()[0]}") from None
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info[problem]:
            raise Refused(f"{checkpoint} does not fit its config.json: {problem.replace('_', ' ')}: {min(map(str, info[problem]))}")
    model = model.to(device)
    # What stands for quantised weights is widened too; in narrow types a model keeps some of its own in float32.
    return (model.float() if dtype == "float32" else model), tokenizer


# ----------------------------------------------------------------------------------------------------------- minisign


class SecretKey:
    """A minisign secret key: calling it signs bytes, prehashed with BLAKE2b-512.

    File: a comment, then base64 of `Ed`, the key derivation (`Sc` or two zeros), `B2`, salt (32), operations (8), memory (8), and
    the key itself, which is xor-ed with what scrypt derives from the password: id (8), seed and public key
    (64), checksum (32).
    """

    def __init__(self, path):
        try:
            raw = base64.b64decode(Path(path).read_text().splitlines()[1], validate=True)
        except (OSError, ValueError, IndexError) as error:
            raise Refused(f"{path} is not a minisign secret key: {error}") from None
        if len(raw) != 158 or raw[:2] != b"Ed" or raw[4:6] != b"B2" or raw[2:4] not in (b"Sc", b"\0\0"):
            raise Refused(f"{path} is not a minisign secret key")
        key, encrypted = raw[54:], raw[2:4] == b"Sc"
        if encrypted:
            key = bytes(a ^ b for a, b in zip(key, derived(path, raw[6:38], *(int.from_bytes(raw[i:i + 8], "little") for i in (38, 46)))))
        # minisign leaves the checksum of a key that is not encrypted at zero.
        checksums = [hashlib.blake2b(b"Ed" + key[:72], digest_size=32).digest()] + [bytes(32)] * (not encrypted)
        if key[72:] not in checksums:
            raise Refused(f"{path}: wrong password, or the file is damaged")
        self.id, self.seed = key[:8], key[8:40]

    def __call__(self, content, trusted_comment):
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key = Ed25519PrivateKey.from_private_bytes(self.seed)
        signature = key.sign(hashlib.blake2b(content).digest())
        both = key.sign(signature + trusted_comment.encode())
        return (f"untrusted comment: signature of {MANIFEST}\n{b64(b'ED' + self.id + signature)}\n"
                f"trusted comment: {trusted_comment}\n{b64(both)}\n")


def derived(path, salt, operations, memory):
    """The scrypt stream of an encrypted key, by libsodium's choice of parameters."""
    password = os.environ.get("BATON_SIGN_PASSWORD")
    if password is None:
        password = getpass.getpass(f"Password of {path}: ")
    operations = max(operations, 32768)
    bound = operations // 32 if operations < memory // 32 else memory // 1024
    log_n = next(n for n in range(1, 64) if 1 << n > bound // 2)
    p = 1 if operations < memory // 32 else min(operations // 4 >> log_n, 0x3FFFFFFF) // 8
    if log_n > 24:
        raise Refused(f"{path} asks for {memory} bytes to derive the key")
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << log_n, r=8, p=p, maxmem=2**31 - 1, dklen=104)


def keygen(name):
    """Writes a new pair of keys, NAME.key (not encrypted) and NAME.pub."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    seed, key_id = secrets.token_bytes(32), secrets.token_bytes(8)
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    key = key_id + seed + public
    key += hashlib.blake2b(b"Ed" + key, digest_size=32).digest()
    secret = b64(b"Ed" + b"\0\0" + b"B2" + bytes(48) + key)
    for suffix, mode, kind, content in (
        (".key", 0o600, "minisign secret key", secret),
        (".pub", 0o644, f"minisign public key {key_id[::-1].hex().upper()}", b64(b"Ed" + key_id + public)),
    ):
        try:
            descriptor = os.open(name + suffix, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise Refused(f"{name}{suffix}: {error.strerror}") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(f"untrusted comment: {kind}\n{content}\n")


def b64(raw):
    return base64.b64encode(raw).decode()


# ------------------------------------------------------------------------------------------------------------- command


def read_object(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} is not a JSON object")
    return value


def read_tolerances(path):
    """Limits by class of precision; what they say of each other is for the reader to judge."""
    tolerances = read_object(path)
    for name, limits in tolerances.items():
        if name not in CLASSES or not isinstance(limits, dict) or limits.keys() != LIMITS:
            raise Refused(f"{path}: {name}: classes are {', '.join(CLASSES)}, each with {', '.join(sorted(LIMITS))}")
    return tolerances


def arguments():
    usage, _, prompts = __doc__.partition("\nPROMPTS is")
    parser = argparse.ArgumentParser(
        description=usage, epilog="PROMPTS is" + prompts, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder with config.json, tokenizer and safetensors")
    add("--prompts", required=True, metavar="FILE", help="what the golden cases are made of")
    add("--out", required=True, metavar="DIR", help="new folder for the bundle (hard links where possible; hidden files stay behind), "
        "or CHECKPOINT itself: then only handoff.json is written, and every file there is part of the bundle")
    add("--sign", metavar="KEY", help="minisign secret key; the password of an encrypted one is asked for, or in BATON_SIGN_PASSWORD")
    add("--dtype", default="float32", choices=sorted(NEAR_TIE), help="type of the arithmetic (default float32)")
    add("--device", default="cpu", help="device of torch that computes (default cpu)")
    add("--threads", type=int, help="threads of torch; the same number for the same bytes")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="greedy tokens of each case at most (default 64)")
    add("--top-k", type=int, default=8, metavar="K", help="likeliest tokens stored for a position (default 8, at least 2)")
    add("--tensors", action=argparse.BooleanOptionalAction, default=True, help="digest every tensor too (default)")
    add("--name", help="of the model (default: the folder's)")
    add("--license", help="of the model, for instance Apache-2.0")
    add("--lineage", metavar="FILE", help="JSON object that says where the model is from, passed through")
    add("--framework", help="what the model was trained with")
    add("--commit", help="of the training code")
    add("--tolerances", metavar="FILE", help="JSON object of limits by class of precision; without one, the server's own apply")
    return parser.parse_args()


def main():
    if sys.argv[1:2] == ["keygen"] and len(sys.argv) == 3:
        return keygen(sys.argv[2])
    args = arguments()
    if args.top_k < 2 or args.max_new_tokens < 0:
        raise Refused("--top-k is at least 2, --max-new-tokens at least 0")
    sign = SecretKey(args.sign) if args.sign else None
    lineage = read_object(args.lineage) if args.lineage else None
    tolerances = read_tolerances(args.tolerances) if args.tolerances else None
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, sums on a GPU have no fixed order
    torch.use_deterministic_algorithms(True)
    if args.threads:
        torch.set_num_threads(args.threads)
    export_checkpoint(
        args.checkpoint, args.prompts, args.out, dtype=args.dtype, device=args.device, sign=sign, max_new_tokens=args.max_new_tokens,
        top_k=args.top_k, digest_tensors=args.tensors, lineage=lineage, license=args.license, framework=args.framework,
        commit=args.commit, tolerances=tolerances, **({"name": args.name} if args.name else {}))


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        sys.exit(f"baton_export: {refused}")

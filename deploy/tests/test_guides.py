"""Guides: every flag, route, metric, setting and command that they name is the binary's, what they say is not there is not, and the figures
of sizing.md are those of its formulas, which are those of the binary."""

import functools
import json
import math
import re
import subprocess

import pytest
from conftest import BATON, DEPLOY, METRIC, ROOT, environment, free_port, run, serving

DOCS = DEPLOY / "docs"
GUIDES = ["from-vllm.md", "from-llama-server.md", "sizing.md", "operating.md"]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
ROUTE = re.compile(r"(?<![\w.:/-])/(?:v[12]|admin|live|ready|startup|health|metrics|version|score|rerank|tokenize|detokenize)\b[\w/{}-]*")
COMMAND = re.compile(r"(?:^    |`)(?:[A-Z_]+=\S+ )?baton ([a-z]+)", re.M)
GIB = 1 << 30


@functools.cache
def flags(*command):
    return set(FLAG.findall(run(BATON, *command, "--help")))


@functools.cache
def commands():
    return set(re.findall(r"^  ([a-z]+) ", run(BATON, "--help"), re.M))


@functools.cache
def all_flags():
    rollout = re.findall(r"^  ([a-z]+) ", run(BATON, "rollout", "--help"), re.M)
    nested = [("rollout", name) for name in rollout if name != "help"] + [("bench", "local")]
    return set().union(*(flags(name) for name in commands() if name != "help"), *(flags(*names) for names in nested))


def tables(text):
    """Rows below their heads, each row as its cells."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append((rows[0], rows[2:]))
            rows = []
    return found


def text_of_others(line):
    """Whether a line of code is another program's."""
    return line.startswith("    ") and not re.search(r"\b(baton|curl)\b", line)


def ours(guide):
    """What a guide says of Baton: its text without the first columns of comparisons, and without other programs' commands."""
    lines = []
    for line in (DOCS / guide).read_text().splitlines():
        if line.startswith("|") and guide.startswith("from-"):
            line = "|".join(line.split("|")[2:])
        if not text_of_others(line):
            lines.append(re.sub(r"`(?:vllm|llama-)[^`]*`", "", line))
    return "\n".join(lines)


@functools.cache
def routes(server):
    return set(json.loads(server.call("/openapi.json")[1])["paths"])


def known_route(route, server):
    pattern = re.sub(r"\\{[^/]*\\}", "[^/]+", re.escape(route))
    return route in routes(server) or any(re.fullmatch(pattern, known) for known in routes(server))


@functools.cache
def metrics(server):
    return set(re.findall(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)[{ ]", server.metrics(), re.M))


@pytest.mark.parametrize("guide", GUIDES)
def test_what_a_guide_names_is_the_binarys(guide, server):
    text = ours(guide)
    assert set(FLAG.findall(text)) <= all_flags(), set(FLAG.findall(text)) - all_flags()
    unknown = {route for route in ROUTE.findall(text) if not known_route(route.rstrip("/"), server)}
    assert not unknown, unknown
    assert set(METRIC.findall(text)) <= metrics(server), set(METRIC.findall(text)) - metrics(server)
    settings = set(re.findall(r"\bBATON_[A-Z0-9_]+", text))
    assert settings <= set(re.findall(r"\[env: (\w+)", run(BATON, "serve", "--help")))
    assert set(COMMAND.findall(text)) <= commands(), set(COMMAND.findall(text)) - commands()


@pytest.mark.parametrize("guide", ["from-vllm.md", "from-llama-server.md"])
def test_what_is_the_same_is_there_and_what_is_not_there_is_refused(guide, server):
    """Both ways: a name that Baton has, and that a guide calls missing or renamed, is as wrong as one that it has not."""
    judged = 0
    for head, rows in tables((DOCS / guide).read_text()):
        assert head[1] == "Baton", head
        for theirs, ours, _ in rows:
            for name in re.findall(r"`([^`]+)`", theirs):
                if name.startswith("--"):
                    there = name in flags("serve")
                elif name.startswith("/"):
                    there = name in routes(server)
                else:
                    there = name in metrics(server)
                assert there == (ours == "same"), (name, ours)
                judged += 1
    assert judged > 60, judged


def test_guides_lead_to_what_is_there():
    for page in [DEPLOY / "README.md", ROOT / "README.md", *DOCS.glob("*.md")]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text()):
            file = (page.parent / target) if target else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
                anchors = {"#" + re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert anchor in anchors, f"{page.name}: {target}{anchor}"
    for guide in GUIDES:
        assert f"docs/{guide}" in (DEPLOY / "README.md").read_text(), guide


def sizing(*columns):
    """Rows of the table with these columns."""
    [rows] = [rows for head, rows in tables((DOCS / "sizing.md").read_text()) if set(columns) <= set(head)]
    [head] = [head for head, _ in tables((DOCS / "sizing.md").read_text()) if set(columns) <= set(head)]
    return [dict(zip(head, row)) for row in rows]


def element_bytes():
    """Of the formats that the page lists, by what it calls them."""
    found = {}
    for row in sizing("Kept as", "Bytes of an element"):
        for name in re.findall(r"[A-Za-z]\w+", re.sub(r"\(.*\)", "", row["Kept as"])):
            found[name] = float(row["Bytes of an element"])
    return found


def test_weights_of_the_page_are_those_of_its_formula():
    width = element_bytes()
    for row in sizing("Model", "Elements"):
        layers, hidden, queries, keys, head, wide, vocabulary = (int(row[name]) for name in ("L", "H", "A", "K", "d", "F", "V"))
        linear = layers * (2 * queries * head * hidden + 2 * keys * head * hidden + 3 * hidden * wide)
        embedding = vocabulary * hidden
        linear += embedding if row["tied"] == "no" else 0
        assert row["Elements"] == f"{(linear + embedding) / 1e9:.2f} G", row["Model"]
        for column in ("float32", "bfloat16"):
            assert row[column] == f"{(linear + embedding) * width[column] / GIB:.2f} GiB", (row["Model"], column)
        quantised = linear * width["Q8_0"] + embedding * width["bfloat16"]
        assert row["q8_0"] == f"{quantised / GIB:.2f} GiB", row["Model"]


def cached(attention, bytes_of):
    """Bytes of a token and layer, as the page has them."""
    one, other = (int(number) for number in re.findall(r"\d+", attention))
    if "×" in attention:
        return 2 * one * bytes_of(other)
    return bytes_of(one) + bytes_of(other)


WIDTHS = {"float32": lambda n: 4 * n, "bfloat16": lambda n: 2 * n, "int8": lambda n: n + 4}


def test_caches_of_the_page_are_those_of_its_formula():
    for row in sizing("Attention", "Layers"):
        for column, bytes_of in WIDTHS.items():
            assert int(row[column]) == int(row["Layers"]) * cached(row["Attention"], bytes_of), (row["Model"], column)
        if eight := row["8192 tokens in bfloat16"]:
            assert eight == f"{8192 * int(row['bfloat16']) / GIB:.2f} GiB", row["Model"]


@pytest.mark.parametrize("model, attention", [("abacus", "64 + 16"), ("qwen2-tied-Q8_0.gguf", "2 × 32"), ("llama-256-Q4_K_M.gguf", None)])
def test_the_binary_refuses_a_cache_with_the_numbers_of_the_formula(model, attention):
    path = ROOT / "models/abacus" if model == "abacus" else ROOT / "models/golden/gguf" / model
    config = json.loads((ROOT / "models" / ("abacus" if model == "abacus" else f"golden/{model.rsplit('-', 1)[0]}") / "config.json").read_text())
    if attention is None:
        heads = config["num_key_value_heads"]
        attention = f"{heads} × {config.get('head_dim') or config['hidden_size'] // config['num_attention_heads']}"
    for dtype, bytes_of in WIDTHS.items():
        command = [BATON, "serve", path, "--port", "0", "--kv-cache-memory-bytes", "1", "--kv-cache-dtype", dtype]
        done = subprocess.run([str(part) for part in command], env=environment({}), text=True, capture_output=True, timeout=60)
        assert done.returncode != 0
        [(tokens, size)] = re.findall(r"cache blocks of (\d+) tokens, (\d+) bytes each", done.stderr)
        assert int(size) == int(tokens) * config["num_hidden_layers"] * cached(attention, bytes_of), (model, dtype)


def test_the_binarys_weights_are_those_of_the_formula(tmp_path):
    """Of the bundled model, quantised at load: linear layers in blocks, the rest as the page says."""
    report, width = tmp_path / "report.json", element_bytes()
    port = free_port()
    command = ["serve", str(ROOT / "models/abacus"), "--port", str(port), "--quantize", "q8_0", "--load-report", str(report), "--log-level", "warn"]
    with serving(command, {}, port):
        found = json.loads(report.read_text())["weight_bytes"]
    [file] = (ROOT / "models/abacus").glob("*.safetensors")
    with file.open("rb") as opened:
        tensors = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    layers = json.loads((ROOT / "models/abacus/config.json").read_text())["num_hidden_layers"]
    expected = 0
    for name, tensor in tensors.items():
        looks_ahead = re.match(rf"model\.layers\.{layers}\.", name)
        if name == "__metadata__" or looks_ahead or len(tensor["shape"]) != 2:
            continue
        stays = re.search(r"embed_tokens|kv_b_proj", name)
        router = name.endswith(".mlp.gate.weight")
        expected += math.prod(tensor["shape"]) * (4 if router else width["bfloat16"] if stays else width["Q8_0"])
    assert expected <= found <= 1.01 * expected

"""Makes `models/golden/tokenizers/converted`: vocabularies that are not a `tokenizer.json`, tiny, and what their own
libraries make of many texts.

    python -m venv v && v/bin/pip install sentencepiece tiktoken "transformers<5" protobuf
    v/bin/python models/golden/make/vocabularies.py

Run by hand; the outputs are committed, the versions recorded in `golden.json`. (transformers 5 no longer converts: it
wants its own settings in place of the model file's.) The judges are `sentencepiece` and
`tiktoken` themselves, and `transformers` where special tokens or its class's settings come in.
"""

import base64
import json
import random
import tempfile
import unicodedata
from importlib.metadata import version
from pathlib import Path

import sentencepiece
import tiktoken
from tiktoken._educational import bpe_train
from transformers import LlamaTokenizerFast

OUT = Path(__file__).resolve().parent.parent / "tokenizers" / "converted"
WORDS = """the of and to in is that it was for on are as with his they be at one have this from or had by hot but some what
there we can out other were all your when up use word how said an each she which do their time if will way about many then
them would write like so these her long make thing see him two has look more day could go come did my sound no most number
who over know water than call first people may down side been now find any new work part take get place made live where after
back little only round man year came show every good me give our under name very through just form much great think say help
low line before turn cause same mean differ move right boy old too does tell sentence set three want air well also play small
end put home read hand port large spell add even land here must big high such follow act why ask men change went light kind
off need house picture try us again animal point mother world near build self earth father head stand own page should country
found answer school grow study still learn plant cover food sun four thought let keep eye never last door between city tree
cross since hard start might story saw far sea draw left late run don't while press close night real life few stop open seem
together next white children begin got walk example ease paper often always music those both mark book letter until mile river
car feet care second group carry took rain eat room friend began idea fish mountain north once base hear horse cut sure watch
color face wood main""".split()
OTHERS = ["größer", "être", "naïve", "señor", "привет", "мир", "слово", "Ελλάδα", "λόγος", "漢字", "東京", "你好", "世界", "かな",
          "カナ", "안녕", "مرحبا", "שלום", "नमस्ते", "ไทย", "🙂", "def f(x):", "return x+1;", "{}", "//", "==", "2024", "3.14", "100"]
# What a charsmap of nmt_nfkc does, for these characters.
RANGES = [(0xA0, 0x17F), (0x2010, 0x2190), (0x2460, 0x2480), (0x3000, 0x3001), (0xFB00, 0xFB07), (0xFF01, 0xFF9F)]

TEXTS = [
    "", " ", "  ", "a", "Hello world", "Hello  world", " Hello", "  Hello", "Hello ", "Hello   ", "\n", "\n\n", "a\n", "\na",
    "\t", "a\tb", "a\r\nb\r\n", "don't we'll it's I'm you're they've he'd", "DON'T WE'LL", "The number is 1234567890.",
    "3.14159 and 1,000,000", "x=1;y=2", "def f(x):\n    return x+1\n\n\nprint(f(2))", "if (a == b) { /* c */ }",
    "größer être naïve señor", "e\u0301a\u0300 decomposed", "ﬁne ﬂow ½ ② Ａｂｃ １２３", "привет мир слово", "Ελλάδα λόγος",
    "漢字かなカナ", "你好，世界！", "안녕하세요", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "ไทย", "🙂🙃", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "\u00a0nbsp\u00a0", "\u200bzero\u200bwidth", "\ufeffbom", "tab\there", "▁under▁score", "_under_score", "\u3000ideographic\u3000",
    "\u2028line\u2029sep", "bell\x07 null\x00 esc\x1b del\x7f", "\ufffd replacement \ufffd", "<0x0A> <0xE2>", "<|x|> [x] <y>",
    "a" * 40, "ab" * 40, " " * 40, "\n" * 20, "!" * 33, "=" * 70, "é" * 17, "漢" * 21, "🙂" * 9, "0" * 31,
    "trailing spaces   \nand lines  \n  indented", "CamelCaseWords andSnake_case_words", "https://example.org/a?b=c&d=%20#e",
    "user@example.org", "«quoted» “quoted” ‘quoted’ — dash – dash … dots", "C'est l'été, n'est-ce pas?", "¿Qué? ¡Sí!",
    "mixed漢字and日本語and한국어", "1st 2nd 3rd 10th", "a.b.c...d", "  two  spaces  everywhere  ", "\n \n  \n", "x \n y", "x\n\n y",
]
SPECIAL_TEXTS = [
    "<s>", "</s>", "<s>Hello</s>", "<s> Hello </s>", "Hello<x>world", "Hello <x> world", "<x>Hello", "<x> Hello", "a<x><x>b",
    "<s>[CALL] Hello [/CALL] world</s>", "text <unk> text", "[CALL]", " <x>", "<x> ", "a<|added|>b", "<|added|>", "x <|added|> y",
]


def corpus(count, seed):
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 12)) + rng.choices(OTHERS, k=rng.randint(0, 3))
        rng.shuffle(words)
        line = " ".join(w.capitalize() if rng.random() < 0.1 else w for w in words)
        lines.append(line + rng.choice([".", ",", "!", "?", "", ":", "\n", " 42", "'s"]))
    return lines


def random_texts(count, seed):
    """Words, spaces and characters of everywhere, in no order."""
    rng = random.Random(seed)
    pieces = WORDS + OTHERS + [" ", "  ", "\n", "\t", "'", "\"", "-", ".", "…", "é", "ß", "Ж", "語", "🙂", "\u0301", "\u200d", "0", "9"]
    return ["".join(rng.choice(pieces) + rng.choice(["", " ", " "]) for _ in range(rng.randint(1, 25))) for _ in range(count)]


def train(name, **options):
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text("\n".join(line.replace("\n", " ") for line in corpus(3000, 1)))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/m", minloglevel=2, character_coverage=0.98, num_threads=1, **options)
        (OUT / name).write_bytes((Path(folder) / "m.model").read_bytes())
    return sentencepiece.SentencePieceProcessor(model_file=str(OUT / name))


def rules(folder):
    """A table of normalisation rules in sentencepiece's own format."""
    lines = []
    for first, last in RANGES:
        for code in range(first, last):
            to = unicodedata.normalize("NFKC", chr(code))
            if to != chr(code):
                lines.append((f"{code:X}", " ".join(f"{ord(c):X}" for c in to)))
    for base in "aeiouAEIOU":
        for mark in "\u0300\u0301":
            composed = unicodedata.normalize("NFC", base + mark)
            lines.append((f"{ord(base):X} {ord(mark):X}", f"{ord(composed):X}"))
    lines += [("9", "20"), ("A", "20"), ("D", "20"), ("7", ""), ("200B", ""), ("FEFF", "")]
    path = Path(folder) / "rules.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, b in lines))
    return str(path)


ALL_TEXTS = {}


def case(name, file, config, encode, decode, texts):
    """Ids of each text, and what they decode to where that is not the text itself."""
    encoded = []
    for text in texts:
        ids = encode(text)
        entry = {"text": ALL_TEXTS.setdefault(text, len(ALL_TEXTS)), "ids": ids}
        decoded = decode(ids)
        encoded.append(entry if decoded == text else {**entry, "decoded": decoded})
    return {"name": name, "file": file, "tokenizer_config": config, "encode": encoded}


def pieces():
    """SentencePiece: what it makes of plain text, and what transformers makes of text with special tokens."""
    common = {"vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
              "user_defined_symbols": ["<x>"], "control_symbols": ["[CALL]", "[/CALL]"]}
    plain = TEXTS + random_texts(60, 2)
    cases = []
    for name, options in [("bpe", common), ("bpe-no-prefix", {**common, "vocab_size": 500, "add_dummy_prefix": False})]:
        spm = train(f"{name}.model", **options)
        cases.append(case(name, f"{name}.model", None, spm.encode, spm.decode, plain))
    with tempfile.TemporaryDirectory() as folder:
        for name, fallback in [("unigram", False), ("unigram-bytes", True)]:
            spm = train(f"{name}.model", vocab_size=420 + 256 * fallback, model_type="unigram", byte_fallback=fallback, unk_surface="<unk>",
                        normalization_rule_tsv=rules(folder), hard_vocab_limit=False)
            # A byte piece written out in a text is that piece to a unigram model of the tokenizers library.
            texts = [t for t in plain if not (fallback and "<0x" in t)]
            cases.append(case(name, f"{name}.model", None, spm.encode, spm.decode, texts))

    spm = sentencepiece.SentencePieceProcessor(model_file=str(OUT / "bpe.model"))
    size = spm.get_piece_size()
    added = {str(size): {"content": "<|added|>", "special": True, "lstrip": False, "rstrip": False,
                         "normalized": False, "single_word": False}}
    for legacy in [False, True]:
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>",
                  "unk_token": "<unk>", "added_tokens_decoder": added}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.model").write_bytes((OUT / "bpe.model").read_bytes())
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = LlamaTokenizerFast.from_pretrained(folder, from_slow=True)
        encode = lambda t: tokenizer.encode(t, add_special_tokens=False)
        decode = lambda i: tokenizer.decode(i, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cases.append(case(f"bpe-legacy-{legacy}".lower(), "bpe.model", config, encode, decode, TEXTS + SPECIAL_TEXTS))
    return cases


def ranks():
    """tiktoken, with the patterns and special tokens of the families that use it."""
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    case_split = (r"[^\r\n\p{L}\p{N}]?[U]*[L]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
                  r"[^\r\n\p{L}\p{N}]?[U]+[L]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
    upper, lower = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    not_han = r"&&[^\p{Han}]"
    o200k = (case_split.replace("U", upper).replace("L]", lower + "]")
             + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    kimi = (r"[\p{Han}]+|" + case_split.replace("U]", upper + not_han + "]").replace("L]", lower + not_han + "]")
            + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    cl100k = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
              r"\s+(?!\S)|\s")
    trained = bpe_train("\n".join(corpus(1500, 3)) + "\n    \n        x\n" * 20, 700, llama3, visualise=None)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in trained.items()]
    (OUT / "ranks.tiktoken").write_text("\n".join(lines) + "\n")
    after = len(trained)
    qwen = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    llama = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>",
             reserved[4], "<|eot_id|>", *reserved[5:]]
    moon = [f"<|reserved_token_{after + i}|>" for i in range(256)]
    moon[:3] = ["[BOS]", "[EOS]", "<|im_end|>"]
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]",
              "added_tokens_decoder": {str(after + i): {"content": moon[i], **flags} for i in range(3)}}
    cases = []
    for file, pattern, names, config, nfc in [
        ("qwen.tiktoken", llama3.replace("{1,3}", ""), qwen, {"tokenizer_class": "QWenTokenizer"}, True),
        ("tokenizer.model", llama3, llama, None, False),
        ("tiktoken.model", kimi, moon, config, False),
        ("cl100k_base.tiktoken", cl100k, ["<|endoftext|>"], None, False),
        ("o200k_base.tiktoken", o200k, ["<|endoftext|>"], None, False),
    ]:
        encoding = tiktoken.Encoding(file, pat_str=pattern, mergeable_ranks=trained,
                                     special_tokens={token: after + i for i, token in enumerate(names)})
        shown = names[:3] + names[-1:]
        texts = TEXTS + random_texts(60, 4) + ["".join(f"{t}word {t} two" for t in shown)] + shown
        def encode(text, encoding=encoding, nfc=nfc):
            return encoding.encode(unicodedata.normalize("NFC", text) if nfc else text, allowed_special="all")
        cases.append(case(file, "ranks.tiktoken", config, encode, encoding.decode, texts))
    return cases


OUT.mkdir(parents=True, exist_ok=True)
libraries = ["sentencepiece", "tiktoken", "transformers", "tokenizers"]
cases = pieces() + ranks()
golden = {"versions": {name: version(name) for name in libraries}, "texts": list(ALL_TEXTS), "cases": cases}
(OUT / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")

"""Makes the checkpoints of `tests/data`: tiny encoders with random weights, and what Hugging Face transformers computes from
them.

    python -m venv v && v/bin/pip install torch transformers tokenizers safetensors numpy
    v/bin/python crates/encoder/tests/make.py

Run by hand; the outputs are committed. Weights are stored in bf16 or f32 and computed in f32, one text at a time.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parent / "data"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["the", "cat", "sits", "outside", "a", "man", "plays", "guitar", "what", "is", "where", "paris", "in", "of"]
TEXTS = ["The cat sits outside.", "a man plays guitar", "x", "Where is the cat?", "paris, in the rain, is full of cats and of men"]
PAIRS = [["where is the cat?", "The cat sits outside."], ["where is the cat?", "a man plays guitar"], ["", "x"],
         ["what is paris?", "paris, in the rain, is full of cats and of men"]]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def word_piece():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "?", *LETTERS, *(f"##{c}" for c in LETTERS)]
    tokens += [word for word in WORDS if len(word) > 1]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tokenizer, len(tokens), names


def unigram():
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", *".,?", *LETTERS, *(f"▁{word}" for word in WORDS)]
    scores = [0.0] * 4 + [-4.0] + [-8.0] * (3 + len(LETTERS)) + [-3.0] * len(WORDS)
    tokenizer = Tokenizer(models.Unigram(list(zip(tokens, scores)), unk_id=3))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.decoder = decoders.Metaspace()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
             "unk_token": "<unk>"}
    return tokenizer, len(tokens), names


BERT = {"model_type": "bert", **SIZES, "max_position_embeddings": 40, "type_vocab_size": 2, "pad_token_id": 0}
ROBERTA = {"model_type": "xlm-roberta", **SIZES, "max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1,
           "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5}
ONE_LABEL = {"num_labels": 1}
CASES = {
    # name: tokenizer, class, config, stored dtype, what stands beside it
    "bert": (word_piece, AutoModel, BERT, torch.bfloat16, {"pooling": "mean", "normalize": True, "max_seq_length": 24}),
    "bert-score": (word_piece, AutoModelForSequenceClassification, {**BERT, **ONE_LABEL, "hidden_act": "relu"}, torch.bfloat16,
                   {"activation": "torch.nn.modules.linear.Identity"}),
    "xlm-roberta": (unigram, AutoModel, ROBERTA, torch.float16, {"pooling": "cls", "normalize": False}),
    "xlm-roberta-score": (unigram, AutoModelForSequenceClassification, {**ROBERTA, **ONE_LABEL}, torch.float32, {}),
}
SWITCHES = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def beside(folder, width, extra):
    if "pooling" in extra:
        names = ["Transformer", "Pooling"] + ["Normalize"] * extra["normalize"]
        paths = ["", "1_Pooling", "2_Normalize"]
        write(folder / "modules.json", [
            {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"}
            for i, name in enumerate(names)])
        switches = {f"pooling_mode_{name}": name.startswith(extra["pooling"] + "_t") for name in SWITCHES}
        write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **switches})
    if "max_seq_length" in extra:
        write(folder / "sentence_bert_config.json", {"max_seq_length": extra["max_seq_length"], "do_lower_case": False})


def main():
    for seed, (name, (make_tokenizer, kind, config, dtype, extra)) in enumerate(CASES.items()):
        folder = DATA / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tokenizer, size, names = make_tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

        config = AutoConfig.for_model(vocab_size=size + 3, **config)
        torch.manual_seed(seed)
        model = kind.from_config(config, attn_implementation="eager").eval()
        rng = np.random.default_rng(seed)
        for key, tensor in model.state_dict().items():
            if tensor.dtype == torch.float32:
                scale = 0.3 if "LayerNorm" in key or "bias" in key or "embeddings" in key else 1.6 / tensor.shape[-1] ** 0.5
                mean = 1.0 if "LayerNorm.weight" in key else 0.0
                values = torch.tensor(mean + scale * rng.standard_normal(tuple(tensor.shape)), dtype=torch.float32)
                tensor.copy_(values.to(dtype).to(torch.float32))
        stored = {key: t.to(dtype).contiguous() for key, t in model.state_dict().items() if t.dtype == torch.float32}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        config.architectures = [type(model).__name__]
        written = json.loads(config.to_json_string(use_diff=False))
        keep = ["architectures", "hidden_act", "layer_norm_eps", "model_type", "position_embedding_type", "vocab_size",
                "max_position_embeddings", "type_vocab_size", "pad_token_id", *SIZES]
        written = {key: written[key] for key in keep if key in written}
        if kind is not AutoModel:
            written["id2label"] = {"0": "LABEL_0"}
        if "activation" in extra:
            written["sbert_ce_default_activation_function"] = extra["activation"]
        write(folder / "config.json", written)
        beside(folder, config.hidden_size, extra)

        golden = {"transformers": transformers.__version__, "texts": []}
        for text in TEXTS if kind is AutoModel else PAIRS:
            arguments = [text] if kind is AutoModel else text
            one_type = config.type_vocab_size == 1
            inputs = wrapped(*arguments, return_tensors="pt", return_token_type_ids=not one_type)
            with torch.no_grad():
                output = model(**inputs)
            entry = {"text": text, "ids": inputs["input_ids"][0].tolist()}
            if not one_type:
                entry["type_ids"] = inputs["token_type_ids"][0].tolist()
            if kind is AutoModel:
                hidden = output.last_hidden_state[0].double()
                pooled = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0).values, "last": hidden[-1]}
                entry |= {way: [round(x, 7) for x in vector.tolist()] for way, vector in pooled.items()}
            else:
                entry["logit"] = round(output.logits.item(), 7)
            golden["texts"].append(entry)
        write(folder / "golden.json", golden)
        print(name, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), "bytes")


main()

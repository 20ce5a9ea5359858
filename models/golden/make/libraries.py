"""Has the libraries that the quantised layouts come from read `models/golden/quantized`, and records what they give.

    python -m venv v && v/bin/pip install numpy torch transformers==5.23.0 compressed-tensors==0.20.0 gptqmodel==7.7.0
    v/bin/pip install --no-deps autoawq==0.2.9 optimum==2.3.0
    v/bin/python models/golden/make/libraries.py
    v/bin/pip install --no-deps compressed-tensors==0.14.0   # the last that can shuffle columns
    v/bin/python models/golden/make/libraries.py packed-int4-shuffled

Run by hand on a CPU; `judges.json`, its output, is committed. Each matrix is
* widened by the library, with scales in float32: these are the values, and must be those of `values/`;
* widened by the library as it does itself, with scales as stored: that must be the values, rounded once;
* packed again by the library from the values: that must be the tensors of the checkpoint, to the bit.
Then transformers loads the whole checkpoint through that library (AWQ through gptqmodel), in float32, and computes the
logits after `PROMPT`.
`judges.json` says by case which library that was, what it was asked, in what type it computes itself, the SHA-256 of the
values it gave, and the logits; these are null where transformers cannot load a case that the library can read.
"""

import hashlib
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent / "quantized"
PROMPT = [1, 2, 3, 4, 5]
# transformers needs a newer compressed-tensors than the shuffled case, and FP8 in blocks.
NOT_LOADED = {"packed-int4-shuffled", "fp8-tensor", "fp8-e5m2"}


def widened(parts, name):
    return {**parts, name: parts[name].float()} if parts[name].dtype == torch.float16 else parts


def compressed_tensors(config, parts, shape):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    judge = BaseCompressor.get_value_from_registry(config["format"])
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    if "weight_g_idx" in parts:  # an older version, with an older interface
        judge = judge(config=parsed)
        read = lambda parts: judge.decompress_weight(dict(parts), scheme.weights)

        def pack(values):
            zeros = dict(parts)
            judge.decompress_weight(zeros, scheme.weights)  # unpacks the zero points in place
            return {**parts, **judge.compress_weight(values, parts["weight_scale"], scheme.weights,
                                                     zeros["weight_zero_point"].data, parts["weight_g_idx"])}
        return f"{type(judge).__name__}.decompress_weight", read(widened(parts, "weight_scale")), read(parts), pack

    read = lambda parts: judge.decompress(parts, scheme)
    pack = lambda values: judge.compress({**read(parts), "weight": values}, scheme)
    values = read(widened(parts, "weight_scale"))["weight"]
    return f"{judge.__name__}.decompress", values.float(), read(parts)["weight"], pack


def gptq(config, parts, shape):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    first = config.get("checkpoint_format") != "gptq_v2"

    def layer():
        return TorchLinear(bits=config["bits"], group_size=config["group_size"], sym=config["sym"],
                           desc_act=config["desc_act"], in_features=shape[1], out_features=shape[0], bias=False,
                           format=FORMAT.GPTQ if first else FORMAT.GPTQ_V2).eval()
    loaded = layer()
    loaded.load_state_dict(parts)
    if first:
        convert_gptq_v1_to_v2_format_module(loaded, config["bits"], torch.int32)
    itself = loaded.dequantize_weight().T
    loaded.scales = loaded.scales.float()
    loaded.clear_weight_cache()
    values = loaded.dequantize_weight().T

    def pack(values):
        linear = torch.nn.Linear(shape[1], shape[0], bias=False)
        linear.weight.data = values.contiguous()
        shifts = torch.arange(0, 32, config["bits"])
        zeros = (loaded.qzeros[:, :, None] >> shifts & 2 ** config["bits"] - 1).flatten(1)
        packed = layer()
        packed.pack_original(linear, loaded.scales.T.contiguous(), zeros.T.float(), parts["g_idx"])
        if first:
            convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=config["bits"]))
        return {name: getattr(packed, name) for name in parts}
    return "TorchLinear.dequantize_weight", values, itself, pack


def awq(config, parts, shape):
    # Of the package itself only this file; the rest of it needs an older transformers.
    path = Path(importlib.util.find_spec("awq").origin).parent / "utils/packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    read = lambda parts: packing.dequantize_gemm(*(parts[n] for n in ("qweight", "qzeros", "scales")),
                                                 config["bits"], config["group_size"]).T

    def pack(values):  # the heir's, since the original packs on a GPU only
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        linear = torch.nn.Linear(shape[1], shape[0], bias=False)
        linear.weight.data = values.contiguous()
        zeros = packing.reverse_awq_order(*packing.unpack_awq(parts["qweight"], parts["qzeros"], 4), 4)[1] & 15
        packed = AwqTorchLinear(bits=4, group_size=config["group_size"], sym=False, desc_act=False,
                                in_features=shape[1], out_features=shape[0])
        packed.pack(linear, parts["scales"].float().T, zeros.T.float())
        return {name: getattr(packed, name) for name in parts}
    return "dequantize_gemm", read(widened(parts, "scales")), read(parts), pack


def fp8(config, parts, shape):
    codes, scale = parts["weight"], parts["weight_scale"]
    values = codes.float() * scale
    return "float8 to float32", values, values, lambda values: {**parts, "weight": (values / scale).to(codes.dtype)}


JUDGES = {
    "compressed-tensors": (compressed_tensors, "compressed-tensors"), "gptq": (gptq, "gptqmodel"),
    "awq": (awq, "autoawq"), "fp8": (fp8, "torch"),
}


def logits(case, config):
    import transformers

    how = {}
    if config["quant_method"] == "compressed-tensors":
        how = {"quantization_config": transformers.CompressedTensorsConfig(run_compressed=False)}
    if config["quant_method"] == "gptq":
        how = {"quantization_config": transformers.GPTQConfig(bits=config["bits"], backend="gptq_torch")}
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(ROOT / case, dtype=torch.float32, device_map="cpu", local_files_only=True, **how)
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].tolist()


def judge(case):
    config = json.loads((ROOT / case / "config.json").read_text())["quantization_config"]
    tensors = load_file(ROOT / case / "model.safetensors")
    expected = load_file(ROOT / "values" / ((ROOT / case / "values").read_text().strip() + ".safetensors"))
    ask, library = JUDGES[config["quant_method"]]
    digest, computes = hashlib.sha256(), set()
    for name in sorted(expected):
        module = name.removesuffix("weight")
        parts = {k.removeprefix(module): t for k, t in tensors.items() if k.startswith(module)}
        what, values, itself, pack = ask(config, parts, expected[name].shape)
        assert torch.equal(values, expected[name]), f"{case}: {name}: the values differ"
        assert torch.equal(itself, values.to(itself.dtype)), f"{case}: {name}: rounded in another way"
        packed = pack(values)
        assert packed.keys() == parts.keys(), f"{case}: {name}: {packed.keys()}"
        for part, tensor in parts.items():
            again = packed[part]
            assert again.shape == tensor.shape, f"{case}: {name}: shape of {part}"
            same = torch.equal(again.to(tensor.dtype).float(), tensor.float())
            assert same, f"{case}: {name}: {part} is packed in another way"
        digest.update(values.contiguous().numpy().tobytes())
        computes.add(str(itself.dtype).removeprefix("torch."))
    (computes,) = computes
    library = f"{library} {version(library)}"
    return {"library": library, "asked": what, "computes": computes, "sha256": digest.hexdigest(),
            "logits": None if case in NOT_LOADED else logits(case, config)}


path = ROOT / "judges.json"
known = json.loads(path.read_text()) if path.exists() else {}
every = sorted(p.parent.name for p in ROOT.glob("*/config.json"))
for case in sys.argv[1:] or [c for c in every if c != "packed-int4-shuffled"]:
    known[case] = judge(case)
    print(case, known[case]["library"])
lines = [f"{json.dumps(case)}: {json.dumps(known[case])}" for case in every if case in known]
path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

"""Does a GGUF file run in place as its weights say? One file for each format that is read, made by
public tools: the gguf package and llama.cpp's quantiser.

Every tensor is decoded here and by the gguf package: the same bits. Logits are compared with those
of stock transformers on the weights as the gguf package decodes them, in float32; spread: of
stock's own implementations, routing held equal.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
from limits import provenance, save  # noqa: E402
from make_gguf import EXPERTS, NAMES  # noqa: E402
from moe_infinity import MoE  # noqa: E402
from moe_infinity.kernels.packed import PackedMatrix  # noqa: E402
from support.families import stock_spread  # noqa: E402

# llama.cpp's numbers of what its quantiser makes.
PLAIN = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9}
PLAIN["MXFP4"] = 38
IN_256 = {"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # for rows of 256 weights
NUM_TOKENS = 64
# In another environment, which may have llama_cpp only.
QUANTISE = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = int(sys.argv[3])
paths = [path.encode() for path in sys.argv[1:3]]
assert llama_cpp.llama_model_quantize(*paths, options) == 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path, help="checkpoint (the bundled one) for most formats")
    parser.add_argument("wide", type=Path, help="one whose rows are of 256, for those with a K")
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama_cpp")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for checkpoint, forms in ((args.plain, PLAIN), (args.wide, IN_256)):
        with tempfile.TemporaryDirectory(dir=args.wide.parent) as folder:
            rows += measure(args, checkpoint, forms, Path(folder))
    save("gguf_formats", {**provenance(), "num_tokens": NUM_TOKENS, "rows": rows})


def measure(
    args: argparse.Namespace, checkpoint: Path, forms: dict[str, int], work: Path
) -> list[dict]:
    source = work / "source.gguf"
    maker = [sys.executable, str(ROOT / "benchmarks" / "make_gguf.py"), str(checkpoint)]
    subprocess.run([*maker, str(source)], check=True, capture_output=True)
    rows = []
    for form, number in forms.items():
        file = work / f"{form}.gguf"
        command = [args.peer_python, "-c", QUANTISE, str(source), str(file), str(number)]
        subprocess.run(command, check=True, capture_output=True)
        rows.append({"checkpoint": checkpoint.name, "form": form, **examine(file, checkpoint)})
        print(rows[-1], flush=True)
        file.unlink()
    return rows


def examine(file: Path, checkpoint: Path) -> dict:
    formats, num_different = decoded(file)
    ids = torch.arange(5, 5 + NUM_TOKENS)[None]
    stock = stock_of(file, checkpoint)
    with torch.no_grad():
        expected = stock(ids).logits
    spread = stock_spread(stock, ids)
    plain = logits(file, ids, dtype="float32", kernel="torch")
    native = logits(file, ids)
    difference = (plain - expected).abs().max().item()
    return {
        "formats": formats,
        "tensors_decoded_otherwise": num_different,
        "difference": difference,
        "spread": spread,
        "is_within": difference <= 2 * spread,
        "native_error": ((native - expected).norm() / expected.norm()).item(),
        "native_same_top_1": (native.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def stock_of(file: Path, checkpoint: Path) -> Any:
    """The library's model of a checkpoint, its weights those of a file by the gguf package."""
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stock.set_experts_implementation("eager")
    stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().clone())  # not tied
    places = {
        "token_embd.weight": stock.model.embed_tokens.weight,
        "output_norm.weight": stock.model.norm.weight,
        "output.weight": stock.lm_head.weight,
    }
    for number, layer in enumerate(stock.model.layers):
        parameters = dict(layer.named_parameters())
        for theirs, ours in NAMES.items():
            if f"{theirs}.weight" in parameters:
                places[f"blk.{number}.{ours}.weight"] = parameters[f"{theirs}.weight"]
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.data.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.data}
        for name, ours in EXPERTS.items():
            places[f"blk.{number}.{ours}.weight"] = parts[name]
    with torch.no_grad():
        for tensor in gguf.GGUFReader(file).tensors:
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            place = places.pop(tensor.name)
            place.copy_(torch.from_numpy(numbers.copy()).view(place.shape))
    assert not places, f"not in the file: {sorted(places)}"
    return stock


def logits(file: Path, ids: torch.Tensor, **options: str) -> torch.Tensor:
    with MoE(file, **options) as moe, torch.no_grad():
        found: torch.Tensor = moe(ids).logits.float()
        return found


def decoded(file: Path) -> tuple[dict[str, int], int]:
    """How many tensors there are of each format, and how many of them we decode otherwise."""
    formats: Counter[str] = Counter()
    num_different = 0
    for tensor in gguf.GGUFReader(file).tensors:
        name = tensor.tensor_type.name
        formats[name] += 1
        if name in ("F32", "F16", "BF16"):
            continue  # nothing is decoded
        cols, *others = tensor.shape.tolist()
        data = torch.from_numpy(np.array(tensor.data).reshape(-1))
        found = PackedMatrix(name, math.prod(others), cols, data).decode().numpy()
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        same = found.reshape(-1).view(np.uint32) == expected.reshape(-1).view(np.uint32)
        num_different += int(not same.all())
    return dict(formats), num_different


if __name__ == "__main__":
    main()

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

import gguf
import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
from limits import provenance, save  # noqa: E402
from moe_infinity import MoE  # noqa: E402
from moe_infinity.kernels.packed import PackedMatrix  # noqa: E402
from support.families import stock_spread  # noqa: E402

# llama.cpp's numbers of what its quantiser makes.
PLAIN = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9}
PLAIN["MXFP4"] = 38
IN_256 = {"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # for rows of 256 weights
NUM_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path, help="checkpoint (the bundled one) for most formats")
    parser.add_argument("wide", type=Path, help="one whose rows are of 256, for those with a K")
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama_cpp")
    parser.add_argument("--quantise", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quantise:
        quantise(*args.quantise)
        return
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
        worker = [
            str(args.plain),
            str(args.wide),
            "--quantise",
            str(source),
            str(file),
            str(number),
        ]
        command = [args.peer_python, __file__, *worker]
        subprocess.run(command, check=True, capture_output=True)
        rows.append({"checkpoint": checkpoint.name, "form": form, **examine(file)})
        print(rows[-1], flush=True)
        file.unlink()
    return rows


def quantise(source: str, to: str, number: str) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = int(number)
    assert llama_cpp.llama_model_quantize(source.encode(), to.encode(), options) == 0


def examine(file: Path) -> dict:
    formats, num_different = decoded(file)
    ids = torch.arange(5, 5 + NUM_TOKENS)[None]
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    stock.set_experts_implementation("eager")
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
        "is_within": difference <= max(2 * spread, 1e-5 * expected.abs().max().item()),
        "native_error": ((native - expected).norm() / expected.norm()).item(),
        "native_same_top_1": (native.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


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

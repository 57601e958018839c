"""Does the widened model say what the bundled one says? Logits, experts and next tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save
from moe_infinity import MoE, bundled_model_path

PROMPTS = (
    "def main():\n    parser = argparse.ArgumentParser()\n",
    "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have? Answer:",
    "Der Benutzer kann die Datei im Ordner speichern und danach",
    "Pour ouvrir le fichier, cliquez sur le bouton et choisissez",
    "The king is dead, and all the lords of England",
    "impl<T> Iterator for Chain<T> {\n    fn next(&mut self)",
    "tree: a tall plant with a wooden trunk and",
    "This module provides access to the operating system's",
    "class Reader:\n    def __init__(self, path):\n        self.path = path\n",
    "Question: A train travels 60 miles in 2 hours. How fast does it go? Answer:",
    "In the beginning God created the heaven and the earth.",
    "Die Funktion gibt eine Liste aller Elemente zurück, wenn",
    "Cette option permet de définir la taille de la fenêtre",
    "pub fn read(&self, buf: &mut [u8]) -> Result<usize> {",
    "for key, value in sorted(table.items()):\n    print(key,",
    "My fellow citizens, the state of the union is",
    "water: a clear liquid that",
    "Changed in version 3.8: the function now accepts",
    "Question: There are 24 hours in a day. How many hours are in 7 days? Answer:",
    "#include <stdio.h>\nint main(void) {\n",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bf16", type=Path, required=True, help="widened by 16, bfloat16")
    parser.add_argument("--fp32", type=Path, required=True, help="widened by 4, float32")
    parser.add_argument("--ram", default="2GiB")
    args = parser.parse_args()
    result = {
        "fp32_f4": compare(args.fp32, "float32", args.ram),
        "bf16_f16": compare(args.bf16, "bfloat16", args.ram),
    }
    print(result)
    save("widened", {**provenance(), "prompts": len(PROMPTS), **result})


def compare(widened: Path, dtype: str, ram: str) -> dict:
    small = run(bundled_model_path(), dtype, ram)
    large = run(widened, dtype, ram)
    same_experts = [
        (a == b).all(dim=-1).float()
        for x, y in zip(small, large, strict=True)
        for a, b in zip(x["experts"], y["experts"], strict=True)
    ]
    next_token = torch.cat(
        [
            (x["logits"].argmax(-1) == y["logits"].argmax(-1)).float().flatten()
            for x, y in zip(small, large, strict=True)
        ]
    )
    return {
        "dtype": dtype,
        "max_logit_difference": max(
            (x["logits"] - y["logits"]).abs().max().item()
            for x, y in zip(small, large, strict=True)
        ),
        "same_expert_sets": torch.cat([s.flatten() for s in same_experts]).mean().item(),
        "same_next_token": next_token.mean().item(),
        "tokens": next_token.numel(),
    }


def run(path: Path, dtype: str, ram: str) -> list[dict]:
    """Logits and sorted expert sets of every prompt and layer."""
    rows = []
    with MoE(path, ram=ram, dtype=dtype, max_context=256) as moe:
        chosen: list[torch.Tensor] = []
        for name, module in moe.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(
                    lambda m, i, out: chosen.append(out[2].sort(dim=-1).values)
                )
        for prompt in PROMPTS:
            chosen.clear()
            ids = moe.tokenizer(prompt, return_tensors="pt").input_ids
            rows.append({"logits": moe(ids).logits.float(), "experts": list(chosen)})
    return rows


if __name__ == "__main__":
    main()

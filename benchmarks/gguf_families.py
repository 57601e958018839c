"""Do GGUF files of every family give the text that llama.cpp gives? Random tiny models, greedy.

What a family's files leave to llama.cpp's code (rotations, scalings, who is routed how) shows here:
each is written by the public gguf package, and both run it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import gguf_text
from limits import provenance, save
from support.gguf_files import ARCHITECTURES, Kind, gguf, small_model, write_gguf

SIZE, VOCABULARY = 64, 96
# What llama.cpp wants of a family: it knows DeepSeek-V2-Lite by its layers.
WANTED = {
    "deepseek_v2": {"num_hidden_layers": 27},
    "olmoe": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama_cpp")
    args = parser.parse_args()
    draw = random.Random(1)
    prompts = [
        draw.choices(range(1, VOCABULARY), k=draw.randrange(5, 90)) for _ in range(args.prompts)
    ]
    families = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURES:
            families[name] = compared(name, Path(folder), prompts, args)
            print(name, families[name], flush=True)
    save("gguf_families", {**provenance(), "new_tokens": args.new_tokens, "families": families})


def compared(name: str, folder: Path, prompts: list[list[int]], args: argparse.Namespace) -> dict:
    """Of some prompts, how many answers are equal, or up to a near-tie of our own logits."""
    path = folder / f"{name}.gguf"
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[name]]
    words = {"tokenizer.ggml.model": "no_vocab", f"{architecture}.vocab_size": VOCABULARY}
    write_gguf(small_model(name, SIZE, **WANTED.get(name, {})), path, Kind.F32, **words)
    job = {"path": str(path), "prompts": prompts, "new_tokens": args.new_tokens}
    command = [args.peer_python, gguf_text.__file__, str(path), "--worker", json.dumps(job)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    theirs = json.loads(said.strip().splitlines()[-1])
    mine = argparse.Namespace(gguf=path, dtype="float32", new_tokens=args.new_tokens)
    rows = [
        gguf_text.compared(*each)
        for each in zip(gguf_text.ours(mine, prompts), theirs, strict=True)
    ]
    equal = sum(row["equal_tokens"] == args.new_tokens for row in rows)
    ties = sum(row["gap"] is not None and row["gap"] < gguf_text.NEAR for row in rows)
    return {"equal": equal, "near_ties": ties, "different": len(rows) - equal - ties}


if __name__ == "__main__":
    main()

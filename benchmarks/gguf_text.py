"""Does a GGUF file give the text that llama.cpp gives? Greedy, from the same file and token ids.

The first token that differs ends a prompt's comparison: it is a near-tie if our two likeliest
tokens' logits lay close together, and an error if not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save
from prefetch_live import PROMPTS

NEAR = 1e-2  # gap of logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tokens", type=Path, help="checkpoint whose tokenizer reads the prompts")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="that we compute in")
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama_cpp")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(llama_cpp(json.loads(args.worker))))
        return
    prompts = prompt_ids(args)
    job = {"path": str(args.gguf), "prompts": prompts, "new_tokens": args.new_tokens}
    command = [args.peer_python, __file__, str(args.gguf), "--worker", json.dumps(job)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    theirs = json.loads(said.strip().splitlines()[-1])
    rows = [compared(*each) for each in zip(ours(args, prompts), theirs, strict=True)]
    equal = sum(row["equal_tokens"] == args.new_tokens for row in rows)
    ties = sum(row["equal_tokens"] < args.new_tokens and row["gap"] < NEAR for row in rows)
    print(f"{equal} equal, {ties} up to a near-tie, {len(rows) - equal - ties} different")
    facts = {"equal": equal, "near_ties": ties, "different": len(rows) - equal - ties}
    save("gguf_text", {**provenance(), "new_tokens": args.new_tokens, **facts, "rows": rows})


def prompt_ids(args: argparse.Namespace) -> list[list[int]]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokens)
    lines = PROMPTS.read_text().splitlines()[: args.prompts]
    return [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]


def ours(args: argparse.Namespace, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """New tokens of each prompt, and the gap between the two likeliest ones at each."""
    import torch

    from moe_infinity import MoE

    found = []
    with MoE(args.gguf, dtype=args.dtype) as moe:
        for ids in prompts:
            out = moe.generate(
                [ids],
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                eos_token_id=None,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            best = torch.cat(out.logits).float().topk(2).values
            tokens = out.sequences[0, len(ids) :].tolist()
            found.append((tokens, (best[:, 0] - best[:, 1]).tolist()))
    return found


def compared(mine: tuple[list[int], list[float]], theirs: list[int]) -> dict:
    tokens, gaps = mine
    pairs = zip(tokens, theirs, strict=True)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
    return {"equal_tokens": equal, "gap": gaps[equal] if equal < len(tokens) else None}


def llama_cpp(job: dict) -> list[list[int]]:
    """What llama.cpp says to each prompt, greedily."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(job["path"].encode(), params)
    num_ids = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    longest = max(map(len, job["prompts"]))
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = longest + job["new_tokens"] + 32
    options.n_batch = longest
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    return [answer(llama_cpp, model, options, num_ids, ids, job) for ids in job["prompts"]]


def answer(lib, model, options, num_ids: int, ids: list[int], job: dict) -> list[int]:
    import numpy as np

    context = lib.llama_init_from_model(model, options)
    found, part = [], ids
    for _ in range(job["new_tokens"]):
        tokens = (lib.llama_token * len(part))(*part)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(part))) != 0:
            sys.exit("llama_decode failed")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (num_ids,))
        found.append(int(logits.argmax()))
        part = found[-1:]
    lib.llama_free(context)
    return found


if __name__ == "__main__":
    main()

"""The same weights, the same tokens, the same kernel memory limit: llama.cpp beside this project.

Every system decodes the same forced token ids after a prompt, warmed up on other ones (without a
limit on these too: everything resident), inside a control group whose limit is a share of
llama.cpp's file, A B A B. Pairs are compared within one
trial; medians of ratios are reported, with hit rates and bytes. make_gguf.py makes llama.cpp's file
of the same weights; llama.cpp runs in its better setting there: memory-mapped, without repacking
(repacking copies what does not fit).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import MemoryLimit, decode_figures, long_prompt_ids, provenance, save

NO_LIMIT = 10.0  # a share that never binds
BATCH_TOKENS = 512  # of a prompt, at once: llama.cpp's own choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", type=Path, nargs="+", help="checkpoint or packed folders")
    parser.add_argument("--gguf", type=Path, help="the same weights for llama.cpp")
    parser.add_argument("--shares", default="10,0.9,0.75,0.55", help="limits over the GGUF's size")
    parser.add_argument("--tokens", type=Path, help="checkpoint whose tokenizer gives the prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--few-tokens", type=int, default=16, help="under limits: minutes each")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help="one that has llama_cpp")
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](json.loads(args.job))))
        return
    rows = [row for share in args.shares.split(",") for row in at_limit(args, float(share))]
    save(args.name or f"peers_{args.gguf.stem}", {**provenance(), "rows": rows})


def at_limit(args: argparse.Namespace, share: float) -> list[dict]:
    """Every system, A B A B, at one limit: a row per system."""
    limit = int(args.gguf.stat().st_size * share)
    systems = {path.name: ("ours", path) for path in args.ours}
    systems["llama.cpp"] = ("llama_cpp", args.gguf)
    ids = forced_ids(args)
    trials: dict[str, list[dict]] = {name: [] for name in systems}
    for _ in range(args.trials):
        for name, (worker, path) in systems.items():
            job = {
                "path": str(path),
                "prompt": ids[: args.prompt_tokens],
                "forced": ids[args.prompt_tokens :][: args.few_tokens if share < 1 else None],
                "limit": limit if share < NO_LIMIT else None,
                "context": args.prompt_tokens + args.new_tokens + 32,
            }
            python = args.peer_python if worker == "llama_cpp" else sys.executable
            found = run_limited(python, worker, job, limit)
            trials[name].append(found)
            print(share, name, json.dumps(found)[:300], flush=True)
    return [summary(name, share, limit, trials) for name in systems]


def forced_ids(args: argparse.Namespace) -> list[int]:
    """Prompt and answer of one text, long enough."""
    wanted = args.prompt_tokens + args.new_tokens
    return long_prompt_ids(args.tokens or args.ours[0], wanted)


def run_limited(python: str, worker: str, job: dict, limit_bytes: int) -> dict:
    limit = MemoryLimit(f"moe-infinity-peers-{worker}", limit_bytes)
    subprocess.run(["sync"], check=True)
    drop_page_cache(Path(job["path"]))
    command = [python, __file__, "--worker", worker, "--job", json.dumps(job)]
    with tempfile.TemporaryDirectory() as state:  # nothing learned in an earlier trial
        env = {"PYTHONDONTWRITEBYTECODE": "1", "MOE_INFINITY_STATE_DIR": state}
        code, out, usage = limit.run(command, os.environ | env)
    limit.close()
    lines = out.strip().splitlines()
    if code != 0 or not lines:
        return {"failed": f"exit code {code}"}
    return json.loads(lines[-1]) | {"group_peak_bytes": usage.peak_bytes}


def drop_page_cache(path: Path) -> None:
    """What an earlier run left in memory, outside of the limit, must not serve the next one."""
    for file in [path] if path.is_file() else path.iterdir():
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def summary(name: str, share: float, limit: int, trials: dict[str, list[dict]]) -> dict:
    """Medians; ratio: of each trial's speed to llama.cpp's in the same trial, and prompt_ratio the
    same for the prompt's."""
    own = [row for row in trials[name] if "failed" not in row]
    pairs = zip(trials[name], trials["llama.cpp"], strict=True)
    good = [pair for pair in pairs if not any("failed" in row for row in pair)]
    ratios = [mine["tokens_per_s"] / theirs["tokens_per_s"] for mine, theirs in good]
    prompt_ratios = [theirs["ttft_s"] / mine["ttft_s"] for mine, theirs in good]
    numbers = {k for row in own for k, v in row.items() if isinstance(v, int | float)}
    medians = {k: statistics.median(row[k] for row in own if k in row) for k in sorted(numbers)}
    return {
        "system": name,
        "share": share if share < NO_LIMIT else None,
        "limit_bytes": limit if share < NO_LIMIT else None,
        **medians,
        "speeds": [row.get("tokens_per_s") for row in trials[name]],
        "ratio": statistics.median(ratios) if ratios else None,
        "prompt_ratio": statistics.median(prompt_ratios) if ratios else None,
        "failed": [row["failed"] for row in trials[name] if "failed" in row],
    }


def ours(job: dict) -> dict:
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from moe_infinity import MoE

    class Forced(LogitsProcessor):
        """Makes the next token of the text the likeliest. Cheaply: llama.cpp is not even asked
        which one that is."""

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[0, forced[ids.shape[1] - len(prompt)]] = torch.inf
            return scores

    prompt, forced = [], []
    with MoE(job["path"], ram=job["limit"] or "auto", max_context=job["context"]) as moe:
        for turn in turns(job):
            prompt, forced = job["prompt"][::turn], job["forced"][::turn]
            wait_until_idle()
            said = moe.generate(
                [prompt],
                max_new_tokens=len(forced),
                do_sample=False,
                logits_processor=LogitsProcessorList([Forced()]),
            )
            assert said[0].tolist() == prompt + forced, "the text holds an end"
        return decode_figures(moe.stats())


def wait_until_idle() -> None:
    """Memory is made ready by a thread, for seconds behind the first prompt where a host has to
    find it; llama.cpp's lies in the page cache."""
    for _ in range(100):
        start = time.process_time()
        time.sleep(0.2)
        if time.process_time() - start < 0.02:
            return


def turns(job: dict) -> tuple[int, ...]:
    """Directions in which the text is run; the last is measured."""
    return (-1, 1) if job["limit"] else (-1, 1, 1)


def llama_cpp(job: dict) -> dict:
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    params = llama_cpp.llama_model_default_params()
    if hasattr(params, "load_mode"):
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    else:
        params.use_mmap = True
    params.use_extra_bufts = job["limit"] is None  # repacking, where everything fits
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(job["path"].encode(), params)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch = job["context"], BATCH_TOKENS
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)

    def decode(ids: list[int]) -> None:
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS]
            array = (llama_cpp.llama_token * len(part))(*part)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(part))):
                raise SystemExit("llama_decode failed")

    result = {}
    for turn in turns(job):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        decode(job["prompt"][::turn])
        first = time.perf_counter()
        for token in job["forced"][::turn][:-1]:
            decode([token])
        end = time.perf_counter()
        rate = (len(job["forced"]) - 1) / (end - first)
        result = {"tokens_per_s": rate, "ttft_s": first - start}
    return result


WORKERS = {"ours": ours, "llama_cpp": llama_cpp}


if __name__ == "__main__":
    main()

"""The same weights, the same tokens, the same kernel memory limit: llama.cpp beside this project.

Every system decodes the same forced token ids after a prompt, warmed up on other ones, inside a
control group whose limit is a share of llama.cpp's file. Without a limit all systems are open at
once and take turns (A B A B, a turn is one request of a second or two): a machine whose memory is
slow for minutes is slow for both halves of a pair. Under a limit each trial is a process of its
own. Pairs are compared within one trial; medians of ratios are reported, with hit rates and bytes.
make_gguf.py makes llama.cpp's file of the same weights; llama.cpp runs in its better setting there:
memory-mapped, without repacking (repacking copies what does not fit).
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import MemoryLimit, decode_figures, long_prompt_ids, provenance, save

NO_LIMIT = 10.0  # a share that never binds
BATCH_TOKENS = 512  # of a prompt, at once: llama.cpp's own choice
FORWARDS, BACKWARDS = 1, -1  # in which a text is run: measured; to warm up
PAUSE_S = 0.2  # in which threads of the system before fall asleep


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
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(json.loads(args.job))
        return
    rows = [row for share in args.shares.split(",") for row in at_limit(args, float(share))]
    save(args.name or f"peers_{args.gguf.stem}", {**provenance(), "rows": rows})


def at_limit(args: argparse.Namespace, share: float) -> list[dict]:
    """Every system, A B A B, at one limit: a row per system."""
    limit = int(args.gguf.stat().st_size * share)
    systems = {path.name: ("ours", path) for path in args.ours}
    systems["llama.cpp"] = ("llama_cpp", args.gguf)
    ids = forced_ids(args)
    jobs = {
        name: {
            "worker": worker,
            "path": str(path),
            "prompt": ids[: args.prompt_tokens],
            "forced": ids[args.prompt_tokens :][: args.few_tokens if share < 1 else None],
            "limit": limit if share < NO_LIMIT else None,
            "context": args.prompt_tokens + args.new_tokens + 32,
        }
        for name, (worker, path) in systems.items()
    }
    pythons = {"ours": sys.executable, "llama_cpp": args.peer_python}
    run = by_processes if share < NO_LIMIT else in_turns
    opened = {name: partial(Peer, pythons[job["worker"]], job, limit) for name, job in jobs.items()}
    trials = run(opened, args.trials)
    return [summary(name, share, limit, trials) for name in systems]


def by_processes(opened: dict[str, Callable[[], Peer]], num_trials: int) -> dict[str, list[dict]]:
    """A process per system and trial, one at a time."""
    trials: dict[str, list[dict]] = {name: [] for name in opened}
    for _ in range(num_trials):
        for name, start in opened.items():
            with closing(start()) as peer:
                peer.turn(BACKWARDS)
                trials[name].append(shown(name, peer.turn(FORWARDS)))
    return trials


def in_turns(opened: dict[str, Callable[[], Peer]], num_trials: int) -> dict[str, list[dict]]:
    """A process per system, all of them open; one of them works."""
    trials: dict[str, list[dict]] = {name: [] for name in opened}
    with ExitStack() as stack:
        peers = {name: stack.enter_context(closing(start())) for name, start in opened.items()}
        for peer in peers.values():
            peer.turn(BACKWARDS)
            peer.turn(FORWARDS)
        for _ in range(num_trials):
            for name, peer in peers.items():
                trials[name].append(shown(name, peer.turn(FORWARDS)))
    return trials


def shown(name: str, found: dict) -> dict:
    print(name, json.dumps(found)[:300], flush=True)
    return found


def forced_ids(args: argparse.Namespace) -> list[int]:
    """Prompt and answer of one text, long enough."""
    wanted = args.prompt_tokens + args.new_tokens
    return long_prompt_ids(args.tokens or args.ours[0], wanted)


class Peer:
    """One system in a process inside its limit; a turn is one request. Close it."""

    def __init__(self, python: str, job: dict, limit_bytes: int) -> None:
        name = f"moe-infinity-peers-{job['worker']}-{Path(job['path']).name}"
        self._limit = MemoryLimit(name, limit_bytes)
        self._state = tempfile.TemporaryDirectory()  # nothing learned in an earlier trial
        subprocess.run(["sync"], check=True)
        drop_page_cache(Path(job["path"]))
        env = {"PYTHONDONTWRITEBYTECODE": "1", "MOE_INFINITY_STATE_DIR": self._state.name}
        command = [python, __file__, "--job", json.dumps(job)]
        self._child = self._limit.start(command, os.environ | env)

    def turn(self, direction: int) -> dict:
        """Figures of the text run in this direction, or what the process failed with."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        time.sleep(PAUSE_S)
        with suppress(BrokenPipeError):
            stdin.write(f"{direction}\n")
            stdin.flush()
        for line in stdout:
            if line.startswith("{"):  # libraries have their say, too
                return json.loads(line) | {"group_peak_bytes": self._limit.peak_bytes()}
        return {"failed": f"exit code {self._child.wait()}"}

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._limit.close()
        self._state.cleanup()


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
        "ratios": ratios,
        "prompt_ratio": statistics.median(prompt_ratios) if ratios else None,
        "failed": [row["failed"] for row in trials[name] if "failed" in row],
    }


def work(job: dict) -> None:
    """The other side of a Peer: a direction a line, an answer a line."""
    with WORKERS[job["worker"]](job) as turn:
        for line in sys.stdin:
            print(json.dumps(turn(int(line))), flush=True)


@contextmanager
def ours(job: dict) -> Iterator[Callable[[int], dict]]:
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from moe_infinity import MoE
    from moe_infinity.machine import measure_memory_gbps

    class Forced(LogitsProcessor):
        """Makes the next token of the text the likeliest. Cheaply: llama.cpp is not even asked
        which one that is."""

        def __init__(self, num_before: int, forced: list[int]) -> None:
            self._num_before, self._forced = num_before, forced

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores.numpy()[0, self._forced[ids.shape[1] - self._num_before]] = torch.inf
            return scores

    with MoE(job["path"], ram=job["limit"] or "auto", max_context=job["context"]) as moe:

        def turn(direction: int) -> dict:
            prompt, forced = job["prompt"][::direction], job["forced"][::direction]
            wait_until_idle()
            said = moe.generate(
                [prompt],
                max_new_tokens=len(forced),
                do_sample=False,
                logits_processor=LogitsProcessorList([Forced(len(prompt), forced)]),
            )
            assert said[0].tolist() == prompt + forced, "the text holds an end"
            wait_until_idle()  # or we would work in the other system's turn
            figures, plan = decode_figures(moe.stats()), moe.plan
            figures["multiplied_bytes_per_token"] = plan.bytes_per_token + plan.dense_read_bytes
            if job["limit"] is None:  # it needs memory
                figures["memory_gbps"] = measure_memory_gbps()
            return figures

        yield turn


def wait_until_idle() -> None:
    """Memory is made ready by a thread, for seconds behind the first prompt where a host has to
    find it; llama.cpp's lies in the page cache."""
    for _ in range(100):
        start = time.process_time()
        time.sleep(0.2)
        if time.process_time() - start < 0.02:
            return


@contextmanager
def llama_cpp(job: dict) -> Iterator[Callable[[int], dict]]:
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

    def turn(direction: int) -> dict:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        forced = job["forced"][::direction]
        start = time.perf_counter()
        decode(job["prompt"][::direction])
        first = time.perf_counter()
        for token in forced[:-1]:
            decode([token])
        rate = (len(forced) - 1) / (time.perf_counter() - first)
        return {"tokens_per_s": rate, "ttft_s": first - start}

    yield turn


WORKERS = {"ours": ours, "llama_cpp": llama_cpp}


if __name__ == "__main__":
    main()

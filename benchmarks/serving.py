"""What the server costs: seconds per token through HTTP and without it, the same model in turns.

The model, the server and the direct runs share one process; the client is another one. Every pair
has a prompt of its own: the server would not read a known one again, and what is read just before
an answer warms the processor's caches for it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import provenance, save

PROMPT = (
    "Question: A farmer has {} cows and buys 5 more. How many cows does the farmer have? Answer:"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="Default: the bundled model.")
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        answer_orders(args.client)
        return
    from moe_infinity import bundled_model_path

    points = []
    for model in args.models or [bundled_model_path()]:
        points.append(measure(model, args.trials, args.new_tokens))
        print(points[-1], flush=True)
    save("serving", {**provenance(), "new_tokens": args.new_tokens, "points": points})


def measure(model: Path, trials: int, new_tokens: int) -> dict[str, Any]:
    """Medians over trials; ratios pair by pair. Either goes first in turn: experts of the prompt
    are in memory then for the other."""
    from moe_infinity import MoE

    with MoE(model, max_context=1024) as moe, served(moe) as url, client(url) as ask:
        pairs = []
        for number in range(1 + trials):
            prompt = PROMPT.format(100 + number)
            if number % 2:
                served_s, direct_s = ask(prompt, new_tokens), direct(moe, prompt, new_tokens)
            else:
                direct_s, served_s = direct(moe, prompt, new_tokens), ask(prompt, new_tokens)
            pairs.append((direct_s, served_s))
        del pairs[0]  # to warm up
        return {
            "model": moe.path.name,
            "direct_ms": 1e3 * statistics.median(a for a, _ in pairs),
            "served_ms": 1e3 * statistics.median(b for _, b in pairs),
            "ratio": statistics.median(b / a for a, b in pairs),
            "ratios": sorted(b / a for a, b in pairs),
        }


def direct(moe: Any, prompt: str, new_tokens: int) -> float:
    """Seconds per token of what ``moe-infinity run`` does, its text going nowhere."""
    from transformers import TextStreamer

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        streamer = TextStreamer(moe.tokenizer, skip_prompt=True, skip_special_tokens=True)
        moe.generate(
            [moe.tokenizer(prompt).input_ids],
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            do_sample=False,
            streamer=streamer,
        )
    return float(moe.stats().tpot_s)


@contextlib.contextmanager
def served(moe: Any) -> Iterator[str]:
    """A server over the model, in a thread of this process."""
    from moe_infinity.server.running import bind, serve, url_of
    from moe_infinity.server.service import Service
    from moe_infinity.server.settings import ServeConfig

    sock = bind("127.0.0.1", 0)
    url, ready = url_of(sock), threading.Event()
    service = Service(moe, ServeConfig(), moe.path.name)
    server = threading.Thread(target=serve, args=(service, sock, ready.set), daemon=True)
    server.start()
    assert ready.wait(60), "the server does not start"
    yield url  # it ends with the process: only the main thread is told to stop


@contextlib.contextmanager
def client(url: str) -> Iterator[Any]:
    """A function that has the other process ask for an answer, and says its seconds per token."""
    command = [sys.executable, __file__, "--client", url]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None and process.stdout is not None
    orders, answers = process.stdin, process.stdout

    def ask(prompt: str, new_tokens: int) -> float:
        orders.write(json.dumps({"prompt": prompt, "max_tokens": new_tokens}) + "\n")
        return float(answers.readline())

    yield ask
    orders.close()
    process.wait()


def answer_orders(url: str) -> None:
    """In the other process: a streamed request for each line of standard input."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    for line in sys.stdin:
        order = json.loads(line)
        text = json.dumps(order | {"temperature": 0, "stream": True, "ignore_eos": True})
        connection.request("POST", "/v1/completions", text, {"content-type": "application/json"})
        response = connection.getresponse()
        stamps = []
        while frame := response.readline():
            if frame.startswith(b"data: {"):
                stamps.append(time.perf_counter())
        connection.close()  # a direct run may take longer than an idle connection is kept
        # The last event only says that it was the last; texts may share an event when they are
        # faster than the reader, tokens do not get lost.
        print((stamps[-1] - stamps[0]) / (order["max_tokens"] - 1), flush=True)


if __name__ == "__main__":
    main()

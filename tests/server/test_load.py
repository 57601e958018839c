"""Many clients at once, some of whom leave: each is answered, refused or gone, and nothing stays.

Prints the throughput beside a single client's.
"""

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter

import psutil
import pytest

from moe_infinity import MoE
from support.engine import assert_at_rest
from support.load import Client, Outcome
from support.serving import Local, running, wait_for

pytestmark = pytest.mark.slow

NUM_CLIENTS, NUM_REQUESTS = 50, 20
GROWTH_BYTES = 64 * 1024**2


async def _all(url: str, num_clients: int, num_requests: int, leaves: float) -> list[Outcome]:
    clients = [
        Client(url, random.Random(number), num_requests, leaves) for number in range(num_clients)
    ]
    found = await asyncio.gather(*(client.run() for client in clients))
    return [outcome for outcomes in found for outcome in outcomes]


def _rate(outcomes: list[Outcome], spent_s: float) -> str:
    tokens = sum(outcome.num_tokens for outcome in outcomes)
    return f"{tokens} tokens in {spent_s:.1f} s, {tokens / spent_s:.1f} tokens/s"


def test_nothing_is_left_behind(moe: MoE, capsys: pytest.CaptureFixture[str]) -> None:
    process = psutil.Process(os.getpid())
    with running(lambda: Local(moe, max_waiting=32)) as local:
        began_s = time.perf_counter()
        alone = asyncio.run(_all(local.url, 1, NUM_REQUESTS, leaves=0.0))
        alone_s = time.perf_counter() - began_s
        local.wait_idle()
        gc.collect()
        before_bytes, before_threads = process.memory_info().rss, threading.active_count()
        began_s = time.perf_counter()
        many = asyncio.run(_all(local.url, NUM_CLIENTS, NUM_REQUESTS, leaves=0.2))
        many_s = time.perf_counter() - began_s
        local.wait_idle()
        wait_for(lambda: local.num_connections == 0)
        gc.collect()
        outcomes = Counter(outcome.kind for outcome in many)
        with capsys.disabled():
            print(f"\n1 client: {_rate(alone, alone_s)}")
            print(f"{NUM_CLIENTS} clients: {_rate(many, many_s)}; {dict(outcomes)}")
        assert len(many) == NUM_CLIENTS * NUM_REQUESTS
        assert outcomes.keys() <= {"answered", "refused", "left"} and outcomes["answered"] > 100
        assert outcomes["left"] > 50
        # Threads that encode long texts stay for the next ones.
        assert threading.active_count() <= before_threads + 8
        assert process.memory_info().rss - before_bytes < GROWTH_BYTES
        assert local.worker.num_waiting == 0
    assert_at_rest(moe)

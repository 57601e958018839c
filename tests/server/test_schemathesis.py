"""Whatever /openapi.json lets one ask, no answer is a server's failure."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from support.serving import SMALL, Server, assert_clean

schemathesis = pytest.importorskip("schemathesis")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NUM_EXAMPLES = 40  # of each operation
BY_DESIGN = (503, 504)


@pytest.fixture(scope="module")
def small_answers() -> Iterator[Server]:
    started = Server(*SMALL, "--max-new-tokens", 2, "--name", "*", "--request-timeout", 20)
    yield started
    code, log = started.stop()
    assert code == 0, log
    assert_clean(log)


def test_no_request_makes_it_fail(small_answers: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{small_answers.url}/openapi.json")
    found = [answers(small_answers.url, each.ok()) for each in schema.get_all_operations()]
    assert sum(tried for tried, _ in found) > 200
    failed = [each for _, failures in found for each in failures]
    assert not failed, failed[:5]


def answers(url: str, operation: Any) -> tuple[int, list[tuple[Any, ...]]]:
    """How many requests were made of an operation, and those that failed."""
    tried, failed = 0, []

    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        nonlocal tried
        tried += 1
        response = case.call(base_url=url, timeout=60)
        if response.status_code >= 500 and response.status_code not in BY_DESIGN:
            failed.append((operation.label, response.status_code, response.text[:300], case.body))

    ask()
    return tried, failed

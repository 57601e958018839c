"""Whatever /openapi.json lets one ask, no answer is a server's failure."""

from collections.abc import Iterator

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
    import hypothesis

    schema = schemathesis.openapi.from_url(f"{small_answers.url}/openapi.json")
    tried, failed = 0, []
    for result in schema.get_all_operations():
        operation = result.ok()
        label = operation.label

        @hypothesis.settings(
            max_examples=NUM_EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case, label=label) -> None:  # type: ignore[no-untyped-def]
            nonlocal tried
            tried += 1
            response = case.call(base_url=small_answers.url, timeout=60)
            if response.status_code >= 500 and response.status_code not in BY_DESIGN:
                failed.append((label, response.status_code, response.text[:300], case.body))

        ask()
    assert tried > 200 and not failed, failed[:5]

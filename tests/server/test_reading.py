"""What a server says of itself: models, health, numbers, and what it does not write down."""

import pytest
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from support.serving import Server, wait_for


def test_models(server: Server, client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("bundled", "model", "moe-infinity")
    assert client.models.retrieve("bundled") == model
    assert client.models.retrieve("other").id == "other"
    assert server.get("/v1/models").json["data"][0]["max_model_len"] == 512
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


def test_health_and_page(server: Server) -> None:
    assert server.get("/health").json == {"status": "ok"}
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_stats(server: Server, client: OpenAI) -> None:
    def idle() -> bool:
        return server.get("/v1/stats").json["state"] == "idle"

    wait_for(idle)
    before = server.get("/v1/stats").json
    client.completions.create(model="bundled", prompt="One two", max_tokens=3, temperature=0)
    wait_for(idle)
    after = server.get("/v1/stats").json
    assert after["version"] == 1 and after["model"] == "bundled"
    assert after["totals"]["requests"] == before["totals"]["requests"] + 1
    assert after["totals"]["new_tokens"] == before["totals"]["new_tokens"] + 3
    assert after["last"]["new_tokens"] == 3 and after["last"]["finish"] == "length"
    assert after["queue"] == {"waiting": 0, "limit": 300}
    experts = after["experts"]
    assert experts["resident"] <= experts["slots"] == 64
    assert sum(row.count("1") for row in experts["tiers"]) == experts["resident"]
    assert "tiers" not in server.get("/v1/stats?map=false").json["experts"]
    assert server.get("/v1/stats?map=perhaps").status in (400, 422)


def test_metrics(server: Server, client: OpenAI) -> None:
    client.completions.create(model="bundled", prompt="One two", max_tokens=3)
    assert server.ask("GET", "/health", None, {"host": "evil.example"}).status == 403
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    found = {family.name: family for family in text_string_to_metric_families(reply.body.decode())}
    requests = {
        (sample.labels["endpoint"], sample.labels["outcome"]): sample.value
        for sample in found["moe_infinity_requests"].samples
        if sample.name.endswith("_total")
    }
    assert requests[("completions", "ok")] >= 1
    answers = {s.labels["status"] for s in found["moe_infinity_http_answers"].samples}
    assert answers >= {"200", "403"}
    for name in ("ttft_seconds", "tpot_seconds", "queue_seconds", "tokens", "expert_lookups",
                 "link_bytes", "seconds", "expert_slots", "requests_waiting"):  # fmt: skip
        assert f"moe_infinity_{name}" in found
    assert found["moe_infinity_expert_slots"].samples[0].value == 64


def test_openapi_names_every_path(server: Server) -> None:
    document = server.get("/openapi.json").json
    for path in (
        "chat/completions",
        "completions",
        "responses",
        "messages",
        "messages/count_tokens",
    ):
        operation = document["paths"][f"/v1/{path}"]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"/v1/models", "/health", "/metrics", "/v1/stats"} <= document["paths"].keys()
    text = server.get("/openapi.json").body.decode()
    for reference in set(
        part.split('"')[0] for part in text.split('"$ref":"#/components/schemas/')[1:]
    ):
        assert reference in document["components"]["schemas"], reference


def test_the_log_tells_of_requests_but_not_what_was_said(server: Server, client: OpenAI) -> None:
    secret = "zanzibar"
    body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 4}
    name = server.post("/v1/chat/completions", body).json["id"]
    server.post("/v1/chat/completions", body | {"temperature": secret})
    server.post("/v1/chat/completions", body | {"model": secret})
    line = wait_for(lambda: next((row for row in server.log.splitlines() if name in row), None))
    assert "chat ok: prompt" in line and "tokens/s" in line
    assert secret not in server.log

"""The application: paths to endpoints, errors to answers, and the document that describes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from openai.types.responses import Response as OpenAIResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from moe_infinity.server import chat, completions, messages, responses
from moe_infinity.server.chat_bodies import ChatBody, CompletionBody
from moe_infinity.server.guard import Guard, error_body
from moe_infinity.server.message_bodies import CountBody, MessagesBody
from moe_infinity.server.metrics import Counted
from moe_infinity.server.problems import ApiError
from moe_infinity.server.replies import ClientGone, error_response
from moe_infinity.server.response_bodies import ResponseBody
from moe_infinity.server.service import Service
from moe_infinity.versions import version_of

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
Endpoint = Callable[[Service, Request], Awaitable[Response]]


def build_app(service: Service) -> FastAPI:
    """The ASGI application over an opened model. Whoever serves it closes the service."""
    app = FastAPI(
        title="MoE-Infinity", version=version_of("moe-infinity"), docs_url=None, redoc_url=None
    )
    app.exception_handler(ApiError)(_on_api_error)
    app.exception_handler(StarletteHTTPException)(_on_http_error)
    app.exception_handler(ClientGone)(_on_gone)
    app.exception_handler(ClientDisconnect)(_on_gone)
    app.exception_handler(Exception)(_on_bug)
    _add_generating(app, service)
    _add_reading(app, service)
    max_body_bytes = service.config.body_bytes(service.moe.plan.max_context)
    app.add_middleware(Guard, config=service.config, max_body_bytes=max_body_bytes)
    if service.config.origins:  # around the guard: pages may read its refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(Counted, metrics=service.metrics)
    return app


def _add_generating(app: FastAPI, service: Service) -> None:
    _post(app, service, "/v1/chat/completions", chat.chat_completions, ChatBody, ChatCompletion)
    _post(app, service, "/v1/completions", completions.completions, CompletionBody, Completion)
    _post(app, service, "/v1/responses", responses.create_response, ResponseBody, OpenAIResponse)
    _post(app, service, "/v1/messages", messages.create_message, MessagesBody, None)
    _post(
        app, service, "/v1/messages/count_tokens", messages.count_tokens, CountBody, None,
        streams=False,
    )  # fmt: skip


def _add_reading(app: FastAPI, service: Service) -> None:
    page = resources.files("moe_infinity.server").joinpath("page/index.html").read_text()
    model = {"id": service.name, "object": "model", "created": service.created}
    model |= {"owned_by": "moe-infinity", "max_model_len": service.moe.plan.max_context}

    @app.get("/", include_in_schema=False)
    async def view() -> HTMLResponse:
        headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        return HTMLResponse(page, headers=headers | {"referrer-policy": "no-referrer"})

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests can be answered, 503 once they cannot."""
        lost = service.worker.lost
        if lost is not None:
            return JSONResponse({"status": "lost", "reason": str(lost)}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", responses={200: {"model": Model}})
    async def one_model(name: str) -> JSONResponse:
        """404 for another name than the model's."""
        service.require_model(name)
        return JSONResponse(model | {"id": name})

    @app.get("/v1/stats")
    async def stats(map: bool = True) -> JSONResponse:
        """What the live view shows; map: the state of every expert too."""
        return JSONResponse(service.live.stats(with_map=map))

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _post(
    app: FastAPI,
    service: Service,
    path: str,
    endpoint: Endpoint,
    body: type[BaseModel],
    answer: type[BaseModel] | None,
    streams: bool = True,
) -> None:
    """A path whose body is read by us, for errors that clients understand; it is described all the
    same."""

    async def answered(request: Request) -> Response:
        return await endpoint(service, request)

    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    known: dict[int | str, dict[str, Any]] = {200: {"model": answer} if answer else {}}
    if streams:
        known[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    for status in (400, 401, 404, 408, 413, 429, 500, 503, 504):
        known[status] = {"description": "An error, as this API shows it."}
    extra = {"requestBody": {"required": True, "content": content}}
    app.post(path, responses=known, openapi_extra=extra, description=endpoint.__doc__)(answered)
    own = app.openapi

    def described() -> dict[str, Any]:
        document = own()
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
        return document

    app.openapi = described  # type: ignore[method-assign]


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, error_body(request.url.path, error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, (HTTPException, StarletteHTTPException))
    known = {404: f"path: got {request.url.path!r:.200}; /openapi.json has those there are",
             405: f"method: {request.method} is not for {request.url.path!r:.200}"}  # fmt: skip
    message = known.get(error.status_code, str(error.detail))
    found = ApiError(error.status_code, message)
    response = error_response(found, error_body(request.url.path, found))
    response.headers.update(error.headers or {})
    return response


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    """It is raised again behind this, and logged by who runs the application."""
    found = ApiError(500, f"{type(error).__name__}: the server failed; its log says why")
    return error_response(found, error_body(request.url.path, found))

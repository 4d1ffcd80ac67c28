"""The routes: pictures as OpenAI's clients ask for them, what a platform and Prometheus ask, and a page for people."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL.Image import Image
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from teefusion import __version__
from teefusion.pictures import png_bytes
from teefusion.serving.api import (
    AUTO,
    ApiError,
    ErrorBody,
    GeneratedImage,
    GenerationRequest,
    GenerationResponse,
    ModelList,
    Status,
    parse,
    request_type,
)
from teefusion.serving.batches import BatchQueue, Picture, QueueFullError
from teefusion.serving.metrics import Metrics
from teefusion.serving.student import Post, ServedStudent, pixels
from teefusion.settings import ServeSettings

_BYTES_A_CHAR = 12  # at most: a pair of \uXXXX in JSON
_CLIENT_GONE = 499  # nginx's number; the metrics alone see it
_SCHEMAS = "#/components/schemas"


@dataclass(frozen=True)
class Parts:
    """What the routes work with."""

    options: ServeSettings
    post: Post
    queue: BatchQueue
    metrics: Metrics

    @property
    def student(self) -> ServedStudent:
        """The student that is served. Raises ApiError while there is none."""
        if self.post.current is None:
            raise ApiError(503, "The student is being loaded. Try again soon.", headers={"Retry-After": "5"})
        return self.post.current


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


def create_app(parts: Parts) -> FastAPI:
    """The ASGI application. Nothing is drawn unless ``parts.queue`` runs."""
    app = FastAPI(title="TeEFusion", version=__version__, docs_url=None, redoc_url=None)  # they load foreign scripts
    app.state.parts = parts
    app.include_router(_platform)
    app.include_router(_v1, dependencies=[Depends(_check_key)] if parts.options.api_key else [])
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_defect)

    def openapi() -> dict[str, Any]:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        current = parts.post.current
        kind = current.request_type if current else request_type(parts.options, parts.options.sizes)
        schema["components"]["schemas"][kind.__name__] = kind.model_json_schema()
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it
    return app


# What a platform asks

_platform = APIRouter()


@_platform.get("/healthz")
async def healthz() -> Status:
    """Whether the process answers."""
    return Status(status="ok")


@_platform.get("/readyz", responses={503: {"description": "The student is not loaded yet", "model": ErrorBody}})
async def readyz(request: Request) -> Status:
    """Whether a student is loaded and has drawn a picture."""
    return Status(status=f"serving {_parts(request).student.card.id}")


@_platform.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    return Response(_parts(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


# What people see

_PAGE = (resources.files("teefusion") / "templates" / "serve.html").read_text(encoding="utf-8")


def _policy() -> str:
    """A content security policy that lets the page's own script run, by its digest, and no other."""
    (script,) = re.findall(r"<script>(.*?)</script>", _PAGE, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_PAGE_HEADERS = {"Content-Security-Policy": _policy(), "Referrer-Policy": "no-referrer"}


@_platform.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)


# What OpenAI's clients ask

_v1 = APIRouter(prefix="/v1")
_bearer = HTTPBearer(auto_error=False, description="serve.api_key")
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is not what the schema says", "model": ErrorBody},
    413: {"description": "The body is too large", "model": ErrorBody},
    429: {
        "description": "Too many pictures wait",
        "model": ErrorBody,
        "headers": {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}},
    },
    500: {"description": "The picture could not be drawn", "model": ErrorBody},
    504: {"description": "It took longer than serve.timeout_s", "model": ErrorBody},
}
_UNREADY: dict[int | str, dict[str, Any]] = {
    401: {"description": "No API key, or a wrong one", "model": ErrorBody},
    503: {"description": "The student is not loaded yet", "model": ErrorBody},
}
_EXAMPLES = {
    "short": {"summary": "The student's own settings", "value": {"prompt": "a photo of a red star"}},
    "whole": {
        "summary": "Two pictures that can be made again",
        "value": {"prompt": "a photo of a red star", "n": 2, "size": AUTO, "seed": 7, "guidance_scale": 4.0},
    },
}
_BODY = {"schema": {"$ref": f"{_SCHEMAS}/{GenerationRequest.__name__}"}, "examples": _EXAMPLES}


async def _check_key(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    key = _parts(request).options.api_key
    given = credentials.credentials if credentials else ""
    if key is None or not secrets.compare_digest(given.encode(), key.get_secret_value().encode()):
        raise ApiError(
            401,
            "This server asks for its API key: send the header 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


@_v1.get("/models", responses=_UNREADY)
async def models(request: Request) -> ModelList:
    """The student that is served."""
    return ModelList(data=[_parts(request).student.card])


@_v1.post(
    "/images/generations",
    response_model=GenerationResponse,
    responses=_ERRORS | _UNREADY,
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": _BODY}}},
)
async def generate(request: Request) -> Response:
    """Pictures of a prompt, as base64 of PNG. Waits until they are drawn, together with those of other clients."""
    parts, started, status = _parts(request), time.monotonic(), 500
    try:
        answer = await _in_time(request, parts)
        status = 200
    except ApiError as error:
        status = error.status
        raise
    finally:
        parts.metrics.finished(status, time.monotonic() - started)
    return Response(answer.model_dump_json(), media_type="application/json")


async def _in_time(request: Request, parts: Parts) -> GenerationResponse:
    seconds = parts.options.timeout_s
    try:
        async with asyncio.timeout(seconds):
            return await _generate(request, parts)
    except TimeoutError as error:
        raise ApiError(504, f"Not drawn within {seconds:g} s. Ask for less, or later.", code="timeout") from error
    except ClientDisconnect as error:
        raise ApiError(_CLIENT_GONE, "The client went away.") from error


async def _generate(request: Request, parts: Parts) -> GenerationResponse:
    student = parts.student  # for the whole request, whatever takes its place meanwhile
    limit = _BYTES_A_CHAR * parts.options.max_prompt_chars + 10_000
    wanted = parse(student.request_type, await _read(request, limit))
    size = student.card.sizes[0] if wanted.size == AUTO else wanted.size
    steps = wanted.num_inference_steps or student.card.num_inference_steps
    first = secrets.randbelow(2**32) if wanted.seed is None else wanted.seed
    seeds = [first + k for k in range(wanted.n)]
    pictures = [Picture(student, wanted.prompt, wanted.guidance_scale, seed, steps, pixels(size)) for seed in seeds]
    try:
        orders = parts.queue.put(pictures)
    except QueueFullError as error:
        headers = {"Retry-After": str(error.retry_after_s)}
        raise ApiError(429, str(error), code="rate_limit_exceeded", headers=headers) from error
    images = await _while_connected(request, orders)
    texts = await asyncio.to_thread(_encode, images)
    return GenerationResponse(
        created=int(time.time()),
        data=[GeneratedImage(b64_json=text, seed=seed) for text, seed in zip(texts, seeds, strict=True)],
        size=size,
        guidance_scale=wanted.guidance_scale,
        num_inference_steps=steps,
        model=student.card.id,
    )


async def _read(request: Request, limit: int) -> bytes:
    """The body. Raises ApiError for one of more than ``limit`` bytes, once it has read as many."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"The body is larger than {limit} bytes.")
    return bytes(body)


async def _while_connected(request: Request, orders: Sequence[asyncio.Future[Image]]) -> list[Image]:
    """The images. Raises ClientDisconnect if the client goes first; however this ends, nothing is left to be drawn."""

    async def all_drawn() -> list[Image]:
        return [await order for order in orders]

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    drawn, left = asyncio.create_task(all_drawn()), asyncio.create_task(gone())
    try:
        await asyncio.wait({drawn, left}, return_when=asyncio.FIRST_COMPLETED)
        if not drawn.done():
            raise ClientDisconnect
        return drawn.result()
    finally:
        left.cancel()
        drawn.cancel()
        for order in orders:
            order.cancel()


def _encode(images: Sequence[Image]) -> list[str]:
    return [base64.b64encode(png_bytes(image, optimize=False)).decode() for image in images]


# Every answer that is no success has OpenAI's shape


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body.model_dump(), error.status, headers=error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, str(error.detail)).body
    return JSONResponse(body.model_dump(), error.status_code, headers=error.headers)


async def _answer_defect(request: Request, error: Exception) -> Response:
    """What nobody expected, a picture that could not be drawn among it. The log has the trace; a client gets none."""
    return await _answer_error(request, ApiError(500, "Something failed here; the server's log says what."))

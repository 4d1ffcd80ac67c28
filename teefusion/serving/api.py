"""A request and its answers, in the shape that OpenAI's clients send and read, with what a student takes besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from teefusion.settings import ServeSettings

AUTO = "auto"
_MAX_SEED = 2**53 - 1  # what a number in JavaScript holds exactly


class GenerationRequest(BaseModel):
    """What to draw. ``request_type`` narrows it to the limits of a server."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    prompt: str
    """What to draw."""
    n: int = 1
    """Pictures."""
    size: str = AUTO
    """Width and height in pixels; `auto` is the student's own."""
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    """Of the first picture's noise; the next picture's is one more. None draws one, which the answer tells."""
    guidance_scale: float
    """diffusers' s: 1 is no guidance."""
    num_inference_steps: int | None = None
    """None is the student's own number."""
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    model: str | None = None
    """Taken and not used: a server has one student."""
    user: str | None = None
    """Taken and not used."""

    @field_validator("n", "seed", "num_inference_steps", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """An integer is what JSON Schema means by it, 2.0 included."""
        return int(value) if isinstance(value, float) and value.is_integer() else value


def request_type(limits: ServeSettings, sizes: Sequence[str]) -> type[GenerationRequest]:
    """``GenerationRequest`` within the limits of a server and the sizes it draws: checks, and is in the OpenAPI."""
    fields = GenerationRequest.model_fields

    def narrowed(name: str, kind: Any, default: Any = ..., **more: Any) -> Any:
        return Annotated[kind, Field(description=fields[name].description, **more)], default

    steps = Annotated[int, Field(ge=1, le=limits.max_steps)] | None
    return create_model(
        "GenerationRequest",
        __base__=GenerationRequest,
        __doc__="What to draw.",
        prompt=narrowed("prompt", str, min_length=1, max_length=limits.max_prompt_chars, examples=["a red star"]),
        n=narrowed("n", int, 1, ge=1, le=limits.max_images),
        size=narrowed("size", Literal[tuple(dict.fromkeys((AUTO, *sizes)))], AUTO),
        guidance_scale=narrowed("guidance_scale", float, limits.guidance_scale, ge=1, le=limits.max_guidance_scale),
        num_inference_steps=narrowed("num_inference_steps", steps, None),
    )


class GeneratedImage(BaseModel):
    """One picture."""

    b64_json: str
    """PNG, in base64."""
    seed: int
    """Asked for again with `n` 1, it gives this picture."""


class GenerationResponse(BaseModel):
    """Pictures, and what made them."""

    created: int
    """Seconds since 1970."""
    data: list[GeneratedImage]
    output_format: Literal["png"] = "png"
    size: str
    guidance_scale: float
    num_inference_steps: int
    model: str


class ModelCard(BaseModel):
    """The student that is served."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """Name and version in the registry, or the end of the folder's path, or the hub id."""
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970, when it was taken up."""
    owned_by: str = "teefusion"
    digest: str | None
    """sha256 of its folder, as registered."""
    guidance_range: tuple[float, float] | None
    """Scales it was trained on."""
    guidance_scale: float
    """Of a request that names none."""
    max_guidance_scale: float
    num_inference_steps: int
    """Of a request that names none."""
    sizes: list[str]
    """The first is `auto`."""
    fusion: str
    """Variant of the fused term."""


class ModelList(BaseModel):
    """The student that is served, in a list of one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """What a platform reads."""

    status: str


class ErrorDetail(BaseModel):
    """What was wrong, and what to do."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with an answer of ``status``. ``type`` and ``code`` are OpenAI's words for kinds of mistakes."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def parse(kind: type[GenerationRequest], body: bytes) -> GenerationRequest:
    """The request of a JSON body. Raises ApiError naming every bad field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False, include_context=False)
        fields = [".".join(str(part) for part in item["loc"][:1]) for item in mistakes]
        text = "; ".join(f"{name or 'body'}: {item['msg']}" for name, item in zip(fields, mistakes, strict=True))
        raise ApiError(400, text, code="invalid_value", param=fields[0] or None) from error

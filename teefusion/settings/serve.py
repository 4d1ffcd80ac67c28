"""The HTTP server that makes pictures with a student."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, SecretStr, StringConstraints, model_validator

from teefusion.settings.section import Section

Size = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}$")]


class ServeSettings(Section):
    """The server, and how much one request may ask for. Nothing of it belongs to a run."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # a key of digits, in YAML

    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is every one of this machine."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    """Asked of clients as `Authorization: Bearer KEY`; none asks for nothing. Set it by its variable."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU, float32 on a CPU."""
    sizes: tuple[Size, ...] = ()
    """Sizes in pixels, as `1024x1024`, that may be asked for; the first is what `auto` means. None is the student's."""
    guidance_scale: float = Field(default=4.0, ge=1)
    """Of requests that name none."""
    num_steps: int = Field(default=20, gt=0)
    """Of requests that name none, where the student was not trained for a number of steps."""
    max_images: int = Field(default=10, gt=0)
    """Pictures of a request."""
    max_steps: int = Field(default=100, gt=0)
    max_guidance_scale: float = Field(default=20.0, ge=1)
    max_prompt_chars: int = Field(default=2000, gt=0)
    max_batch: int = Field(default=8, gt=0)
    """Pictures drawn together."""
    max_waiting: int = Field(default=128, gt=0)
    """Pictures that may wait; a request that does not fit any more is answered 429."""
    timeout_s: float = Field(default=120.0, gt=0)
    """For one request, waiting included."""
    follow_s: float = Field(default=30.0, gt=0)
    """Between two looks at where the alias points."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"host", "port", "api_key", "dtype", "sizes", "guidance_scale", "num_steps", "max_images", "max_steps"}
        | {"max_guidance_scale", "max_prompt_chars", "max_batch", "max_waiting", "timeout_s", "follow_s"}
    )

    @model_validator(mode="after")
    def _defaults_are_within_limits(self) -> Self:
        for name, limit in (
            ("guidance_scale", "max_guidance_scale"),
            ("num_steps", "max_steps"),
            ("max_images", "max_waiting"),
        ):
            if getattr(self, name) > getattr(self, limit):
                raise ValueError(
                    f"serve.{name} ({getattr(self, name)}) is above serve.{limit} ({getattr(self, limit)})"
                )
        return self

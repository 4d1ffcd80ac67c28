"""The comparison with the teacher, and what it has to show."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from teefusion.errors import ScorerError
from teefusion.scorer_names import DEFAULT_TOKENIZER, HpsVersion, Transparency, hps_version, parse_scorer
from teefusion.settings.section import Section


class EvaluateSettings(Section):
    """The paired comparison of student and teacher."""

    scorer: str = "bundled:shapes"
    """`hps:` and the path or s3:// URI of a published HPS checkpoint, or v2.0 or v2.1 for those on the hub; `clip:`
    (CLIPScore) or `pickscore:` and a transformers CLIP folder or hub id; `bundled:shapes`; or a transformers CLIP
    folder, whose pictures are prepared as HPS's are."""
    scorer_version: HpsVersion | None = None
    """Of an HPS checkpoint whose file name does not say."""
    scorer_revision: str | None = None
    """Commit of a scorer on the hub; none is the newest."""
    tokenizer: str = DEFAULT_TOKENIZER
    """CLIP's tokenizer for weights that come without one, as HPS's do: a folder or hub id."""
    antialias: bool = True
    """Whether pictures are antialiased when they are made smaller for the scorer. HPS's scores depend on it."""
    transparency: Transparency = "white"
    """Of pictures with an alpha channel: composited over white, or refused where they are not opaque."""
    guidance_scale: float = Field(default=4.0, ge=1, le=100)
    """s of teacher and student in the comparison."""
    num_steps: int | None = Field(default=None, ge=2, le=1000)
    """Sampler steps; none is the strategy's."""
    prompts_per_style: int = Field(default=80, gt=0)
    """Held-out prompts scored in each style, in hash order; the HPS benchmark's group size."""
    batch_size: int = Field(default=16, gt=0)
    """Pictures made together."""
    sweep: tuple[Annotated[float, Field(ge=1, le=100)], ...] = (1.0, 2.0, 4.0, 7.0)
    """Guidance scales at which teacher and student are compared beside ``guidance_scale``: score and saturation."""
    sweep_prompts: int = Field(default=16, gt=0)
    """Prompts drawn at each of them."""
    diversity_prompts: int = Field(default=32, gt=0)
    """Prompts whose pictures from several seeds are compared with each other."""
    diversity_seeds: int = Field(default=3, ge=2)
    """Pictures of each."""
    picture_prompts: int = Field(default=12, gt=0, le=64)
    """Prompts whose pictures stand in the report."""
    champion: str | None = "champion"
    """Alias of the registered version that the student is also held against; null compares with none."""
    seed: int = Field(default=1, ge=0)
    """Of the initial noise, one generator a prompt."""
    num_processes: int = Field(default=1, gt=0)
    """Processes on this machine that make and score pictures, one a GPU; above 1 they run under torchrun. On a shared
    device they slow each other down, which the measured seconds show."""

    operational: ClassVar[frozenset[str]] = frozenset({"num_processes"})

    @model_validator(mode="after")
    def _scorer_is_possible(self) -> Self:
        try:
            scorer = parse_scorer(self.scorer)
            if scorer.kind == "hps":
                hps_version(scorer.location, self.scorer_version)
        except ScorerError as error:
            raise ValueError(str(error)) from error
        if scorer.kind != "hps" and self.scorer_version is not None:
            raise ValueError(f"scorer_version is of hps: scorers alone, and scorer is {self.scorer!r}: unset it")
        if scorer.kind in ("clip", "pickscore") and not self.antialias:
            raise ValueError(f"antialias is off, but {scorer.kind}: was published with it: set it to true")
        return self


class GateSettings(Section):
    """When a student may be registered as challenger. Margins are shares of the teacher's mean score."""

    margin: float = Field(default=0.01, ge=0, lt=1)
    """Over all prompts: the lower bound of student - teacher must stay above -margin."""
    style_margin: float = Field(default=0.03, ge=0, lt=1)
    """The same in each style, where there are fewer prompts."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the two-sided paired bootstrap interval."""
    resamples: int = Field(default=10_000, ge=1000)
    min_prompts: int = Field(default=20, gt=1)
    """Fewer prompts in a style are not enough evidence; nor are so few that the interval is wider than the margin."""
    max_nfe_ratio: float = Field(default=0.5, gt=0)
    """Student's forwards a picture over the teacher's, at most."""
    min_speedup: float = Field(default=1.0, ge=0)
    """Teacher's seconds a picture over the student's, at least; 0 asks for nothing. Seconds are of the machine that
    evaluates, forwards are not."""
    min_diversity: float = Field(default=0.7, ge=0)
    """Student's diversity over the teacher's, at least; 0 asks for nothing. A few dozen prompts measure it to about a
    sixth, so nearer to 1 it refuses by chance."""
    max_guidance_residual: float = Field(default=1.0, gt=0)
    """At most; 1 is a student that learned no guidance."""
    seed: int = Field(default=0, ge=0)
    """Of the resampling."""

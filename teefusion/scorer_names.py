"""What ``evaluate.scorer`` may say, taken apart. No I/O, no heavy imports: settings are checked with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from teefusion.errors import ScorerError

BUNDLED = "bundled:shapes"
DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
"""Hub id of CLIP's byte-pair encoding, the same for ViT-L-14, ViT-H-14 and the teachers' CLIP text encoders."""
Kind = Literal["folder", "hps", "clip", "pickscore"]
HpsVersion = Literal["v2.0", "v2.1"]
Transparency = Literal["white", "refuse"]

_PREFIXED: tuple[Kind, ...] = ("hps", "clip", "pickscore")
_VERSIONS: dict[str, HpsVersion] = {"v2.0": "v2.0", "v2.1": "v2.1"}
# The published files are HPS_v2_compressed.pt and HPS_v2.1_compressed.pt.
_IN_NAME = re.compile(r"hps[-_]?v?2(?P<minor>[._]\d+)?(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class ScorerName:
    """``kind:location``; without a prefix the kind is `folder`."""

    kind: Kind
    location: str


def parse_scorer(scorer: str) -> ScorerName:
    """Raises ScorerError for a bundled scorer that there is not, or a prefix with nothing behind it."""
    prefix, _, location = scorer.partition(":")
    if prefix == "bundled" and scorer != BUNDLED:
        raise ScorerError(
            f"There is no bundled scorer {scorer!r}, only {BUNDLED!r}. Set evaluate.scorer to it or a folder."
        )
    for kind in _PREFIXED:
        if prefix == kind:
            if not location:
                raise ScorerError(f"evaluate.scorer is {scorer!r}, which names no weights. Write {kind}:WHERE.")
            return ScorerName(kind, location)
    return ScorerName("folder", scorer)


def hps_version(location: str, given: HpsVersion | None = None) -> HpsVersion:
    """The version of an HPS checkpoint: as given, or as its file is named. Raises ScorerError where neither says.

    The two are networks of one shape, so the weights themselves do not tell; and their scores do not compare.
    """
    told = _told(location.rstrip("/").rpartition("/")[2])
    if given is not None and told not in (None, given):
        raise ScorerError(
            f"{location} is {told} by its name, and evaluate.scorer_version says {given}. Correct one of them."
        )
    version = given or _VERSIONS.get(told or "")
    if version is None:
        raise ScorerError(
            f"The name of {location} does not say which HPS it is. Set evaluate.scorer_version to v2.0 or v2.1."
        )
    return version


def _told(file: str) -> str | None:
    if file in _VERSIONS:
        return file
    match = _IN_NAME.search(file)
    return match and f"v2.{(match['minor'] or '.0')[1:]}"

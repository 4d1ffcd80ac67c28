"""MLflow's model registry: versions by reference to student folders, aliases that only move to what may be trusted.

registration.py   a version of a student whose gate passed, with the tags that say where it came from
versions.py       a version as it is stored, and whether it may be trusted
sources.py        a student folder behind a version's source, here and verified
trust.py          what whoever loads a model calls
"""

from __future__ import annotations

from teefusion.registry.registration import register
from teefusion.registry.trust import TrustedModel, resolve, version_of

__all__ = ["TrustedModel", "register", "resolve", "version_of"]

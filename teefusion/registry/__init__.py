"""MLflow's model registry: versions by reference to student folders, aliases that only move to what may be trusted.

registration.py   a version of a student whose gate passed, with the tags that say where it came from
packaging.py      what makes its folder an MLflow model, which pyfunc.py loads; card.py describes it
versions.py       a version as it is stored, and whether it may be trusted
sources.py        a student folder behind a version's source, here and verified
trust.py          what whoever loads a model calls
journal.py        who was champion when, in an order on which all agree
store.py          versions, aliases and journal in MLflow
promotion.py      moving the champion, by the journal
listing.py        all of this, shown
"""

from __future__ import annotations

from teefusion.registry.registration import register
from teefusion.registry.trust import SCHEME, TrustedModel, find_champion, resolve, version_of

__all__ = ["SCHEME", "TrustedModel", "find_champion", "register", "resolve", "version_of"]

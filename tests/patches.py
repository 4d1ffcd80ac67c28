"""The two patches of Kubernetes that Helm 3 sends, applied as its API server does."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
# By which field the elements of a list are told apart; a list that is not named here is replaced as a whole.
_KEYS = {
    "containers": ("name",),
    "initContainers": ("name",),
    "env": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "imagePullSecrets": ("name",),
    "topologySpreadConstraints": ("topologyKey",),
    "ports": ("containerPort", "port"),
}


def merge_patched(old: Any, patch: Any) -> Any:
    """By a JSON merge patch (RFC 7386), as custom resources are."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patched(result.get(name), value)
    return result


def strategically_patched(old: Any, patch: Any, field: str = "") -> Any:
    """By a strategic merge patch: lists of known fields are merged element by element."""
    if isinstance(patch, dict):
        return _patched_map(old if isinstance(old, dict) else {}, patch)
    if isinstance(patch, list) and (key := _key(field, patch)):
        elements = {element[key]: element for element in old or []}
        for element in patch:
            if element.get("$patch") == "delete":
                elements.pop(element[key], None)
            else:
                elements[element[key]] = strategically_patched(elements.get(element[key]), element)
        return list(elements.values())
    return patch


def _patched_map(old: Json, patch: Json) -> Json:
    kept = patch.get("$retainKeys")
    result = {} if patch.get("$patch") == "replace" else {k: v for k, v in old.items() if kept is None or k in kept}
    for name, value in patch.items():
        if name.startswith("$"):
            continue
        if value is None:
            result.pop(name, None)
        else:
            result[name] = strategically_patched(result.get(name), value, name)
    for name, order in patch.items():
        field = name.removeprefix("$setElementOrder/")
        if field != name and (key := _key(field, order)):
            places = [element[key] for element in order]
            result[field] = sorted(result[field], key=lambda element: places.index(element[key]))
    return result


def _key(field: str, elements: list[Any]) -> str | None:
    return next((key for key in _KEYS.get(field, ()) if elements and all(key in element for element in elements)), None)

"""Kubernetes manifests of examples/kubernetes, as ``kubectl apply --kustomize`` would send them.

Only what the examples use of kustomize is understood: a namespace, resources, components, and
patches without targets, which are merged by the names of objects, containers, volumes and mounts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "kubernetes"
MERGE_KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath"}

Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    """The objects of one file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def files() -> list[Path]:
    """All manifests, also kustomizations and patches."""
    return sorted(FOLDER.rglob("*.yaml"))


def built(folder: Path, component: Path | None = None) -> list[Object]:
    """The objects of a folder's kustomization, and of a component on top of it."""
    found = list(_resources(folder))
    for kustomization in filter(None, (folder, component)):
        if kustomization is component:
            found += _resources(kustomization)
        for patch in _kustomization(kustomization).get("patches", []):
            for change in documents(kustomization / patch["path"]):
                (at,) = [i for i, one in enumerate(found) if identity(one) == identity(change)]
                found[at] = merged(found[at], change)
    place = {"metadata": {"namespace": _kustomization(folder)["namespace"]}}
    return [merged(one, place) for one in found]


def identity(one: Object) -> tuple[str, str, str]:
    """What names an object in its namespace."""
    return one["apiVersion"], one["kind"], one["metadata"]["name"]


def merged(base: Any, change: Any, field: str = "") -> Any:
    """A strategic merge: objects by their fields, lists with a merge key by that, others whole."""
    if isinstance(base, dict) and isinstance(change, dict):
        result = copy.deepcopy(base)
        for name, value in change.items():
            result[name] = merged(base.get(name), value, name)
        return result
    if isinstance(base, list) and field in MERGE_KEYS:
        key = MERGE_KEYS[field]
        changes = {one[key]: one for one in change}
        kept = [merged(one, changes.pop(one[key], one)) for one in base]
        return kept + list(changes.values())
    return copy.deepcopy(change)


def containers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each container with the object that makes its pods."""
    for one in objects:
        if one["kind"] in ("StatefulSet", "Deployment"):
            for container in one["spec"]["template"]["spec"]["containers"]:
                yield one, container


def picker_config() -> Object:
    """The configuration of the endpoint picker, a file in a ConfigMap."""
    (picker,) = [
        one for one in documents(FOLDER / "gateway" / "picker.yaml") if one["kind"] == "ConfigMap"
    ]
    (text,) = picker["data"].values()
    found: Object = yaml.safe_load(text)
    return found


def engine() -> Object:
    """How the picker reads the metrics of our servers: an entry of ``engineConfigs``."""
    (extractor,) = [
        plugin
        for plugin in picker_config()["plugins"]
        if plugin["type"] == "core-metrics-extractor"
    ]
    (entry,) = extractor["parameters"]["engineConfigs"]
    assert extractor["parameters"]["defaultEngine"] == entry["name"]
    found: Object = entry
    return found


def _kustomization(folder: Path) -> Object:
    (found,) = documents(folder / "kustomization.yaml")
    return found


def _resources(folder: Path) -> Iterator[Object]:
    for name in _kustomization(folder)["resources"]:
        path = folder / name
        if path.is_dir():
            yield from built(path.resolve())
        else:
            yield from documents(path)

"""Which files an installed package consists of, so that a sandbox can show exactly these."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_EXTRA = re.compile(r"extra\s*==")


@dataclass(frozen=True)
class Packages:
    """modules: what to import beforehand. roots: folders to import from. paths: what below them may be read."""

    modules: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


def find_packages(names: Sequence[str]) -> Packages:
    """The installed distributions `names` and all they require; PackageNotFoundError if one of `names` is not there."""
    modules: dict[str, None] = {}
    roots: dict[str, None] = {}
    paths: dict[str, None] = {}
    for wanted in names:
        own = importlib.metadata.distribution(wanted)
        modules.update(dict.fromkeys(_modules(own)))
        for found in _with_requirements(own):
            root = Path(str(found.locate_file(""))).resolve()
            roots[str(root)] = None
            for name in _top_level(found):
                paths[str(root / name)] = None
    return Packages(tuple(modules), tuple(roots), tuple(paths))


def _with_requirements(first: importlib.metadata.Distribution) -> Iterator[importlib.metadata.Distribution]:
    waiting, seen = [first], set()
    while waiting:
        distribution = waiting.pop()
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name in seen:
            continue
        seen.add(name)
        yield distribution
        for requirement in distribution.requires or ():
            if _EXTRA.search(requirement):
                continue
            try:
                waiting.append(importlib.metadata.distribution(re.match(r"[\w.-]+", requirement)[0]))
            except importlib.metadata.PackageNotFoundError:
                # A requirement of other platforms or Pythons; one that is truly missing shows when it is imported.
                continue


def _top_level(distribution: importlib.metadata.Distribution) -> list[str]:
    """First parts of the distribution's files: folders and modules, without its metadata."""
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    return sorted(top for top in tops if not top.endswith((".dist-info", ".egg-info", ".pth")))


def _modules(distribution: importlib.metadata.Distribution) -> list[str]:
    """What to import of it: its packages, or, where it has none, its modules (beside packages these are scripts)."""
    names = [top for top in _top_level(distribution) if not top.startswith("_")]
    packages = [name for name in names if name.isidentifier()]
    return packages or [name.partition(".")[0] for name in names if name.partition(".")[0].isidentifier()]

"""Functions and modules of installed packages, without importing the packages around them.

Peers are imported from where pip put them, never copied. Importing one the usual way would need all that it depends on
(ray, datasets, pandas) and would take seconds; its kernels need none of that.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ._harness import Unavailable

# The versions that the adapters in _peers.py are written for.
PEERS = {"trl": "1.16.0", "verl": "0.9.1", "liger-kernel": "0.8.5"}


def installed_versions() -> dict[str, str]:
    """Distribution -> version, of the peers that are installed."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def folder(distribution: str) -> Path:
    """Where the package lies; Unavailable, saying how to install it, where it is absent or another version."""
    wanted = PEERS[distribution]
    how = f"pip install {distribution}=={wanted} --no-deps"
    found = installed_versions().get(distribution)
    if found is None:
        raise Unavailable(f"{distribution} is not installed: {how}")
    if found != wanted:
        raise Unavailable(f"{distribution} {found} is installed, known is {wanted}: {how}")
    spec = util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"{distribution} {found} has no importable folder: {how}")
    return Path(spec.submodule_search_locations[0])


@cache
def module(distribution: str, name: str, *absolute: tuple[str, types.ModuleType]) -> types.ModuleType:
    """The module `name` of a package, run without the `__init__` of any package around it.

    It and what it imports relatively live under an alias of the package, so the package itself can still be imported.
    absolute: pairs (full name, module) that its own absolute imports shall get.
    """
    path = folder(distribution)
    alias = "_arpo_ext_peer_" + distribution.replace("-", "_")
    parents = name.split(".")[:-1]
    for depth in range(len(parents) + 1):
        shell = types.ModuleType(".".join([alias, *parents[:depth]]))
        shell.__path__ = [str(path.joinpath(*parents[:depth]))]
        sys.modules.setdefault(shell.__name__, shell)
    hidden = {full: sys.modules.get(full) for full, _ in absolute}
    sys.modules.update(absolute)
    try:
        return importlib.import_module(f"{alias}.{name}")
    finally:
        for full, before in hidden.items():
            if before is None:
                del sys.modules[full]
            else:
                sys.modules[full] = before


def place_module(distribution: str, name: str, members: Mapping[str, Any]) -> None:
    """Let relative imports of `name` inside `module`s of the package find these members."""
    full = f"_arpo_ext_peer_{distribution.replace('-', '_')}.{name}"
    for parent in (full.rpartition(".")[0], full):
        sys.modules.setdefault(parent, types.ModuleType(parent))
    vars(sys.modules[full]).update(members)


def functions(path: Path, names: Iterable[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The named functions, classes or methods ("Class.method") of a file, with the top-level names that they use.

    given: values for names that the file would import or define; used as they are.
    """
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path))
    binds = {name: statement for statement in tree.body for name in _bound(statement)}
    namespace: dict[str, Any] = {"__name__": f"_arpo_ext_peer.{path.stem}", **(given or {})}
    chosen: dict[int, ast.stmt] = {}
    found: dict[str, str] = {}
    pending = []
    for name in names:
        owner, _, method = name.partition(".")
        statement = binds[owner]
        if method:
            assert isinstance(statement, ast.ClassDef)
            statement = next(s for s in statement.body if isinstance(s, ast.FunctionDef) and s.name == method)
        found[name] = method or owner
        pending.append(statement)
    while pending:
        statement = pending.pop()
        if statement.lineno in chosen:
            continue
        chosen[statement.lineno] = statement
        used = set(_used(statement)) - set(namespace) - set(dir(builtins))
        pending += [binds[name] for name in used if name in binds]
    body = [chosen[line] for line in sorted(chosen)]
    # Annotations stay text: they name types that are not loaded.
    code = compile(ast.Module(body, []), str(path), "exec", flags=annotations.compiler_flag, dont_inherit=True)
    exec(code, namespace)
    return {name: namespace[key] for name, key in found.items()}


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement defines."""
    for node in ast.walk(statement) if isinstance(statement, (ast.Try, ast.If)) else (statement,):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (name.asname or name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _used(node: ast.AST) -> Iterator[str]:
    """Names that a statement reads, its annotations left out."""
    if isinstance(node, ast.Name):
        yield node.id
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else (value,):
            if isinstance(child, ast.AST):
                yield from _used(child)


def keep(*_args: Any, **_keywords: Any) -> Callable[[Any], Any]:
    """Stands for a decorator factory, such as a registration, that is not wanted."""
    return lambda decorated: decorated

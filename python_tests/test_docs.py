"""The documents stay true: their Python runs, their commands are run by CI or by the tests, their links resolve."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/**/README.md")) if p.is_file()
)
DOCUMENTS = [p for p in DOCUMENTS if not {".venv", "build", "runs"} & set(p.relative_to(ROOT).parts)]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_run(path, capsys):
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), {})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_run_by_ci(path):
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for block in blocks(path, "sh") for line in block.splitlines()]
    assert not [line for line in lines if line and line not in ci]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_resolve(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]

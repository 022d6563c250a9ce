"""The tutorial's files, written into an empty folder and run as a reader would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "add_a_method.md"
FILES = dict(re.findall(r"```(?:python|yaml) (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_files_are_found() -> None:
    assert list(FILES) == ["nm_sparsity.py", "test_nm_sparsity.py", "nm-digits.yaml"]


@pytest.mark.slow
def test_the_tutorials_tests_pass(folder: Path) -> None:
    output = run(folder, "pytest", "-q", "--doctest-modules", "-p", "no:cacheprovider", ".")
    # the doctest, two masks, three errors, the suite twice, instances, plain and federated
    assert re.search(r"\b27 passed", output), output


@pytest.mark.slow
def test_the_recipe_reaches_the_readers_own_module(folder: Path) -> None:
    run(folder, "lightning_fedsparse.cli", "run", "nm-digits.yaml")
    history = (folder / "runs" / "nm-digits" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(history) == 3
    assert re.search(r'"sparsity": 0\.(49|50)', history[-1])

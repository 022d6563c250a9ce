"""What is built is what is in the tree, and what is installed works away from the checkout."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from site import getsitepackages

import pytest

import lightning_fedsparse.callbacks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FOLDERS = {  # folder in the tree -> folder in the wheel
    "lightning_fedsparse": "lightning_fedsparse",
    "callbacks": "lightning_fedsparse/callbacks",
    "recipes": "lightning_fedsparse/recipes",
}
SHIPPED_SUFFIXES = {".py", ".yaml", ".npz"}
SHIPPED_NAMES = {"py.typed", "NOTICE.md"}


def run(command: Iterable[str | Path], cwd: Path) -> str:
    """Standard output of a command that must succeed, run without PYTHONPATH so that only what is installed is seen."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["COLUMNS"] = "200"  # tables keep long names whole
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments} in {cwd} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_below(folder: Path) -> list[Path]:
    """Real files below a folder, relative to it; links are left out and not followed."""
    found = []
    for parent, _, names in os.walk(folder):
        paths = [Path(parent, name) for name in names]
        found += [path.relative_to(folder) for path in paths if not path.is_symlink()]
    return sorted(found)


def shipped_files(root: Path) -> dict[str, bytes]:
    """Content of each file that the wheel must hold, by its name in the wheel, read from the folders of a tree."""
    return {
        f"{target}/{path.as_posix()}": (root / source / path).read_bytes()
        for source, target in PACKAGE_FOLDERS.items()
        for path in files_below(root / source)
        if path.suffix in SHIPPED_SUFFIXES or path.name in SHIPPED_NAMES
    }


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """Content of each file of a wheel by name; none may be a link."""
    with zipfile.ZipFile(wheel) as archive:
        assert not [item.filename for item in archive.infolist() if stat.S_ISLNK(item.external_attr >> 16)]
        return {item.filename: archive.read(item) for item in archive.infolist() if not item.is_dir()}


@dataclass(frozen=True)
class Build:
    """A copy of the tree and what was built from it."""

    source: Path
    sdist: Path
    wheel: Path  # straight from the tree
    wheel_from_sdist: Path


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout: git tells which files belong to the tree")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():  # else: deleted, but not yet in the index
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation"]
    run([*command, "--outdir", folder / "all"], source)  # the sdist, and the wheel from the sdist
    run([*command, "--outdir", folder / "direct", "--wheel"], source)
    (sdist,) = (folder / "all").glob("*.tar.gz")
    (wheel_from_sdist,) = (folder / "all").glob("*.whl")
    (wheel,) = (folder / "direct").glob("*.whl")
    return Build(source, sdist, wheel, wheel_from_sdist)


@pytest.mark.slow
def test_wheel_holds_the_files_of_the_tree(build: Build) -> None:
    expected = shipped_files(build.source)
    built = wheel_files(build.wheel)
    modules = {name: content for name, content in built.items() if ".dist-info/" not in name}
    assert modules.keys() == expected.keys()
    assert modules == expected
    assert {name.partition(".dist-info/")[2] for name in built.keys() - modules.keys()} >= {
        "licenses/LICENSE",
        "licenses/lightning_fedsparse/datasets/NOTICE.md",
        "entry_points.txt",
    }


@pytest.mark.slow
def test_sdist_holds_no_link_and_builds_the_same_wheel(build: Build) -> None:
    with tarfile.open(build.sdist) as archive:
        assert not [item.name for item in archive.getmembers() if item.issym() or item.islnk()]
    assert build.wheel_from_sdist.name == build.wheel.name
    assert wheel_files(build.wheel_from_sdist) == wheel_files(build.wheel)


PROBE = """
import importlib, importlib.resources, json, pkgutil, sys
import lightning_fedsparse, lightning_fedsparse.callbacks as callbacks

def yaml_below(folder, prefix=""):
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from yaml_below(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name

modules = [module.name for module in pkgutil.walk_packages(lightning_fedsparse.__path__, "lightning_fedsparse.")]
for name in modules:
    importlib.import_module(name)
print(json.dumps({
    "files": [lightning_fedsparse.__file__, callbacks.__file__],
    "editable": [name for name in sys.modules if name.startswith("__editable__")],
    "modules": modules,
    "callbacks": [name for name in callbacks.__all__ if callable(getattr(callbacks, name))],
    "recipes": list(yaml_below(importlib.resources.files("lightning_fedsparse.recipes"))),
}))
"""


@pytest.mark.slow
def test_installed_wheel_works_from_another_folder(build: Build, tmp_path: Path) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run([sys.executable, "-m", "venv", environment], tmp_path)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    where = run([scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], elsewhere)
    packages = Path(where.strip())
    # torch and the rest are found in the environment of this test; the .pth files in there, an editable install's
    # among them, are not read for a folder that is named by a .pth file itself
    (packages / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in getsitepackages()))
    run([scripts / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", build.wheel], elsewhere)

    found = json.loads(run([scripts / "python", "-c", PROBE], elsewhere).splitlines()[-1])
    expected = [Path(name) for name in shipped_files(build.source)]
    modules = {".".join(path.with_suffix("").parts) for path in expected if path.suffix == ".py"}
    recipes = [
        path.relative_to("lightning_fedsparse/recipes").as_posix() for path in expected if path.suffix == ".yaml"
    ]
    assert not found["editable"]
    assert [Path(name) for name in found["files"]] == [
        packages / "lightning_fedsparse" / "__init__.py",
        packages / "lightning_fedsparse" / "callbacks" / "__init__.py",
    ]
    assert {name.removesuffix(".__init__") for name in modules} == {"lightning_fedsparse", *found["modules"]}
    assert found["callbacks"] == list(lightning_fedsparse.callbacks.__all__)
    assert sorted(found["recipes"]) == sorted(recipes)

    listing = run([scripts / "fedsparse", "list"], elsewhere)
    assert [recipe for recipe in recipes if Path(recipe).stem not in listing] == []
    assert list(elsewhere.iterdir()) == []


def imported_names(source: str) -> set[str]:
    """Absolute module names that the import statements of a source text name, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def test_imported_names() -> None:
    source = "import a.b as c, d\ndef f():\n    from e.f import g\nfrom . import h\nfrom .i import j"
    assert imported_names(source) == {"a.b", "d", "e.f"}


def test_nothing_imports_the_folders_by_their_top_level_names() -> None:
    # `import callbacks.x` works from the repository root, but makes a second copy of every class
    offenders = {
        f"{folder}/{path}": sorted(names)
        for folder in (*PACKAGE_FOLDERS, "tests")
        for path in files_below(ROOT / folder)
        if path.suffix == ".py"
        and (
            names := {
                name
                for name in imported_names((ROOT / folder / path).read_text(encoding="utf-8"))
                if name.partition(".")[0] in ("callbacks", "recipes")
            }
        )
    }
    assert offenders == {}


@pytest.mark.slow
def test_doctests_of_callbacks_are_collected_through_the_link() -> None:
    # without the link `lightning_fedsparse/callbacks` they would be skipped without a word
    written = {path.name for path in (ROOT / "callbacks").glob("*.py") if ">>> " in path.read_text(encoding="utf-8")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "lightning_fedsparse"]
    collected = run(command, ROOT).splitlines()
    link = "lightning_fedsparse/callbacks/"
    assert {item.removeprefix(link).partition("::")[0] for item in collected if item.startswith(link)} == written


@pytest.mark.slow
def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    # counted on top of lightning.pytorch, which brings matplotlib along where it is installed
    probe = (
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_fedsparse; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = set(run([sys.executable, "-c", probe], tmp_path).split())
    heavy = {"matplotlib", "matplotlib.pyplot", "torch_pruning", "hypothesis", "lightning_fedsparse.datasets"}
    assert "lightning_fedsparse" in loaded
    assert loaded & heavy == set()

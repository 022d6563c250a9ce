"""Every test starts from the same process state and leaves none behind; real data comes from the environment."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import lightning.pytorch  # noqa: F401  # sets its loggers to INFO when first imported: before the levels below
import numpy as np
import pytest
import torch

# derandomize: a failure on CI is then the same failure on the next run and on every machine
hypothesis.settings.register_profile("tests", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("tests")

# the fuzz target is no test, and imports atheris, which tests do without
collect_ignore = ["fuzz/fuzz_payload.py"]

torch.set_num_threads(1)
for _name in ("lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _isolated_process_state() -> Iterator[None]:
    """Seed the global generators and one torch thread; put back environment, generators and threads afterwards."""
    environment = dict(os.environ)
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    random.setstate(generators[0])
    np.random.set_state(generators[1])
    torch.set_rng_state(generators[2])
    torch.set_num_threads(1)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(autouse=True)
def _nothing_written_to_cwd(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Run in an empty folder that must stay empty: no `lightning_logs`, no checkpoints, no stray file.

    A test that wants to write below the current directory changes to its own ``tmp_path``.
    """
    cwd = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(cwd)
    yield
    stray = sorted(str(path.relative_to(cwd)) for path in cwd.rglob("*"))
    assert not stray, f"the test left files in the current directory: {stray}"


@pytest.fixture
def data_root() -> Path:
    """The folder that FEDSPARSE_DATA names, with one sub-folder per data set; skips where it is not set."""
    folder = os.environ.get("FEDSPARSE_DATA")
    if not folder:
        pytest.skip("needs real data: FEDSPARSE_DATA names no folder")
    return Path(folder)


@pytest.fixture
def real_data(data_root: Path) -> Callable[[str], Path]:
    """``real_data("fashion-mnist")``: the folder of one data set; skips where it is absent."""

    def folder_of(name: str) -> Path:
        folder = data_root / name
        if not folder.is_dir():
            pytest.skip(f"needs real data: no folder {name!r} in FEDSPARSE_DATA")
        return folder

    return folder_of

"""Peers, each in an environment of its own, whose rounds stand between ours: pfl-research's simulator and Flower's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from speed_apart import write_clients
from speed_work import Work

__all__ = ["ENVIRONMENTS", "Peer"]

ENVIRONMENTS = Path("runs", "peers")
# torch by itself first: what comes after then asks for no other build of it
_PACKAGES = {
    "speed_pfl": ["pfl==0.6.0", "torch<3", "packaging<26"],
    "speed_flower": ["flwr[simulation]>=1.42", f"lightning=={version('lightning')}"],
}
_TORCH = f"torch=={version('torch').split('+')[0]}"


class Peer:
    """A peer's process.

    Args:
        module: Its program, beside this file.
        work: What its clients train on.
        options: Of its program.

    It is installed into ``ENVIRONMENTS``, once, for the Python that runs this, which the peer must support.

    Attributes:
        version: The peer's.
    """

    def __init__(self, module: str, work: Work, *options: str) -> None:
        python = _installed(module)
        self.version = _version(python, _PACKAGES[module][0])
        self._folder = tempfile.TemporaryDirectory()
        examples, clients = work.examples, work.clients
        images, classes = examples.batch(torch.arange(clients * (len(examples) // clients)))
        write_clients(
            Path(self._folder.name),
            images.numpy().reshape(clients, -1, *images.shape[1:]),
            classes.numpy().reshape(clients, -1),
        )
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": self._folder.name,
        }
        self._process = subprocess.Popen(
            [str(python), "-c", f"import {module}; {module}.main()", self._folder.name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=self._folder.name,
        )

    def round(self, index: int) -> float:
        """Have it run its next round; its seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith('{"seconds"'):
                seconds: float = json.loads(line)["seconds"]
                return seconds
        raise RuntimeError(f"expected seconds of round {index + 1}, the peer's process ended")

    def stop(self) -> None:
        """Let its process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._folder.cleanup()


def _installed(module: str) -> Path:
    """The peer's Python, once it is installed."""
    folder = ENVIRONMENTS.resolve() / module.removeprefix("speed_")
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in ([_TORCH], _PACKAGES[module]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


def _version(python: Path, requirement: str) -> str:
    """Version of an installed package."""
    name = re.split(r"[^a-z]", requirement)[0]
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

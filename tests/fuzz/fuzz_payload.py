"""A coverage-guided fuzz target for the decoder: the checks of ``invariants.py`` under libFuzzer.

    python3.11 -m venv .fuzz && .fuzz/bin/pip install -c constraints.txt atheris pytest hypothesis -e .
    mkdir -p found
    .fuzz/bin/python -m tests.fuzz.fuzz_payload -runs=300000 -max_len=4096 -rss_limit_mb=1024 -timeout=5 found tests/fuzz/corpus
    .fuzz/bin/python -m tests.fuzz.fuzz_payload --write-corpus tests/fuzz/corpus

The last line writes the inputs anew that a run begins with. libFuzzer finds crashes (the checks' AssertionErrors among
them), hangs (``-timeout``, in seconds) and memory beyond a limit (``-rss_limit_mb``); it keeps in ``found`` what
reached code that nothing before had reached.
"""

import sys
import warnings
from pathlib import Path

import atheris
import torch

# the decoder, and the minimal one, are compiled so that they report which branches they take
with atheris.instrument_imports(include=["lightning_fedsparse", "tests"]):
    from tests.fuzz.invariants import check, write_corpus


def main() -> None:
    if sys.argv[1:2] == ["--write-corpus"]:
        write_corpus(Path(sys.argv[2]))
        return
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    accepted = [0, 0]

    def one_input(data: bytes) -> None:
        accepted[check(data)] += 1
        if sum(accepted) % 50_000 == 0:
            print(f"{sum(accepted)} inputs, {accepted[True]} accepted", flush=True)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The command: runs end to end in a run folder, says one sentence about bad input, and nothing of Lightning's own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_fedsparse.cli import main
from lightning_fedsparse.failures import TooFewClientsError
from lightning_fedsparse.recipe import shipped_recipes

SHORT = ("--loop.rounds=2", "--loop.trainer.max_epochs=1", "--loop.trainer.limit_train_batches=2")
LIGHTNING_WORDS = (
    "GPU available",
    "TPU",
    "Tip",
    "Epoch ",
    "Params",
    "lightning_logs",
    "Trainer.fit",
    "Seed set",
    "Warning",
)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # the command looks for the user's own classes in the working directory
    monkeypatch.setattr(sys, "path", list(sys.path))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


# -- run and resume ----------------------------------------------------------------------------------------------------


def test_quickstart_runs_and_leaves_its_results_in_one_folder(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SHORT]) == 0
    out, err = capfd.readouterr()
    assert files(Path()) == [
        "runs/quickstart/.lock",
        "runs/quickstart/checkpoints/last.ckpt",
        "runs/quickstart/history.jsonl",
        "runs/quickstart/recipe.yaml",
    ]
    assert [row["round"] for row in history(Path("runs/quickstart"))] == [0, 1, 2]
    assert err == ""
    assert not [word for word in LIGHTNING_WORDS if word in out]
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["round", "0/2", "1/2", "2/2"]
    for words in ("done", "test_accuracy", "x less", "saved in runs/quickstart", "history.jsonl", "fedsparse resume"):
        assert words in out


def test_uploads_are_sparse_and_counted() -> None:
    assert main(["run", "quickstart", *SHORT]) == 0
    first, _, last = history(Path("runs/quickstart"))
    assert first["bytes_up"] == 0
    # half of the weights are zero from the start; positions are known to both sides
    assert 0 < last["bytes_up"] < 0.5 * last["dense_bytes_up"]
    assert last["total_bytes_up"] > last["bytes_up"]


def test_the_saved_recipe_gives_the_same_run_again() -> None:
    assert main(["run", "quickstart", *SHORT, "--seed_everything=5"]) == 0
    assert main(["run", "runs/quickstart/recipe.yaml"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["quickstart", "quickstart-2"]
    assert history(Path("runs/quickstart")) == history(Path("runs/quickstart-2"))


def test_resume_goes_on_as_if_nothing_had_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SHORT]) == 0
    capsys.readouterr()
    assert main(["resume", "runs/quickstart", "--loop.rounds=3"]) == 0
    assert "going on after round 2 of 3" in capsys.readouterr().out
    assert [row["round"] for row in history(Path("runs/quickstart"))] == [0, 1, 2, 3]
    assert "rounds: 3" in Path("runs/quickstart/recipe.yaml").read_text()
    assert main(["resume", "runs/quickstart"]) == 0
    assert "nothing left to do: 3 of 3 rounds are done" in capsys.readouterr().out


def test_a_resumed_run_that_does_nothing_leaves_its_recipe_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SHORT]) == 0
    before = Path("runs/quickstart/recipe.yaml").read_text()
    assert main(["resume", "runs/quickstart", "--loop.checkpointing.every_n_rounds=2"]) == 0
    assert "nothing left to do: 2 of 2 rounds are done" in capsys.readouterr().out
    assert main(["resume", "runs/quickstart", "--loop.rounds=1"]) == 1
    assert "expected at least 2 rounds, as many as the checkpoint has done, got 1" in capsys.readouterr().err
    assert Path("runs/quickstart/recipe.yaml").read_text() == before


def test_what_a_resumed_run_turns_down_does_not_stay_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SHORT]) == 0
    before = Path("runs/quickstart/recipe.yaml").read_text()
    assert main(["resume", "runs/quickstart", "--model.network.num_classes=11", "--loop.callbacks.sparsity=0.5"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: expected the recipe that the checkpoint was made with, got another: "
        "model.init_args.network.init_args.num_classes: 10 -> 11, loop.callbacks.init_args.sparsity: 0.9 -> 0.5; "
    )
    assert Path("runs/quickstart/recipe.yaml").read_text() == before


def test_the_folder_is_what_the_recipe_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SHORT, "--loop.default_root_dir=here"]) == 0
    assert "here/history.jsonl" in files(Path())
    assert "default_root_dir: null" in Path("here/recipe.yaml").read_text()
    assert main(["run", "quickstart", *SHORT, "--loop.default_root_dir=here"]) == 2
    assert "found a run in here: continue it with `fedsparse resume here`" in capsys.readouterr().err


def test_a_run_that_failed_at_once_leaves_its_name_free(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SHORT, "--loop.clients_per_round=21"]) == 1
    assert capsys.readouterr().err == "error: expected at most 20 clients per round, as many as there are, got 21\n"
    assert main(["run", "quickstart", *SHORT]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["quickstart"]


def test_a_recipe_without_federation_runs_and_resumes(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pruning-only", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]) == 0
    out, err = capfd.readouterr()
    kept = [".lock", "checkpoints/last.ckpt", "logs/version_0/metrics.csv", "recipe.yaml"]
    assert files(Path("runs/pruning-only")) == kept
    assert not [word for word in LIGHTNING_WORDS if word in out + err]
    for words in ("test_accuracy", "sparsity", "saved in runs/pruning-only", "--trainer.max_epochs=2"):
        assert words in out
    assert main(["resume", "runs/pruning-only", "--trainer.max_epochs=2"]) == 0
    rows = Path("runs/pruning-only/logs/version_1/metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("2,")


def test_a_users_own_model_is_found_in_the_working_directory() -> None:
    Path("my_models.py").write_text(
        "from lightning_fedsparse.models import DigitsCNN\nclass Mine(DigitsCNN):\n    pass\n", encoding="utf-8"
    )
    assert main(["run", "quickstart", *SHORT, "--model.network=my_models.Mine"]) == 0
    assert "my_models.Mine" in Path("runs/quickstart/recipe.yaml").read_text()


# -- list, show, help --------------------------------------------------------------------------------------------------


def test_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped_recipes())


def test_show_prints_the_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "quickstart"]) == 0
    assert capsys.readouterr().out == shipped_recipes()["quickstart"].read_text(encoding="utf-8")


def test_show_prints_the_base_below(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "feddip-turbofan"]) == 0
    own, base = (shipped_recipes()[name].read_text(encoding="utf-8") for name in ("feddip-turbofan", "fedavg-turbofan"))
    assert capsys.readouterr().out == f"{own}\n{base}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["run", "resume", "list", "show"]),
        (["run", "--help"], ["RECIPE", "--KEY=VALUE"]),
        (["run", "quickstart", "--help"], ["--loop.rounds", "--loop.trainer.max_epochs", "--seed_everything"]),
    ],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "quikstart"], 2, "unknown recipe 'quikstart': did you mean quickstart?"),
        (["show", "nope"], 2, "unknown recipe 'nope': fedsparse list shows the shipped recipes"),
        (["run", "quickstart", "--loop.roundz=3"], 2, "unknown key loop.roundz: did you mean rounds?"),
        (["run", "quickstart", "--loop.rounds=many"], 2, "expected loop.rounds to be an int, got 'many'"),
        (["run", "quickstart", "--loop.rounds=0"], 2, "expected rounds to be at least 1, got 0"),
        (
            ["run", "quickstart", "--loop.callbacks.sparsity=1.5"],
            2,
            "expected a sparsity schedule with values in [0, 1)",
        ),
        (["resume", "nowhere"], 2, "expected a run folder with a recipe.yaml, found none in nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert files(Path()) == []


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew() -> None:
    assert main(["run", "quickstart", *SHORT]) == 0
    folder = Path("runs/quickstart")
    whole = history(folder)
    (folder / "checkpoints/last.ckpt").unlink()
    rows = (folder / "history.jsonl").read_text().splitlines()
    (folder / "history.jsonl").write_text(rows[0] + "\n" + rows[1][:100])
    assert main(["resume", "runs/quickstart"]) == 0
    assert history(folder) == whole


def test_an_error_that_is_not_a_sentence_of_ours_keeps_its_traceback() -> None:
    Path("my_broken.py").write_text(
        "from torch import nn\nclass Broken(nn.Module):\n    def __init__(self):\n        raise ValueError('mine')\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="^mine$"):
        main(["run", "quickstart", "--model.network=my_broken.Broken"])


@pytest.mark.parametrize(
    "given",
    [
        ["--loop.faults.min_clients=2", "--loop.faults.when_fewer=skip", "--loop.screen.norm=5"],
        ["--config=policy.yaml"],
    ],
)
def test_what_becomes_of_failing_clients_is_in_the_recipe(given: list[str]) -> None:
    Path("policy.yaml").write_text(
        "loop:\n"
        "  faults: {class_path: lightning_fedsparse.faults.FaultPolicy, init_args: {min_clients: 2, when_fewer: skip}}\n"
        "  screen: {class_path: lightning_fedsparse.screening.Screen, init_args: {norm: 5.0}}\n",
        encoding="utf-8",
    )
    assert main(["run", "quickstart", *SHORT, *given]) == 0
    recipe = yaml.safe_load(Path("runs/quickstart/recipe.yaml").read_text(encoding="utf-8"))["loop"]
    faults = recipe["faults"].get("init_args", recipe["faults"])
    assert (faults["min_clients"], faults["when_fewer"], faults["tries"]) == (2, "skip", 1)
    assert recipe["screen"].get("init_args", recipe["screen"])["norm"] == 5.0
    assert main(["run", "runs/quickstart/recipe.yaml", "--loop.default_root_dir=again"]) == 0
    assert history(Path("again")) == history(Path("runs/quickstart"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--loop.faults.min_clients=0", "expected min_clients to be at least 1, got 0"),
        ("--loop.faults.when_fewer=retry", "expected loop.faults.when_fewer"),
        ("--loop.faults.min_clients=100", "expected min_clients of at most 5, the clients per round, got 100"),
        ("--loop.screen.cosine=2", "expected cosine in [-1, 1), got 2.0"),
    ],
)
def test_a_policy_that_is_wrong_is_an_error_at_once(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "quickstart", *SHORT, given]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_what_every_client_raises_keeps_its_traceback() -> None:
    Path("my_wrong.py").write_text(
        "from torch import nn\n"
        "class Wrong(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x.flatten(1)) if not self.training else self.no_such(x)\n",
        encoding="utf-8",
    )
    with pytest.raises(TooFewClientsError, match="has no attribute 'no_such'") as caught:
        main(["run", "quickstart", *SHORT, "--model.network=my_wrong.Wrong"])
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_sentence_of_ours_from_every_client_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SHORT, "--loop.trainer.max_epochs=0"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: expected at least 1 of the 5 clients of round 1 to return, got 0 (5 no step); client '"
    )


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_quickstart_learns_with_few_bytes() -> None:
    assert main(["run", "quickstart"]) == 0
    rows = history(Path("runs/quickstart"))
    assert rows[-1]["metrics"]["test_accuracy"] > 0.94
    assert 0.89 < rows[-1]["sparsity"] <= 0.9
    sent = rows[-1]["total_bytes_down"] + rows[-1]["total_bytes_up"]
    assert sent < 0.22 * sum(row["dense_bytes_down"] + row["dense_bytes_up"] for row in rows)


@pytest.mark.slow
def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "lightning_fedsparse.cli", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "lightning_fedsparse.cli", "show", "quickstart"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_with_what_was_done() -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_fedsparse.cli",
        "run",
        "quickstart",
        "--loop.checkpointing.every_n_rounds=1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a shell's background job ignores the signal, and so would its children; one that is handled here is theirs to handle
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        record = Path("runs/quickstart/history.jsonl")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (record.exists() and record.read_text().count("\n") >= 3):
            time.sleep(0.05)
        signal.signal(signal.SIGINT, before)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    rounds = [row["round"] for row in history(Path("runs/quickstart"))]
    assert rounds == list(range(len(rounds)))
    shown = re.search(r"interrupted after (\d+) of 20 rounds", out)
    # the signal may come between a round's record and its row
    assert shown is not None
    assert rounds[-1] - int(shown[1]) in (0, 1)
    assert "last checkpoint: runs/quickstart/checkpoints/last.ckpt" in out
    assert "go on with: fedsparse resume runs/quickstart" in out
    assert main(["resume", "runs/quickstart", f"--loop.rounds={rounds[-1] + 1}"]) == 0

"""What the loop asks of methods on the server, and of its caller, in one sentence each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import SparsityCallback
from lightning_fedsparse.rounds import ServerRound, UploadRule
from lightning_fedsparse.server import ServerState
from tests.test_loop import QUIET, Net, clients, loaders


def test_the_global_model_before_a_run_is_one_sentence() -> None:
    loop = FederatedLoop(1, 1, console=False)
    with pytest.raises(
        RuntimeError, match=r"expected fit\(\) before the global model is asked for, got a FederatedLoop"
    ):
        _ = loop.state
    with pytest.raises(RuntimeError, match=r"expected fit\(\)"):
        loop.load_submodel(Net(), 0.5)


class Rule(SparsityCallback):
    def __init__(self, **rule: Any) -> None:
        super().__init__()
        self.rule = UploadRule(**rule)

    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule:
        return self.rule


def test_methods_agree_on_what_an_upload_holds() -> None:
    class Other(Rule):
        pass

    FederatedLoop(1, 2, [Rule(), Other()], console=False, evaluation=QUIET).fit(Net(), loaders(clients()))
    loop = FederatedLoop(1, 2, [Rule(extra_values=1), Rule(extra_values=2)], console=False, evaluation=QUIET)
    with pytest.raises(ValueError, match="expected methods that agree on what an upload holds"):
        loop.fit(Net(), loaders(clients()))
    loop = FederatedLoop(1, 2, [Rule(), Other(absent="unheld")], console=False, evaluation=QUIET)
    with pytest.raises(ValueError, match="expected methods that agree on what an upload holds, got .*'Other'.*unheld"):
        loop.fit(Net(), loaders(clients()))


class Replaces(SparsityCallback):
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        return replace(state, weights={name: weight.clone() for name, weight in state.weights.items()})


def test_other_tensors_as_weights_are_refused_beside_a_server_optimizer() -> None:
    FederatedLoop(2, 2, [Replaces()], console=False, evaluation=QUIET).fit(Net(), loaders(clients()))
    optimizer = partial(torch.optim.SGD, lr=0.5)
    loop = FederatedLoop(2, 2, [Replaces()], server_optimizer=optimizer, console=False, evaluation=QUIET)
    with pytest.raises(ValueError, match="expected server hooks to change weights in place .*, got another tensor as"):
        loop.fit(Net(), loaders(clients()))

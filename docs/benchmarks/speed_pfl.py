"""pfl-research's own simulator on the CIFAR-10 workload, set up as its benchmark is; runs in an environment with pfl 0.6.0."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from speed_apart import BATCH, COHORT, RATE, SimpleCNN, Turns, read_clients
from torch import Tensor


class Network(SimpleCNN):
    """Its benchmark keeps channels last and turns each batch, after which convolutions work in that layout."""

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        self.train()
        return F.cross_entropy(self(images.permute(0, 3, 1, 2)), classes)

    def metrics(self, images: Tensor, classes: Tensor) -> dict[str, Any]:
        return {}


class Rounds(TrainingProcessCallback):
    def __init__(self) -> None:
        self._turns = Turns()

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self._turns.wait()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self._turns.report()
        self._turns.wait()
        return False, Metrics()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    images, classes = read_clients(sys.argv[1])
    users = {
        user: [torch.from_numpy(np.ascontiguousarray(x.transpose(0, 2, 3, 1))), torch.from_numpy(np.array(y))]
        for user, (x, y) in enumerate(zip(images, classes, strict=True))
    }
    data = FederatedDataset.from_slices(users, get_user_sampler("minimize_reuse", list(users)))
    network = Network()
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=10**6, evaluation_frequency=10**6, train_cohort_size=COHORT, val_cohort_size=0
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()]),
        model=model,
        model_train_params=NNTrainHyperParams(local_learning_rate=RATE, local_num_epochs=1, local_batch_size=BATCH),
        callbacks=[Rounds()],
    )

"""The methods, as Lightning callbacks: each works in any ``Trainer``, and in a ``FederatedLoop``."""

from lightning_fedsparse.callbacks.base import CallbackList, EffectiveWeightCallback, SparsityCallback
from lightning_fedsparse.callbacks.compression_memory import CompressionMemory
from lightning_fedsparse.callbacks.dense_statistics import DenseStatistics
from lightning_fedsparse.callbacks.dynamic_pruning import DynamicPruning
from lightning_fedsparse.callbacks.error_feedback import ErrorFeedback
from lightning_fedsparse.callbacks.feddip import feddip
from lightning_fedsparse.callbacks.incremental_regularization import IncrementalRegularization
from lightning_fedsparse.callbacks.magnitude_pruning import MagnitudePruning
from lightning_fedsparse.callbacks.round_learning_rate import RoundLearningRate
from lightning_fedsparse.callbacks.sparsity_monitor import SparsityMonitor

__all__ = [
    "CallbackList",
    "CompressionMemory",
    "DenseStatistics",
    "DynamicPruning",
    "EffectiveWeightCallback",
    "ErrorFeedback",
    "IncrementalRegularization",
    "MagnitudePruning",
    "RoundLearningRate",
    "SparsityCallback",
    "SparsityMonitor",
    "feddip",
]

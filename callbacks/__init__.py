"""The methods, as Lightning callbacks: each works in any ``Trainer``, and in a ``FederatedLoop``."""

from lightning_fedsparse.callbacks.activation_pruning import ActivationPruning
from lightning_fedsparse.callbacks.base import CallbackList, EffectiveWeightCallback, SparsityCallback
from lightning_fedsparse.callbacks.collapse_monitor import CollapseMonitor
from lightning_fedsparse.callbacks.compression_memory import CompressionMemory
from lightning_fedsparse.callbacks.dense_statistics import DenseStatistics
from lightning_fedsparse.callbacks.device_monitor import DeviceMonitor
from lightning_fedsparse.callbacks.dynamic_pruning import DynamicPruning
from lightning_fedsparse.callbacks.dynamic_sparse_training import DynamicSparseTraining
from lightning_fedsparse.callbacks.error_feedback import ErrorFeedback
from lightning_fedsparse.callbacks.feddip import feddip
from lightning_fedsparse.callbacks.fiarse import fiarse
from lightning_fedsparse.callbacks.fixed_mask import FixedMask
from lightning_fedsparse.callbacks.forward_pruning import ForwardPruning
from lightning_fedsparse.callbacks.gradient_pruning import GradientPruning
from lightning_fedsparse.callbacks.importance_masking import ImportanceMasking
from lightning_fedsparse.callbacks.incremental_regularization import IncrementalRegularization
from lightning_fedsparse.callbacks.magnitude_pruning import MagnitudePruning
from lightning_fedsparse.callbacks.mask_monitor import MaskMonitor
from lightning_fedsparse.callbacks.powerpropagation import Powerpropagation
from lightning_fedsparse.callbacks.proximal_term import ProximalTerm
from lightning_fedsparse.callbacks.round_learning_rate import RoundLearningRate
from lightning_fedsparse.callbacks.sparsity_monitor import SparsityMonitor
from lightning_fedsparse.callbacks.sparsyfed import sparsyfed
from lightning_fedsparse.callbacks.topk_after_training import TopKAfterTraining
from lightning_fedsparse.callbacks.width_masking import WidthMasking
from lightning_fedsparse.callbacks.zerofl import zerofl

__all__ = [
    "ActivationPruning",
    "CallbackList",
    "CollapseMonitor",
    "CompressionMemory",
    "DenseStatistics",
    "DeviceMonitor",
    "DynamicPruning",
    "DynamicSparseTraining",
    "EffectiveWeightCallback",
    "ErrorFeedback",
    "FixedMask",
    "ForwardPruning",
    "GradientPruning",
    "ImportanceMasking",
    "IncrementalRegularization",
    "MagnitudePruning",
    "MaskMonitor",
    "Powerpropagation",
    "ProximalTerm",
    "RoundLearningRate",
    "SparsityCallback",
    "SparsityMonitor",
    "TopKAfterTraining",
    "WidthMasking",
    "feddip",
    "fiarse",
    "sparsyfed",
    "zerofl",
]

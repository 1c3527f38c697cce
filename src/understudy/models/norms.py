"""Batch normalisation: by running statistics where a network keeps none, and over the batches of several processes.

Imported by `models`, the pipeline and `engine.py`. Over several processes CUDA has torch's `SyncBatchNorm`; elsewhere
torch has none, so here is one for any device.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def normalises_by_batch(network: nn.Module) -> bool:
    """Tell whether an answer depends on the other images of a batch in evaluation, too."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is None for module in network.modules())


def keep_running_statistics(network: nn.Module, within: Container[str] | None = None) -> None:
    """Let batch normalisation that keeps no running statistics keep them, in place, as torch's own does by default.

    Training is the same to the last bit; evaluation then normalises by what training saw, so that an image's answer
    does not depend on the images beside it.

    Args:
        network: with the weights it starts from.
        within: names of tensors; only modules whose `running_mean` is among them.
    """
    for name, module in network.named_modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is not None:
            continue
        if within is None or f"{name}.running_mean".lstrip(".") in within:
            example = next(module.parameters(), torch.zeros(()))
            module.track_running_stats = True
            module.running_mean = torch.zeros(module.num_features, device=example.device)
            module.running_var = torch.ones(module.num_features, device=example.device)
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=example.device)


def share_statistics(network: nn.Module, device: torch.device) -> None:
    """Replace the batch normalisation inside a network, in place; parameters and buffers stay the same tensors.

    Subclasses, which may do more than torch's own classes, are left as they are: `keeps_statistics_apart` tells.
    """
    kind: Any = nn.SyncBatchNorm if device.type == "cuda" else SharedBatchNorm
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in _KNOWN:
                setattr(parent, name, _replaced(cast(_BatchNorm, child), kind))


def keeps_statistics_apart(network: nn.Module) -> bool:
    """Tell whether every process would still normalise by the statistics of its own images."""
    return any(
        isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm | SharedBatchNorm)
        for module in network.modules()
    )


class SharedBatchNorm(_BatchNorm):
    """Batch normalisation by the mean and variance over the images of all processes, however many each has."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [batch, channels, ...]; in evaluation as torch does."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        axes = [0, *range(2, values.ndim)]
        column = (1, -1, *(1 for _ in axes[1:]))
        own = values.new_tensor([values.numel() / values.shape[1]])
        *_, count = summed = _Sum.apply(torch.cat([values.sum(axes), own]))
        mean = summed[:-1] / count
        centred = values - mean.view(column)
        variance = _Sum.apply((centred * centred).sum(axes)) / count
        self._remember(mean.detach(), variance.detach(), count.detach())
        scale = torch.rsqrt(variance + self.eps) * (1.0 if self.weight is None else self.weight)
        shift = 0.0 if self.bias is None else self.bias.view(column)
        normalised: Tensor = centred * scale.view(column) + shift
        return normalised.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of axes: the class that was replaced knew its own."""

    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, by the unbiased variance, as torch does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / (count - 1), share)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient, since every process's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _replaced(old: _BatchNorm, kind: Any) -> nn.Module:
    new: nn.Module = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    for name, tensor in (*old.named_parameters(), *old.named_buffers()):
        setattr(new, name, tensor)
    return new.train(old.training)

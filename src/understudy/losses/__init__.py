"""The catalogue of losses: tensors in, one value per example out; the caller takes the mean.

Torch only; imports nothing else of this package and may be imported by every part above it.
"""

from understudy.losses.logits import cross_entropy, kd

__all__ = ["cross_entropy", "kd"]

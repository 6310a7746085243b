"""How far two right computations of one value may lie apart on any machine: it follows from the path's precision.

Kernels for other instruction sets, and other numbers of threads, sum the same terms in another order, and each rounding
costs up to half a unit in the last place. A forward pass of the tiny models strings together a few hundred of them, and
differences of two passes magnify the relative error further; ROUNDINGS allows for both. No tolerance is smaller than this
only because it passed on one machine.

The path through a transformers model is float32 at best, also where its weights are float64: eager attention takes its
softmax in float32, and RMS norms and rotary embeddings compute in it.
"""

import torch

ROUNDINGS = 1000


def relative(dtype: torch.dtype = torch.float32) -> float:
    """Relative tolerance of values of normal size: 1.2e-4 where float32 is on the path, 2.2e-13 where all is float64."""
    return ROUNDINGS * torch.finfo(dtype).eps


def of_difference(size: float, dtype: torch.dtype = torch.float32) -> float:
    """Absolute tolerance of a difference of two values of this size: a few roundings of each, whatever is left of them."""
    return 16 * torch.finfo(dtype).eps * size

"""What a computation allocates, counted operation by operation."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned, in forward and backward passes."""

    numel = 0

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tensors(result)]
        self.numel = max([self.numel, *sizes])
        return result


class DeviceOnly(TorchDispatchMode):
    """Refuses a tensor that is made on another device than `device`, as one that is copied there afterwards is."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tensors(result):
            assert tensor.device.type == self.device, f"{operation} made a tensor on {tensor.device}"
        return result


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]

"""States without their frozen part: adapters, heads on a frozen backbone."""

from __future__ import annotations

from typing import Any

import torch


def trainable_state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` without the parameters that require no grad; buffers stay.

    :meth:`CheckpointDirectory.restore` loads it into a model whose frozen parameters come from elsewhere, such as the
    files of a pretrained model.

    Args:
        model: any module; a parameter under several names is left out under all of them.

    Returns:
        A dict of the same type and with the same metadata as that of ``state_dict()``. Its tensors are the model's.

    Example:
        >>> for parameter in model.parameters():
        ...     parameter = parameter.requires_grad_(False)
        >>> list(sio.trainable_state_dict(model))
        []
    """
    state: dict[str, Any] = model.state_dict()
    for name in frozen_names(model):
        state.pop(name, None)
    return state


def frozen_names(model: torch.nn.Module) -> set[str]:
    """All names of its parameters that require no grad."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """``model.load_state_dict(state)``, which may lack frozen parameters, and nothing else.

    Raises:
        RuntimeError: torch's, where keys do not match.
    """
    own = set(model.state_dict())
    lacks_frozen_only = set(state) < own and own - set(state) <= frozen_names(model)
    model.load_state_dict(state, strict=not lacks_frozen_only)

"""What is saved: state dicts of a wished size, always of random bytes, every page touched before anything is timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SWEEP_NBYTES = (KIB, 16 * KIB, 256 * KIB, 4 * MIB, 64 * MIB, GIB, 4 * GIB)
SMALL_TENSOR_NBYTES = KIB


@dataclass
class Case:
    state: dict[str, Any]
    payload_nbytes: int
    tensors: int


@dataclass(frozen=True)
class CaseKind:
    build: Callable[[int, str], dict[str, Any]]
    about: str
    fixed_nbytes: int | None = None
    """Set where the case has a size of its own and --size is ignored."""
    build_factor: float = 1.0
    """Memory needed while building, over the payload."""


def build(name: str, nbytes: int, device: str = "cpu") -> Case:
    state = KINDS[name].build(nbytes, device)
    tensors = list(tensors_in(state))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return Case(state, sum(storages.values()), len(tensors))


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for child in tree.values():
            yield from tensors_in(child)
    elif isinstance(tree, (list, tuple)):
        for child in tree:
            yield from tensors_in(child)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random bits (some of them NaN): drawn as integers, several times faster than normal floats."""
    import torch

    tensor = torch.empty(shape, dtype=dtype, device=device)
    flat = tensor.view(-1).view(torch.uint8)
    words = flat.numel() // 8 * 8
    if words:
        flat[:words].view(torch.int64).random_()
    flat[words:].random_()
    return tensor


def llama_shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Llama 3's layers, narrowed until at least four of them fit beside the two vocabulary matrices."""
    elements = max(nbytes // 2, 1)
    hidden, vocabulary, layers = 16, 64, 1
    for wide in (4096, 2048, 1024, 512, 256, 128, 64, 32, 16):
        words = min(32_000, 16 * wide)
        room = elements - 2 * words * wide - wide
        if room // _layer_elements(wide) >= 4:
            hidden, vocabulary, layers = wide, words, room // _layer_elements(wide)
            break
    used = 2 * vocabulary * hidden + layers * _layer_elements(hidden) + hidden
    vocabulary += max(0, (elements - used) // (2 * hidden))  # the rest, so that the payload meets the wished size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        for name, shape in _layer_shapes(hidden).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _layer_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    wide = hidden * 7 // 2
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // 4, hidden),
        "self_attn.v_proj.weight": (hidden // 4, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def _layer_elements(hidden: int) -> int:
    total = 0
    for shape in _layer_shapes(hidden).values():
        total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total


def _llama(nbytes: int, device: str) -> dict[str, Any]:
    import torch

    return {name: random_tensor(shape, torch.bfloat16, device) for name, shape in llama_shapes(nbytes).items()}


def _adamw(nbytes: int, device: str) -> dict[str, Any]:
    """fp32 weights and both moments (12 bytes a parameter) after one real AdamW step with random gradients."""
    import torch

    # A bf16 Llama of n bytes has n/2 parameters; here a parameter takes 12 bytes.
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, device=device) * 0.02)
        for name, shape in llama_shapes(nbytes // 6).items()
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-4, weight_decay=0.1)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "model": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "step": 1000,
    }


def _many(count: int) -> Callable[[int, str], dict[str, Any]]:
    def build_many(nbytes: int, device: str) -> dict[str, Any]:
        import torch

        shape = (SMALL_TENSOR_NBYTES // 4,)
        return {f"blocks.{i}.weight": random_tensor(shape, torch.float32, device) for i in range(count)}

    return build_many


def _one(nbytes: int, device: str) -> dict[str, Any]:
    import torch

    return {"weight": random_tensor((max(1, nbytes // 2),), torch.bfloat16, device)}


KINDS: dict[str, CaseKind] = {
    "llama": CaseKind(_llama, "bf16 weights in Llama's layer shapes"),
    "adamw": CaseKind(_adamw, "fp32 model and AdamW state after a real step", build_factor=1.5),
    "many20k": CaseKind(_many(20_000), "20,000 tensors of 1 KiB", 20_000 * SMALL_TENSOR_NBYTES),
    "many100k": CaseKind(_many(100_000), "100,000 tensors of 1 KiB", 100_000 * SMALL_TENSOR_NBYTES),
    "one": CaseKind(_one, "one bf16 tensor"),
}


def points(names: list[str], size_nbytes: int) -> list[tuple[str, int]]:
    """(case, size) in the order asked for; `sweep` is one tensor at every size of the sweep up to --size."""
    chosen: list[tuple[str, int]] = []
    for name in names:
        if name == "sweep":
            chosen += [("one", nbytes) for nbytes in SWEEP_NBYTES if nbytes <= size_nbytes]
        else:
            fixed = KINDS[name].fixed_nbytes
            chosen.append((name, size_nbytes if fixed is None else fixed))
    return chosen


def parse_size(text: str) -> int:
    """`64MiB`, `1GiB`, `4096`, `1.5g`: binary units."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def format_size(nbytes: int) -> str:
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if nbytes >= factor * 0.999:  # a payload a few bytes short of 1 MiB is no 1024 KiB
            return f"{nbytes / factor:.3g} {unit}" if nbytes < 999 * factor else f"{nbytes / factor:.0f} {unit}"
    return f"{nbytes} B"

"""Random states for asynchronous saves, and everything that a caller may do to them once the call has returned."""

import random

import torch

MIB = 1 << 20


def random_bytes(nbytes, seed):
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_state(chance, device="cpu", max_nbytes=3 * MIB):
    """Tensors of every size class, some of them views, ties and parameters; at times one of more than a region."""
    state = {}
    for i in range(chance.randint(3, 14)):
        nbytes = 4 * int(chance.choice([0, 1, 10, 300, 40_000, 200_000, max_nbytes / 4]) * chance.random())
        tensor = random_bytes(nbytes, chance.getrandbits(32)).view(torch.int32).to(device)
        state[f"w{i}"] = torch.nn.Parameter(tensor, requires_grad=False) if chance.random() < 0.3 else tensor
        if chance.random() < 0.3:
            state[f"view {i}"] = tensor[: len(tensor) // 2]
    if chance.random() < 0.1:
        state["large"] = random_bytes(9 * MIB + chance.randint(0, 100), chance.getrandbits(32)).to(device)
    state["python"] = {"step": chance.getrandbits(20), "list": [1, 2.5, "x"]}
    return state


def overwrite(storage, byte):
    # Not through a tensor: its storage may have shrunk since.
    torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).fill_(byte)


def disturb(chance, state):
    """Overwrites, frees, resizes and moves what `state` holds, and lets others have the memory."""
    state["python"]["step"] = "another"
    state["python"]["list"].clear()
    for name in [name for name in state if name != "python"]:
        tensor = state[name]
        how = chance.choice(["overwrite", "free", "shrink", "grow", "move"])
        if how == "overwrite":
            overwrite(tensor.untyped_storage(), 7)
        elif how == "free":
            del state[name]
        elif how == "shrink":
            tensor.untyped_storage().resize_(0)
        elif how == "grow":
            tensor.untyped_storage().resize_(2 * tensor.untyped_storage().nbytes() + 64)
            overwrite(tensor.untyped_storage(), 9)
        else:
            tensor.data = torch.full_like(tensor, 3)
        device = tensor.device
        del tensor
        torch.full((chance.choice([10, 1000, 100_000]),), 5, dtype=torch.int32).to(device)


def chance_of(number):
    return random.Random(1000 + number)

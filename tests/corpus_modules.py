"""Modules, optimizers, schedulers, parameters, tensor subclasses, distributed tensors."""

import collections
import weakref

import torch
from corpus_case import Corpus, filled, numbers
from torch import nn

MODULES = Corpus()


def seeded(make):
    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return make()

    made.__name__ = make.__name__
    return made


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width, bias=False)])
        self.table = nn.ModuleDict({"embed": nn.Embedding(5, width)})
        self.scales = nn.ParameterList([nn.Parameter(numbers(3)), nn.Parameter(numbers(2))])
        self.named = nn.ParameterDict({"p": nn.Parameter(numbers(2, 2))})
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", numbers(3), persistent=False)
        self.register_buffer("absent", None)
        self.layers[1].weight = self.layers[0].weight
        self.epoch = 3

    def get_extra_state(self):
        return {"epoch": self.epoch, "tensor": numbers(2, seed=9)}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]


MODULES.add("module", seeded(Block))
MODULES.add("module_state_dict", seeded(lambda: Block().state_dict()))
MODULES.add("module_state_dict_keep_vars", seeded(lambda: Block().state_dict(keep_vars=True)))
MODULES.add("module_state_dict_prefix", seeded(lambda: Block().state_dict(prefix="model.")))
MODULES.add("module_half", seeded(lambda: Block().half().state_dict()))
MODULES.add("module_on_meta", seeded(lambda: Block().to("meta").state_dict()))
MODULES.add("transformer", seeded(lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).state_dict()))
MODULES.add("lstm_module", seeded(lambda: nn.LSTM(4, 5, num_layers=2)))


@MODULES.case
@seeded
def module_that_refers_to_itself():
    module = Block()
    module.__dict__["parent"] = module
    module.layers[0].__dict__["root"] = module
    return {"module": module, "state": module.state_dict()}


@MODULES.case
@seeded
def module_with_parametrization():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).state_dict()


@MODULES.each(["SGD", "Adam", "AdamW", "Adagrad", "LBFGS", "RMSprop", "NAdam"])
def training_state(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)

        def loss():
            optimizer.zero_grad()
            value = model(numbers(3, 6)).square().sum()
            value.backward()
            return value

        for _ in range(3):
            optimizer.step(loss)
            scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "rng": torch.get_rng_state()[:64].clone(),
        "loss": float("nan"),
        "config": {"lr": 0.01, "name": name},
    }


@MODULES.case
@seeded
def optimizer_object():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return {"optimizer": optimizer, "model": model}


@MODULES.case
def schedulers():
    optimizer = torch.optim.SGD([nn.Parameter(numbers(2))], lr=0.5)
    first = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
    second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    chain = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [3])
    return {
        "state": chain.state_dict(),
        "swa": torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)).state_dict().keys().__len__(),
    }


@MODULES.case
def gradient_scaler_state():
    return torch.amp.GradScaler("cpu").state_dict()


@MODULES.case
def parameters():
    plain, frozen = nn.Parameter(numbers(3)), nn.Parameter(filled(3, dtype=torch.int8), requires_grad=False)
    tagged = nn.Parameter(numbers(4, 2))
    tagged.sharding = {"axis": 1, "mesh": ("a", "b")}
    tagged.twin = filled(2)
    return {"plain": plain, "frozen": frozen, "tagged": tagged, "again": tagged, "buffer": nn.Buffer(filled(2))}


@MODULES.case
def tensor_with_attributes():
    tensor = filled(3)
    tensor.note, tensor.other = "kept", [filled(2)]
    return tensor


@MODULES.case
def tensor_with_hooks():
    parameter = nn.Parameter(numbers(2))
    parameter.register_hook(len)
    return parameter


@MODULES.case
def uninitialized_parameter():
    return {"lazy": nn.LazyLinear(3).state_dict()}


class Labelled(torch.Tensor):
    """A tensor subclass without data of its own."""


class WithState(torch.Tensor):
    def __getstate__(self):
        return {"custom": self.sum().item()}

    def __setstate__(self, state):
        self.custom = state["custom"]


class Pair(torch.Tensor):
    """A wrapper subclass: no storage of its own, two tensors inside."""

    @staticmethod
    def __new__(cls, low, high):
        return torch.Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype, device=low.device)

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __tensor_flatten__(self):
        return ["low", "high"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return Pair(inner["low"], inner["high"])

    def __reduce_ex__(self, protocol):
        return Pair, (self.low, self.high)

    def __repr__(self):
        return f"Pair({self.low}, {self.high})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on Pair")


@MODULES.case
def tensor_subclasses():
    labelled = filled(4).as_subclass(Labelled)
    labelled.label = "attribute"
    base = filled(5)
    return {"labelled": labelled, "shares": [base, base[1:].as_subclass(Labelled)], "parameter": nn.Parameter(labelled)}


@MODULES.case
def tensor_subclass_with_state():
    return {"it": numbers(4).as_subclass(WithState)}


@MODULES.case
def wrapper_subclass():
    low = filled(3)
    pair = Pair(low, filled(3, seed=1))
    return {"pair": pair, "low": low, "again": pair}


@MODULES.case
def wrapper_subclass_pickled_by_torch():
    class_of_two = TwoTensorLike(filled(3), filled(3, seed=1))
    return {"two": class_of_two}


class TwoTensorLike(Pair):
    """A wrapper without its own ``__reduce_ex__``: torch.Tensor's code pickles it."""

    __reduce_ex__ = torch.Tensor.__reduce_ex__


def _mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))


@MODULES.case
def dtensor():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = _mesh()
    return {
        "sharded": distribute_tensor(numbers(4, 6), mesh, [Shard(0)]),
        "replicated": nn.Parameter(distribute_tensor(numbers(5, seed=1), mesh, [Replicate()])),
        "plain": filled(3),
    }


@MODULES.case
def weak_value():
    target = nn.Linear(1, 1)
    return {"module": target, "weak": weakref.ref(target)}  # torch.save cannot pickle it


@MODULES.case
def checkpoint_of_a_training_script():
    state = collections.OrderedDict(
        (f"encoder.{i}.{n}", filled(16, 16, seed=f"{i}{n}")) for i in range(30) for n in ("w", "b")
    )
    return {
        "state_dict": state,
        "step": 1234,
        "args": {"lr": 1e-4, "betas": (0.9, 0.95), "name": "run ü"},
        "best": None,
    }

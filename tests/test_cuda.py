"""A real CUDA device: bytes, order among streams, contexts. What the stand-in of test_device.py cannot show."""

import io
import subprocess
import sys

import pytest
import torch
from conftest import require_native
from oracle import assert_same_bytes, two_directories

import statedict_io as sio

pytestmark = pytest.mark.cuda


def random_on(device, nbytes, dtype=torch.bfloat16):
    words = torch.randint(-(2**62), 2**62, (nbytes // 8,), device=device)
    return words.view(dtype)


def assert_same_saves(obj, tmp_path, backend, **options):
    ref, ours = two_directories(tmp_path)
    torch.save(obj, ref / "model.pt")
    sio.save(obj, ours / "model.pt", backend=backend, **options)
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


@pytest.mark.parametrize("durable", [True, False])
def test_same_bytes_as_torch_save(tmp_path, backend, durable):
    obj = {
        "big": random_on("cuda", 40 << 20),
        "odd": random_on("cuda", 9 << 20)[: (8 << 20) // 2 + 13].clone(),
        "cpu": random_on("cpu", 3 << 20),
        "pinned": random_on("cpu", 1 << 20).pin_memory(),
        "half": torch.randn(1000, device="cuda").half(),
        "float8": torch.randn(1000, device="cuda").to(torch.float8_e4m3fn),
        "empty": torch.empty(0, device="cuda"),
        "scalar": torch.tensor(3.5, device="cuda"),
        "parameter": torch.nn.Parameter(torch.randn(3, 4, device="cuda")),
    }
    obj["view"] = obj["big"][5:1000:7]
    assert_same_saves(obj, tmp_path, backend, durable=durable)


def test_same_bytes_into_a_file_object(backend):
    obj = {"weight": random_on("cuda", 20 << 20)}
    reference, ours = io.BytesIO(), io.BytesIO()
    torch.save(obj, reference)
    sio.save(obj, ours, backend=backend)
    assert ours.getvalue() == reference.getvalue()


def test_thousands_of_small_tensors(tmp_path, backend):
    assert_same_saves({f"layer.{i}": random_on("cuda", 1024) for i in range(5000)}, tmp_path, backend)


@pytest.mark.parametrize("own_stream", [False, True])
def test_waits_for_work_on_the_current_stream(tmp_path, backend, own_stream):
    weight = random_on("cuda", 64 << 20, torch.float32)
    weight.fill_(1.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        weight.fill_(2.0)
        sio.save({"weight": weight}, tmp_path / "model.pt", backend=backend)
    assert bool((torch.load(tmp_path / "model.pt", map_location="cpu")["weight"] == 2.0).all())


def test_later_saves_pin_no_more_memory(tmp_path):
    require_native()
    from statedict_io import _core

    obj = {"weight": random_on("cuda", 100 << 20)}
    sio.save(obj, tmp_path / "model.pt", backend="native")
    before = _core.testing.num_slots_allocated()
    sio.save(obj, tmp_path / "model.pt", backend="native")
    assert _core.testing.num_slots_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_dict_on_device_1_makes_no_context_on_device_0(tmp_path, backend):
    program = f"""
import torch, statedict_io as sio
weight = torch.ones(1 << 20, device="cuda:1")
sio.save({{"weight": weight}}, {str(tmp_path / "model.pt")!r}, backend={backend!r})
assert torch._C._cuda_hasPrimaryContext(1) and not torch._C._cuda_hasPrimaryContext(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("seed", range(5))
def test_async_the_file_is_the_state_at_the_call(tmp_path, backend, room, seed):
    """Values that the device has yet to compute are saved; what is done afterwards, on any stream, is not."""
    ref, ours = two_directories(tmp_path)
    state = {f"w{i}": random_on("cuda", nbytes) for i, nbytes in enumerate([40 << 20, 9 << 20, *[1 << 10] * 200])}
    state["host"] = random_on("cpu", 3 << 20)
    scaled = {name: tensor * 2 if tensor.is_cuda else tensor for name, tensor in state.items()}
    torch.save(scaled, ref / "model.pt")
    work = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5 * seed):
        work = work @ work
    for tensor in state.values():
        if tensor.is_cuda:
            tensor.mul_(2)
    pending = sio.save_async(state, ours / "model.pt", backend=backend, max_device_snapshot_nbytes=room)
    with torch.cuda.stream(side):
        for tensor in state.values():
            tensor.zero_()
    state.clear()
    torch.full((60 << 20,), 7, dtype=torch.uint8, device="cuda")
    pending.result()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")


def test_async_wait_snapshot_false_returns_before_the_device_gets_to_it(tmp_path):
    require_native()
    ref, ours = two_directories(tmp_path)
    state = {"w": random_on("cuda", 40 << 20)}
    torch.save(state, ref / "model.pt")
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    pending = sio.save_async(state, ours / "model.pt", backend="native", wait_snapshot=False)
    assert not pending.snapshot_done()
    state["w"].zero_()
    pending.wait_snapshot()
    assert pending.snapshot_done()
    pending.result()
    assert_same_bytes(ref / "model.pt", ours / "model.pt")

"""The functions that a ``_torch`` module hands to ``_core``.

Those for devices are tested in test_device.py and cpp/torch_device_test.cpp.
"""

import ctypes
import gc
import threading

import pytest
import torch
import torch_functions
from conftest import promised
from torch.profiler import ProfilerActivity, profile
from torch_functions import Error, PlainTensor, Release, StorageFacts


@pytest.fixture(scope="module")
def functions():
    try:
        torch_functions.module()
    except ModuleNotFoundError:
        if promised("STATEDICT_IO_REQUIRE_NATIVE"):
            pytest.fail(f"STATEDICT_IO_REQUIRE_NATIVE=1, but there is no {torch_functions.NAME}")
        pytest.skip(f"there is no {torch_functions.NAME}")
    return torch_functions.Functions()


@pytest.fixture
def handle_of(functions):
    """A function: the handle of a storage, until the test ends."""
    handles = []

    def made(storage):
        handles.append(functions.storage_of(storage))
        return handles[-1]

    yield made
    for handle in handles:
        functions.storage_release(handle)


# ---- the table


def test_every_function_is_there(functions):
    names = torch_functions.names_in_header()
    assert sorted(names) == sorted(torch_functions.WITH_GIL.keys() | torch_functions.WITHOUT_GIL.keys())
    assert [name for name in names if not functions.addresses[name]] == []
    assert len(set(functions.addresses.values())) == len(names)


def test_the_release_is_named(functions):
    module = torch_functions.module()
    assert functions.version == torch_functions.version_in_header()
    assert module.built_for == functions.torch_version
    assert module.built_for.split(".")[:2] == torch.__version__.split(".")[:2]
    assert {name for name in vars(module) if not name.startswith("__")} == {"functions", "built_for"}


# ---- storages


def in_a_thread(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


def test_a_handle_is_an_owner_and_wraps_back(functions):
    memory, released = ctypes.create_string_buffer(b"\x01\x02", 2), []
    release = Release(released.append)
    storage = functions.storage_over(ctypes.addressof(memory), 2, release, 5)
    identity = storage._cdata
    handle = functions.storage_of(storage)
    assert functions.storage_retain(handle) == handle == identity
    assert functions.storage_wrap(handle)._cdata == identity
    del storage
    gc.collect()
    in_a_thread(functions.storage_release, handle)
    wrapped = functions.storage_wrap(handle)
    assert isinstance(wrapped, torch.UntypedStorage) and wrapped.tolist() == [1, 2]
    del wrapped
    gc.collect()
    assert released == []
    in_a_thread(functions.storage_release, handle)
    assert released == [5]


@pytest.mark.parametrize("other", [None, 3, torch.ones(1)], ids=["None", "int", "tensor"])
def test_other_objects_have_no_handle(functions, other):
    with pytest.raises(TypeError, match=r"torch\.UntypedStorage"):
        functions.storage_of(other)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("nbytes", [0, 7])
def test_facts(functions, handle_of, device, nbytes):
    storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    facts = StorageFacts()
    assert functions.storage_facts(handle_of(storage), facts) == 0
    assert (facts.nbytes, facts.on_host) == (nbytes, device == "cpu")
    assert (facts.data or 0) == (storage.data_ptr() if device == "cpu" else 0)


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_device_of_a_storage(functions, handle_of, device, size):
    name = ctypes.create_string_buffer(b"?" * 40, 40)
    functions.storage_device(handle_of(torch.empty(3, device=device).untyped_storage()), name, size)
    assert name.value == device.encode()[: size - 1] and name.raw[size:] == b"?" * (40 - size)


def test_storages_without_an_address_raise_what_torch_raises(functions, handle_of):
    raised = []

    def look(tensor):
        storage = tensor.untyped_storage()
        for ask in (storage.data_ptr, lambda: functions.storage_facts(handle_of(storage), StorageFacts())):
            with pytest.raises(RuntimeError) as error:
                ask()
            raised.append(str(error.value))
        return tensor

    torch.func.functionalize(look)(torch.ones(3))
    assert len(raised) == 2 and raised[0] == raised[1]


def test_a_storage_over_memory(functions):
    memory = ctypes.create_string_buffer(b"\x01\x02\x03\x04", 4)
    released = []
    release = Release(released.append)
    storage = functions.storage_over(ctypes.addressof(memory), 4, release, 77)
    assert (storage.nbytes(), storage.data_ptr(), storage.device.type) == (4, ctypes.addressof(memory), "cpu")
    tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
    assert tensor.tolist() == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="resizable"):
        storage.resize_(5)
    del storage
    gc.collect()
    assert released == []
    del tensor
    gc.collect()
    assert released == [77]


def test_memory_without_a_context_is_released_too(functions):
    released = []
    release = Release(released.append)
    storage = functions.storage_over(None, 0, release, None)
    assert storage.nbytes() == 0
    del storage
    gc.collect()
    assert released == [None]


# ---- plain tensors

PLAIN = {
    "matrix": lambda: torch.arange(6.0).view(2, 3),
    "transposed view": lambda: torch.arange(24, dtype=torch.bfloat16).view(4, 6)[1:].mT,
    "scalar": lambda: torch.tensor(7),
    "empty": lambda: torch.empty(0, 3),
    "expanded": lambda: torch.ones(1).expand(4),
    "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "frozen parameter": lambda: torch.nn.Parameter(torch.ones(3), requires_grad=False),
    "result": lambda: torch.ones(3, requires_grad=True) * 2,
}
OTHERS = {
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negative view": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.ones(3).to_sparse(),
    "meta": lambda: torch.ones(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_plain_tensors(functions, make):
    tensor, plain = make(), PlainTensor()
    assert functions.plain_tensor(tensor, plain) == 1
    assert plain.storage == tensor.untyped_storage()._cdata
    assert ctypes.cast(plain.dtype, ctypes.py_object).value is tensor.dtype
    assert (plain.storage_offset, plain.itemsize) == (tensor.storage_offset(), tensor.element_size())
    assert (plain.num_dimensions, plain.requires_grad) == (tensor.dim(), tensor.requires_grad)
    assert tuple(plain.sizes[: tensor.dim()]) == tuple(tensor.size())
    assert tuple(plain.strides[: tensor.dim()]) == tensor.stride()


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_others_are_left_to_torch(functions, make):
    tensor, plain = make(), PlainTensor(storage=1)
    assert functions.plain_tensor(tensor, plain) == 0
    assert plain.storage == 1


def test_wrapped_tensors_are_left_to_torch(functions):
    seen = []
    torch.func.vmap(lambda row: seen.append(functions.plain_tensor(row, PlainTensor())) or row)(torch.ones(2, 3))
    torch.func.functionalize(lambda t: seen.append(functions.plain_tensor(t, PlainTensor())) or t)(torch.ones(2))
    assert seen == [0, 0]


# ---- storages that keep their memory


def fixed(functions, *handles):
    return functions.fix((ctypes.c_void_p * len(handles))(*handles), len(handles))


def test_fixed_storages_cannot_be_resized_until_the_last_reader_is_done(functions, handle_of):
    storage = torch.ones(3).untyped_storage()
    handle = handle_of(storage)
    first, second = fixed(functions, handle, handle), fixed(functions, handle)
    for held in (first, second):
        with pytest.raises(RuntimeError, match="resiz"):
            storage.resize_(100)
        functions.unfix(held)
    storage.resize_(100)


def test_storages_that_never_could_stay_so(functions, handle_of):
    storage = torch.UntypedStorage(8)[0:8]
    assert not storage.resizable()
    functions.unfix(fixed(functions, handle_of(storage)))
    assert not storage.resizable()


def test_a_forked_child_forgets_what_was_fixed(functions, handle_of):
    storage = torch.ones(3).untyped_storage()
    held = fixed(functions, handle_of(storage))
    functions.forget_fixed()
    assert storage.resizable()
    functions.unfix(held)
    assert storage.resizable()


# ---- statuses


def destination(functions, device, sizes=(8,)):
    """(the handle or None, the status, the message)."""
    status, error = ctypes.c_int(-1), Error()
    made = functions.destination_new(device, (ctypes.c_uint64 * len(sizes))(*sizes), len(sizes), status, error)
    return made, status.value, error.message


@pytest.mark.parametrize("device", [b"cpu", b"meta", b"no such device"])
def test_devices_without_streams_are_unsupported(functions, device):
    made, status, message = destination(functions, device)
    assert (made, status) == (None, torch_functions.UNSUPPORTED)
    assert message and b"Exception raised from" not in message


@pytest.mark.parametrize("shift", range(4))
def test_long_messages_are_cut_at_the_end_of_a_character(functions, shift):
    _, status, message = destination(functions, b"x" * shift + "\N{SNOWMAN}".encode() * 1000)
    assert status == torch_functions.UNSUPPORTED
    assert 990 <= len(message) < 1000 and message.decode().endswith("\N{SNOWMAN}")


def test_more_than_there_is_is_no_reason_to_crash(functions):
    made, status, message = destination(functions, b"cpu", [1 << 62])
    assert made is None and status in {torch_functions.NO_MEMORY, torch_functions.UNSUPPORTED} and message


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to pin for")
def test_without_an_accelerator_nothing_is_pinned(functions):
    assert functions.pin(1 << 20, ctypes.c_void_p()) is None


# ---- profiles


def test_steps_are_in_profiles_of_the_thread_and_of_those_it_goes_on_in(functions):
    def step(name):
        begun = functions.step_begin(name)
        functions.step_end(begun)
        return begun is not None

    assert not step(b"statedict_io::before")
    recorded = []

    def other_thread():
        recorded.append(step(b"statedict_io::unasked"))
        functions.recording_continue(recording)
        recorded.append(step(b"statedict_io::continued"))

    with profile(activities=[ProfilerActivity.CPU]) as profiling:
        assert step(b"statedict_io::here")
        recording = functions.recording_of_this_thread()
        in_a_thread(other_thread)
        functions.recording_delete(recording)
    names = {event.name for event in profiling.events() if event.name.startswith("statedict_io::")}
    assert names == {"statedict_io::here", "statedict_io::continued"} and recorded == [False, True]

"""torch's own settings and ambient modes: what they change in torch.save's bytes they change here."""

import concurrent.futures
import contextlib
import copyreg
import pickle
import runpy
import subprocess
import sys

import pytest
import torch
import warm_process
from corpus import CORPUS
from corpus_case import filled
from equality import difference
from oracle import assert_same_bytes, assert_same_file, attempt, names_in, two_directories
from torch.utils.serialization import config

pytestmark = pytest.mark.filterwarnings("ignore")

OBJECTS = ["module_state_dict", "around_the_alignment", "storages", "payloads_like_descriptors", "top_level[1]"]


@contextlib.contextmanager
def setting(name, value):
    before = getattr(config.save, name)
    setattr(config.save, name, value)
    try:
        yield
    finally:
        setattr(config.save, name, before)


def of_a_thread():
    """Whether a new thread has settings of its own; torch 2.9 has them for all threads."""
    with setting("storage_alignment", 128), concurrent.futures.ThreadPoolExecutor() as threads:
        return threads.submit(lambda: config.save.storage_alignment).result() == 64


@contextlib.contextmanager
def crc32(on):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(on)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@pytest.mark.parametrize("alignment", [1, 2, 3, 8, 63, 64, 4096, 65535, 65536, 100_000])
@pytest.mark.parametrize("name", OBJECTS)
def test_storage_alignment(name, alignment, backend, tmp_path):
    with setting("storage_alignment", alignment):
        assert_same_file(tmp_path, CORPUS[name](), backend, load=False, durable=(False,))


@pytest.mark.parametrize("name", ["b.pt", "ключ.pt"])
def test_storage_alignment_of_a_large_file(name, backend, tmp_path):
    with setting("storage_alignment", 4096):
        assert_same_file(tmp_path, CORPUS["larger_than_one_region"](), backend, name=name)


@pytest.mark.skipif(not of_a_thread(), reason="torch.save dies of it in the proof of the format, too")
def test_a_storage_alignment_of_zero_is_an_error_not_a_crash(backend, tmp_path):
    """torch.save divides by it and dies of SIGFPE."""
    program = (
        "import sys, torch, statedict_io as sio\n"
        "torch.utils.serialization.config.save.storage_alignment = 0\n"
        "sio.save([torch.ones(3)], sys.argv[1], backend=sys.argv[2])\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = warm_process.run(tmp_path / "program.py", tmp_path / "m.pt", backend, timeout=60)
    assert done.returncode == 1, f"exit status {done.returncode}: {done.stderr}"
    assert names_in(tmp_path) == ["program.py"]


@pytest.mark.parametrize("name", [*OBJECTS, "larger_than_one_region", "many_small"])
def test_crc32_off(name, backend, tmp_path):
    with crc32(False):
        assert_same_file(tmp_path, CORPUS[name](), backend, load=False)


def test_crc32_off_changes_the_file_and_on_restores_it(saved_bytes):
    obj = {"a": filled(100)}
    before = saved_bytes(obj)
    with crc32(False):
        without = saved_bytes(obj)
    assert without != before
    assert saved_bytes(obj) == before


@pytest.mark.parametrize("name", [*OBJECTS, "meta", "larger_than_one_region"])
def test_skip_data(name, backend, tmp_path):
    with torch.serialization.skip_data():
        reference = assert_same_file(tmp_path, CORPUS[name](), backend, load=False)
    assert reference is None, "torch.save refused: this test compares nothing"


@pytest.mark.parametrize("crc", [True, False])
@pytest.mark.parametrize("alignment", [64, 4096])
def test_skip_data_with_other_settings(alignment, crc, backend, tmp_path):
    with torch.serialization.skip_data(), crc32(crc), setting("storage_alignment", alignment):
        assert assert_same_file(tmp_path, CORPUS["module_state_dict"](), backend, load=False) is None


def test_skip_data_with_the_legacy_format_is_refused(backend, tmp_path):
    with torch.serialization.skip_data():
        reference = assert_same_file(tmp_path, [filled(3)], backend, _use_new_zipfile_serialization=False)
    assert isinstance(reference, RuntimeError)


def fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(6, 4)
        return {
            "weight": weight,
            "view": weight[1:],
            "other": torch.empty(3, dtype=torch.int8),
            "scalar": torch.tensor(1.0),
        }


def test_fake_tensors_under_skip_data_that_materializes(backend, tmp_path):
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        reference = assert_same_file(tmp_path, fake_tensors(), backend, load=False)
    assert reference is None, "torch.save refused: this test compares nothing"


@pytest.mark.parametrize("skip", [False, True])
def test_fake_tensors_elsewhere_fail_as_in_torch(skip, backend, tmp_path):
    with torch.serialization.skip_data() if skip else contextlib.nullcontext():
        reference = assert_same_file(tmp_path, fake_tensors(), backend, load=False)
    assert reference is not None or skip, "torch.save saved a FakeTensor: this test compares nothing"


@pytest.mark.parametrize("name", ["ref.pt", "ключ.pt"])
def test_without_the_byteorder_record(name, backend, tmp_path):
    obj = CORPUS["module_state_dict"]()
    assert assert_same_file(tmp_path, obj, backend, name=name, _disable_byteorder_record=True) is None
    torch.save(obj, tmp_path / name)
    assert (tmp_path / "ours" / name).read_bytes() != (tmp_path / name).read_bytes(), (
        "the option changes nothing: this compares nothing"
    )


LEGACY = ["module_state_dict", "storages", "tied_and_overlapping", "top_level[1]", "training_state[SGD]",
          "sparse_coo[torch.int64]", "larger_than_one_region", "weak_value", "parameters"]  # fmt: skip


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_format(name, backend, tmp_path):
    obj = CORPUS[name]()
    reference = assert_same_file(tmp_path, obj, backend, load=False, _use_new_zipfile_serialization=False)
    if reference is None:
        expected, error = attempt(lambda: torch.load(tmp_path / "ref" / "model.pt", weights_only=False))
        if error is None:
            loaded = torch.load(tmp_path / "ours" / "model.pt", weights_only=False)
            assert difference(expected, loaded) is None


@pytest.mark.parametrize("name", [".pt", "a.b.c", "noext", "x" * 255])
def test_legacy_format_under_any_name(name, backend, tmp_path):
    assert_same_file(tmp_path, [filled(3)], backend, name=name, load=False, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_legacy_format_and_protocols(protocol, backend, tmp_path):
    assert_same_file(
        tmp_path, {"a": filled(3)}, backend, load=False, _use_new_zipfile_serialization=False, pickle_protocol=protocol
    )


@contextlib.contextmanager
def calling(function, value, before):
    function(value)
    try:
        yield
    finally:
        function(before)


class _CountsCalls(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


AMBIENT = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "device meta": lambda: torch.device("meta"),
    "default device meta": lambda: calling(torch.set_default_device, "meta", None),
    "default dtype float64": lambda: calling(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: calling(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "deterministic algorithms": lambda: calling(torch.use_deterministic_algorithms, True, False),
    "one thread": lambda: calling(torch.set_num_threads, 1, torch.get_num_threads()),
    "function mode": _CountsCalls,
    "fake tensor mode": fake_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "no torch function": torch._C.DisableTorchFunctionSubclass,
    "detect anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize("mode", AMBIENT)
@pytest.mark.parametrize("name", ["module_state_dict", "storages", "parameters", "sparse_coo[torch.float32]"])
def test_ambient_modes(mode, name, backend, tmp_path):
    obj = CORPUS[name]()
    with AMBIENT[mode]():
        assert_same_file(tmp_path, obj, backend, load=False)


def test_tensors_made_in_inference_mode(backend, tmp_path):
    with torch.inference_mode():
        obj = {"a": filled(5), "b": torch.nn.Parameter(filled(2))}
    assert assert_same_file(tmp_path, obj, backend) is None


def test_a_large_save_under_a_meta_default_device_holds_data(backend, tmp_path):
    obj = CORPUS["larger_than_one_region"]()
    with AMBIENT["default device meta"]():
        assert_same_file(tmp_path, obj, backend, load=False)
        assert names_in(tmp_path / "ours") == ["model.pt"]


# ---- somebody else decides how tensors are pickled


def as_a_list(tensor, *_):
    return torch.tensor, (tensor.tolist(),)


def as_parameter(parameter, *_):
    return torch.nn.Parameter, (parameter.data, False)


@contextlib.contextmanager
def location_tagger(tag):
    registry = torch.serialization._package_registry
    before = [*registry]
    torch.serialization.register_package(0, tag, lambda storage, location: None)
    try:
        yield
    finally:
        registry[:] = before


class TensorsAsLists(pickle.Pickler):
    def reducer_override(self, obj):
        return as_a_list(obj) if type(obj) is torch.Tensor else NotImplemented


def patched(how, *arguments):
    @contextlib.contextmanager
    def patching():
        with pytest.MonkeyPatch.context() as patch:
            getattr(patch, how)(*arguments)
            yield

    return patching


INTERFERENCE = {
    "Tensor.__reduce_ex__": patched("setattr", torch.Tensor, "__reduce_ex__", as_a_list),
    "Tensor._reduce_ex_internal": patched("setattr", torch.Tensor, "_reduce_ex_internal", as_a_list),
    "Parameter.__reduce_ex__": patched("setattr", torch.nn.Parameter, "__reduce_ex__", as_parameter),
    "copyreg, Tensor": patched("setitem", copyreg.dispatch_table, torch.Tensor, as_a_list),
    "copyreg, Parameter": patched("setitem", copyreg.dispatch_table, torch.nn.Parameter, as_parameter),
    "location tags": lambda: location_tagger(lambda storage: "elsewhere"),
    "pickle.Pickler": patched("setattr", pickle, "Pickler", TensorsAsLists),
}


@pytest.mark.parametrize("who", INTERFERENCE)
def test_whoever_changes_how_tensors_are_pickled(who, backend, tmp_path):
    obj = {"tensor": filled(5), "parameter": torch.nn.Parameter(filled(3)), "number": 1.5}
    files = []
    for when, patching in (("before", contextlib.nullcontext), ("meanwhile", INTERFERENCE[who])):
        (tmp_path / when).mkdir()
        with patching():
            assert assert_same_file(tmp_path / when, obj, backend, load=False) is None
        files.append((tmp_path / when / "ours" / "model.pt").read_bytes())
    assert files[0] != files[1]


def test_whoever_did_so_before_the_import(backend, tmp_path):
    program = (
        "import sys, torch\n"
        "torch.Tensor.__reduce_ex__ = lambda tensor, *_: (torch.tensor, (tensor.tolist(),))\n"
        "import statedict_io as sio\n"
        "torch.save({'w': torch.ones(3)}, sys.argv[1])\n"
        "sio.save({'w': torch.ones(3)}, sys.argv[2], backend=sys.argv[3])\n"
    )
    ref, ours = (directory / "model.pt" for directory in two_directories(tmp_path))
    subprocess.run([sys.executable, "-c", program, ref, ours, backend], check=True)
    assert_same_bytes(ref, ours)
    assert b"data/0" not in ours.read_bytes()


def test_a_torch_without_the_module_of_settings(monkeypatch):
    """As 2.6 is."""
    from statedict_io.installed import stock, torch_format

    assert stock.setting("save", "storage_alignment", 1) == config.save.storage_alignment
    monkeypatch.setitem(sys.modules, "torch.utils.serialization", None)
    without = runpy.run_path(stock.__file__)
    assert without["_config"] is None and without["setting"]("save", "storage_alignment", 1) == 1
    monkeypatch.setattr(stock, "_config", None)
    assert stock.setting("save", "storage_alignment", 1) == 1 and torch_format.storage_alignment() == 64
    hidden = "import sys, torch; sys.modules['torch.utils.serialization'] = None; import statedict_io"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

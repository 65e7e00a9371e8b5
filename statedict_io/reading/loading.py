"""``load``: what ``torch.load`` returns, read in parallel."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import backends
from .. import progress as progress_module
from ..errors import StateDictIOError
from ..installed import stock
from ..options import check_flags
from ..pickles.unpickling import can_rebind, load_through
from ..progress import Progress, ProgressCallback
from ..remote.urls import is_url
from .load_errors import naming_as_torch, raising_as_torch
from .load_steps import ArchiveSteps, LoadRequest
from .opened_again import Replaced
from .opened_bytes import PartOfBytes
from .trial import loads_like_torch
from .weight_folders import is_folder
from .weights import file_to_load, opened_file, weights_of

if TYPE_CHECKING:
    from ..remote.ranges import RangedObject

_MAX_ATTEMPTS = 100  # to map a file that is replaced while torch opens it by its path


def load(
    f: Any,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = True,
    mmap: bool | None = None,
    verify: bool = False,
    backend: str = "auto",
    progress: Progress = None,
    **pickle_load_args: Any,
) -> Any:
    """Loads what :func:`torch.load` would, from the same files, faster.

    Storages are read in parallel, straight into their final memory; the unpickler is torch's own. So are the tensors of
    safetensors files, whatever their name. File objects, the legacy format, TorchScript archives, ``mmap`` and fake
    tensors are left to ``torch.load`` altogether.

    Args:
        f: a path; a URL of fsspec (``str``), of which ranges are read; or an object with ``read``, ``readline``,
            ``tell`` and ``seek``. A path or URL may lead to an index of shards (``*.index.json``), or to a folder of
            weights as transformers lays them out (such a URL ends in ``/``): all their tensors are returned in a dict.
            Of a directory of ``torch.distributed.checkpoint`` the state is returned that was saved.
        map_location: None, a string, a :class:`torch.device`, a dict or a callable. ``"meta"`` reads no data. What is
            in a safetensors file counts as saved from the CPU.
        weights_only: unpickle with torch's restricted unpickler: the security boundary. Load with ``False`` only what
            you trust.
        mmap: map the file instead of reading it.
        verify: check the CRC-32 of every record, those that are not asked for too. Records without one (saved with CRCs
            off) pass.
        backend: what reads the file: ``"auto"`` the compiled extension where it can be used, else the Python
            backend; ``"native"`` insists on the extension, ``"python"`` does without it.
        progress: ``True`` for a bar on stderr (needs ``tqdm``), or a callable taking (bytes_done, bytes_total).
        pickle_module, pickle_load_args: as for ``torch.load``.

    Returns:
        What was saved, with tensors on the devices that ``map_location`` says, or that they were saved from.

    Raises:
        CorruptCheckpointError: the file is not a sound archive, or a checksum does not match; names the record and the
            tensors in it. It is a :class:`RuntimeError` too, which ``torch.load`` raises.
        FileKindError: it is a file of another kind, and torch.load cannot read it; names the kind, or the first bytes.
            It and a CorruptCheckpointError for an empty or cut-off file are also what ``torch.load`` raises there.
        TypeError: an option is of a wrong type, or there is no such one; names it.
        ValueError: ``verify=True`` for a file without checksums.
        OSError: what the system reported.
        NativeUnavailableError: ``backend="native"`` and the extension cannot be used.
        Exception: otherwise what ``torch.load`` raises for the same arguments.

    Example:
        >>> sio.save({"w": torch.zeros(2, 3)}, "weights.pt")
        >>> sio.load("weights.pt", "cpu", verify=True)["w"].shape
        torch.Size([2, 3])
    """
    check_flags(verify=verify)
    progress_module.check(progress)
    chosen = backends.for_reading(backend)
    with contextlib.ExitStack() as exit_stack:
        source: RangedObject | None = None
        if is_folder(f):
            f = file_to_load(f)
        name = f
        if is_url(f):
            from ..remote import opening

            found = exit_stack.enter_context(opening.open_url(f))
            f, name = found.content, found.url
            if not isinstance(f, str):
                source, f = f, exit_stack.enter_context(f.stream())
        load_file = functools.partial(
            load, map_location=map_location, weights_only=weights_only, mmap=mmap, verify=verify, backend=backend
        )
        options: dict[str, Any] = {"weights_only": weights_only, "mmap": mmap, **pickle_load_args}
        request = LoadRequest(
            f=f,
            source=source,
            name=name,
            map_location=map_location,
            mmap=mmap,
            verify=verify,
            wish=backend,
            backend=chosen,
            progress=None,
        )
        load_part = functools.partial(_load_part, request, options)
        file, weights = None, None
        if pickle_module is None and not pickle_load_args:
            file = None if source is not None else exit_stack.enter_context(opened_file(f))
            opened = file if source is None else source
            weights = weights_of(
                opened, name, chosen, load_file, load_part, mmap=mmap, weights_only=weights_only is not False
            )
        if weights is not None:
            with progress_module.reporting(progress, "load") as callback, naming_as_torch():
                return weights.load(map_location, backend, callback, verify=verify)
        request.progress = exit_stack.enter_context(progress_module.reporting(progress, "load"))
        return _loaded(request, file, pickle_module, options)


def _load_part(
    request: LoadRequest, options: dict[str, Any], part: PartOfBytes, *, progress: ProgressCallback | None
) -> Any:
    """Loads an archive that is a part of a file as ``request`` wants it."""
    with part.stream() as stream:
        of_part = replace(request, f=stream, source=part, name=part.name, mmap=False, progress=progress)
        return _loaded(of_part, None, None, {**options, "mmap": False})


def _loaded(request: LoadRequest, file: io.BufferedReader | None, pickle_module: Any, options: dict[str, Any]) -> Any:
    """By torch, with our reader behind it.

    Args:
        file: the file at the path, where it has been opened.
        options: further ones of ``torch.load``.
    """
    loading = loads_like_torch(request.backend.lean_pickle)
    backends.warn_if_reading_is_slow(request.wish, loading=loading)
    has_our_steps = bool(loading) and can_rebind()
    for _ in range(_MAX_ATTEMPTS):
        steps, file = ArchiveSteps(request, file), None
        with (
            contextlib.suppress(Replaced),
            raising_as_torch(steps, pickled_by_default=pickle_module in (None, pickle)),
        ):
            if has_our_steps:
                return load_through(steps)(request.f, request.map_location, pickle_module, **options)
            with steps.verified() as content:
                return stock.torch_load(content, request.map_location, pickle_module, **options)
    raise StateDictIOError(
        f"{request.name}: was replaced each of the {_MAX_ATTEMPTS} times that it was mapped; load it with mmap=False"
    )

"""``FastCheckpointIO``: checkpoints of Lightning's ``Trainer`` and ``Fabric`` through this library.

For ``lightning`` and for ``pytorch_lightning``, whose base classes are not the same. Lightning calls it in the main
thread of each process that saves.
"""

from __future__ import annotations

import importlib
import inspect
import os
import threading
from collections.abc import Callable
from typing import Any

from ..reading import loading
from ..writing import async_saving, pending, saving
from ..writing.pending import PendingSave


def _base_classes() -> tuple[Any, ...]:
    """Those of both packages, as far as they are installed: whichever ``Trainer`` gets the plugin looks for its own."""
    found, missing = [], None
    for fabric in ("lightning.fabric", "lightning_fabric"):
        try:
            found.append(importlib.import_module(f"{fabric}.plugins.io").TorchCheckpointIO)
        except ModuleNotFoundError as e:
            missing = e
    if not found:
        raise ImportError(
            "statedict_io.integrations.lightning needs Lightning, which this environment lacks: "
            "pip install 'statedict-io[lightning]'"
        ) from missing
    return tuple(found)


class FastCheckpointIO(*_base_classes()):  # type: ignore[misc]
    """Saves with :func:`statedict_io.save` or :func:`~statedict_io.save_async`, loads with :func:`~statedict_io.load`.

    Give it to ``Trainer(plugins=[...])`` or ``Fabric(plugins=[...])``. A file is what ``torch.save(checkpoint, path)``
    writes. Paths with a scheme (``s3://``) are left to Lightning.

    Args:
        asynchronous: training goes on as soon as the state has been copied. A save's error is raised by the next save,
            or by :meth:`teardown`. A checkpoint that Lightning removes stays until every save started before has ended,
            and for good if one of them failed: whenever the process dies, a complete checkpoint is there.
        options: keyword options of ``save``, or of ``save_async``.
    """

    def __init__(self, *, asynchronous: bool = False, **options: Any) -> None:
        super().__init__()
        inspect.signature(async_saving.save_async if asynchronous else saving.save).bind(None, "", **options)
        self.asynchronous = asynchronous
        self._options = options
        # Both empty between calls of fit(), so that strategies which start processes can pickle this.
        self._saves: list[PendingSave] = []
        self._removals: list[_Removal] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises what an earlier asynchronous save has failed with; this one is not started then."""
        if _has_scheme(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)  # which refuses the options
            return
        path = os.fspath(path)
        self._collect(wait=False)
        for removal in self._removals:
            if removal.path == path:
                removal.done.wait()
        os.makedirs(os.path.dirname(path) or os.curdir, exist_ok=True)
        if self.asynchronous:
            self._saves.append(async_saving.save_async(checkpoint, path, **self._options))
        else:
            saving.save(checkpoint, path, **self._options)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> Any:
        """Waits for saves in flight first: one of them may be what is asked for."""
        if _has_scheme(path):
            return super().load_checkpoint(path, map_location, weights_only)
        self._wait()
        if not os.path.exists(path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")  # as Lightning says it
        return loading.load(path, map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        removal = _Removal(str(path), list(self._saves), super().remove_checkpoint)
        self._removals.append(removal)
        removal.start()
        self._collect(wait=False, saves=False)

    def teardown(self) -> None:
        """Waits for saves in flight; raises the error of the first that failed; others are reported at exit."""
        self._collect(wait=True)

    def _wait(self) -> None:
        for save in self._saves:
            pending.ended_well(save)
        for removal in self._removals:
            removal.done.wait()

    def _collect(self, *, wait: bool, saves: bool = True) -> None:
        """Forgets what has ended, and raises its error."""
        if wait:
            self._wait()
        removals = [removal for removal in self._removals if removal.done.is_set()]
        self._removals = [removal for removal in self._removals if removal not in removals]
        if saves:
            ended = [save for save in self._saves if save.done()]
            self._saves = [save for save in self._saves if save not in ended]
            for save in ended:
                save.result()
        for removal in removals:
            if removal.error is not None:
                raise removal.error


class _Removal:
    """Of a checkpoint, once the saves that may replace it have ended well."""

    def __init__(self, path: str, after: list[PendingSave], remove: Callable[[str], None]) -> None:
        self.path = path
        self.done = threading.Event()
        self.error: OSError | None = None
        self._after = after
        self._remove = remove

    def start(self) -> None:
        if all(save.done() for save in self._after):
            self._run()
        else:
            threading.Thread(target=self._run, name=f"remove {self.path}", daemon=False).start()

    def _run(self) -> None:
        try:
            if all([pending.ended_well(save) for save in self._after]):
                self._remove(self.path)
        except OSError as e:
            self.error = e
        finally:
            self._after = []
            self.done.set()


def _has_scheme(path: Any) -> bool:
    return "://" in str(path)

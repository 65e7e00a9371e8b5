"""Names that promise another format than that of ``torch.save``."""

from __future__ import annotations

import os
from typing import Any

from ..errors import FileKindError
from ..installed.stock import save_is_rebound


def check_suffix(f: Any) -> None:
    """Refuses a path that ends in ``.safetensors``: whatever reads files of that name, ``torch.load`` included, could
    not read what is written here.

    Not where something else stands in for ``torch.save``, which writes its own format under any name: through that
    name come calls of code that knows torch alone.

    Args:
        f: as given to ``save``; an object to write to has no name.

    Raises:
        FileKindError: names the way to a safetensors file.
    """
    path = os.fspath(f) if isinstance(f, (str, os.PathLike)) else None
    if isinstance(path, str) and path.endswith(".safetensors") and not save_is_rebound():
        raise FileKindError(
            f"{path}: the file would be a zip archive of torch.save, which nothing that reads safetensors can load; "
            "write tensors in that format with statedict_io.save_safetensors, or save to a name that ends in .pt"
        )

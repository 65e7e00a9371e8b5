"""The installed torch's own ``save``, whatever :func:`~statedict_io.patch_torch` has bound to its name since.

Whatever has torch write calls this one: the patched one would call back.
"""

import torch.serialization

torch_save = torch.serialization.save

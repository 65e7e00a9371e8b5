"""What ``torch.save`` writes for a plain tensor, once its globals are in the memo, as a regular expression."""

from __future__ import annotations

import re

_LONG = b"|".join(b"\\x8a" + re.escape(bytes([n])) + b"." * n for n in range(1, 10))
_INTEGER = b"(?:K.|M..|J....|" + _LONG + b")"
# One alternative for each length of up to 8 digits.
_KEY = b"X(?:" + b"|".join(re.escape(bytes([n, 0, 0, 0])) + b"." * n for n in range(1, 9)) + b")"


def _tensor_call(get: bytes, put: bytes, key: bytes, put_of_key: bytes, grouped: bytes) -> bytes:
    """``torch._utils._rebuild_tensor_v2((storage), offset, size, stride, requires_grad, OrderedDict())``."""
    integers = (
        b"(?:\\)|(?:" + _INTEGER + b"\\x85|" + _INTEGER * 2 + b"\\x86|" + _INTEGER * 3 + b"\\x87|\\("
        + _INTEGER + b"{0,64}t)" + put + b")"
    )  # fmt: skip
    got = get.replace(b".", grouped)
    return (
        got + b"\\(\\(" + got * 2 + key + put_of_key + got + _INTEGER + b"t" + put + b"Q"
        + _INTEGER + integers * 2 + b"[\\x88\\x89]" + got + b"\\)R" + put + b"t" + put + b"R"
    )  # fmt: skip


#: its groups are the opcode with the key of the storage, which begins five bytes behind it, and the put of it
TENSOR_CALL = re.compile(
    b"(?s)" + _tensor_call(b"(?:h.|j....)", b"(?:q.|r....)?", b"(" + _KEY + b")", b"(q.|r....)?", b".")
)

_LATE_PUT = b"(?:r(?!.\\0\\0\\0)....)?"
#: behind the first 256 entries of the memo, with all symbols among those: none of its puts changes one. Behind and
#: before it may be a put. Its groups are the indices of three symbols, of the key where that was met before (four bytes
#: or none), and of two more symbols.
LATE_TENSOR_CALL = re.compile(
    b"(?s)" + _LATE_PUT + _tensor_call(b"h.", _LATE_PUT, b"(?:" + _KEY + b"|j(....))", _LATE_PUT, b"(.)") + _LATE_PUT
)

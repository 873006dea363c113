"""How tensors, and texts as tensors, lie in a file of safetensors; equal contents are equal files.

The library's own writer orders the entries of a header at random.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_ssm.errors import UserError

LARGEST_HEADER = 100_000_000
"""Bytes; readers of safetensors refuse a larger header."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors names the types of tensors."""


def packed(texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as tensors: their ``bytes`` one after the other, and ``offsets``, where each begins and the last ends."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
    whole_text = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {"bytes": torch.from_numpy(whole_text), "offsets": torch.from_numpy(offsets)}


def unpacked(content: Tensor, offsets: Tensor) -> list[str]:
    """The inverse of :func:`packed`.

    Raises:
        ValueError: the two do not fit, or it is not text.
    """
    plain_types = content.dtype == torch.uint8 and offsets.dtype == torch.int64
    if not plain_types or content.dim() != 1 or offsets.dim() != 1 or not len(offsets):
        raise ValueError("bytes and offsets are not lists of such")
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != len(content) or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError("the offsets do not fit the bytes")
    text = content.numpy().tobytes()
    return [text[begin:end].decode("utf-8", "surrogatepass") for begin, end in itertools.pairwise(ends)]


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors as they follow each other in a file: the widest types first, so that all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file of safetensors: the length of the JSON that says where everything lies, and that JSON.

    Raises:
        UserError: it is longer than readers accept.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in in_order(tensors):
        begin, end = end, end + tensors[name].nbytes
        shape, kind = list(tensors[name].shape), TYPES[tensors[name].dtype]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise UserError(
            f"checkpoint: what is no tensor takes {len(text):,} bytes, and a header may have {LARGEST_HEADER:,}; "
            "let hooks keep less in their state"
        )
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """The SHA-256 of a text and of all tensors with their names, types and shapes, in hexadecimal."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()

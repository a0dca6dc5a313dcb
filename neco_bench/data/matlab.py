"""Read arrays and structures of MATLAB files of version 5, because a damaged file can crash or hang SciPy's reader.

Format: MathWorks, "MAT-File Format", version 5. Text, cells, sparse arrays and objects are skipped.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

# NumPy's types of data elements, and of the classes of arrays.
_ELEMENTS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}

_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}

_STRUCT, _MATRIX, _COMPRESSED = 2, 14, 15

_DEPTH = 10  # maximum nesting of structures


def parse_matlab(content: bytes) -> dict[str, Any]:
    """Return the variables of a file: arrays of numbers as ndarray, single structures as dict, anything else as None.

    Raises ValueError, struct.error or zlib.error if it is not such a file.
    """
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(content[124:128])
    if order is None:
        raise ValueError("it is not a MATLAB file of version 5")
    variables = {}
    for kind, element in _elements(memoryview(content)[128:], order):
        matrices = [(kind, element)]
        if kind == _COMPRESSED:
            matrices = list(_elements(memoryview(zlib.decompress(element)), order))
        for kind_, matrix in matrices:
            if kind_ == _MATRIX:
                name, value = _matrix(matrix, order, 0)
                variables[name] = value
    return variables


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield (type, data) of each data element."""
    place = 0
    while place < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, place)
        start = place + 8
        end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if kind >> 16:  # a short element, with its data in the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, place + 4, start
        if start + size > len(content):
            raise ValueError(f"a data element of {size} bytes is truncated")
        yield kind, content[start : start + size]
        place = end


def _numbers(element: tuple[int, memoryview], order: str) -> np.ndarray:
    kind, data = element
    if kind not in _ELEMENTS:
        raise ValueError(f"data of type {kind} are not numbers")
    return np.frombuffer(data, order + _ELEMENTS[kind])


def _matrix(content: memoryview, order: str, depth: int) -> tuple[str, Any]:
    """Return name and value of an array."""
    if depth > _DEPTH:
        raise ValueError("its structures are nested too deeply")
    parts = list(_elements(content, order))
    if len(parts) < 4:  # an empty array, or one of a skipped kind
        return "", None
    flags, shape = (_numbers(part, order) for part in parts[:2])
    name, kind = bytes(parts[2][1]).decode("latin-1"), int(flags[0]) & 0xFF
    if kind in _CLASSES:
        values = _numbers(parts[3], order)
        if len(values) != math.prod(map(int, shape)):
            raise ValueError(f"{name!r} has {len(values)} numbers for the shape {shape.tolist()}")
        return name, values.astype(_CLASSES[kind]).reshape(shape.tolist(), order="F")
    if kind != _STRUCT or math.prod(map(int, shape)) != 1:
        return name, None
    width = int(_numbers(parts[3], order)[0])
    names = bytes(parts[4][1]).decode("latin-1")
    fields = [names[i : i + width].partition("\0")[0] for i in range(0, len(names), width)]
    return name, {field: _matrix(part, order, depth + 1)[1] for field, (_, part) in zip(fields, parts[5:], strict=True)}

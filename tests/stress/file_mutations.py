"""Ways to corrupt a file: blind ones on bytes, and ones that know zip, JSON, numpy and safetensors."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

Mutation = Callable[[bytes, Generator], bytes]
BOMB = 1 << 24
"""Zeros that a bomb unpacks to: 16 MiB, thousands of times what the file announces."""


class Payload:
    """Unpickling this creates the file `TRACE`: whoever does it has run foreign code."""

    trace = Path("unpickled")

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (type(self).trace,)


def truncated(content: bytes, generator: Generator) -> bytes:
    """The start of the file, as a full disk or a killed copy leaves it."""
    return content[: int(generator.integers(len(content)))]


def bits_flipped(content: bytes, generator: Generator) -> bytes:
    """One to eight flipped bits."""
    array = np.frombuffer(content, dtype=np.uint8).copy()
    for position in generator.integers(array.size, size=generator.integers(1, 9)):
        array[position] ^= 1 << int(generator.integers(8))
    return array.tobytes()


def overwritten(content: bytes, generator: Generator) -> bytes:
    """A stretch of random bytes, or of zeros as a lost disk block gives."""
    start = int(generator.integers(len(content)))
    length = int(generator.integers(1, max(2, len(content) // 4)))
    fill = generator.bytes(length) if generator.random() < 0.5 else bytes(length)
    return (content[:start] + fill + content[start + length :])[: len(content)]


def spliced(content: bytes, generator: Generator) -> bytes:
    """A stretch left out, doubled or moved."""
    a, b, c = sorted(int(i) for i in generator.integers(len(content) + 1, size=3))
    first, second = content[a:b], content[b:c]
    middle = (second, first + first + second, second + first)[int(generator.integers(3))]
    return content[:a] + middle + content[c:]


def appended(content: bytes, generator: Generator) -> bytes:
    """Bytes after the end, or before the start."""
    extra = generator.bytes(int(generator.integers(1, 200)))
    return content + extra if generator.random() < 0.7 else extra + content


def foreign(content: bytes, generator: Generator) -> bytes:
    """Another file altogether: empty, noise, a pickle, deep JSON, a huge safetensors header."""
    kinds = (
        b"",
        generator.bytes(int(generator.integers(1, 500))),
        pickle.dumps(Payload()),
        pickled_array(),
        b"[" * 200_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"9" * 10_000,
        (2**62).to_bytes(8, "little") + content[8:],
        (len(content) * 2).to_bytes(8, "little") + content[8:],
        b"PK\x05\x06" + bytes(18),
    )
    return kinds[int(generator.integers(len(kinds)))]


def pickled_array() -> bytes:
    """A numpy file of objects, which `allow_pickle=True` would run."""
    stream = io.BytesIO()
    np.save(stream, np.array([Payload()], dtype=object), allow_pickle=True)
    return stream.getvalue()


BLIND: tuple[Mutation, ...] = (truncated, bits_flipped, overwritten, spliced, appended, foreign)


def zip_changed(content: bytes, generator: Generator) -> bytes:
    """A zip archive written again with correct checksums of its own and one thing changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    number = int(generator.integers(len(members)))
    name, data = members[number]
    method = zipfile.ZIP_DEFLATED
    change = int(generator.integers(9))
    if change == 0:
        del members[number]
    elif change == 1:
        members.append((name, data))
    elif change == 2:
        members.append(("extra.npy", data))
    elif change == 3:
        members[number] = (name, data + bytes(BOMB))
    elif change == 4:
        members[number] = (name, pickled_array())
    elif change == 5:
        method = (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[int(generator.integers(2))]
    elif change == 6:
        members[number] = (name, array_changed(data, generator))
    elif change == 7:
        members[number] = (name, BLIND[int(generator.integers(4))](data, generator))
    else:
        members = [(n, header_changed(d, generator) if n == "header.npy" else d) for n, d in members]
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as archive:
        warnings.simplefilter("ignore")  # of a name that comes twice
        for member, kept in members:
            info = zipfile.ZipInfo(member)
            info.compress_type = method
            archive.writestr(info, kept)
    return stream.getvalue()


def array_changed(data: bytes, generator: Generator) -> bytes:
    """A numpy file with another shape, type or value."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    change = int(generator.integers(6))
    if change == 0:
        array = array.reshape(*array.shape, 1)
    elif change == 1:
        array = array.T.copy() if array.ndim > 1 else array[::-1].copy()
    elif change == 2:
        array = array.astype(np.float32)
    elif change == 3:
        array = np.concatenate([array, array[:1]]) if array.ndim else array
    elif change == 4 and array.size:
        flat = array.reshape(-1).copy()
        position = int(generator.integers(flat.size))
        if flat.dtype == np.float64:
            flat[position] = generator.choice([np.nan, np.inf, 0.0, np.nextafter(flat[position], np.inf)])
        else:
            flat.view(np.uint8)[position] ^= int(generator.choice([1, 2, 255]))
        array = flat.reshape(array.shape)
    else:
        head, said = data[:10], b"(" + b"9" * 12 + b",)"
        text = data[10 : 10 + int.from_bytes(head[8:], "little")]
        start, stop = text.index(b"("), text.index(b")") + 1
        return head + (text[:start] + said + text[stop:])[: len(text) - 1] + b"\n" + data[10 + len(text) :]
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header_changed(data: bytes, generator: Generator) -> bytes:
    """The JSON header of a container with one value changed."""
    document = json.loads(np.load(io.BytesIO(data), allow_pickle=False).tobytes())
    text = json.dumps(value_changed(document, generator)).encode()
    stream = io.BytesIO()
    np.save(stream, np.frombuffer(text, dtype=np.uint8))
    return stream.getvalue()


def json_changed(content: bytes, generator: Generator) -> bytes:
    """A JSON object written again with one value changed."""
    return json.dumps(value_changed(json.loads(content), generator)).encode()


def lines_changed(content: bytes, generator: Generator) -> bytes:
    """One line cut short, or with a value of its JSON object changed under the checksum before it."""
    lines = content.splitlines(keepends=True)
    number = int(generator.integers(len(lines)))
    start = lines[number].find(b"{")
    if start >= 0 and generator.random() < 0.6:
        body = json.dumps(value_changed(json.loads(lines[number][start:]), generator))
        lines[number] = lines[number][:start] + body.encode() + b"\n"
    else:
        lines[number] = lines[number][: int(generator.integers(len(lines[number])))]
    return b"".join(lines)


def safetensors_changed(content: bytes, generator: Generator) -> bytes:
    """A safetensors file with one value of its header changed: shapes, types, offsets, metadata."""
    length = int.from_bytes(content[:8], "little")
    document = value_changed(json.loads(content[8 : 8 + length]), generator)
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def value_changed(document: Any, generator: Generator) -> Any:
    """A copy of a JSON value with one entry, anywhere in it, replaced, removed or added."""
    changed = copy.deepcopy(document)
    place = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return {"unheard of": 1} if place is changed else changed
        key = keys[int(generator.integers(len(keys)))]
        if isinstance(place[key], dict | list) and place[key] and generator.random() < 0.85:
            place = place[key]
            continue
        choice = int(generator.integers(4))
        if choice == 0 and isinstance(place, dict):
            del place[key]
        elif choice == 1 and isinstance(place, dict):
            place[f"{key}x"] = place.pop(key)
        else:
            place[key] = replacement(place[key], generator)
        return changed


def replacement(value: Any, generator: Generator) -> Any:
    """Another value: near the old one, of another type, or absurd."""
    near: list[Any] = [None, True, -1, 0, 10**12, 10**400, "", "x" * 1000, [], {}, [[[]]], 0.5, float("nan")]
    if isinstance(value, bool):
        near += [not value] * 6
    elif isinstance(value, int | float):
        near += [value + 1, value - 1, value * 2 + 1, -value, str(value)]
    elif isinstance(value, str):
        near += [value[:-1], value + "0", value[::-1] + "!", value.upper() + "."]
    elif isinstance(value, list):
        near += [value + value + [0], [*value[::-1], 1], value[1:]]
    return near[int(generator.integers(len(near)))]

"""The safetensors format by hand: tensors in a file that can do nothing but hold tensors.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' raw bytes, end to end (https://github.com/huggingface/safetensors). Unlike a pickle it runs
no code. A header is not believed: it is checked whole before a single tensor is made.
"""

import json
import math
import mmap
from pathlib import Path

import torch

from nanoem import UserError
from nanoem.lab.files import without_duplicates, write_file

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER = 100_000_000  # bytes, as in the reference implementation
CHUNK = 1 << 20  # bytes copied at a time: what reading needs beside the tensor itself


def save_tensors(path, tensors):
    """Write {name: tensor} to a safetensors file, byte for byte as the reference writes it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        dtype = getattr(tensor, "dtype", type(tensor))
        if dtype not in names:
            raise UserError(f"{path}: tensor '{name}' is {dtype}; nanoem writes "
                            + ", ".join(DTYPES))
    # wide dtypes first, so that every tensor starts at a multiple of its own width
    order = sorted(tensors, key=lambda n: (list(names).index(tensors[n].dtype), n))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        end = offset + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def chunks():
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            flat = tensors[name].detach().cpu().reshape(-1).view(torch.uint8)
            yield from (part.numpy().tobytes() for part in flat.split(CHUNK))

    write_file(path, chunks())


def load_tensors(path):
    """Read a safetensors file -> {name: tensor}. Raises UserError for a missing or broken file."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.entries}


class TensorFile:
    """An open, memory-mapped safetensors file, from which single tensors are read.

    `entries` is {name: (dtype, shape, begin, end)}, in bytes from the file's start. Raises
    UserError, naming the file, for whatever is wrong with it.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                self.entries = read_header(self.path, file, size)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else (
                f"cannot be read: {error.strerror or error}")
            raise UserError(f"{path} {reason}") from error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.map.close()

    def read(self, name, dtype=None, device="cpu"):
        """One tensor, in its own or the asked dtype. Needs CHUNK bytes beside the tensor.

        Refuses a value that is not finite in that dtype: a model with one answers only NaN.
        """
        stored, shape, begin, end = self.entries[name]
        tensor = torch.empty(shape, dtype=dtype or stored, device=device)
        flat, done = tensor.view(-1), 0
        for start in range(begin, end, CHUNK):
            chunk = bytearray(self.map[start : min(start + CHUNK, end)])
            values = torch.frombuffer(chunk, dtype=stored)
            part = flat[done : done + len(values)].copy_(values)
            if not torch.stack(part.aminmax()).isfinite().all():
                raise UserError(f"{self.path}: tensor '{name}' holds a value that is not finite; "
                                "copy or make the file again")
            done += len(values)
            if hasattr(mmap, "MADV_DONTNEED"):  # give the pages back; else they count as ours
                self.map.madvise(mmap.MADV_DONTNEED, start - start % mmap.PAGESIZE, CHUNK)
        return tensor


def read_header(path, file, size):
    """The checked header of an open file of `size` bytes; see TensorFile.entries."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8 or length > MAX_HEADER:
        raise UserError(f"{path} is truncated or no safetensors file: a header of {length} bytes "
                        f"does not fit in its {size} bytes; copy or make it again")

    # a JSON table, and the place of every tensor after it
    start = 8 + length
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (isinstance(metadata, dict)
                                         and all(isinstance(v, str) for v in metadata.values())):
            raise ValueError("__metadata__ is no table of strings")
        entries = {name: read_entry(path, name, header[name], start) for name in header}
    except UserError:  # it is a ValueError, too
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a broken safetensors header ({error}); "
                        "make it again") from error
    check_offsets(path, entries, start, size)
    return entries


def read_entry(path, name, entry, start):
    """{dtype, shape, data_offsets} -> (dtype, shape, begin, end), each checked by itself."""
    # of the right types
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' should have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str):
        raise ValueError(f"the dtype of '{name}' is no text")
    if kind not in DTYPES:
        raise UserError(f"{path}: tensor '{name}' has dtype {kind}; nanoem reads "
                        + ", ".join(DTYPES))
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f"the shape and data_offsets of '{name}' should be lists of integers")
    if len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"'{name}' has {len(offsets)} data_offsets and {len(shape)} dimensions")

    # the shape fits the bytes, and its strides 64 bits, even where an axis of 0 leaves no bytes
    begin, end = offsets
    n_bytes = math.prod(shape) * DTYPES[kind].itemsize
    fits = min(shape, default=0) >= 0 and begin >= 0 and end - begin == n_bytes
    if not fits or math.prod(max(n, 1) for n in shape) >> 62:
        raise UserError(f"{path}: tensor '{name}' has shape {shape} but bytes {begin} to "
                        f"{end}; the header is broken, make the file again")
    return DTYPES[kind], tuple(shape), start + begin, start + end


def check_offsets(path, entries, start, size):
    """The tensors' bytes must fill the file exactly, without a hole or an overlap."""
    position, before = start, "the header"
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end > size:
            raise UserError(f"{path} is truncated: tensor '{name}' should end at byte {end}, "
                            f"the file at {size}; copy or make it again")
        if begin != position:
            problem = "overlaps with" if begin < position else "leaves a hole after"
            raise UserError(f"{path}: tensor '{name}' {problem} {before}; the header is broken, "
                            "make the file again")
        position, before = end, f"'{name}'"
    if position != size:
        raise UserError(f"{path} has {size - position} bytes after its last tensor that belong to "
                        "none; copy or make it again")

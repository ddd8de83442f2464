"""Bytes of tensors to their places in files."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import torch

from mapdsl.checkpoint.layout import FileLayout
from mapdsl.checkpoint.rawbytes import buffer, strips

# Other file systems, old kernels, special files: the bytes are written from memory then.
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def allocate(path: Path, file: FileLayout) -> None:
    """Make a file of its final size, so that a full disk is found before the work is done, and write its header."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, file.size)
        else:
            os.ftruncate(descriptor, file.size)
        write_all(descriptor, memoryview(file.header), 0)
    finally:
        os.close(descriptor)


def write_tensor(path: Path, offset: int, tensor: torch.Tensor) -> None:
    """Write a tensor's bytes from an offset on, strided ones and those on a device in strips."""
    if not tensor.nbytes:
        return
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for strip in strips(tensor):
            write_all(descriptor, buffer(strip), offset)
            offset += strip.nbytes
    finally:
        os.close(descriptor)


def copy_range(source: Path, offset: int, target: Path, place: int, size: int) -> bool:
    """Copy bytes between files within the system; False where it cannot, or not between these."""
    if not hasattr(os, "copy_file_range"):
        return False
    outof, into = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY)
    try:
        while size:
            count = os.copy_file_range(outof, into, size, offset, place)
            if not count:
                raise OSError(errno.EIO, f"{source.name} has become shorter", str(source))
            offset, place, size = offset + count, place + count, size - count
    except OSError as problem:
        if problem.errno in _CANNOT_COPY:
            return False
        raise
    finally:
        os.close(outof)
        os.close(into)
    return True


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes from an offset on, in as many calls as that takes."""
    while data:
        try:
            count = os.pwrite(descriptor, data, offset)
        except OSError as problem:
            if problem.errno == errno.EFAULT:  # mapped memory that has lost its file; to look at it ends the process
                raise OSError(errno.EIO, "the file that it comes from has become shorter") from problem
            raise
        data, offset = data[count:], offset + count


def flush(path: Path) -> None:
    """Make what was written to a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    with contextlib.suppress(OSError):  # some file systems cannot flush a folder
        flush(path)

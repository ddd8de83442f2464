"""Memory for what is converted: as torch's, and in huge pages where it is large."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from mapdsl.runtime.codecs import memory
from mapdsl.runtime.codecs.memory import fresh

LINUX = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
MEGABYTE = 1 << 20


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2048, 2049)])
def test_it_is_a_tensor_of_its_own(shape: tuple[int, ...]) -> None:
    made = fresh(shape, torch.bfloat16)
    assert (tuple(made.shape), made.dtype, made.device.type) == (shape, torch.bfloat16, "cpu")
    assert made.is_contiguous() and made.fill_(2).eq(2).all()
    assert fresh(shape, torch.uint8, torch.device("meta")).is_meta


@LINUX
def test_large_ones_are_advised_and_small_ones_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole pages that lie in the tensor; a refusal does no harm."""
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_advise", lambda: lambda *words: seen.append(words) or -1)
    fresh((MEGABYTE,), torch.bfloat16)
    assert not seen
    made = fresh((4 * MEGABYTE + 1,), torch.bfloat16)
    ((begin, length, advice),) = seen
    assert advice == mmap.MADV_HUGEPAGE and begin % mmap.PAGESIZE == 0
    assert made.data_ptr() <= begin < made.data_ptr() + mmap.PAGESIZE
    assert begin + length == made.data_ptr() + made.nbytes


@LINUX
def test_the_system_takes_the_advice() -> None:
    """As /proc tells of the mapping, whether there are huge pages just now or not."""
    if "never" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]:
        pytest.skip("huge pages are off")
    made = fresh((64 * MEGABYTE,), torch.uint8)
    place, is_inside, flags = made.data_ptr() + made.nbytes // 2, False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(word, 16) for word in head.split("-"))
            is_inside = begin <= place < end
        elif is_inside and head == "VmFlags:":
            flags = line
    assert " hg" in flags, flags

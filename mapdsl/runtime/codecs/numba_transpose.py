"""The inner loop of transposing 16-bit values, compiled.

Squares of 32 x 32 are turned in a first-level cache: a row of one is a cache line, so memory is read and written in
whole lines. Within, squares of 4 x 4 are turned in registers, four values in each 64-bit word.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mapdsl.runtime.codecs.numba_kernels import CHUNK, compiled, convert_row, kept_on_disk, spread

EDGE = 32  # values in a cache line of 64 bytes
PER_WORD = 4
_WORDS = EDGE // PER_WORD
_BAND = 512  # rows of the source that are turned before the next columns: their lines of the output are neighbours

_u64 = np.uint64
_EVEN, _ODD = _u64(0x0000FFFF0000FFFF), _u64(0xFFFF0000FFFF0000)  # of the four values in a word
_LOWER, _UPPER = _u64(0x00000000FFFFFFFF), _u64(0xFFFFFFFF00000000)
_BY_ONE, _BY_TWO = _u64(16), _u64(32)


@compiled
def _turn(square: Any, turned: Any, word: Any, quad: Any) -> None:
    """Transpose the 4 x 4 values of a word of the rows of a quad."""
    row, column = PER_WORD * quad, PER_WORD * word
    a, b, c, d = square[row, word], square[row + 1, word], square[row + 2, word], square[row + 3, word]
    first, second = (a & _EVEN) | ((b & _EVEN) << _BY_ONE), ((a >> _BY_ONE) & _EVEN) | (b & _ODD)
    third, fourth = (c & _EVEN) | ((d & _EVEN) << _BY_ONE), ((c >> _BY_ONE) & _EVEN) | (d & _ODD)
    turned[column, quad] = (first & _LOWER) | (third << _BY_TWO)
    turned[column + 1, quad] = (second & _LOWER) | (fourth << _BY_TWO)
    turned[column + 2, quad] = (first >> _BY_TWO) | (third & _UPPER)
    turned[column + 3, quad] = (second >> _BY_TWO) | (fourth & _UPPER)


@compiled
def _turn_line(source: Any, source_stride: Any, left: Any, out: Any, out_stride: Any, top: Any, buffers: Any) -> None:
    """Transpose the square of `source` that begins with a word of its first `EDGE` rows, to a word of rows of `out`."""
    square, turned = buffers
    for row in range(EDGE):
        start = row * source_stride + left
        line = source[start : start + _WORDS]
        for word in range(_WORDS):
            square[row, word] = line[word]
    for word in range(_WORDS):
        for quad in range(_WORDS):
            _turn(square, turned, word, quad)
    for column in range(EDGE):
        start = column * out_stride + top
        line = out[start : start + _WORDS]
        for word in range(_WORDS):
            line[word] = turned[column, word]


@functools.cache
def transposer() -> Any:
    """The kernel for `source` `[rows, columns]` into `out` `[columns, rows]`, both multiples of `EDGE`.

    Tensors come as flat arrays of uint64 words, least significant value first, and the distance of rows in words.
    """

    def transpose(source: Any, source_stride: Any, out: Any, out_stride: Any, rows: Any, columns: Any) -> Any:
        buffers = np.empty((EDGE, _WORDS), np.uint64), np.empty((EDGE, _WORDS), np.uint64)
        for band in range(0, rows, _BAND):
            for left in range(0, columns, EDGE):
                places = out[left * out_stride :]
                for top in range(band, min(band + _BAND, rows), EDGE):
                    lines = source[top * source_stride :]
                    _turn_line(lines, source_stride, left // PER_WORD, places, out_stride, top // PER_WORD, buffers)

    return kept_on_disk(transpose)


@functools.cache
def transposing_decoder(form: Any, per: int) -> Any:
    """The kernel that decodes blocks to bf16 as `converter` does, and transposes what it has decoded.

    `out` `[columns, rows]` is a flat array of uint64 words, both sizes multiples of `EDGE`. `EDGE` rows at a time are
    decoded into a second-level cache.
    """

    def decode(codes: Any, code_stride: Any, out: Any, out_stride: Any, factors: Any, height: Any, width: Any) -> Any:
        bands, groups = factors.shape
        row_width = groups * width
        columns = row_width * per
        buffers = np.empty((EDGE, _WORDS), np.uint64), np.empty((EDGE, _WORDS), np.uint64)
        scales, values = np.empty(row_width, np.float32), np.empty(EDGE * columns, np.uint16)
        words = values.view(np.uint64)
        for top in range(0, bands * height, EDGE):
            for row in range(EDGE):
                band = (top + row) // height
                if width % CHUNK != 0:
                    spread(factors, band, width, scales)
                mine = codes[(top + row) * code_stride : (top + row) * code_stride + row_width]
                theirs = values[row * columns : (row + 1) * columns]
                convert_row(True, mine, theirs, factors, band, width, scales, form, per)
            for left in range(0, columns, EDGE):
                places, stride = out[left * out_stride :], columns // PER_WORD
                _turn_line(words, stride, left // PER_WORD, places, out_stride, top // PER_WORD, buffers)

    return kept_on_disk(decode, form, per)

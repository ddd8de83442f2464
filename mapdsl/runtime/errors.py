"""The one error of the runtime."""

from __future__ import annotations


class ConversionError(ValueError):
    """Tensors that do not fit the map.

    `code` is a code of the catalogue (`mapdsl explain R605` tells more); `message` names the tensor, what was expected
    and what was found.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"error[{self.code}]: {self.message}"

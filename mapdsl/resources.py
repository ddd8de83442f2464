"""Where the grammar, the templates and the shipped maps lie: in the wheel, or beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(*parts: str) -> Path:
    """Path of a file or folder of `grammars/`, `rules/` or `codegen/`."""
    packed = _PACKAGE / "_data"
    return (packed if packed.is_dir() else _PACKAGE.parent).joinpath(*parts)


def shipped_maps() -> dict[str, Path]:
    """Every shipped map by name: `deepseek_v4`, `megatron/gpt`."""
    root = resource("rules")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.map"))}

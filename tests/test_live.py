"""The state of a live model, on the ranks of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.jobs import run_job
from tests.helpers.live_job import check


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.heavy)])
def test_in_a_job(world: int, tmp_path: Path) -> None:
    run_job("tests.helpers.live_job", check, world, tmp_path)

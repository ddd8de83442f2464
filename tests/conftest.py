"""Settings of all tests."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

# Machines are noisy: no test is judged by the clock, and every run draws the same examples.
settings.register_profile("mapdsl", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mapdsl")

# Two threads on a busy machine of two cores wait for each other; one test a core is faster.
torch.set_num_threads(1)

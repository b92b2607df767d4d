"""The device that is held against the CPU, and what is skipped where there is none."""

import os

import pytest
import torch

# The one place that names it. With `cpu` the tests hold the CPU against itself, which shows that they run at all.
DEVICE = os.environ.get("FLAP_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> str:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no graphics card here; FLAP_TEST_DEVICE=cpu runs these tests on the CPU")
    return DEVICE


@pytest.fixture(scope="session")
def two_devices(device: str) -> str:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one graphics card alone")
    return device

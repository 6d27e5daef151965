"""What tests of benchmarks share."""

import pytest

from basis.bench.timing import Setting


@pytest.fixture
def setting():
    def timer(step):
        step()
        return 0.002

    return Setting(
        device="cpu", precision="fp32", memory_format="channels_last", batch_size=2, rounds=3, timer=timer
    )  # fmt: skip

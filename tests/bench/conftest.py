"""What tests of benchmarks share. None looks at real times, which would make it fail on a busy machine."""

import pytest

from basis.bench.timing import Setting


class Clock:
    """Runs each step and reports a time of its choosing, by the number of the call."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, step):
        step()
        self.calls += 1
        return self.seconds(self.calls)


@pytest.fixture
def setting():
    clock = Clock(lambda _: 0.002)
    return Setting(device="cpu", precision="fp32", memory_format="channels_last", batch_size=2, rounds=3, timer=clock)

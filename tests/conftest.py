"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Waking a second thread costs more than the small layers of the tests do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items):
    """Trials take long: they are run only where they are asked for by ``-m trial``."""
    if "trial" not in config.option.markexpr:
        left = [item for item in items if item.get_closest_marker("trial")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]

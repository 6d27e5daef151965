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

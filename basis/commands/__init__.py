"""The commands of ``basis``, each in a module that is imported when one of its commands is named.

``do_NAME(options)`` does it and returns the exit status; ``add_NAME(command)`` gives the command its options.
"""

import argparse

import torch


def device(text: str) -> str:
    """An argument that names a device of this machine."""
    gpus = torch.cuda.device_count()
    try:
        place = torch.device(text)
        here = place.type != "cuda" or (place.index or 0) < gpus
    except RuntimeError:
        here = False
    if not here:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine, which has a CPU and {gpus} GPUs")
    return text

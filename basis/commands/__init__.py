"""The commands of ``basis``, each in a module that is imported when one of its commands is named.

``do_NAME(options)`` does it and returns the exit status; ``add_NAME(command)`` gives the command its options.
"""

import argparse

import torch


def device(text: str) -> str:
    """An argument that names a device of this machine."""
    gpus = torch.cuda.device_count()
    known = ["cpu", *["cuda"] * bool(gpus), *(f"cuda:{i}" for i in range(gpus))]
    known += ["mps"] * torch.backends.mps.is_available()
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine, which has {', '.join(known)}")
    return text

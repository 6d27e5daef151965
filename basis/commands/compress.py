"""``basis compress``: make a trained network smaller."""

import argparse
import shlex
from dataclasses import fields

from basis.compression.compress import Settings, compress


def add_compress(command: argparse.ArgumentParser) -> None:
    """The options of ``basis compress``."""
    command.add_argument("model", metavar="MODEL", help="a network of torchvision or timm, or package.module:factory")
    command.add_argument("--weights", required=True, metavar="FILE", help="safetensors, or a state_dict of torch.save")
    data = "folder with train/CLASS/* and val/CLASS/*; rotations in EXIF are ignored, as in torchvision's training"
    command.add_argument("--data", required=True, help=data)
    budget = "share of params, macs, backward_macs or milliseconds that may stay, as params=0.5; repeatable"
    command.add_argument("--budget", required=True, action="append", type=_share, metavar="UNIT=SHARE", help=budget)
    command.add_argument("--out", required=True, help="folder to fill; a run of the same settings there goes on")
    for one in (field for field in fields(Settings) if field.metadata):
        command.add_argument(f"--{one.name.replace('_', '-')}", default=one.default, **one.metadata)


def _share(text: str) -> tuple[str, float]:
    unit, _, share = text.partition("=")
    return unit, float(share)


def do_compress(options: argparse.Namespace) -> int:
    """Find the layers of a trained network that can take it, replace them by basis convolutions, repair, measure and
    export. May be stopped and repeated at will: the same command goes on where it was.
    """
    given = {field.name: getattr(options, field.name) for field in fields(Settings)} | {"budget": dict(options.budget)}
    compress(Settings(**given), say=print, command=shlex.join(["basis", *options.typed]))
    return 0

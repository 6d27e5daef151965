"""The command ``basis compress``: a trained network in, a smaller one with its report out."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from typing import Any

from basis.cli_campaign import device
from basis.compression.compress import compress
from basis.compression.job import Settings, parse_budget
from basis.training.loop import DTYPES


def add_command(commands: Any) -> None:
    """Add ``basis compress``, whose options are :class:`basis.compression.job.Settings`."""
    command = commands.add_parser("compress", help="make a trained network smaller", description=_compress.__doc__)
    usual = Settings(model="", weights="", data="", budget={"params": 0.5}, out="")
    add = command.add_argument
    add("model", metavar="MODEL", help="a network of torchvision or timm, or package.module:factory")
    add("--weights", required=True, metavar="FILE", help="safetensors, or a state_dict that torch.save wrote")
    add(
        "--data",
        required=True,
        metavar="FOLDER",
        help="train/CLASS/* and val/CLASS/*, or an npz (x_train, y_train, ...)",
    )
    add("--budget", required=True, action="append", metavar="UNIT=X",
        help="what the network may keep: params, macs, backward_macs or milliseconds; 0.5 or 50%% is a fraction of the "
        "dense network's, 5M a number; may be given several times")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="the folder to fill; a run of the same settings there goes on")
    add("--measure", help="of the sensitivity, such as activation or fisher (default: oneshot_bn, which is exact)")
    add("--ratios", nargs="+", type=float, default=usual.ratios, metavar="R", help="of k to C_out (default: 0.5 0.25)")
    add("--multiple", type=int, default=usual.multiple, metavar="N", help="what every k is a multiple of (default: 8)")
    add("--include", nargs="+", default=(), metavar="PATTERN", help="only layers of such names, as layer4.*")
    add("--exclude", nargs="+", default=(), metavar="PATTERN", help="no layers of such names")
    add("--epochs", type=int, default=usual.epochs, metavar="N", help="of fine-tuning, 0 for none (default: 1)")
    add("--lr", type=float, default=usual.lr, metavar="LR", help="peak learning rate of fine-tuning (default: 0.01)")
    add("--distil", action="store_true", help="fine-tuning learns from the dense network's outputs, too")
    add("--batch-size", type=int, default=usual.batch_size, metavar="N", help="also of the latencies (default: 64)")
    add("--image-size", type=int, metavar="N", help="side in pixels (default: the network's own)")
    add("--mean", nargs="+", type=float, metavar="X", help="of each channel, in units of full scale")
    add("--std", nargs="+", type=float, metavar="X")
    add("--calibration-images", type=int, metavar="N", help="to fit layers on, and at most so many to score them on "
        "(default: 2000 of at most 64 pixels, else 256)")  # fmt: skip
    add("--validation-images", type=int, metavar="N", help="held out of the training images to choose layers on "
        "(default: a tenth, at most 2000)")  # fmt: skip
    add("--device", type=device, metavar="DEVICE", help="default: the GPU if there is one")
    add("--precision", default=usual.precision, choices=("auto", *DTYPES), help="of the latencies (default: fp32)")
    add("--seed", type=int, default=usual.seed, metavar="N")
    add("--table", metavar="FILE", help="sensitivity.jsonl of an earlier run, whose measurements are not made again")
    add("--no-resume", dest="resume", action="store_false", help="refuse a folder that holds a run already")
    add("--quiet", action="store_true", help="print nothing but errors")
    command.set_defaults(command=_compress)


def _compress(options: argparse.Namespace) -> int:
    """Find the layers of a trained network that can take it, replace them by basis convolutions, repair, measure and
    export. May be stopped and repeated at will: the same command goes on where it was.
    """
    names = [f.name for f in fields(Settings) if f.name != "budget"]
    settings = Settings(budget=parse_budget(options.budget), **{name: getattr(options, name) for name in names})
    typed = shlex.join(["basis", *options.typed])
    try:
        compress(settings, say=None if options.quiet else print, command=typed)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(f"a file could not be read or written ({error}); finished stages are kept") from error
    return 0

"""The results of Gray, Crowley and Storkey, "Separable Layers Enable Structured Efficient Linear Substitutions".

arXiv 1906.00859 and github.com/BayesWatch/deficient-efficient. :data:`GRAY` (``gray2019.csv``) holds WRN-28-10 on
CIFAR-10, trained with attention transfer. Errors were decoded from ``images/wrn-28-10-at.pdf`` there; each point was
given its setting by its number of parameters, which ours equals to the unit.
"""

import csv
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    """One network: the authors' ``setting``, our layer's text (None: dense), and what they report.

    Parameters of the whole network, multiply-adds of one image of 32 x 32 to four digits, as the authors count, and
    top-1 test errors in %, one a run; none where not reported.
    """

    setting: str
    layer: str | None
    parameters: int
    mult_adds: float
    errors: tuple[float, ...]


with Path(__file__).with_name("gray2019.csv").open(encoding="utf-8", newline="") as file:
    GRAY: tuple[Published, ...] = tuple(
        Published(setting, layer or None, int(parameters), float(count), tuple(map(float, errors.split())))
        for setting, layer, parameters, count, errors in list(csv.reader(file))[1:]
    )

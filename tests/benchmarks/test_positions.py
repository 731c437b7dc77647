import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from positions import describe


def test_few_pictures_have_students_interval():
    """Of two pictures 12.706 standard errors, of eight 2.365."""
    zeros = torch.zeros(8)
    assert describe(torch.tensor([0.0, 2.0]), zeros[:2]) == "1.000 (+1.000 +- 12.706)"
    changes = torch.tensor([1.0, -1.0] * 4)
    assert describe(changes, zeros) == "0.000 (+0.000 +- 0.894)"  # 2.365 * sqrt(8 / 7 / 8)
    assert describe(zeros, zeros) == "0.000 (+0.000 +- 0.000)"

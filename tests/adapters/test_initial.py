import torch

from urae.adapters.files import LowRank
from urae.adapters.initial import fingerprint_origin


def test_a_base_is_known_in_whatever_precision_it_is_held():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 32, generator=generator).half()
    lora = LowRank(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
    rounded = LowRank(lora.down.bfloat16(), lora.up.bfloat16())

    def fingerprint(held, over=()):
        return fingerprint_origin({"layer": lambda: held.float()}, [{"layer": o} for o in over])

    assert fingerprint(weight) == fingerprint(weight.bfloat16())
    assert fingerprint(weight) != fingerprint(1.01 * weight)
    assert fingerprint(weight, [lora]) != fingerprint(weight)
    assert fingerprint(weight, [lora]) != fingerprint(weight, [rounded])

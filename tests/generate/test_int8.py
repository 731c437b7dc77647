"""Products with int8 weights."""

import copy

import pytest
import torch
from torch import nn

from urae.generate.int8 import Int8Linear

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of torchao


@pytest.fixture(params=[True, False], ids=["bias", "none"])
def layers(request):
    """A layer in int8, and one whose weight is what the first one's stands for."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    dense = nn.Linear(16, 24, bias=request.param).requires_grad_(False)
    small = copy.deepcopy(dense)
    quantize_(small, Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    dense.weight.data = small.weight.dequantize()
    small.__class__ = Int8Linear
    return small, dense


def test_product_and_gradient_are_those_of_the_dequantised_weight(layers, rel):
    inputs = list(torch.randn(1, 5, 16, generator=torch.manual_seed(1)).expand(2, 5, 16).clone())
    outputs = [layer(x.requires_grad_()) for layer, x in zip(layers, inputs, strict=True)]
    assert rel(*outputs) < 1e-6
    for output in outputs:
        output.square().sum().backward()
    assert rel(inputs[0].grad, inputs[1].grad) < 1e-6


def test_the_compiler_sees_one_operation(layers):
    small, _ = layers
    graphs = []

    def look(graph, _inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch.compiler.reset()
    x = torch.randn(1, 16)
    assert torch.equal(torch.compile(small, backend=look, fullgraph=True)(x), small(x))
    assert torch.ops.urae.int8_linear in graphs[0]


def test_the_operation_is_as_torch_wants_it(layers):
    small, _ = layers
    x = torch.randn(3, 16, requires_grad=True)
    torch.library.opcheck(
        torch.ops.urae.int8_linear.default, (x, small.weight.qdata, small.weight.scale)
    )

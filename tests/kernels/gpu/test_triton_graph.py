"""On a real GPU only (TRITON_INTERPRET=0): the launches of a layer, captured in a CUDA graph."""

import pytest
import torch

pytest.importorskip("triton")

from moe_infinity.kernels.gpu import kernel as gpu
from moe_infinity.kernels.gpu.launches import Jobs
from moe_infinity.kernels.gpu.layout import kind_of, lay_out
from support.gpu import DEVICE, GATED, Shape, expert, random, views_there

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu", reason="TRITON_INTERPRET is not 0"),
]


@pytest.mark.parametrize("number_format", ["BF16", "EXACT12", "Q4_0"])
def test_a_graph_computes_whatever_jobs_it_finds(number_format: str) -> None:
    shape = Shape(256, 128)
    experts = [views_there(expert(number_format, shape, seed)) for seed in range(3)]
    kernel, found = gpu.Kernel(DEVICE), [lay_out(kind_of(GATED), views) for views in experts]
    layout = found[0][0]  # type: ignore[index]
    table = torch.tensor([each[1] for each in found], device=DEVICE)  # type: ignore[index]
    which = torch.tensor([0, -1], dtype=torch.int32, device=DEVICE)
    places = torch.arange(2, dtype=torch.int32, device=DEVICE)
    jobs = Jobs(table, which, torch.arange(3, dtype=torch.int32, device=DEVICE), places * 0, places)
    x, out = random(1, 256).bfloat16().to(DEVICE), torch.zeros(2, 256).bfloat16().to(DEVICE)
    way = kernel.tuned.way(1, False)
    kernel.compute(GATED, layout, way, jobs, x, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.compute(GATED, layout, way, jobs, x, out)
    for chosen in ([0, 1], [2, -1], [-1, 0]):
        which.copy_(torch.tensor(chosen, dtype=torch.int32))
        x.copy_(random(1, 256, seed=sum(chosen)))
        out.fill_(7)
        graph.replay()
        for place, number in enumerate(chosen):
            if number < 0:
                assert (out[place] == 7).all()
            else:
                assert torch.equal(
                    out[place : place + 1], kernel.forward(GATED, experts[number], x)
                )

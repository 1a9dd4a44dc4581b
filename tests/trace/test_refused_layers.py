"""What a compiled model could not do in each step as PyTorch does is refused, by its name and line."""

import types

import pytest
import torch
from torch import nn

from nnscaler import UserError
from tests.trace.layers import WIDTH, Layer, Stack, buffer, sets, stack, traced


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Marked(Sign):
    """Its name ends in letters that "Backward" has."""


signed, marked = Sign.apply, Marked.apply  # taken before tracing begins


def counts(layer):
    layer.calls = getattr(layer, "calls", 0) + 1
    return float(layer.calls)


def updates(layer):
    layer.held.add_(1)
    return layer.held


def updates_by_out(layer):
    return torch.add(layer.held, 1, out=layer.held)


def keeps(layer):
    layer.t[0].mul_(2)
    return layer.t[0]


def keeps_by_out(layer):
    return torch.mul(layer.t[0], 2, out=layer.t[0])


def shared_count():
    counter = types.SimpleNamespace(calls=0)
    return stack(lambda layer: counts(counter))()


def backward_hook():
    model = stack(Layer.scale)()
    model.layers[1].register_full_backward_hook(lambda layer, given, result: (given[0] * 2,))
    return model


class Limited(nn.Module):
    """Shortens rows of its weight in forward."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(4, WIDTH, max_norm=1.0)

    def forward(self, x):
        return self.rows(x[..., 0].long() * 0) + x


def in_bfloat16(layer):
    with torch.autocast("cpu", torch.bfloat16):
        return layer.linear(layer.linear.weight)


def unregistered():
    model = stack(lambda layer: layer.parts["a"][0].weight, sets(parts=lambda i: {"a": [nn.Linear(WIDTH, WIDTH)]}))
    return model()


def scripted():
    model = stack(Layer.scale)()
    model.layers[0].linear = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    return model


def loops(layer):
    total = layer.linear.weight[0]
    for _ in range(3000):
        total = total * 0.5
    return total


REFUSED = {
    "a long loop": (
        stack(loops),
        r"forward of Layer 'layers.0' calls torch more than 2000 times, \d+ of them at test_refused_layers.py:\d+: a l",
    ),
    "a counter": (stack(counts), "sets layers.0.calls.*changes from one call to the next"),
    "a shared counter": (shared_count, r"forward of 'layers.0' computes changes from one call to the next"),
    "a buffer": (stack(updates, buffer), r"changes buffer 'layers.0.held' at test_refused_layers.py:\d+"),
    "a kept tensor": (stack(keeps, sets(t=lambda i: [torch.ones(WIDTH)])), r"changes a tensor that it keeps .*py:\d+"),
    "a buffer by out": (stack(updates_by_out, buffer), r"changes buffer 'layers.0.held' at test_refused_layers.py:\d+"),
    "a kept tensor by out": (
        stack(keeps_by_out, sets(t=lambda i: [torch.ones(WIDTH)])),
        r"changes a tensor that it keeps .*py:\d+",
    ),
    "batch norm": (lambda: Stack([nn.BatchNorm1d(4)]), "changes buffer 'layers.0.num_batches_tracked'"),
    "a backward": (
        stack(lambda layer: signed(layer.linear.weight).sum()),
        r"Sign, .*py:\d+, has a backward of its",
    ),
    "a backward with a name like that": (
        stack(lambda layer: marked(layer.linear.weight).sum()),
        r"^Marked, .* returns, not Marked\.apply$",
    ),
    "a gradient's hook": (
        stack(lambda layer: layer.linear.weight.register_hook(abs) and 1.0),
        "register_hook at test_",
    ),
    "a module's": (backward_hook, "a module has a backward hook"),
    "no value": (
        stack(lambda layer: layer.t, sets(t=lambda i: torch.randn(WIDTH))),
        "neither a parameter nor a buffer",
    ),
    "modules in a list": (unregistered, r"py:\d+ .*neither a parameter nor a buffer .* register it"),
    "vmap": (
        stack(lambda layer: torch.func.vmap(torch.sum)(layer.linear.weight)),
        r"torch.func \(vmap, grad, jvp\) at test_refused_layers.py:\d+ is not traced",
    ),
    "a limit": (lambda: Stack([Limited()]), "forward changes '.*rows.weight' by aten.embedding_renorm_"),
    "autocast": (
        stack(lambda layer: in_bfloat16(layer).sum()),
        r"autocast inside .* \(it is on at layers.py:\d+\)",
    ),
    "torchscript": (scripted, r"'layers\.0\.linear' is a module of torch\.jit, which is not traced; give the one that"),
    "a branch": (
        stack(lambda layer: torch.cond(layer.linear.weight.sum() > 0, torch.sin, torch.cos, (layer.linear.weight[0],))),
        r"CondAutogradOp, whose result is used at layers.py:\d+, has a backward of its own",
    ),
    "a check": (
        stack(lambda layer: torch.linalg.inv(layer.linear.weight).sum()),
        r"_linalg_check_errors\.default at layers.py:\d+ does more than give its result: not supported",
    ),
    "a read": (
        stack(lambda layer: layer.linear.weight.sum().item()),
        r"reads a tensor's value .* \(at test_.*py:\d",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        traced(make)

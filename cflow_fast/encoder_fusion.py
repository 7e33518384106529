"""A frozen encoder made fast: batch norms folded into convolutions, and on a CPU additions and ReLUs into them too.

The function computed is the encoder's own, to rounding. What is made here is derived and holds copies: when the
encoder's tensors change, it is made anew.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cflow_fast.encoders import Encoder
from cflow_fast.precision import cpu_has, multiplies_bf16

ADDITIONS = (torch.add, operator.add)
MAX_PACKED = 2
"""Shapes of inputs that weights stay packed for: a full batch and one other."""


class FusedEncoder:
    """`Encoder.forward` for inference; see there for shapes and errors.

    precision: "fp32", or "fp16" or "bf16" for weights and activations in it, features included, where the device
    multiplies it; elsewhere that is fp32 too.

    Packed weights fit one input shape and are half as fast as unpacked ones with another, so that a shape is packed
    for at its second use, and the one unused for longest is given up.
    """

    def __init__(self, encoder: Encoder, precision: str = "fp32") -> None:
        self.encoder = encoder
        self.folded = _fold_batch_norms(encoder.network)
        device = encoder.mean.device
        if precision == "fp16" and device.type == "cuda":
            self.folded = self.folded.half()
        elif precision == "bf16" and multiplies_bf16(device):
            self.folded = self.folded.bfloat16()
        self.is_finite = all(tensor.isfinite().all() for tensor in encoder.state_dict().values())
        self._seen: torch.Size | None = None
        self._packed: OrderedDict[torch.Size, fx.GraphModule] = OrderedDict()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        x = self.encoder.normalised(images).to(self.dtype)
        features = self._network(x)(x)
        return [features[layer] for layer in self.encoder.layers]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.folded.parameters()).dtype

    def _network(self, x: Tensor) -> fx.GraphModule:
        if not (_packing_pays(x) and self.is_finite and bool(x.isfinite().all())):  # oneDNN's ReLU takes NaN to 0
            return self.folded
        if x.shape in self._packed:
            self._packed.move_to_end(x.shape)
        elif x.shape == self._seen:
            self._packed[x.shape] = _pack(self.folded, x)
            while len(self._packed) > MAX_PACKED:
                self._packed.popitem(last=False)
        self._seen = x.shape
        return self._packed.get(x.shape, self.folded)


def _packing_pays(x: Tensor) -> bool:
    """Where it was measured to: WideResNet-50 1.5 times as fast at one image, 1.1 times at eight."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and cpu_has("avx512")
    )


def _fold_batch_norms(network: fx.GraphModule) -> fx.GraphModule:
    """A copy of the network without identities, and without the batch norms that follow a convolution of their own."""
    network = copy.deepcopy(network)
    for node in list(network.graph.nodes):
        module = _module(network, node)
        if isinstance(module, nn.BatchNorm2d):
            _fold_into_convolution(network, node, module)
        elif isinstance(module, nn.Identity):
            _remove(network, node)
    network.graph.lint()
    network.recompile()
    return network


def _fold_into_convolution(network: fx.GraphModule, node: fx.Node, norm: nn.BatchNorm2d) -> None:
    source: Any = node.args[0]
    convolution = _module(network, source)
    calls = [other for other in network.graph.nodes if other.op == "call_module" and other.target == source.target]
    if not isinstance(convolution, nn.Conv2d) or len(source.users) > 1 or len(calls) > 1:
        return
    network.set_submodule(source.target, fuse_conv_bn_eval(convolution, norm))
    if isinstance(norm, BatchNormAct2d):  # timm's: its activation stays
        network.set_submodule(str(node.target), norm.act)
    else:
        _remove(network, node)


def _remove(network: fx.GraphModule, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    network.graph.erase_node(node)


def _pack(folded: fx.GraphModule, x: Tensor) -> fx.GraphModule:
    """Every plain convolution on weights that oneDNN packed for x's shape, with the addition and ReLU behind it."""
    network = copy.copy(folded)
    network.graph = copy.deepcopy(folded.graph)
    ShapeProp(network).propagate(x)
    for node in list(network.graph.nodes):
        if isinstance(_module(network, node), nn.ReLU):
            _pack_with_relu(network, node)
    for node in list(network.graph.nodes):
        if _packable(network, node):
            _replace(network, node, node, None, "none")
    network.graph.lint()
    network.recompile()
    return network


def _pack_with_relu(network: fx.GraphModule, relu: fx.Node) -> None:
    source: Any = relu.args[0]
    if not isinstance(source, fx.Node) or len(source.users) > 1:
        return
    if _packable(network, source):
        _replace(network, relu, source, None, "relu")
    elif source.op == "call_function" and source.target in ADDITIONS:
        order = {node: place for place, node in enumerate(network.graph.nodes)}
        added = [node for node in source.args if isinstance(node, fx.Node)]
        if len(added) != 2 or added[0].meta["tensor_meta"].shape != added[1].meta["tensor_meta"].shape:
            return
        first, last = sorted(added, key=lambda node: order[node])
        if _packable(network, last) and len(last.users) == 1:
            _replace(network, relu, last, first, "relu")


def _replace(
    network: fx.GraphModule, result: fx.Node, convolution: fx.Node, add: fx.Node | None, activation: str
) -> None:
    """Compute `result` = activation(convolution + add) by one packed convolution."""
    source: Any = convolution.args[0]
    module: Any = _module(network, convolution)
    name = f"packed_{convolution.name}"
    network.add_submodule(name, _PackedConvolution(module, source.meta["tensor_meta"].shape, activation))
    with network.graph.inserting_before(result):
        packed = network.graph.call_module(name, (source,) if add is None else (source, add))
    packed.meta = result.meta
    result.replace_all_uses_with(packed)
    network.graph.eliminate_dead_code()


def _packable(network: fx.GraphModule, node: fx.Node) -> bool:
    module = _module(network, node)
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _module(network: fx.GraphModule, node: Any) -> nn.Module | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return network.get_submodule(str(node.target))


class _PackedConvolution(nn.Module):
    """activation(convolution(x) + add)."""

    def __init__(self, convolution: nn.Conv2d, shape: torch.Size, activation: str) -> None:
        super().__init__()
        self.geometry = [list(sizes) for sizes in (convolution.padding, convolution.stride, convolution.dilation)] + [
            convolution.groups
        ]
        self.activation = activation
        self.bias = convolution.bias
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(convolution.weight, *self.geometry, list(shape))

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        convolve = torch.ops.mkldnn._convolution_pointwise
        if add is None:
            return convolve(x, self.weight, self.bias, *self.geometry, self.activation, [], "")
        return convolve.binary(x, add, self.weight, self.bias, *self.geometry, "add", 1.0, self.activation, [], "")

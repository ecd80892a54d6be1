"""torch.ao's stubs and FloatFunctional; where it is gone, our own."""

from typing import TYPE_CHECKING

from qtrain.common.torch_parts import has_torch_ao

if TYPE_CHECKING or has_torch_ao():
    from torch.ao.nn.quantized import FloatFunctional
    from torch.ao.quantization import DeQuantStub, QuantStub
else:
    from qtrain.simulate.stubs import DeQuantStub, FloatFunctional, QuantStub

__all__ = ["DeQuantStub", "FloatFunctional", "QuantStub"]

"""What a model says of itself, where torch.ao no longer has these classes: names as there."""

from torch import Tensor, nn

from qtrain.simulate.sites import Functional


class QuantStub(nn.Module):
    """Where a tensor becomes quantized, once the model is; does nothing by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class DeQuantStub(nn.Module):
    """Where it becomes float again; does nothing by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FloatFunctional(Functional, nn.Module):
    """An operation between quantized tensors, one object for each place: `self.ff.add(x, y)`."""

    def forward(self, *_: object) -> Tensor:
        raise RuntimeError("call a method of it, such as add")

    def _output(self, op: str, value: Tensor) -> Tensor:
        return value

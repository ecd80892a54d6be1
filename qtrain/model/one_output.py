"""Of a model with several outputs the one that a task wants."""

from typing import Any

from torch import Tensor, nn


class OneOutput(nn.Module):
    """Puts out the logits alone of a model that puts out more, as Hugging Face's do.

    Args:
        model: takes one input, and puts out a mapping or an object with attributes.
        output: the name of the wanted one; of torchvision's segmentation it is "out".
    """

    def __init__(self, *, model: nn.Module, output: str = "logits") -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        outputs: Any = self.model(x)
        try:
            wanted: Tensor = outputs[self.output]
        except (KeyError, IndexError, TypeError) as err:
            names = (
                f", which has {', '.join(outputs)}"
                if hasattr(outputs, "keys")
                else ""
            )
            raise ValueError(
                f"output={self.output}: the model puts out a {type(outputs).__name__}"
                f"{names}; name one of its outputs"
            ) from err
        return wanted

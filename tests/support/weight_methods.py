"""Weight-only methods in short, and the sizes of the tiny GPT-2 that they are tried on."""

from qtrain.functional.spec import QuantSpec
from qtrain.quant.llm_int8 import LLMInt8
from qtrain.quant.weight_only import WeightOnly

V, C, T = 40, 16, 8
LINEARS = 2 * 12 * C * C  # weights of two blocks


def weight_only(*, embedding="float", head="shared", layers=None, **weight):
    return WeightOnly(
        weight=QuantSpec(**weight),
        embedding=embedding,
        head=head,
        layers=layers or {},
    )


def llm_int8(threshold=6.0, *, embedding="float", head="shared", layers=None):
    return LLMInt8(
        threshold=threshold, embedding=embedding, head=head, layers=layers or {}
    )

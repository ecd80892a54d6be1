"""Plain int8 tensors with scales: what outlives torch's quantized tensors."""

from qtrain.backend.int8.backend import Int8
from qtrain.backend.machine import saturates

BACKENDS = {"int8": Int8("int8", reduce_range=saturates)}

"""Hadamard matrices: rotations of +1 and -1 alone, which spread each
coordinate over all.
"""

import torch
from torch import Tensor

PRIMES = (11, 19, 43)  # of Paley's matrices of 12, 20 and 44 rows


def hadamard(size: int) -> Tensor:
    """Returns (size, size), float64: an orthogonal matrix, all of whose
    entries are alike but for their signs.

    Sizes are 2^k times 1, 12, 20, 44 or 144 = 12 * 12 (R. E. A. C. Paley,
    "On Orthogonal Matrices", 1933).

    Raises:
        ValueError: there is none of that size here.

    >>> hadamard(2) * 2**0.5
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    >>> matrix = hadamard(768)
    >>> bool((matrix @ matrix.T - torch.eye(768)).abs().max() < 1e-12)
    True
    """
    paley = [_paley(prime) for prime in PRIMES]
    one = torch.ones(1, 1, dtype=torch.float64)
    for start in (one, *paley, torch.kron(paley[0], paley[0])):
        times, rest = divmod(size, len(start))
        if rest or times & (times - 1) or not times:
            continue
        matrix = start
        while len(matrix) < size:
            top = torch.cat([matrix, matrix], 1)
            matrix = torch.cat([top, torch.cat([matrix, -matrix], 1)])
        rotation: Tensor = matrix / size**0.5
        return rotation
    raise ValueError(
        f"size={size}: there is no Hadamard matrix here; use 2^k times 1, 12, 20, 44 or 144"
    )


def _paley(prime: int) -> Tensor:
    """Returns I + S, of prime + 1 rows, for a prime that leaves 3 when
    divided by 4.
    """
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor(
        [0] + [1 if i in squares else -1 for i in range(1, prime)]
    )
    index = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(index[:, None] - index) % prime].double()
    found: Tensor = skew + torch.eye(prime + 1, dtype=torch.float64)
    return found

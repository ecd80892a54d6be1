"""Roundings that tell what they are given, or refuse it."""

from qtrain.transform.gptq import GPTQ


class Teller(GPTQ):
    name = "teller"

    def choose(self, target, hessian):
        print("rounds", tuple(target.weight.shape))
        return super().choose(target, hessian)


class Refuser(GPTQ):
    def choose(self, target, hessian):
        if len(target.weight) == 10:
            raise ValueError("ten rows are too many")
        return super().choose(target, hessian)

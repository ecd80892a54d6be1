"""A copy shares nothing with its model, empty as it may be."""

import torch
from torch import nn

from qtrain.common.copying import copy_model


def test_what_is_added_to_a_copy_is_not_in_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.seen = {}
    copied = copy_model(model)
    copied.seen["calls"] = 1
    copied[1].register_forward_hook(lambda *_: copied.seen.update(calls=2))
    copied[1].register_buffer("steps", torch.zeros(1), persistent=False)
    copied(torch.ones(1, 2))
    assert copied.seen == {"calls": 2} and model.seen == {}
    model(torch.ones(1, 2))
    assert copied.seen == {"calls": 2} and not list(model.buffers())
    assert not model[1]._non_persistent_buffers_set


def test_what_two_modules_share_their_copies_share():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].seen = model[1].seen = {}
    copied = copy_model(model)
    copied[0].seen["calls"] = 1
    assert copied[1].seen == {"calls": 1} and model[0].seen == {}

import pytest
import torch

from qtrain.functional.grouping import expand_parameter, from_groups, to_groups


@pytest.mark.parametrize("shape", [(6,), (2, 6), (3, 2, 6), (0, 6), (4, 0)], ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 6])
def test_groups_hold_neighbours_and_come_back(shape, group_size):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    groups = to_groups(x, group_size)
    assert groups.shape == (*shape[:-1], shape[-1] // group_size, group_size)
    assert torch.equal(groups.reshape(-1), x.reshape(-1))
    assert torch.equal(from_groups(groups), x)


def test_groups_of_a_non_contiguous_tensor_are_a_view():
    x = torch.arange(12).reshape(4, 3).t()
    groups = to_groups(x, 2)
    assert groups.data_ptr() == x.data_ptr()
    assert torch.equal(from_groups(groups), x)


@pytest.mark.parametrize("group_size", [5, 0, -3, 24])
def test_a_size_that_does_not_divide_is_named_with_the_legal_ones(group_size):
    message = (
        rf"group_size={group_size} does not divide the last dimension, 12, .*"
        r"use one of 1, 2, 3, 4, 6, 12$"
    )
    with pytest.raises(ValueError, match=message):
        to_groups(torch.zeros(2, 12), group_size)


def test_a_single_number_has_no_groups():
    with pytest.raises(
        ValueError, match="group_size=2 needs a tensor with at least one dimension"
    ):
        to_groups(torch.tensor(1.0), 2)


@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 1), (4, 1), (1, 6), (4, 2), (1, 3)], ids=str
)
def test_a_parameter_covers_its_block(shape):
    parameter = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    expanded = expand_parameter(parameter, torch.zeros(4, 6)).expand(4, 6)
    rows, columns = (
        parameter.reshape(1, 1) if parameter.numel() == 1 else parameter
    ).shape
    for row in range(4):
        for column in range(6):
            block = parameter.reshape(rows, columns)[
                row * rows // 4, column * columns // 6
            ]
            assert expanded[row, column] == block


@pytest.mark.parametrize(
    "shape", [(4,), (6,), (4, 0), (2, 1), (4, 4), (1, 4, 6), (4, 12)], ids=str
)
def test_a_parameter_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"does not fit x of shape \[4, 6\]"):
        expand_parameter(torch.ones(shape), torch.zeros(4, 6))

import pytest
import torch
from torch import nn

from qtrain.analyze.truth import TruthError
from qtrain.data.tensors import ImageLoader
from qtrain.task.classification import Classification
from qtrain.train.evaluate import evaluate

TASK = Classification()
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (23, 5, 5), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.randint(0, 4, (23,), generator=GENERATOR)


def make_loader(batch_size):
    return ImageLoader(
        IMAGES,
        LABELS,
        batch_size=batch_size,
        shuffle=False,
        mean=0.5,
        std=0.25,
        channels=1,
    )


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(25, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_scores_of_the_whole_split(batch_size):
    model = make_model().train()
    scores = evaluate(model, make_loader(batch_size), TASK)

    logits = model.eval()((IMAGES[:, None] / 255 - 0.5) / 0.25).detach().double()
    right = logits.argmax(1) == LABELS
    losses = -logits.log_softmax(1)[torch.arange(23), LABELS]
    assert scores.metrics["accuracy"] == right.sum().item() / 23
    assert scores.metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert scores.metrics["count"] == 23
    assert scores.metrics["wrong_per_class"] == [
        int((~right & (LABELS == c)).sum()) for c in range(4)
    ]
    assert scores.examples.tolist() == right.int().tolist()


def test_leaves_the_model_as_it_was_but_in_eval_mode():
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, make_loader(5), TASK)
    assert not any(module.training for module in model.modules())
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Spoiler(nn.Module):
    """Puts out NaN or infinity from a call on, counted from 0, or where a pixel is large."""

    def __init__(self, value, batch):
        super().__init__()
        self.value, self.batch, self.count = value, batch, -1

    def forward(self, x):
        self.count += 1
        return x * self.value if self.count >= self.batch else x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [0, 2])
def test_an_output_that_is_not_finite_is_an_error_by_layer_and_batch(value, batch):
    model = make_model()
    model.insert(3, Spoiler(value, batch))
    with pytest.raises(
        TruthError,
        match=rf"^layer 3: its output is not finite in evaluation, batch {batch}$",
    ):
        evaluate(model, make_loader(5), TASK)


def test_an_output_that_is_not_finite_outside_of_any_layer():
    class Network(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] / 0

    with pytest.raises(
        TruthError, match="^model: its output on evaluation batch 0 is not finite$"
    ):
        evaluate(Network(), make_loader(5), TASK)

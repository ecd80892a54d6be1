"""A rank of a training on made-up digits: `python two_ranks.py RANK RANKS RENDEZVOUS OUT`."""

import sys
from functools import partial

import torch
import torch.distributed as dist

from qtrain.backend import integers, torch_ao
from qtrain.data.tensors import ImageLoader
from qtrain.functional.spec import QuantSpec
from qtrain.logger.loggers import Logger
from qtrain.model.convnet import ConvNet
from qtrain.model.mlp import MLP
from qtrain.quant.qat import QAT
from qtrain.runs.outputs import activation_qparams
from qtrain.task.classification import Classification
from qtrain.train.scheduler import constant
from qtrain.train.state import Checkpoint
from qtrain.train.trainer import Trainer


class Lines(Logger):
    def __init__(self):
        self.losses = []

    def log(self, metrics, step):
        self.losses += [
            value for name, value in metrics.items() if name.endswith("loss")
        ]


def fit(model, accumulate=1, on_epoch=lambda epoch: None):
    """Trains on 43 images in batches of 7: ranks get unequal parts, and the last batch has one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (43, 28, 28), dtype=torch.uint8, generator=generator
    )
    labels = torch.arange(43) % 10
    images[torch.arange(43), labels] = 255
    loader = ImageLoader(
        images, labels, batch_size=7, shuffle=True, mean=0.13, std=0.3, channels=1
    )
    torch.manual_seed(0)
    lines = Lines()
    trainer = Trainer(
        epochs=2,
        max_steps=None,
        accumulate=accumulate,
        clip_norm=1.0,
        log_every=1,
        save_every=2,
        devices=1,
    )
    trainer.fit(
        model,
        loader,
        Classification(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        scheduler=constant,
        device="cpu",
        logger=lines,
        stage="float",
        on_epoch_start=on_epoch,
        checkpoint=Checkpoint(),
    )
    return lines.losses


def qat(model, conv_bn="folded"):
    spec = QuantSpec(
        observer=partial(torch_ao.moving_average, averaging_constant=0.1)
    )
    weight = QuantSpec(observer=torch_ao.minmax)
    quantizer = QAT(
        engine="auto",
        weight=weight,
        activation=spec,
        layers={},
        fake_quantize="qtrain",
        conv_bn=conv_bn,
        epochs=2,
        optimizer=None,
        scheduler=None,
        from_scratch=False,
        start_epoch=0,
        freeze_observers_epoch=None,
        freeze_batch_norm_epoch=None,
        convert_every=0,
    )
    prepared = quantizer.prepare(model)
    losses = fit(prepared, on_epoch=lambda epoch: quantizer.on_epoch(prepared, epoch))
    return losses, quantizer.convert(prepared)


def everything():
    """Returns losses and weights of float training; with qparams, of QAT without and with norms."""
    torch.manual_seed(3)
    mlp = MLP(hidden=16, hidden_relu=True, output_relu=False)
    found = {"float": fit(mlp), "weights": mlp.state_dict()}
    torch.manual_seed(3)
    found["accumulated"] = fit(
        MLP(hidden=16, hidden_relu=True, output_relu=False), accumulate=3
    )
    for name, model, *conv_bn in (
        ("mlp", MLP(hidden=16, hidden_relu=True, output_relu=False)),
        ("norms folded", ConvNet(width=4, hidden=8), "folded"),
        ("norms exact", ConvNet(width=4, hidden=8), "exact"),
    ):
        torch.manual_seed(3)
        for part in model.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        losses, quantized = qat(model, *conv_bn)
        found[name] = {
            "losses": losses,
            "qparams": activation_qparams(quantized, quantized),
            "integers": {
                n: w.int_repr()
                for n, m in quantized.named_modules()
                if (w := integers.quantized_weight(m)) is not None
            },
        }
    return found


if __name__ == "__main__":
    number = int(sys.argv[1])
    ranks = int(sys.argv[2])
    rendezvous = sys.argv[3]
    out = sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=number, world_size=ranks
    )
    torch.save(everything(), out)
    dist.destroy_process_group()

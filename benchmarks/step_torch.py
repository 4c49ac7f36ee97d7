"""The plain train step and the features of ``step.py`` in PyTorch, for an environment that has it.

``step.py --torch PYTHON`` starts this with a file of parameters, images and targets, and asks for
turns on standard input, a line each; it answers with JSON. Written as a user of PyTorch would:
modules, channels_last, autograd, ``torch.optim.SGD``.
"""

import functools
import json
import sys

import measure
import numpy as np
import torch
from torch import nn
from torch.nn import functional

_KERNEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32) / 3


class Network(nn.Module):
    """A network of ``nat_jax.models`` with its parameters."""

    def __init__(self, network, weights):
        super().__init__()
        self.sobel = network["frontend"] == "sobel"
        kernel = torch.tensor(np.stack([_KERNEL, _KERNEL.T]))[:, None].repeat(1, 3, 1, 1)
        self.register_buffer("kernel", kernel)
        layers, channels = [], 2 if self.sobel else 3
        for number, conv in enumerate(network["convs"], start=1):
            layer = nn.Conv2d(
                channels, conv["features"], conv["kernel"], conv["stride"], conv["pad"]
            )
            layers += self.block(layer, nn.BatchNorm2d, weights, f"conv{number}")
            if conv["pool"]:
                layers.append(nn.MaxPool2d(*conv["pool"]))
            channels = conv["features"]
        self.convolutions = nn.Sequential(*layers)
        layers = []
        for number, dense in enumerate(network["denses"], start=len(network["convs"]) + 1):
            width = len(weights[f"fc{number}/map/kernel"])
            layer = nn.Linear(width, dense["features"])
            layers += self.block(layer, nn.BatchNorm1d, weights, f"fc{number}")
            if dense["dropout"]:
                layers.append(nn.Dropout(dense["dropout"]))
        head = nn.Linear(*weights["head/kernel"].shape)
        self.fill(head, weights, "head")
        self.fully_connected = nn.Sequential(*layers, head)

    def block(self, layer, norm, weights, name):
        """Return a linear map, batch norm and ReLU with their weights."""
        self.fill(layer, weights, f"{name}/map")
        norm = norm(len(weights[f"{name}/norm/scale"]))
        with torch.no_grad():
            norm.weight.copy_(torch.tensor(weights[f"{name}/norm/scale"]))
            norm.bias.copy_(torch.tensor(weights[f"{name}/norm/bias"]))
        return layer, norm, nn.ReLU(inplace=True)

    def fill(self, layer, weights, name):
        """Copy a kernel, whose output channels are its last axis, and a bias."""
        kernel = weights[f"{name}/kernel"]
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(kernel.transpose(axes)))
            layer.bias.copy_(torch.tensor(weights[f"{name}/bias"]))

    def forward(self, images):
        """Return unit features [B, D] of uint8[B, 3, H, W]."""
        x = images.float() / 255
        x = x - x.mean((1, 2, 3), keepdim=True)
        x = x / x.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(0.5 / 255)
        if self.sobel:
            x = functional.conv2d(x, self.kernel, padding=1)
        x = self.convolutions(x)
        x = x.permute(0, 2, 3, 1).flatten(1)  # the order of the library's kernels
        return functional.normalize(self.fully_connected(x), dim=1)


def main():
    """Answer requests until there are no more."""
    torch.set_num_threads(len(measure.core_numbers()))
    data = dict(np.load(sys.argv[1]))
    settings = json.loads(str(data.pop("settings")))
    images = torch.tensor(data.pop("images")).permute(0, 1, 4, 2, 3)  # as NHWC in memory
    targets = torch.tensor(data.pop("targets"))
    network = Network(settings, data).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), settings["rate"], momentum=settings["momentum"]
    )
    done = 0

    def train(count):
        nonlocal done
        network.train()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            z = network(images[done % len(images)])
            loss = 0.5 * (z - targets[done % len(targets)]).square().sum(dim=1).mean()
            loss.backward()
            optimizer.step()
            done += 1
        return loss.item()

    def features(count):
        network.eval()
        with torch.inference_mode():
            for k in range(count):
                z = network(images[k % len(images)])
        return z.sum().item()

    works = {"train": train, "features": features}
    first = network.eval()(images[0]).detach().numpy().tolist()
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"features": first, **versions}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work = functools.partial(works[request["work"]], request["count"])
        value, taken = measure.timed(work)
        print(json.dumps({"value": value, **taken}), flush=True)


if __name__ == "__main__":
    main()

"""A small classifier of the embedded 16x16 images, whose features define `fd_demo`."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from data.dataset import ImageDataset
from dnnlib import ROOT
from dnnlib.files import atomic_write, check_output, open_regular, parse_json
from dnnlib.text import first_line
from metrics.features.weights import DetectorError

DEMO_CLASSIFIER = ROOT / "assets" / "demo" / "classifier.safetensors"


class DemoClassifier(nn.Module):
    """Three convolutions. Distances in its pooled features compare models on that data alone: they are no FID."""

    name = "fd_demo"
    feature_dim = 128

    def __init__(self, num_classes: int = 10, resolution: int = 16) -> None:
        super().__init__()
        self.resolution = resolution
        widths = (32, 64, self.feature_dim)
        pairs = zip((1, *widths), widths, strict=False)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [N,128] of uint8 images [N,1,H,W]. Raises ValueError for any other shape or type."""
        expected = (1, self.resolution, self.resolution)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            shape, found = ",".join(map(str, expected)), f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{self.name} takes uint8 images [N,{shape}], got {found}")
        x = images.to(torch.float32) / 127.5 - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            x = F.avg_pool2d(x, 2) if i < 2 else x.mean(dim=(2, 3))
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [N,num_classes] of features [N,128]."""
        return self.head(features)


def save_demo_classifier(path: str | Path, classifier: DemoClassifier, facts: dict) -> None:
    """Write the classifier as safetensors with its training facts as metadata, atomically."""
    config = json.dumps({"resolution": classifier.resolution})
    metadata = {"detector": classifier.name, "config": config, "training": json.dumps(facts)}
    with atomic_write(path) as file:
        file.write(save({k: v.contiguous() for k, v in classifier.state_dict().items()}, metadata))


def load_demo_classifier(path: str | Path = DEMO_CLASSIFIER) -> DemoClassifier:
    """Read the classifier, in eval mode. Raises DetectorError naming the file if it is missing or something else."""
    try:
        with open_regular(path), safe_open(str(path), framework="pt") as file:
            metadata, weights = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        reason = f"{path or repr(path)}: {getattr(error, 'strerror', None) or error}"
        raise DetectorError(f"cannot read the demo classifier {reason}") from None
    if metadata.get("detector") != DemoClassifier.name:
        raise DetectorError(f"{path} is not a {DemoClassifier.name} classifier")
    try:
        config = parse_json(metadata["config"])
        classifier = DemoClassifier(num_classes=len(weights["head.bias"]), resolution=int(config["resolution"]))
        classifier.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DetectorError(f"the demo classifier {path} is damaged: {first_line(error)}") from None
    return classifier.eval().requires_grad_(False)


def train_demo_classifier(*, data: str, out: str, epochs: int, batch: int, lr: float, held_out: int, seed: int) -> None:
    """Train on all but the last `held_out` images, write the classifier and print its accuracy on those."""
    check_output(out, ".safetensors", [data])
    dataset = ImageDataset(data, cache=True)
    if not dataset.has_onehot_labels or held_out + batch > len(dataset) or dataset.num_channels != 1:
        raise ValueError(f"{data} needs grey images with class labels, at least {held_out + batch} of them")
    pairs = [dataset[i] for i in range(len(dataset))]
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    classes, split = labels.argmax(dim=1), len(images) - held_out
    torch.manual_seed(seed)
    net = DemoClassifier(dataset.label_dim, dataset.resolution).train()
    steps = epochs * (split // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    with tqdm(total=steps, unit="step") as bar:
        for order in (torch.randperm(split) for _ in range(epochs)):
            for index in order[: split // batch * batch].split(batch):
                loss = F.cross_entropy(net.logits(net(images[index])), classes[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net.logits(net(part)).argmax(dim=1) for part in images[split:].split(500)])
    accuracy = (guesses == classes[split:]).float().mean().item()
    facts = dict(data=dataset.name, epochs=epochs, batch=batch, lr=lr, seed=seed, held_out_accuracy=round(accuracy, 4))
    save_demo_classifier(out, net, facts)
    print(f"{out}: {accuracy:.1%} of {held_out} held-out images classified correctly")

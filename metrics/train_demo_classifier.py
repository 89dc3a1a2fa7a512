"""Train the classifier whose features define fd_demo:  python -m metrics.train_demo_classifier --help"""

from __future__ import annotations

import click

from torch_utils.errors import user_errors
from torch_utils.threads import wait_passively


@click.command(context_settings={"show_default": True})
@click.option("--data", metavar="DIR|ZIP", default="assets/fashion16.zip", help="Labelled images.")
@click.option("--out", metavar="FILE", required=True, help="Where to write it.")
@click.option("--epochs", type=click.IntRange(1), default=8)
@click.option("--batch", type=click.IntRange(1), default=128)
@click.option("--lr", type=float, default=2e-3, help="Peak learning rate of a one-cycle schedule.")
@click.option("--held-out", type=click.IntRange(1), default=2000, help="Last images, kept to measure the accuracy.")
@click.option("--seed", type=click.IntRange(0), default=0)
def main(data: str, out: str, epochs: int, batch: int, lr: float, held_out: int, seed: int) -> None:
    """Train on all but the last images of a data set and report the accuracy on those."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    from data.dataset import ImageDataset
    from dnnlib.files import check_output
    from metrics.features.detectors import DemoClassifier, save_demo_classifier

    with user_errors():
        check_output(out, ".safetensors", [data])
        dataset = ImageDataset(data, cache=True)
        if not dataset.has_onehot_labels or held_out + batch > len(dataset) or dataset.num_channels != 1:
            raise ValueError(f"{data} needs grey images with class labels, at least {held_out + batch} of them")
        pairs = [dataset[i] for i in range(len(dataset))]
    images = torch.from_numpy(np.stack([image for image, _ in pairs]))
    classes = torch.from_numpy(np.stack([label for _, label in pairs])).argmax(dim=1)
    split = len(images) - held_out

    torch.manual_seed(seed)
    net = DemoClassifier(dataset.label_dim, dataset.resolution).train()
    steps = epochs * (split // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    bar = tqdm(total=steps, unit="step")
    for _ in range(epochs):
        order = torch.randperm(split)
        for k in range(split // batch):
            index = order[k * batch : (k + 1) * batch]
            loss = F.cross_entropy(net.logits(net(images[index])), classes[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    bar.close()

    net.eval()
    with torch.no_grad():
        guesses = torch.cat([net.logits(net(part)).argmax(dim=1) for part in images[split:].split(500)])
    accuracy = (guesses == classes[split:]).float().mean().item()
    facts = dict(data=dataset.name, epochs=epochs, batch=batch, lr=lr, seed=seed, held_out_accuracy=round(accuracy, 4))
    save_demo_classifier(out, net, facts)
    print(f"{out}: {accuracy:.1%} of {held_out} held-out images classified correctly")


if __name__ == "__main__":
    wait_passively()
    main()

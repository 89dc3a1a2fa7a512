"""Train the classifier whose features define fd_demo:  python -m metrics.train_demo_classifier --help"""

import click

from torch_utils.errors import user_errors
from torch_utils.options import set_wait_policy


@click.command(context_settings={"show_default": True})
@click.option("--data", metavar="DIR|ZIP", default="assets/fashion16.zip", help="Labelled images.")
@click.option("--out", metavar="FILE", required=True, help="Where to write it.")
@click.option("--epochs", type=click.IntRange(1), default=8)
@click.option("--batch", type=click.IntRange(1), default=128)
@click.option("--lr", type=float, default=2e-3, help="Peak learning rate of a one-cycle schedule.")
@click.option("--held-out", type=click.IntRange(1), default=2000, help="Last images, kept to measure the accuracy.")
@click.option("--seed", type=click.IntRange(0), default=0)
def main(**options: object) -> None:
    """Train on all but the last images of a data set and report the accuracy on those."""
    with user_errors():
        from metrics.features.demo import train_demo_classifier

        train_demo_classifier(**options)


if __name__ == "__main__":
    set_wait_policy()
    main()

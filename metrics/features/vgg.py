"""The convolutions of VGG16, in whose features LPIPS is taken."""

import torch.nn.functional as F
from torch import Tensor, nn

from metrics.features.weights import WeightFile

BACKBONE = WeightFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    size="about 528 MB",
    sha256_prefix="397923af",  # the file's name says it
    option="--lpips-path",
)
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # convolutions, numbered as in the published file
WIDTHS = (64, 128, 256, 512, 512)  # channels of each block


class VGG16(nn.Module):
    """The thirteen convolutions of VGG16 (Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", 2015), under the names that `vgg16-397923af.pth` gives them. Weights are left uninitialised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        channels = 3
        for block, width in zip(BLOCKS, WIDTHS, strict=True):
            for index in block:
                self.features[str(index)] = nn.utils.skip_init(nn.Conv2d, channels, width, 3, padding=1)
                channels = width
        self.requires_grad_(False)

    def forward_block(self, block: int, x: Tensor) -> Tensor:
        """Convolutions and ReLUs of block 0 to 4. The pooling between two blocks is the caller's."""
        for index in BLOCKS[block]:
            x = F.relu(self.features[str(index)](x), inplace=True)
        return x

"""Writes networks as EDM2's training does: pickles in which every module is a call with a dict of its attributes."""

import pickle
from collections import OrderedDict

import torch
from torch import nn


class _Global:
    """A global that need not exist here."""

    def __init__(self, module, name):
        self.text = f"c{module}\n{name}\n".encode()


class _Object:
    """An instance of one of EDM2's persistent classes."""

    def __init__(self, class_name, state):
        self.content = dict(type="class", version=6, module_src="", class_name=class_name, state=state)


class _EasyDict(dict):
    """An instance of EDM2's `dnnlib.util.EasyDict`."""


class _Pickler(pickle._Pickler):
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            self.write(obj.text)
        elif isinstance(obj, _Object):
            self.save(_Global("torch_utils.persistence", "_reconstruct_persistent_obj"))
            self.save((obj.content,))
            self.write(pickle.REDUCE)
        elif isinstance(obj, _EasyDict):
            self.save(_Global("dnnlib.util", "EasyDict"))
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.MARK)
            for key, value in obj.items():
                self.save(key)
                self.save(value)
            self.write(pickle.SETITEMS)
        else:
            super().save(obj, save_persistent_id)


def _module(module: nn.Module, kwargs=None):
    state = dict(
        training=False,
        _parameters=OrderedDict((k, p.data.half()) for k, p in module.named_parameters(recurse=False)),
        _buffers=OrderedDict((k, b.half()) for k, b in module.named_buffers(recurse=False)),
        _modules=OrderedDict((k, _module(m)) for k, m in module.named_children()),
        _init_args=(),
        _init_kwargs=dict(kwargs or {}),
    )
    return _Object(type(module).__name__, state)


def write_edm2_pickle(path, net: nn.Module, encoder: str = "rgb", vae: str = "stabilityai/sd-vae-ft-mse") -> None:
    """A teacher's file with the encoder of pixels ('rgb') or of latents ('sd-vae')."""
    if encoder == "rgb":
        described = _Object("StandardRGBEncoder", dict(_init_args=(), _init_kwargs={}))
    else:
        raw_mean, raw_std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
        scale = 0.5 / raw_std
        bias = -raw_mean * scale
        state = dict(vae_name=vae, scale=scale.numpy(), bias=bias.numpy(), batch_size=8, _vae=None)
        described = _Object("StabilityVAEEncoder", dict(state, _init_args=(), _init_kwargs={}))
    with open(path, "wb") as file:
        _Pickler(file, protocol=4).dump(_EasyDict(encoder=described, ema=_module(net, net.init_kwargs)))

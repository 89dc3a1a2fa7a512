"""Files of networks: the project's own format, and the published pickles of EDM2 and NCVSD.

The own format is one safetensors file. The weights stand under the keys of `net.state_dict()`; the metadata entry
"ncvsd" is a JSON object:

    format_version   1
    kind             "Precond", "PrecondCondition", "GenerativeDenoiser" or "Discriminator"
    init_kwargs      arguments that rebuild the network (of the inner PrecondCondition for a GenerativeDenoiser)
    gamma            extra noise of a GenerativeDenoiser; null for the others
    init_sigma       top of a GenerativeDenoiser's noise levels, in data units; null for the others
    encoder          description of the encoder, see `networks.encoders.encoder_from_config`
    dataset          facts about the training data, or null
    provenance       how the network was trained (git commit, command, images seen, EMA std, seed, ...), or null

Kernels and matrices are stored in float32 or float16. Scalars, vectors and the Fourier frequencies and phases are
always float32: they are few, and float16 would lose the phase of the higher frequencies.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dnnlib.download import open_url
from dnnlib.files import PathLike, atomic_path, open_regular, parse_json
from dnnlib.text import first_line, redact
from networks.denoisers import Discriminator, GenerativeDenoiser, Precond, PrecondCondition
from networks.encoders import Encoder, encoder_from_config, nonfinite_weights
from networks.published import Contents, check_init_kwargs, check_number, read_pickle, show
from torch_utils import safe_pickle
from torch_utils.safe_pickle import CheckpointError, UnsafeCheckpointError

__all__ = ["CheckpointError", "LoadedNetwork", "NonFiniteError", "UnsafeCheckpointError", "load", "save"]

Network = Precond | PrecondCondition | GenerativeDenoiser | Discriminator

_FORMAT_VERSION = 1
_METADATA_KEY = "ncvsd"
_MAX_HEADER = 16 * 2**20  # bytes of safetensors header; the largest networks need about 0.3 MiB
_ENTRIES = ("kind", "init_kwargs", "gamma", "init_sigma", "encoder", "dataset", "provenance")
_MODEL_KINDS = {"Precond": Precond, "PrecondCondition": PrecondCondition, "Discriminator": Discriminator}
_FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NonFiniteError(CheckpointError):
    """A network file holds weights that are not numbers."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network ready for evaluation, with what belongs to it."""

    net: Network  # eval mode, no gradients, float32 parameters
    encoder: Encoder  # between pixels and what the network sees
    config: dict[str, Any]  # kind, init_kwargs, gamma, init_sigma, encoder, dataset, provenance, source
    path: Path  # the local file


def save(
    path: PathLike,
    net: Network,
    encoder: Encoder,
    *,
    dtype: torch.dtype = torch.float32,  # of kernels and matrices in the file: float32 or float16
    dataset: Mapping[str, Any] | None = None,  # facts about the training data, JSON-able
    provenance: Mapping[str, Any] | None = None,  # how the network was trained, JSON-able
) -> None:
    """Writes a network to a safetensors file, whole or not at all. The format is described at the top of this module.
    Raises CheckpointError (a ValueError) for another class of network, another dtype, facts that JSON cannot hold, and
    weights that overflow float16, OSError where the file cannot be written; an existing one is left as it was.
    """
    if dtype not in (torch.float32, torch.float16):
        raise CheckpointError(f"{path}: weights are stored as float32 or float16, not {dtype}")
    kind = type(net).__name__
    if kind != "GenerativeDenoiser" and type(net) is not _MODEL_KINDS.get(kind):
        raise CheckpointError(f"{path}: cannot store a {kind}; known are {', '.join(_MODEL_KINDS)}, GenerativeDenoiser")
    generative = isinstance(net, GenerativeDenoiser)
    config: dict[str, Any] = {"format_version": _FORMAT_VERSION, "kind": kind}
    config["init_kwargs"] = dict(net.model.init_kwargs if generative else net.init_kwargs)
    config |= {name: float(getattr(net, name)) if generative else None for name in ("gamma", "init_sigma")}
    config["encoder"] = encoder.to_config()
    config |= {"dataset": dataset and dict(dataset), "provenance": provenance and dict(provenance)}
    try:
        metadata = json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of the network cannot be written as JSON: {error}") from None

    tensors = {}
    for key, tensor in net.state_dict().items():
        stored = tensor.detach().to("cpu", torch.float32)
        if stored.ndim >= 2 and dtype == torch.float16:
            if stored.numel() and stored.abs().max() > torch.finfo(torch.float16).max:
                raise CheckpointError(f"{path}: {key} overflows float16; store float32")
            stored = stored.to(torch.float16)
        tensors[key] = stored.clone(memory_format=torch.contiguous_format)
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={_METADATA_KEY: metadata})
        except safetensors.SafetensorError as error:  # of the file system, whose own error it hides
            raise OSError(f"{path}: cannot be written ({show(error)})") from None


def load(
    source: PathLike,
    device: torch.device | str = "cpu",
    *,
    sha256: str | None = None,  # expected hash of a file behind a path or URL, 64 hexadecimal digits
    quiet: bool = False,  # no progress bar while downloading
    check_finite: bool = True,  # refuse weights that are NaN or infinite
) -> LoadedNetwork:
    """Loads a network from a path, an http(s) URL or a Hugging Face Hub id `hf://owner/repo/file[@revision]`; each may
    end in `#sha256=` and 64 hexadecimal digits. Reads files written by `save`, EDM2's network pickles and the NCVSD
    authors', told apart by their content. Nothing in a file is executed. Raises CheckpointError (a ValueError) for
    files that are damaged, of another kind, or whose weights do not fit; UnsafeCheckpointError and NonFiniteError,
    kinds of it, for pickles with anything outside the allowed set and for weights that are not finite; ValueError for
    failed downloads.
    """
    path = _local_path(os.fspath(source), sha256, quiet)
    try:
        config, tensors = _read(path)
        net = _build(config, tensors, path.stat().st_size, torch.device(device))
        if check_finite and (bad := nonfinite_weights(net)):
            more = f" and {len(bad) - 1} more" if bad[1:] else ""
            advice = "the file is damaged, or of a training that diverged; use an earlier one"
            raise NonFiniteError(f"{path}: NaN or infinite weights in {bad[0]}{more}: {advice}")
        encoder = _build_encoder(config["encoder"], net.img_channels).to(device)
    except (CheckpointError, OSError) as error:
        if str(error).startswith(str(path)):
            raise
        raise CheckpointError(f"{path}: {error}") from None
    model = net.model if isinstance(net, GenerativeDenoiser) else net
    config = {**config, "init_kwargs": dict(model.init_kwargs), "encoder": encoder.to_config()}
    return LoadedNetwork(net, encoder, {**config, "source": redact(os.fspath(source))}, path)


def _local_path(text: str, sha256: str | None, quiet: bool) -> Path:
    """The file behind a source, downloaded if need be; `#sha256=` at its end counts as the hash."""
    source, mark, digest = text.rpartition("#sha256=")
    if mark and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise CheckpointError(f"{show(redact(text))}: after #sha256= must come 64 hexadecimal digits")
    if mark and sha256 is not None and sha256.lower() != digest.lower():
        raise CheckpointError(f"{show(redact(text))}: differs from the SHA-256 given besides, {show(sha256)}")
    text, sha256 = (source, digest) if mark else (text, sha256)
    if os.path.isdir(text):
        inside = max((name for name in os.listdir(text) if name.endswith((".safetensors", ".pkl"))), default=None)
        advice = f"a network in it, such as {show(inside)}" if inside else "a file, .safetensors or .pkl"
        raise CheckpointError(f"{show(text)}: this is a folder: give {advice}")
    if not text.startswith("hf://"):
        return open_url(text, sha256=sha256, quiet=quiet)
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^@]+)(?:@([\w./-]+))?", text)
    if match is None:
        raise CheckpointError(f"{redact(text)}: write hf://owner/repository/path/to/file or the same with @revision")
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(match[1], match[2], revision=match[3])
    except Exception as error:  # the Hub's client, its HTTP library and its cache have no common error
        reason = redact(first_line(error))
        raise CheckpointError(f"{text}: cannot fetch this from the Hugging Face Hub: {reason}") from None
    return open_url(path, sha256=sha256)


def _read(path: Path) -> Contents:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
    if size > safe_pickle.MAX_BYTES:
        raise CheckpointError(f"larger than the limit of {safe_pickle.MAX_BYTES} bytes")
    if start[8:] == b"{":
        if (header := int.from_bytes(start[:8], "little")) > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"damaged safetensors file: a header of {header} bytes in a file of {size} bytes")
        return _read_safetensors(path)
    if len(start) == 9 and start[:1] == b"\x80" and 2 <= start[1] <= 5:
        return read_pickle(path)
    if start.startswith(b"PK"):
        raise CheckpointError("a ZIP archive (perhaps of torch.save) is not a network file: use .safetensors or .pkl")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError("this is a web page, not a network file: check the address it was downloaded from")
    raise CheckpointError("neither a safetensors file nor a pickle of protocol 2 to 5, or cut off at the start")


def _read_safetensors(path: Path) -> Contents:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA_KEY)
            if metadata is None:
                raise CheckpointError(f"safetensors file without the metadata {_METADATA_KEY!r}: not written by NCVSD")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"damaged safetensors file: {show(error)}") from None
    try:
        config = parse_json(metadata)
    except ValueError:
        raise CheckpointError("damaged safetensors file: its description of the network is not JSON") from None
    found = config.get("format_version") if type(config) is dict else None
    if found != _FORMAT_VERSION:
        raise CheckpointError(f"format version {show(found)} is not {_FORMAT_VERSION}: written by another NCVSD")
    if missing := [name for name in _ENTRIES if name not in config]:
        raise CheckpointError(f"its description of the network lacks {', '.join(missing)}")
    for name in ("dataset", "provenance"):
        if type(config[name]) not in (dict, type(None)):
            raise CheckpointError(f"its {name} is not a JSON object")
    return {name: config[name] for name in _ENTRIES}, tensors


def _build(config: dict[str, Any], found: dict[str, torch.Tensor], file_size: int, device: torch.device) -> Network:
    """Builds the network without memory, compares it with the tensors, and only then allocates and fills it."""
    kind, kwargs = config["kind"], check_init_kwargs(config["init_kwargs"])
    if type(kind) is not str or kind not in (*_MODEL_KINDS, "GenerativeDenoiser"):
        raise CheckpointError(f"a network of unknown kind {show(kind)}")
    bounds = {"gamma": (0, 100), "init_sigma": (1e-3, 1e6)} if kind == "GenerativeDenoiser" else {}
    numbers = {name: check_number(name, config[name], *limits) for name, limits in bounds.items()}
    try:
        with torch.device("meta"):
            net = _MODEL_KINDS.get(kind, PrecondCondition)(**kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"its architecture cannot be built: {show(error)}") from None
    net = GenerativeDenoiser(net, **numbers) if numbers else net

    expected = net.state_dict()
    count = sum(tensor.numel() for tensor in expected.values())
    if count > file_size:
        raise CheckpointError(f"a file of {file_size} bytes cannot hold the {count} weights of its architecture")
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"missing weights: {_list(missing)}")
    if unexpected := found.keys() - expected.keys():
        raise CheckpointError(f"unexpected weights: {_list(unexpected)}")
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape:
            raise CheckpointError(f"{key} has the shape {list(found[key].shape)}, expected {list(tensor.shape)}")
        if found[key].dtype not in _FLOAT_TYPES:
            raise CheckpointError(f"{key} is stored as {found[key].dtype}, expected floating-point numbers")

    net = net.to_empty(device=device).eval().requires_grad_(False)
    for key, tensor in net.state_dict().items():
        tensor.copy_(found[key])
    return net


def _build_encoder(config: Any, img_channels: int) -> Encoder:
    if type(config) is not dict or type(config.get("vae_name", "")) is not str:
        raise CheckpointError("the description of its encoder is not a dictionary with the name of an autoencoder")
    try:
        encoder = encoder_from_config(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"its encoder cannot be built: {show(error)}") from None
    if config["type"] == "sd-vae" and len(encoder.scale) != img_channels:
        raise CheckpointError(f"its encoder gives {len(encoder.scale)} channels, its network takes {img_channels}")
    return encoder


def _list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(show(name) for name in ordered[:3]) + (f" and {len(ordered) - 3} more" if ordered[3:] else "")

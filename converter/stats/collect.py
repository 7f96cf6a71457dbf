"""The one calibration pass: blocks are walked one at a time, so memory is bounded by one or two blocks in fp32 and the hidden states.

Hidden states [N, S, d] of all windows advance block by block; while a block is in memory every window passes through it and every statistic of its
sites is fed. A finished block's statistics are a folder of their own; on resume such a block only advances the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..arch import Site
from ..artifact import Header, InputError, atomic_folder, read_header, write_header
from ..blocks import BlockCalls, block_calls, down_rows, embed, empty_model, ffn_down, ffn_parts, filled
from ..data import Batches
from ..scores import Context, load_score
from ..source import Source
from . import Setting, SiteStats, file_name, load_stat

TOKENS_AT_ONCE = 2048


def collect(source: Source, batches: Batches, names: Sequence[str], folder: Path, seed: int = 0, device: str = "cpu") -> dict[Site, Mapping[str, Tensor]]:
    """Statistics `names` (as in `histogram:gate`) of every feed-forward site, stored below `folder`, one finished folder a site."""
    names = sorted(set(names))
    sites = source.arch.sites(source.config)
    headers = {site: _header(source, batches, names, site, seed) for site in sites}
    todo = [site for site in sites if not _is_complete(folder / site.key, headers[site], names)]
    if todo:
        _walk(source, batches, names, folder, seed, device, headers, set(todo), max(todo))
    return {site: SiteStats(folder / site.key, names) for site in sites}


def _is_complete(folder: Path, header: Header, names: Sequence[str]) -> bool:
    """Whether a site's folder holds at least `names`, made from what `header` says: a run that needs fewer statistics does not collect again."""
    stored = read_header(folder)
    if stored is None or not set(names) <= set(stored.config.get("stats", ())):
        return False
    same = stored.model_copy(update={"config": header.config}) == header and stored.config.get("site") == header.config["site"]
    return same and all((folder / file_name(name)).is_file() for name in names)


def drop_samples(folder: Path) -> None:
    """Delete the stored activations below a statistics folder; the other statistics stay."""
    for path in folder.glob("*/samples.*.safetensors"):
        path.unlink()


def _header(source: Source, batches: Batches, names: Sequence[str], site: Site, seed: int) -> Header:
    return Header(format="stats", parents={"model": source.fingerprint}, config={"site": site.key, "stats": list(names)}, seed=seed, calibration=batches.sha256)


@torch.no_grad()
def _walk(
    source: Source, batches: Batches, names: Sequence[str], folder: Path, seed: int, device: str, headers: dict[Site, Header], todo: set[Site], last: Site
) -> None:
    model = empty_model(source)
    blocks = model.get_decoder().layers
    tokens, _ = embed(model, source, batches.tokens)
    rows = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    hidden = torch.empty((*tokens.shape, source.arch.size(source.config, "hidden")), dtype=torch.float32)
    calls: dict[tuple[int, bool], BlockCalls] = {}
    groups = [slice(k, min(k + rows, len(tokens))) for k in range(0, len(tokens), rows)]
    for group in groups:
        call = block_calls(model, blocks, tokens[group], batches.mask[group])
        hidden[group] = call.hidden
        full = bool(batches.mask[group].all())
        calls.setdefault((group.stop - group.start, full) if full else (-group.start - 1, full), call._replace(hidden=torch.empty(0)))
    del model.get_input_embeddings().weight
    positions = torch.where(batches.mask.flatten(), batches.mask.flatten().cumsum(0) - 1, -1).view(batches.mask.shape)

    for layer in tqdm(range(last.layer + 1), desc="calibrate", unit="block"):
        site = Site(layer)
        prefix = source.arch.block_prefix(layer)
        # the block's own names: files may hold more, such as rotary tables that older versions of transformers stored
        tensors = {name.removeprefix(prefix): t for name, t in source.read(prefix + name for name, _ in blocks[layer].named_parameters()).items()}
        with filled(blocks[layer], tensors, device) as block:
            recorder = _Recorder(source, block.get_submodule(source.arch.ffn.module), names) if site in todo else None
            if recorder:
                with atomic_folder(folder / site.key) as partial:
                    recorder.start(partial, batches.count, seed)
                    _advance(block, layer, hidden, groups, calls, batches.mask, positions, recorder, device)
                    recorder.store(partial)
                    write_header(partial, headers[site])
            else:
                _advance(block, layer, hidden, groups, calls, batches.mask, positions, None, device)


def _advance(
    block: Any, layer: int, hidden: Tensor, groups: list[slice], calls: dict, mask: Tensor, positions: Tensor, recorder: _Recorder | None, device: str
) -> None:
    for group in groups:
        full = bool(mask[group].all())
        call = calls[(group.stop - group.start, full) if full else (-group.start - 1, full)]
        keywords = {name: _move(value, device) for name, value in call.keywords[layer].items()}
        if recorder:
            recorder.keep, recorder.positions = mask[group].flatten(), positions[group].flatten()[mask[group].flatten()]
        out = block(hidden[group].to(device), **keywords)
        hidden[group] = (out[0] if isinstance(out, tuple) else out).cpu()
        if not bool(hidden[group][mask[group]].isfinite().all()):
            raise InputError(f"Hidden states must be finite numbers, got NaN or infinity after layer {layer}. Check the weights; fetch the model again.")
    if recorder:
        recorder.detach()


def _move(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(v, device) for v in value)
    return value


class _Recorder:
    """Replaces a feed-forward module's forward by one that feeds the statistics with the tokens that are not padding."""

    def __init__(self, source: Source, module: Any, names: Sequence[str]) -> None:
        self.source, self.module, self.names = source, module, names
        self.keep = self.positions = torch.empty(0)
        self.activation = source.arch.activation(source.config)
        module.forward = self.forward

    def start(self, folder: Path, tokens: int, seed: int) -> None:
        hidden, units = (self.source.arch.size(self.source.config, space) for space in ("hidden", "units"))
        self.states = {name: load_stat(name)[0].init(Setting(hidden, units, tokens, seed, folder, name)) for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        parts = ffn_parts(self.module, self.source.arch, self.activation, x)
        fields = {"x": x, "gate": parts.gate, "up": parts.up, "z": parts.z, "w_down": down_rows(self.module, self.source.arch)}
        kept = self._rows(x)
        for score in sorted({load_stat(name)[1] for name in self.names}):
            module = load_score(score)
            values = module.score(Context(**{name: fields[name] if name.startswith("w_") else self._rows(fields[name]) for name in module.NEEDS}))
            for name in self.names:
                if load_stat(name)[1] == score:
                    load_stat(name)[0].update(self.states[name], kept, values, self.positions)
        return ffn_down(self.module, self.source.arch, parts.z)

    def _rows(self, values: Tensor) -> Tensor:
        """The rows of tokens that are not padding [T, ...]; a view where there is no padding."""
        flat = values.flatten(0, -2)
        return flat if bool(self.keep.all()) else flat[self.keep.to(flat.device)]

    def store(self, folder: Path) -> None:
        for name in self.names:
            tensors = load_stat(name)[0].finish(self.states[name])
            if tensors:
                save_file(tensors, folder / file_name(name))

    def detach(self) -> None:
        del self.module.forward

"""The one calibration pass: blocks are walked one at a time, so memory is bounded by one or two blocks in fp32 and the
hidden states.

Hidden states [N, S, d] of all windows advance block by block; while a block is in memory every window passes through it
and every statistic of its sites is fed. A finished site's statistics are a folder of their own; on resume a block whose
sites are finished only advances the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ..arch.shapes import linear_rows, linear_shapes
from ..arch.site import Site
from ..checkpoint.source import Source
from ..checkpoint.stage import Header, atomic_folder, is_intact, leave_out, read_header, write_header, write_tensors
from ..modeling.blocks import embed, ffn_down, filled, moved
from ..modeling.empty import empty_model
from ..modeling.taps import (
    BlockCalls,
    Fields,
    block_calls,
    ffn_fields,
    linear_by_parts,
    masked,
    replaced,
    tapped_inputs,
)
from ..progress import partly, track
from ..scores import Context, load_score
from ..text.windows import Batches
from . import Probe, SiteStats, StatSetup, file_name, load_stat

TOKENS_AT_ONCE = 2048
PROBE_TOKENS = 512
"""Tokens that statistics with `settle` look at twice: whole windows, at least one."""


def collect(
    source: Source, batches: Batches, names: Sequence[str], folder: Path, seed: int = 0, device: str = "cpu"
) -> dict[Site, Mapping[str, Tensor]]:
    """Statistics `names` (as in `histogram:gate`) of every site of their kinds, stored below `folder`, one finished
    folder a site.

    The kind of a statistic is its score's: feed-forward networks, or every linear of a block. Raises InputError for a
    score that one forward cannot give.
    """
    by_site = _by_site(source, names)
    headers = {site: _header(source, batches, wanted, site, seed) for site, wanted in by_site.items()}
    todo = {site for site, wanted in by_site.items() if not _is_complete(folder / site.key, headers[site], wanted)}
    if len(todo) < len(by_site):
        partly()
    if todo:
        begun = {(site.layer, site.kind.partition(":")[0]) for site in todo}  # a layer's linears are settled together
        again = [site for site in by_site if (site.layer, site.kind.partition(":")[0]) in begun]
        _walk(source, batches, {site: by_site[site] for site in again}, folder, seed, device, headers)
    return {site: SiteStats(folder / site.key, wanted) for site, wanted in by_site.items()}


def _by_site(source: Source, names: Sequence[str]) -> dict[Site, list[str]]:
    """The statistics of every site, layer by layer, the network before its linears."""
    kinds: dict[str, list[str]] = {"ffn": [], "linear": []}
    for name in sorted(set(names)):
        score = load_stat(name)[1]
        module = load_score(score)
        kind = getattr(module, "KIND", "ffn")
        missing = set(module.NEEDS) - (
            {"x", "w"} if kind == "linear" else {"x", "gate", "up", "z", "w_gate", "w_up", "w_down"}
        )
        if kind not in kinds or missing:
            raise InputError(
                f"A statistic's score must need one forward only, got {score}, which needs "
                f"{', '.join(sorted(missing)) or kind}. Choose another."
            )
        kinds[kind].append(name)
    by_site: dict[Site, list[str]] = {}
    for site in source.arch.sites(source.config):
        linears = [Site(site.layer, kind=f"linear:{name}") for name in source.arch.linears()]
        by_site |= {s: kinds[s.kind.partition(":")[0]] for s in (site, *linears) if kinds[s.kind.partition(":")[0]]}
    return by_site


def _is_complete(folder: Path, header: Header, names: Sequence[str]) -> bool:
    """Whether a site's folder holds at least `names`, made from what `header` says: a run that needs fewer statistics
    does not collect again.
    """
    stored = read_header(folder)
    if stored is None or not set(names) <= set(stored.config.get("stats", ())):
        return False
    same = (
        stored.model_copy(update={"config": header.config}) == header
        and stored.config.get("site") == header.config["site"]
    )
    return same and all((folder / file_name(name)).is_file() for name in names) and is_intact(folder)


def drop_samples(folder: Path) -> None:
    """Delete the stored activations below a statistics folder; the other statistics stay."""
    for site in folder.glob("*"):
        stored = [path.name for kind in ("samples", "moments") for path in site.glob(f"{kind}.*.safetensors")]
        if stored:
            leave_out(site, stored)


def _header(source: Source, batches: Batches, names: Sequence[str], site: Site, seed: int) -> Header:
    return Header(
        format="stats",
        parents={"model": source.fingerprint},
        config={"site": site.key, "stats": list(names)},
        seed=seed,
        calibration=batches.sha256,
    )


@torch.no_grad()
def _walk(
    source: Source,
    batches: Batches,
    by_site: Mapping[Site, list[str]],
    folder: Path,
    seed: int,
    device: str,
    headers: Mapping[Site, Header],
) -> None:
    model = empty_model(source)
    blocks = model.get_decoder().layers
    tokens, _ = embed(model, source, batches.tokens)
    hidden = torch.empty((*tokens.shape, source.arch.size(source.config, "hidden")), dtype=torch.float32)
    states = _States(hidden, batches.mask, device)
    states.enter(model, tokens)
    few = slice(max(1, PROBE_TOKENS // tokens.shape[1]))
    probed = block_calls(model, blocks, tokens[few], batches.mask[few])._replace(hidden=torch.empty(0))
    del model.get_input_embeddings().weight

    last = max(site.layer for site in by_site)
    for layer in track(range(last + 1), unit="block"):
        prefix = source.arch.block_prefix(layer)
        # the block's own names: files may hold more, such as rotary tables that older versions of transformers stored
        tensors = {
            name.removeprefix(prefix): t
            for name, t in source.read(prefix + name for name, _ in blocks[layer].named_parameters()).items()
        }
        sites = {site: names for site, names in by_site.items() if site.layer == layer}
        with filled(blocks[layer], tensors, device) as block, ExitStack() as stack:
            if not sites:
                states.advance(block, layer)
                continue
            partials = {site: stack.enter_context(atomic_folder(folder / site.key)) for site in sites}
            recorder = _Recorder(source, block, sites, partials, batches.count, seed)
            entering = hidden[few].to(device, copy=True) if recorder.settles() else None
            with recorder.attached():
                states.advance(block, layer, recorder)
            if entering is not None:
                keywords = moved(probed.keywords[layer], device)
                recorder.settle(
                    lambda entering=entering, keywords=keywords: block(entering, **keywords), batches.mask[few]
                )
            for site, path in partials.items():
                recorder.store(site, path)
                write_header(path, headers[site])


@dataclass(frozen=True)
class _States:
    """Hidden states [N, S, d] fp32 of all windows on the CPU, which go through the blocks on `device` one after the
    other, in groups of windows.

    `mask` [N, S] is False on padding. `calls` has what the blocks of a group are called with: by (windows, True) of
    groups without padding, which share it, else by (-1 - the group's first window, False).
    """

    hidden: Tensor
    mask: Tensor
    device: str
    groups: list[slice] = field(default_factory=list)
    calls: dict[tuple[int, bool], BlockCalls] = field(default_factory=dict)

    def enter(self, model: Any, tokens: Tensor) -> None:
        """The hidden states before the first block, for `tokens` [N, S]."""
        rows = max(1, TOKENS_AT_ONCE // tokens.shape[1])
        self.groups.extend(slice(k, min(k + rows, len(tokens))) for k in range(0, len(tokens), rows))
        for group in self.groups:
            call = block_calls(model, model.get_decoder().layers, tokens[group], self.mask[group])
            self.hidden[group] = call.hidden
            self.calls.setdefault(self._key(group), call._replace(hidden=torch.empty(0)))

    def advance(self, block: Any, layer: int, recorder: _Recorder | None = None) -> None:
        """The hidden states after `block`, whose sites `recorder` sees."""
        positions = torch.where(self.mask.flatten(), self.mask.flatten().cumsum(0) - 1, -1).view(self.mask.shape)
        for group in self.groups:
            mask = self.mask[group]
            if recorder:
                recorder.keep, recorder.positions = mask.flatten(), positions[group].flatten()[mask.flatten()]
            keywords = moved(self.calls[self._key(group)].keywords[layer], self.device)
            out = block(self.hidden[group].to(self.device), **keywords)
            self.hidden[group] = (out[0] if isinstance(out, tuple) else out).cpu()
            entered = self.hidden[group] if bool(mask.all()) else self.hidden[group][mask]
            # NaN and infinity stay in a sum, and finite fp32 numbers do not overflow it
            if not bool(entered.sum(dtype=torch.float64).isfinite()):
                raise InputError(
                    f"Hidden states must be finite numbers, got NaN or infinity after layer {layer}. Check the "
                    "weights; fetch the model again."
                )

    def _key(self, group: slice) -> tuple[int, bool]:
        full = bool(self.mask[group].all())
        return (group.stop - group.start if full else -group.start - 1, full)


class _Recorder:
    """Feeds the statistics of a layer's sites with the tokens that are not padding, while its block runs."""

    def __init__(
        self,
        source: Source,
        block: Any,
        sites: Mapping[Site, list[str]],
        folders: Mapping[Site, Path],
        tokens: int,
        seed: int,
    ) -> None:
        self.source, self.block, self.sites = source, block, sites
        self.keep = self.positions = torch.empty(0)
        self.activation = source.arch.activation(source.config)
        self.network = block.get_submodule(source.arch.ffn.module)
        layer = next(iter(sites)).layer
        self.rows = linear_rows(source.arch, source.config, layer)
        shapes = linear_shapes(source.arch, source.config, layer)
        hidden, units = (source.arch.size(source.config, space, layer) for space in ("hidden", "units"))
        self.states: dict[Site, dict[str, Any]] = {}
        for site, names in sites.items():
            outputs, inputs = shapes.get(site.kind.removeprefix("linear:"), (hidden, hidden))
            width = units if site.kind == "ffn" else inputs
            self.states[site] = {
                name: load_stat(name)[0].init(StatSetup(inputs, width, tokens, seed, folders[site], name, outputs))
                for name in names
            }

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the block inside the context."""
        linears = {}
        for name, parts in self.rows.items():
            module = self.block.get_submodule(name)
            sites = {site: parts[part] for site in self.sites if (part := site.kind.removeprefix("linear:")) in parts}
            if sites:
                linears[module] = partial(self._see_linear, sites, module)
        networks = {self.network: self._see_network} if any(site.kind == "ffn" for site in self.sites) else {}
        with tapped_inputs(linears), replaced(networks):
            yield

    def _see_linear(self, sites: Mapping[Site, slice], module: Any, x: Tensor) -> None:
        for site, rows in sites.items():
            self._feed(site, {"x": x, "w": module.weight[rows]})

    def _see_network(self, x: Tensor) -> Tensor:
        (site,) = (site for site in self.sites if site.kind == "ffn")
        fields = self._fields(x)
        self._feed(site, fields)
        return ffn_down(self.network, self.source.arch, fields["z"])

    def _fields(self, x: Tensor) -> Fields:
        """The fields of a neuron score for x [..., d]; a plain network has up = 1, so that z = gate * up always."""
        fields = ffn_fields(self.network, self.source.arch, self.activation, x)
        return fields if "up" in fields else fields | {"up": torch.ones_like(fields["gate"])}

    def _feed(self, site: Site, fields: dict[str, Tensor]) -> None:
        kept = self._rows(fields["x"])
        for score in sorted({load_stat(name)[1] for name in self.sites[site]}):
            module = load_score(score)
            values = module.score(self._context(module, fields))
            for name in (name for name in self.sites[site] if load_stat(name)[1] == score):
                statistic, state = load_stat(name)[0], self.states[site][name]
                if needed := getattr(statistic, "FIELDS", ()):
                    state["fields"] = {
                        field: self._unit_score(module, fields) if field == "scale" else self._rows(fields[field])
                        for field in needed
                    }
                statistic.update(state, kept, values, self.positions)
                state.pop("fields", None)

    def _context(self, module: Any, fields: Mapping[str, Tensor]) -> Context:
        return Context(
            **{name: fields[name] if name.startswith("w") else self._rows(fields[name]) for name in module.NEEDS}
        )

    def _unit_score(self, module: Any, fields: Mapping[str, Tensor]) -> Tensor:
        """The score of an input of 1 at every channel: [d_in]."""
        ones = {"x": torch.ones_like(fields["w"][:1]), "w": fields["w"]}
        return module.score(Context(**{name: ones[name] for name in module.NEEDS}))[0]

    def _rows(self, values: Tensor) -> Tensor:
        """The rows of tokens that are not padding [T, ...]; a view where there is no padding."""
        flat = values.flatten(0, -2)
        return flat if bool(self.keep.all()) else flat[self.keep.to(flat.device)]

    def settles(self) -> bool:
        """Whether a statistic wants to see the block again."""
        return any(hasattr(load_stat(name)[0], "settle") for names in self.sites.values() for name in names)

    def settle(self, run: Callable[[], Any], mask: Tensor) -> None:
        """Let every statistic with `settle` look again; `run` runs the block on its few tokens, whose padding is False
        in mask [B, S].
        """
        self.keep = mask.flatten()
        for name in sorted({name for names in self.sites.values() for name in names}):
            statistic, score = load_stat(name)
            if hasattr(statistic, "settle"):
                states = {site: self.states[site][name] for site, names in self.sites.items() if name in names}
                statistic.settle(states, Probe(partial(self._block, run), partial(self._neurons, run)), score)

    def _block(self, run: Callable[[], Any], taus: Mapping[str, Tensor]) -> Tensor:
        def forward(module: Any, parts: Mapping[str, slice], x: Tensor) -> Tensor:
            inputs = [masked(x, x.abs() > taus[name].to(x.device)) if name in taus else x for name in parts]
            return linear_by_parts(module, list(parts.values()), inputs)

        modules = {self.block.get_submodule(name): parts for name, parts in self.rows.items() if set(parts) & set(taus)}
        with replaced({module: partial(forward, module, parts) for module, parts in modules.items()}):
            out = run()
        return self._rows(out[0] if isinstance(out, tuple) else out)

    def _neurons(self, run: Callable[[], Any], score: str) -> tuple[Tensor, Tensor, Tensor]:
        inputs: list[Tensor] = []
        with tapped_inputs({self.network: inputs.append}):
            run()
        fields, module = self._fields(inputs[0]), load_score(score)
        return module.score(self._context(module, fields)), self._rows(fields["z"]), fields["w_down"]

    def store(self, site: Site, folder: Path) -> None:
        for name, state in self.states[site].items():
            tensors = load_stat(name)[0].finish(state)
            if tensors:
                write_tensors(folder / file_name(name), tensors)

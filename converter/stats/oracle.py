"""Statistics of scores that need gradients, for predictors that learn an oracle: one forward and one backward of the
whole model a batch gives the scores of all layers, labelled by the model's own greedy tokens. Folders and tensors are
those of `stats.collect`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arch.site import Site
from ..checkpoint.cost import site_units
from ..checkpoint.source import Source
from ..checkpoint.stage import Header, atomic_folder, is_finished, write_header, write_tensors
from ..modeling.blocks import down_rows, ffn_modules
from ..modeling.gradients import NEURONS, Gradients, attribute
from ..modeling.taps import ffn_inputs
from ..progress import track
from ..scores import Context, load_score
from ..text.windows import Batches
from . import SiteStats, StatSetup, file_name, load_stat

_TOKENS_AT_ONCE = 2048


def collect_labels(
    model: Any, source: Source, batches: Batches, names: Sequence[str], folder: Path, seed: int
) -> dict[Site, Mapping[str, Tensor]]:
    """Statistics `names` (as in `samples:corrected_gxo`) of every feed-forward site of the dense `model`, stored below
    `folder`.

    A score is shifted by its least value over the token's units, which keeps its order and makes it non-negative.
    """
    names, sites = sorted(set(names)), source.arch.sites(source.config)
    headers = {
        site: Header(
            format="stats",
            parents={"model": source.fingerprint},
            config={"site": site.key, "stats": names},
            seed=seed,
            calibration=batches.sha256,
        )
        for site in sites
    }
    paths = [
        folder / site.key / file_name(name) for site in sites for name in names
    ]  # stored activations go when a conversion's plans are made
    if not all(path.is_file() for path in paths) or not all(
        is_finished(folder / site.key, headers[site]) for site in sites
    ):
        with ExitStack() as stack:
            partials = {site: stack.enter_context(atomic_folder(folder / site.key)) for site in sites}
            _walk(model, source, batches, names, partials, seed)
            for site, partial in partials.items():
                write_header(partial, headers[site])
    return {site: SiteStats(folder / site.key, names) for site in sites}


def _walk(
    model: Any, source: Source, batches: Batches, names: Sequence[str], folders: Mapping[Site, Path], seed: int
) -> None:
    arch = source.arch
    hidden, units = arch.size(source.config, "hidden"), site_units(folders, arch, source.config)
    states = {
        (site, name): load_stat(name)[0].init(StatSetup(hidden, units[site], batches.count, seed, folder, name))
        for site, folder in folders.items()
        for name in names
    }
    modules = ffn_modules(model, arch, folders)
    positions = torch.where(batches.mask.flatten(), batches.mask.flatten().cumsum(0) - 1, -1).view(batches.mask.shape)
    rows = max(1, _TOKENS_AT_ONCE // batches.tokens.shape[1])
    for start in track(range(0, len(batches.tokens), rows), unit="batch"):
        group = slice(start, start + rows)
        tokens, mask = batches.tokens[group].to(model.device), batches.mask[group].to(model.device)
        with ffn_inputs(model, arch, folders) as inputs, torch.no_grad():
            logits = model(
                input_ids=tokens, attention_mask=None if bool(mask.all()) else mask.long(), use_cache=False
            ).logits
        label = logits.argmax(-1)
        at = positions[group][batches.mask[group]]
        entered = {site: x for site, (x,) in inputs.items()}

        def consume(
            site: Site,
            gradients: Gradients,
            entered: Mapping[Site, Tensor] = entered,
            mask: Tensor = mask,
            label: Tensor = label,
            at: Tensor = at,
        ) -> None:
            fields = {
                "z": gradients.value[mask],
                "grad": gradients.grad[mask],
                "label": label[mask],
                "w_down": down_rows(modules[site], arch).detach(),
            }
            for name in names:
                stat, score = load_stat(name)
                module = load_score(score)
                values = module.score(Context(**{field: fields[field] for field in module.NEEDS}))
                stat.update(states[site, name], entered[site][mask], values - values.amin(dim=1, keepdim=True), at)

        attribute(model, arch, tokens, NEURONS, mask=mask, labels=label, consume=consume)
    for (site, name), state in states.items():
        tensors = load_stat(name)[0].finish(state)
        if tensors:
            write_tensors(folders[site] / file_name(name), tensors)

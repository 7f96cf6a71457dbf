"""inspect: what can be converted and why not, from configuration and safetensors headers alone, before any download."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.untrusted import read_json
from ..arch import load_arch
from ..checkpoint.config_bounds import check_graph
from ..checkpoint.model_check import Stored
from ..checkpoint.source import backed_config, check_config, open_source, stored
from ..progress import job
from ..sources.hub import is_hub_id, remote_inspect
from ..sources.named import resolve
from ..sources.powerinfer import is_powerinfer, powerinfer_headers, read_powerinfer, stored_bytes
from ..sources.published import is_published, normal_config
from .configs import method_configs
from .estimate import Estimate, estimate_shapes
from .recipe import Flags, compile_recipe
from .time_budget import decide, decided


class Inspection(BaseModel):
    """What headers tell of a model; `reason` says why it cannot be converted."""

    model: str
    model_type: str
    convertible: bool
    reason: str = ""
    sites: int = 0
    hidden: int = 0
    units: int = 0
    activation: str = ""
    download_bytes: int = 0
    estimate: Estimate | None = None


@job()
def inspect(model: str | Path) -> Inspection:
    """Inspect a folder, a PowerInfer file or a Hub id. Raises InputError when there is nothing to read; what is
    readable but unsupported comes back with its reason.
    """
    name = str(model)
    if is_hub_id(name):
        remote = remote_inspect(name)
        raw, tensors = remote.config, remote.tensors
        size, download = remote.total_bytes, remote.download_bytes
    elif is_powerinfer(name):
        raw, tensors = powerinfer_headers(read_powerinfer(name))
        size, download = stored_bytes(tensors), 0
    else:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            open_source(folder)
        raw, tensors, size, download = read_json(folder / "config.json", "config.json"), None, 0, 0
    model_type = str(raw.get("model_type"))
    try:
        if tensors is None:
            with TemporaryDirectory() as temporary:
                source = resolve(name, Path(temporary) / "source")
                tensors = stored(source.tensors)
                size = sum(info.bytes for info in source.tensors.values())
        return _found(name, raw, tensors, size, download)
    except InputError as error:
        return Inspection(
            model=name, model_type=model_type, convertible=False, reason=str(error), download_bytes=download
        )


def _found(name: str, raw: dict[str, Any], tensors: Stored, size: int, download: int) -> Inspection:
    read = normal_config(raw) if is_published(raw) else raw
    check_config(read)
    arch = load_arch(str(read.get("model_type")))
    config = backed_config(arch, read, tensors)
    shapes = {key: shape for key, (shape, _) in tensors.items()}
    check_graph(arch, config)
    recipe = compile_recipe(Flags(name))
    swapped = {fields["activation"] for fields in read.get("sparsity", {}).get("sites", {}).values()}
    decision = decide(arch, config, shapes, size, recipe, method_configs(recipe, bool(swapped)))
    recipe = decided(recipe, decision)
    needed = estimate_shapes(arch, config, shapes, size, recipe, method_configs(recipe, bool(swapped)))
    return Inspection(
        model=name,
        model_type=str(raw.get("model_type")),
        convertible=True,
        sites=len(arch.sites(config)),
        hidden=arch.size(config, "hidden"),
        units=arch.size(config, "units"),
        activation=", ".join(sorted(swapped)) or arch.activation(config),
        download_bytes=download,
        estimate=needed.model_copy(update={"download_bytes": download, **decision.shown()}),
    )

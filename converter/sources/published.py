"""Published folders whose activation differs from that of their base model, brought into the form of our own swapped
checkpoints.

Their code is never run: what a model type computes stands in PUBLISHED, read in the published modelling files. A folder
keeps its weights and tokenizer as they are; only config.json is written anew. Predictors that lie beside the
feed-forward weights stay there (`predictors.predictors_beside` reads them).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.ops.activation import spell_activation, split_activation
from ...runtime_onnx.untrusted import read_json, regular
from ..arch import ACTIVATIONS, PREFIX, SWAPPED, Arch, load_arch
from ..checkpoint.plan import Exact, SitePlan, Swap
from ..checkpoint.source import INDEX, SINGLE, TOKENIZER_FILES, check_config, drop_code, make_config, open_source
from ..checkpoint.sparsity import KEY, encode
from ..checkpoint.stage import HEADER, Header, atomic_folder, hash_json, mark, write_json

SOURCE = (
    "bamboo: PowerInfer/Bamboo-base-v0_1, Bamboo-DPO-v0_1 and TurboSparse-Mistral-Instruct, config.json (hidden_act "
    "relu) and modeling_bamboo.py: Mistral, "
    "down(act(gate x) * act(up x)); TurboSparse adds mlp.predictor.fc1 and fc2, arXiv 2406.05955",
    "sparsellama: SparseLLM/prosparse-llama-2-7b and -13b, config.json (hidden_act fatrelu, hidden_act_param 0.01) and "
    "modeling_sparsellama.py: Llama, "
    "fatrelu keeps v >= hidden_act_param, shiftrelu is relu(v - hidden_act_param), arXiv 2402.13516",
    "turbosparsemixtral: PowerInfer/TurboSparse-Mixtral, config.json: dReLU in every expert, refused",
    "SparseLLM/ReluLLaMA and openbmb/MiniCPM-S-1B-sft-llama-format are stock llama with hidden_act relu and need "
    "nothing",
    "PowerInfer/SparseQwen2-7B says qwen2 with hidden_act relu, its card that up is rectified too: no configuration "
    "tells it from relu(gate) * up, so the "
    "activation drelu must be given",
)


@dataclass(frozen=True)
class PublishedType:
    """A published model type: the type of its base, the activation of the base, and what its configuration makes the
    feed-forward networks compute.
    """

    base: str
    base_activation: str
    activation: Callable[[dict[str, Any]], str]


def _bamboo(raw: dict[str, Any]) -> str:
    if raw.get("hidden_act") != "relu":
        raise InputError(
            f"hidden_act of a bamboo model must be relu (dReLU), got {raw.get('hidden_act')!r}. Convert it by its own "
            "code."
        )
    return "drelu"


def _sparsellama(raw: dict[str, Any]) -> str:
    name, parameter = raw.get("hidden_act"), raw.get("hidden_act_param")
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    kind = {"fatrelu": "fatrelu", "shiftrelu": "shifted_relu"}.get(str(name))
    if kind is None:
        raise InputError(
            f"hidden_act of a sparsellama model must be fatrelu, shiftrelu, relu or a stock activation, got {name!r}. "
            "Convert it by its own code."
        )
    if (
        isinstance(parameter, bool)
        or not isinstance(parameter, int | float)
        or not abs(parameter) <= float(np.finfo(np.float32).max)
    ):
        raise InputError(f"hidden_act_param must be a finite number for {name}, got {parameter!r}. Mend config.json.")
    # v >= b in float32 is v > the next float32 below b
    value = (
        np.nextafter(np.float32(parameter), np.float32(-np.inf))
        if kind == "fatrelu" and parameter > 0
        else np.float32(parameter)
    )
    if value == 0:
        return "relu"
    try:
        return spell_activation(kind, float(value))
    except InputError as error:
        raise InputError(f"hidden_act_param must suit {name}, got {parameter!r}: {error}") from None


PUBLISHED = {
    "bamboo": PublishedType("mistral", "silu", _bamboo),
    "sparsellama": PublishedType("llama", "silu", _sparsellama),
}
REFUSED = {
    "turbosparsemixtral": "its feed-forward networks are experts with dReLU, which are not converted yet. Take "
    "TurboSparse-Mistral or another model without "
    "experts.",
}
"""Published model types that are known and cannot be converted -> why, and what to do."""


def is_published(raw: dict[str, Any]) -> bool:
    """Whether a config.json's content is of a published type that `normalise` knows, one that it refuses included."""
    return str(raw.get("model_type")) in {*PUBLISHED, *REFUSED}


def normal_config(raw: dict[str, Any], activation: str | None = None) -> dict[str, Any]:
    """What config.json says in the form that `open_source` reads, from that of a published model alone. Arguments and
    refusals are `normalise`'s.
    """
    check_config(raw)
    model_type = str(raw.get("model_type"))
    if model_type in REFUSED:
        raise InputError(
            f"MODEL must have feed-forward networks of one activation, got {model_type}: {REFUSED[model_type]}"
        )
    row = PUBLISHED.get(model_type)
    if row is None and activation is None:
        raise InputError(
            f"model_type must be one of {', '.join(PUBLISHED)}, got {model_type!r}. Give a published folder, or the "
            "activation of a stock one."
        )
    arch = load_arch(row.base if row else model_type)
    field = arch.ffn.activation.config
    computed = activation or (row.activation(raw) if row else "")
    split_activation(computed)
    arch.check_activation(computed)
    stock = next((name for name, ours in ACTIVATIONS.items() if ours == computed), None)
    base_activation = stock or (row.base_activation if row else _stock_activation(raw, arch))
    base = _carried(raw, arch) | {
        "model_type": arch.model_type,
        "architectures": [_class_name(arch)],
        field: base_activation,
    }
    config = make_config(base)
    if stock:
        return base
    key, _ = encode(
        {site: SitePlan((Swap(computed),), Exact()) for site in arch.sites(config)}, computed, base_activation
    )
    swapped = {
        "model_type": PREFIX + arch.model_type,
        "architectures": [f"Sparsegate{_class_name(arch)}"],
        field: SWAPPED,
    }
    return base | swapped | {KEY: key}


def normalise(folder: str | Path, out: str | Path, activation: str | None = None) -> Path:
    """Write `folder`, a published model, as `out` in the form that `open_source` reads; returns `out`. Weights are hard
    links, or else symlinks.

    `activation` None is the published type's own. Another one may be given for a folder of a stock type whose
    config.json does not say what the weights were trained with, as "drelu" for SparseQwen2. Where stock transformers
    computes the same, `out` is a stock folder. Raises InputError for types that are unknown or refused, for
    configurations and weights that do not belong together, and for pickles.
    """
    folder, out = Path(folder), Path(out)
    config = normal_config(read_json(folder / "config.json", "config.json"), activation)
    header = Header(format="normal", parents={"config": hash_json(config)})
    if (
        out.is_dir()
        and not (out / HEADER).exists()
        and (out / "config.json").is_file()
        and read_json(out / "config.json", "config.json") == config
    ):
        mark(out, header)  # by a version that left no header
    with atomic_folder(out) as partial:
        mark(partial, header)
        _link_files(folder, partial)
        write_json(partial / "config.json", config)
        open_source(partial)
    return out


def _stock_activation(raw: dict[str, Any], arch: Arch) -> str:
    name = raw.get(arch.ffn.activation.config)
    if name not in ACTIVATIONS:
        raise InputError(
            f"{arch.ffn.activation.config} must be one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}. Mend "
            "config.json."
        )
    return str(name)


def _class_name(arch: Arch) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch.model_type])


def _carried(raw: dict[str, Any], arch: Arch) -> dict[str, Any]:
    """What of the published configuration the base's class knows; code, paths and keys of other classes are left
    behind.
    """
    from transformers import AutoConfig

    known = set(AutoConfig.for_model(arch.model_type).to_dict()) | {"torch_dtype", "rope_theta", "rope_scaling"}
    left = {
        "_name_or_path",
        "transformers_version",
        "auto_map",
        "model_type",
        "architectures",
        arch.ffn.activation.config,
    }
    return {key: value for key, value in raw.items() if key in known - left}


def _link_files(folder: Path, partial: Path) -> None:
    """Link weights, tokenizer and generation settings into `partial`. Raises InputError for a folder without
    safetensors.
    """
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE not in weights and not (folder / INDEX).is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"Weights must be safetensors, got {pickles[0]}, a pickle file that can run code when read. "
                "Load it with transformers on a machine you trust and save it with model.save_pretrained(DIR)."
            )
        raise InputError(
            f"Weights must be {SINGLE} or shards with {INDEX}, got neither in {folder}. Fetch the weights."
        )
    for name in [*weights, INDEX, "generation_config.json", *TOKENIZER_FILES]:
        if (folder / name).is_file():
            weight = name in weights
            _link((folder / name if weight else regular(folder / name)).resolve(), partial / name, weight)
    drop_code(partial)


def _link(target: Path, link: Path, large: bool) -> None:
    try:
        os.link(target, link)
    except OSError:  # another file system, or one without hard links
        link.symlink_to(target) if large else shutil.copyfile(target, link)

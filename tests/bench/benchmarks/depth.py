"""How the stages of a conversion grow with the depth of the model: the sizes of a real one, random weights, several
numbers of layers.

python tests/bench/benchmarks/depth.py [--shape smollm2-135m] [--layers 4,8,16,30] [--windows 32] [--steps 8]
[-o RESULT.json]

One conversion for each depth has everything that looks at all layers: an allocation from sensitivities, gate thresholds
and weights trained under them with residual heads in closed form, quality, export, agreement. Writes
RESULT.json and prints its table. A stage whose seconds grow as the depth does has a growth of 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.provenance import provenance
from records.depth_results import PLACE, Depths
from sparsegate.converter.evaluation.speed.random_model import make_checkpoint
from sparsegate.converter.evaluation.speed.shapes import Shape, find_shape
from sparsegate.converter.pipeline.convert import convert

LAYERS = (4, 8, 16, 30)


def stage_seconds(shape: Shape, layers: int, windows: int, steps: int, folder: Path) -> dict[str, float]:
    """Seconds of every stage of one conversion."""
    tune = {"steps": steps, "data": 4 * steps, "windows": 2}
    config = {"sparsity": 0.3, "allocation": "greedy", "residual": "trained", "tune": tune}
    recipe = {
        "version": 1,
        "model": str(make_checkpoint(shape, folder / f"model-{layers}", layers)),
        "calibration": {"windows": windows, "length": 256},
        "stages": [{"method": "trained_gate", "config": config}],
    }
    path = folder / f"{layers}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = convert(recipe=str(path), output=folder / f"out-{layers}")
    assert result.report is not None
    return {stage.name: stage.seconds for stage in result.report.stages}


def growth(depths: Sequence[int], seconds: Sequence[float]) -> float:
    """The power of the depth that seconds grow with, between the two deepest models; NaN where nothing was taken."""
    if min(seconds[-2:]) <= 0:
        return math.nan
    return math.log(seconds[-1] / seconds[-2]) / math.log(depths[-1] / depths[-2])


def table(found: Depths) -> str:
    """Markdown: a stage a row, a depth a column."""
    depths = [int(layers) for layers in found.seconds]
    names = [name for name in next(iter(found.seconds.values()))]
    lines = ["| stage | " + " | ".join(f"{layers} layers" for layers in depths) + " | growth |"]
    lines.append("|---|" + "---:|" * (len(depths) + 1))
    for name in names:
        row = [found.seconds[str(layers)].get(name, 0.0) for layers in depths]
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f} s" for value in row) + f" | {growth(depths, row):.2f} |")
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> Depths:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="smollm2-135m", help="sizes, by their name in converter/evaluation/speed")
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)), help="rising, separated by commas")
    parser.add_argument("--windows", type=int, default=32, help="that are calibrated on")
    parser.add_argument("--steps", type=int, default=8, help="of the training")
    parser.add_argument("-o", "--output", type=Path, default=PLACE, help="the JSON to write")
    arguments = parser.parse_args(given)
    shape, depths = find_shape(arguments.shape), [int(layers) for layers in arguments.layers.split(",")]
    seconds = {}
    for layers in depths:
        with TemporaryDirectory() as folder:
            seconds[str(layers)] = stage_seconds(shape, layers, arguments.windows, arguments.steps, Path(folder))
    found = Depths(
        shape=shape.name,
        windows=arguments.windows,
        steps=arguments.steps,
        seconds=seconds,
        **provenance(),
    )
    found.save(arguments.output)
    print(table(found))
    return found


if __name__ == "__main__":
    main()

"""What `auto` makes, one after the other: candidates without training; of the best one, where it skips input channels,
the same on the rotated model; the trained form of the best of all, in the time that is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..checkpoint.stage import CheckError
from ..methods import TRAINED_FORMS, trained_form
from ..progress import stage
from .candidates import Candidate, best_first, measure, rank
from .configs import ON_ROTATED, Configs, made_later
from .conversion import Conversion, Made
from .recipe import Recipe
from .rotate import ROTATED, rotated
from .schedule import make, met
from .statistics import FOLDER, Statistics

log = logging.getLogger("sparsegate")
Sparsities = dict[str, float | None]


@dataclass(frozen=True)
class Tried:
    """What was made and measured, and the trained form of the best candidate, made or left out (None: it has none)."""

    candidates: list[Candidate]
    form: str | None = None


@dataclass(frozen=True)
class _Place:
    """A model that plans are made for, and its statistics. The plans' names end with `suffix`."""

    planning: Conversion
    statistics: Statistics
    suffix: str = ""


class Rounds:
    """The rounds of `auto` for a conversion. Plans are made for the budget in `recipe`, which is what a precision
    leaves of the conversion's own; `configs` and `sparsities` are those of all methods that may be made.
    """

    def __init__(self, conversion: Conversion, recipe: Recipe, configs: Configs, sparsities: Sparsities) -> None:
        self.conversion, self.configs, self.sparsities = conversion, configs, sparsities
        self.later = made_later(conversion.recipe, configs, conversion.source.arch)
        planning = replace(conversion, recipe=recipe)
        self.place = _Place(planning, Statistics(planning))
        self.candidates: list[Candidate] = []

    def run(self, expect: Callable[[str], None]) -> Tried:
        """All rounds. `expect` is told the best candidate of the first one.

        Raises InputError when no method without training can meet the budget.
        """
        first = {name: parts for name, parts in self.configs.items() if name not in TRAINED_FORMS}
        forms = {name: parts for name, parts in self.configs.items() if name in TRAINED_FORMS}
        made = met(make(self.place.planning, first, self.place.statistics, forms), first)
        self._measure("quality", made)
        method = self.best.method
        expect(method)
        places = [self.place]
        if f"{method}{ON_ROTATED}" in self.later[method]:
            places += self._rotated(method)
        form = trained_form(method)
        if form is not None and form in self.configs:
            on = next(place for place in reversed(places) if self.best.method == f"{method}{place.suffix}")
            self._train(form, on)
        for place in places:
            place.statistics.drop_samples()
        return Tried(self.candidates, form)

    @property
    def best(self) -> Candidate:
        """The best candidate so far: of those that hold the budget, where any does."""
        order = best_first(self.candidates, self.conversion.recipe.searches)
        return next((candidate for candidate in order if candidate.passed), order[0])

    def _measure(self, label: str, made: dict[str, Made]) -> None:
        """Add candidates, on the windows of those that are there."""
        windows = self.candidates[0].quality.windows if self.candidates else None
        with stage(label):
            self.candidates += measure(self.conversion, made, self.sparsities, windows)

    def _rotated(self, method: str) -> list[_Place]:
        """Try a method on the rotated model; that place, none where the rotation is not exact enough."""
        conversion, name = self.conversion, f"{method}{ON_ROTATED}"
        folder = conversion.work / ROTATED
        try:
            source = rotated(conversion.source, conversion.texts.calibration, folder, conversion.device)
        except CheckError as error:
            log.warning("%s is not tried: %s", name, error)
            return []
        planning = self.place.planning.with_source(source)
        place = _Place(planning, Statistics(planning, f"{FOLDER}_{ROTATED}", f"calibrate {ROTATED}"), ON_ROTATED)
        forms = {form: self.configs[form] for form in self.later[method] if form in TRAINED_FORMS}
        made = make(planning, {name: self.configs[method]}, place.statistics, forms)
        if not made:
            log.warning("%s keeps the budget at no density.", name)
            return []
        self._measure("quality rotated", {name: made[name]._replace(rotated=True)})
        return [place]

    def _train(self, form: str, place: _Place) -> None:
        """Add the trained form of the best candidate, on the same model."""
        before, name, searches = self.best, f"{form}{place.suffix}", self.conversion.recipe.searches
        made = make(place.planning, {name: self.configs[form]}, place.statistics)
        if not made:
            log.warning("%s is the best: %s, its trained form, keeps the budget at no density.", before.method, name)
            return
        self._measure("quality trained", {name: made[name]._replace(rotated=bool(place.suffix))})
        trained = self.candidates[-1]
        if self.best is not before or not trained.passed:
            return
        what, unit = ("reads", "of the blocks' bytes") if searches else ("has a KL of", "nats")
        log.warning(
            "%s is the best, without training: it %s %.4f %s, its trained form %s %.4f.",
            before.method,
            what,
            rank(before, searches),
            unit,
            name,
            rank(trained, searches),
        )

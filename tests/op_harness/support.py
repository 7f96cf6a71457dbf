"""Mode support: what the installed library says it runs, over every variant of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from sparsegate.runtime_onnx import library

from . import cases_of


def table(stem: str, provider: str) -> dict[str, dict[str, bool]]:
    """Weights and dtypes -> activation and score (or what else the op has) -> whether the library supports the variant
    on the provider.
    """
    rows: dict[str, dict[str, bool]] = {}
    for row, column, variant in cases_of(stem).grid():
        rows.setdefault(row, {})[column] = library.supports(variant.name, provider)
    return rows


def unsupported(stem: str, provider: str) -> list[str]:
    """Names of the op's variants, the whole vocabulary, that the library does not run on the provider."""
    return [variant.name for variant in cases_of(stem).names() if not library.supports(variant.name, provider)]


def main(ops: Sequence[str], isas: Sequence[str], full: bool) -> int:
    """Prints a table per op and provider: columns that are alike share a line; always 0."""
    print(f"sparsegate {library.version()}, CPU kernels {library.isa()} of this machine")
    for stem in ops:
        every = sum(1 for _ in cases_of(stem).names())
        for provider in library.PROVIDERS:
            missing = len(unsupported(stem, provider))
            print(f"\n{stem} on {provider}: {every - missing} of {every} variants")
            for row, columns in table(stem, provider).items():
                yes = [name for name, supported in columns.items() if supported]
                said = "all" if len(yes) == len(columns) else ", ".join(yes) or "none"
                print(f"  {row:44} {said}")
    return 0

"""Opens an ONNX folder in onnxruntime: registers the native library where it can run the model, or says why the
standard ops run.

`session` gives the plain InferenceSession; `Decoder` is the KV-cache loop of a decoder that onnxruntime-genai's model
builder wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from .errors import InputError, explained
from .genai_config import read_config
from .library import DENSE, PROVIDERS, Executor, executor, library_path, model_file

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from numpy.typing import ArrayLike, NDArray

_PAST, _PRESENT = "past_key_values.", "present."
Providers = Sequence[str | tuple[str, dict[str, Any]]]

_REMEDIES = {
    False: "Fetch or convert the folder again.",
    True: "It must be a real file beside its data: download with snapshot_download(repo, local_dir=...).",
}
_registered: WeakSet[Any] = (
    WeakSet()
)  # SessionOptions that hold the library: a second registration of a domain is an error in onnxruntime


def session(
    path: str | Path,
    providers: Providers | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
    library: bool | None = None,
) -> onnxruntime.InferenceSession:
    """An InferenceSession for a model, with one log line that says what runs its ai.sparsegate ops.

    Args:
        path: ONNX folder, sparse checkpoint (with onnx/ inside) or .onnx file.
        providers: As in InferenceSession; the CPU by default.
        session_options: Options to use; the library is registered with this object, which stays so.
        library: None uses the native library where it supports the model, False never, True raises InputError where it
        cannot.

    Raises:
        InputError: There is no model, onnxruntime refuses it (its text is in the error), the library was
        demanded and cannot run it, or onnxruntime
            is not installed.
    """
    ort = _onnxruntime()
    file = model_file(path)
    providers = list(providers or PROVIDERS[:1])
    options = session_options or ort.SessionOptions()
    chosen = choose(file, [entry if isinstance(entry, str) else entry[0] for entry in providers], library)
    if chosen.kernel and options not in _registered:
        options.register_custom_ops_library(str(library_path()))
        _registered.add(options)
    elif not chosen.kernel and options in _registered:
        raise InputError(
            f"session_options must be fresh for a model that runs without the library ({chosen.reason}), got options "
            "that hold it. Make new SessionOptions."
        )
    with explained(f"{file}, a link into a cache," if file.is_symlink() else str(file), _REMEDIES[file.is_symlink()]):
        opened = ort.InferenceSession(str(file), options, providers=providers)
    report(file, chosen, library)
    return opened


def choose(path: str | Path, providers: Sequence[str] = PROVIDERS[:1], library: bool | None = None) -> Executor:
    """The executor for a model under the caller's wish (`library` as in `session`); the library must support every
    provider that has kernels.

    Raises InputError when the library is demanded and cannot run the model.
    """
    supported = [name for name in providers if name in PROVIDERS] or list(PROVIDERS[:1])
    results = [executor(path, name) for name in supported]
    chosen = next((result for result in results if not result.kernel), results[0])
    if library is False:
        return Executor(False, DENSE if chosen.reason == DENSE else "asked for without the library")
    if library and not chosen.kernel:
        raise InputError(
            f"The native library must support the model at {path}, got: {chosen.reason}. Pass library=None to run "
            "standard ONNX ops instead."
        )
    return chosen


def report(path: Path, chosen: Executor, library: bool | None) -> None:
    """One log line on the executor; a warning where the library was wanted and could not be used."""
    expected = chosen.kernel or library is False or chosen.reason == DENSE
    logging.getLogger("sparsegate").log(logging.INFO if expected else logging.WARNING, "%s runs with %s", path, chosen)


class Decoder:
    """A causal language model with its KV cache, one sequence at a time, over plain onnxruntime.

    Attributes:
        session: The InferenceSession.
        length: Tokens in the cache.
    """

    def __init__(
        self,
        path: str | Path,
        providers: Providers | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        library: bool | None = None,
    ) -> None:
        """Opens the ONNX folder at `path`, which needs its genai_config.json; arguments and errors as in `session`."""
        self._head_size = read_config(path)["model"]["decoder"]["head_size"]
        self.session = session(path, providers, session_options, library)
        self._ort = _onnxruntime()
        self._device = "cuda" if self.session.get_providers()[0] == PROVIDERS[1] else "cpu"
        self._inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self._outputs = [entry.name for entry in self.session.get_outputs()]
        self._file = model_file(path)
        caches = [name for name in self._inputs if name.startswith(_PAST)]
        missing = [
            name
            for name in ("logits", *(name.replace(_PAST, _PRESENT) for name in caches))
            if name not in self._outputs
        ]
        if (
            missing
            or "input_ids" not in self._inputs
            or not all(_is_cache(self._inputs[name].shape) for name in caches)
        ):
            actual = f"no output {missing[0]}" if missing else f"inputs {', '.join(self._inputs)}"
            raise InputError(
                f"{self._file} must be a decoder with input_ids, logits and a cache of keys and values, got "
                f"{actual:.200}. Convert the model again."
            )
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        import numpy as np

        self.length = 0
        self._cache = {}
        for name, entry in self._inputs.items():
            if name.startswith(_PAST):
                shape = [1, entry.shape[1], 0, self._head_size]
                dtype = np.float16 if entry.type == "tensor(float16)" else np.float32
                with explained(str(self._file)):
                    self._cache[name] = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self._device, 0)

    def __call__(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Appends token ids [T] and returns their logits [T, vocabulary]. Raises InputError with onnxruntime's text
        where the graph does not run.
        """
        import numpy as np

        tokens = np.asarray(ids, np.int64).reshape(1, -1)
        before, self.length = self.length, self.length + tokens.shape[1]
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(before, self.length)[None],
        }
        with explained(str(self._file)):
            binding = self.session.io_binding()
            for name, value in feeds.items():
                if name in self._inputs:
                    binding.bind_cpu_input(name, value)
            for name, value in self._cache.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, self._device if name.startswith(_PRESENT) else "cpu")
            self.session.run_with_iobinding(binding)
            results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
            self._cache = {name: results[name.replace(_PAST, _PRESENT)] for name in self._cache}
            return results["logits"].numpy()[0].astype(np.float32, copy=False)


def _is_cache(shape: Sequence[Any]) -> bool:
    """Whether an input's shape is [1, heads, length, head size] with a number of heads."""
    return len(shape) == 4 and isinstance(shape[1], int)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f'onnxruntime must be installed to run a model, got: {error}. Do: pip install "sparsegate[cpu]" (with a '
            'CUDA GPU: "sparsegate[gpu]")'
        ) from None
    return onnxruntime

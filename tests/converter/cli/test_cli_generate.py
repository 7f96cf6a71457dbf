"""`sparsegate generate`: what it prints, raw and in a chat, and on a terminal with other letters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from models import make_model
from small_recipe import Done, call_cli

import sparsegate.runtime_onnx as runtime
from sparsegate.converter.onnx_export.base_graph import build_base


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command line in this process."""
    return partial(call_cli, capsys)


def one_line(done: Done) -> str:
    """The single line on stderr of a user's mistake; nothing stands on stdout."""
    assert done.status == 2 and done.out == "" and done.err.startswith("sparsegate: ") and done.err.count("\n") == 1, (
        done
    )
    return done.err


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its dense graph in onnx/; copy it before changing anything in it."""
    folder = make_model("llama", tmp_path_factory.mktemp("generate") / "out")
    build_base(folder, folder / "onnx")
    return folder


def test_generate_prints_prompt_and_continuation(converted: Path, call: Callable[..., Done]) -> None:
    done = call("generate", converted, "import os", "--raw", "--max-new-tokens", "8")
    assert done.status == 0
    text = "".join(runtime.generate(converted, "import os", 8, chat=False))
    assert done.out == "import os" + text + "\n" and text
    assert call("generate", converted / "onnx", "import os", "--raw", "--max-new-tokens", "8", "--body").out == done.out
    first, again, other = (
        call("generate", converted, "import os", "--temperature", "2", "--top-k", "0", "--seed", str(seed)).out
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert "top_p must be in (0, 1], got 2.0" in one_line(call("generate", converted, "x", "--top-p", "2"))
    assert "The prompt must hold text" in one_line(call("generate", converted, ""))


def test_generate_chats_with_a_model_that_has_a_template(
    converted: Path, call: Callable[..., Done], tmp_path: Path
) -> None:
    """The answer alone is printed; where there is no template the prompt is continued, and --chat is refused."""
    done = call("generate", converted, "import os", "--max-new-tokens", "8")
    rendered = runtime.Tokenizer(converted).chat([{"role": "user", "content": "import os"}])
    assert rendered != "import os" and done.status == 0
    assert (
        done.out
        == "".join(runtime.generate(converted, rendered, 8, chat=False)) + "\n"
        == call("generate", converted, "import os", "--chat", "--max-new-tokens", "8").out
    )
    folder = shutil.copytree(converted / "onnx", tmp_path / "onnx")
    (folder / "chat_template.jinja").unlink()
    plain = call("generate", folder, "import os", "--max-new-tokens", "8")
    assert plain.out == call("generate", converted, "import os", "--raw", "--max-new-tokens", "8").out
    assert "must have a chat template to be chatted with" in one_line(call("generate", folder, "x", "--chat"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles\nmust alternate') }}")
    assert "got: roles must alternate" in one_line(call("generate", folder, "x"))


def test_generate_on_a_terminal_with_other_letters(converted: Path) -> None:
    """Latin 1 out and a byte in the prompt that is no text: replaced characters, one line."""
    command = [
        sys.executable,
        "-c",
        "from sparsegate.converter.cli import main; main()",
        "generate",
        str(converted),
        b"caf\xff \xe2\x82\xac",
        "--raw",
        "--max-new-tokens",
        "4",
    ]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "1"}, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith(b"caf? ?")
    lines = done.stderr.decode().splitlines()
    assert (
        sum("They are read as question marks" in line for line in lines) == 1
        and "Traceback" not in done.stderr.decode()
    )

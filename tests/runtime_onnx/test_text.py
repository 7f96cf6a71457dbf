"""Text to ids and back as in transformers, streams that break no character, and chat templates that cannot do harm."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from odd_tokenizers import TOKENIZERS, byte_level
from transformers import AutoTokenizer

from sparsegate.converter.onnx_export.tokenizer_check import TEXTS
from sparsegate.runtime_onnx import chat_template
from sparsegate.runtime_onnx.text import Tokenizer

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "1 < 2 & caf\u00e9?"},
    {"role": "assistant", "content": "Yes.\n"},
]
ASK = [*MESSAGES, {"role": "user", "content": "Why?"}]
TEMPLATES = {
    "turns": "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m.content | trim + eos_token + '\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "blocks": "{%- for message in messages %}\n    {%- if loop.first %}\n{{ bos_token }}\n    {% endif %}\n  {% if "
    "message.role == 'user' %}\n"
    "Q: {{ message.content }}\n  {% elif loop.last %}end{% else %}\nA: {{ message.content }}\n  {% endif %}\n{% endfor "
    "%}\n",
    "loops": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}{{ m.content "
    "}}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(count=0, system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set "
    "ns.system = m.content %}"
    "{% else %}{% set ns.count = ns.count + 1 %}{% endif %}{% endfor %}{{ ns.system }}{{ ns.count }}{{ messages[1:] | "
    "length }}",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ dict(a=1, b='<\u00e9>') | tojson }}",
    "date": "{{ strftime_now('%Y') }}{% if date_string is not defined %}{% set date_string = strftime_now('%B %Y') "
    "%}{% endif %}{{ date_string }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "macros": "{% macro turn(m, mark='#') %}{{ mark }} {{ m['content'].strip().split(' ')[0] | upper }}\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "names": "{% if tools is not none %}tools{% endif %}{% if documents %}docs{% endif %}"
    "{{ unk_token }}{{ pad_token is defined }}{{ add_generation_prompt }}{{ x }}",
    "methods": "{{ messages[0].keys() | list }}{{ 'abc'.startswith('a') }}"
    "{{ messages[1].get('name', 'nobody') }}{{ '%s-%d' % ('a', 3) }}{{ messages | map(attribute='role') | join(',') }}",
}


def save(name: str, folder: Path, template: str | None = None) -> Path:
    """A folder that a model's tokenizer lies in."""
    tokenizer = TOKENIZERS[name]()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "model.onnx").write_bytes(b"")
    return folder


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param))


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "something thing more  things <tool>x<|user|>  y <mask> z</s>", "the\nthe  thing", ""]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"], text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.special_tokens == theirs.special_tokens_map and ours.template is None


def is_stable(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether no token changes what stood before it, as a byte that breaks a row of byte tokens does: nobody could
    stream that.
    """
    whole = tokenizer.decode(ids)
    return all(whole.startswith(tokenizer.decode(ids[:k]).rstrip("\ufffd")) for k in range(len(ids)))


def test_streams_are_the_whole_texts(folder: Path) -> None:
    """Encoded texts and random tokens, from every start: what the pieces add up to is what the tokens add to the text
    before them.
    """
    tokenizer, chance = Tokenizer(folder), random.Random(0)
    size = tokenizer._tokenizer.get_vocab_size()
    rows = [tokenizer.encode(text) for text in TEXTS] + [[chance.randrange(size) for _ in range(24)] for _ in range(20)]
    rows = [ids for ids in rows if is_stable(tokenizer, ids)]
    compared = 0
    for ids in rows:
        for start in range(0, len(ids), 5):
            for skip in (True, False):
                before, whole = tokenizer.decode(ids[:start], skip), tokenizer.decode(ids, skip)
                if before.endswith("\ufffd") or not whole.startswith(before):
                    continue  # the context is a broken character, which the next tokens may complete
                stream = tokenizer.stream(ids[:start], skip_special_tokens=skip)
                pieces = [stream.put(token) for token in ids[start:]]
                assert not any(piece.endswith("\ufffd") for piece in pieces)
                assert before + "".join(pieces) + stream.end() == whole, (ids, start, skip)
                compared += 1
    assert len(rows) > 25 and compared > 200


def test_a_stream_shows_a_character_when_it_is_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save("byte_level", tmp_path / "t"))
    ids = tokenizer.encode("a\U0001f600b")
    stream = tokenizer.stream()
    assert [stream.put(token) for token in ids] == ["a", "", "", "", "\U0001f600", "b"]
    stream = tokenizer.stream()
    assert [stream.put(token) for token in ids[:3]] == ["a", "", ""] and stream.end() == "\ufffd" and stream.end() == ""


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_the_text_of_transformers(name: str, tmp_path: Path) -> None:
    folder = save("begin_of_text", tmp_path / "t", TEMPLATES[name])
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.template == theirs.chat_template
    text = theirs.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert ours.chat(ASK) == text and text
    assert ours.encode_chat(ASK) == theirs.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"], (
        "no second begin-of-text token"
    )


def test_where_a_template_stands(tmp_path: Path) -> None:
    """In its own file, in the settings, under a name; the older special tokens' file counts too."""
    folder = save("byte_level", tmp_path / "t", "own file {{ bos_token }}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert Tokenizer(folder).chat(ASK) == "own file <s>"
    (folder / "chat_template.jinja").unlink()
    for template, expected in (
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template(ASK, tokenize=False)
        assert Tokenizer(folder).chat(ASK) == expected == text
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "bos_token": {"content": "<x>"}, "chat_template": "{{ bos_token }}{{ sep_token }}"})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"sep_token": {"content": "<sep>"}}))
    assert Tokenizer(folder).chat(ASK) == "<x><sep>"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": [{"name": "rag", "template": "r"}]})
    )
    with pytest.raises(ValueError, match=r"must have a chat template to be chatted with.*\(--raw\)"):
        Tokenizer(folder).chat(ASK)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.os }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ namespace(_x=1) }}", "underscore"),
        ("{%- macro f(n) -%}{{ f(n + 1) }}{%- endmacro -%}{{ f(0) }}", "recursion"),
        ("{{ 'a' * 10 ** 10 }}", "MiB"),
        ("{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "MiB"),
        ("{{ 'a' * 20000000 }}", "20000000 characters"),
        ("{% include 'x' %}", "no loader|include"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){reason}") as caught:
        chat_template.render(template, {"messages": ASK})
    assert str(caught.value).startswith("The chat template must render the conversation, got:") and "\n" not in str(
        caught.value
    )


def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)  # a few seconds by the clock, which is what a test can wait for
    with pytest.raises(ValueError, match="did not end"):
        chat_template.render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})


def test_a_template_sees_no_environment_and_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the sandbox open, its process still has no secrets and cannot write."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = tmp_path / "probe.py"
    source = Path(chat_template.__file__).read_text(encoding="utf-8")
    probe = f"texts = [str([__import__('os').environ.get('HF_TOKEN'), _try({str(tmp_path / 'out')!r})])]"
    helper = (
        "def _try(path):\n    try:\n        open(path, 'wb', 0).write(b'x')\n        return 'written'\n    "
        "except "
        "OSError:\n        return 'refused'\n\n\n"
    )
    rendered = (
        'texts = [\n            compiled.render(**{**request["variables"], "messages": messages}) for messages in '
        'request["conversations"]\n        ]'
    )
    assert rendered in source
    program.write_text(
        source.replace(rendered, f"{probe}").replace("def _answer(", helper + "def _answer("), encoding="utf-8"
    )
    monkeypatch.setattr(chat_template, "__file__", str(program))
    assert chat_template.render("", {}) == "[None, 'refused']"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    folder = save("byte_level", tmp_path / "t", "x")
    (folder / name).write_bytes(b'{"version": \xff')
    with pytest.raises(ValueError, match=name) as caught:
        Tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_absent_and_strange_files(tmp_path: Path) -> None:
    folder = save("byte_level", tmp_path / "t")
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        Tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder).encode("the") == byte_level()("the")["input_ids"]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="must have a tokenizer.json beside it"):
        Tokenizer(folder)


def test_half_a_character_in_a_prompt(tmp_path: Path) -> None:
    """What a terminal makes of bytes that are no text."""
    tokenizer = Tokenizer(save("byte_level", tmp_path / "t"))
    assert tokenizer.encode("a\udcff b") == tokenizer.encode("a? b")

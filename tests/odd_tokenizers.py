"""Small tokenizers of many kinds, as transformers saves them: those of common model families, and those that
onnxruntime-genai reads otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

WORDS = [
    "def add(first, second):\n    return first + second\n",
    "the other thing is there, when the weather is 1234 5678 degrees",
    "some thing else the more",
] * 8
SPECIAL = ["<unk>", "<s>", "</s>"]
_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def _fast(tokenizer: Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | settings
    )


def _byte_level(
    prefix: bool = False, split: pre_tokenizers.PreTokenizer | None = None, ignore_merges: bool = False
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=_LETTERS, show_progress=False),
    )
    return tokenizer


def byte_level() -> PreTrainedTokenizerBase:
    return _fast(_byte_level())


def prefix_space() -> PreTrainedTokenizerBase:
    return _fast(_byte_level(prefix=True), add_prefix_space=True)


def own_split() -> PreTrainedTokenizerBase:
    """Digits one by one, letters with the mark before them, spaces alone."""
    split = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{L}\p{N}]?\p{L}+|\s|[^\s\p{L}\p{N}]+"), "isolated")
    return _fast(
        _byte_level(
            split=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        )
    )


def begin_of_text() -> PreTrainedTokenizerBase:
    """As Llama 3: whole words before merges, and a token that the post-processor puts before a text."""
    tokenizer = _byte_level(ignore_merges=True)
    begin = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return _fast(tokenizer)


def both_ends() -> PreTrainedTokenizerBase:
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12, pad_id=2, pad_token="</s>")
    return _fast(tokenizer)


def added_tokens() -> PreTrainedTokenizerBase:
    """Special and plain added tokens that stand alone, or take the space beside them."""
    tokenizer = _byte_level()
    tokenizer.add_special_tokens(
        [AddedToken("<|user|>", special=True, rstrip=True), AddedToken("<mask>", special=True, lstrip=True)]
    )
    tokenizer.add_tokens(
        [
            AddedToken("thing", single_word=True),
            AddedToken("<tool>", normalized=False),
            AddedToken("more", single_word=True, rstrip=True),
        ]
    )
    return _fast(tokenizer)


def normalised() -> PreTrainedTokenizerBase:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("``", '"')])
    return _fast(tokenizer)


def lowercase() -> PreTrainedTokenizerBase:
    tokenizer = _byte_level()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    return _fast(tokenizer)


def _pieces(byte_fallback: bool) -> Tokenizer:
    letters = [
        "\u2581",
        *sorted(set("".join(WORDS)) - {" "}),
        "\u2581the",
        "\u2581th",
        "ing",
        "er",
        "\u2581some",
        "\u2581return",
        "\u2581second",
    ]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    vocabulary = [(piece, -float(rank) / 8) for rank, piece in enumerate([*SPECIAL, *fallback, *letters])]
    return Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback))


def unigram() -> PreTrainedTokenizerBase:
    """Without the fields that sentencepiece's converter writes."""
    tokenizer = _pieces(byte_fallback=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _fast(tokenizer)


def unigram_bytes() -> PreTrainedTokenizerBase:
    tokenizer = _pieces(byte_fallback=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _fast(tokenizer)


def _merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-fallback BPE as of Llama 2."""
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("i", "n"), ("in", "g"), ("\u2581", "s"), ("e", "r")]
    letters = ["\u2581", *sorted(set("".join(WORDS)) - {" ", "\n"}), *(a + b for a, b in merges)]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    return {token: number for number, token in enumerate(tokens)}, merges


def llama_2_file() -> PreTrainedTokenizerBase:
    vocabulary, merges = _merges()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    return _fast(tokenizer)


def llama_class() -> PreTrainedTokenizerBase:
    vocabulary, merges = _merges()
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def qwen_class() -> PreTrainedTokenizerBase:
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *_LETTERS, "th", "the", "\u0120the"])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[("t", "h"), ("th", "e"), ("\u0120", "the")])


def words() -> PreTrainedTokenizerBase:
    """Whole words without a decoder: they are joined by spaces."""
    names = [*SPECIAL, "the", "thing", "is", "there", ",", ".", "some", "def"]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(tokenizer)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    function.__name__: function
    for function in (
        byte_level,
        prefix_space,
        own_split,
        begin_of_text,
        both_ends,
        added_tokens,
        normalised,
        lowercase,
        unigram,
        unigram_bytes,
        llama_2_file,
        llama_class,
        qwen_class,
        words,
    )
}

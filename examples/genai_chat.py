"""A chat in the terminal over onnxruntime-genai: chat template, sampling, answers streamed word by word.

    python examples/genai_chat.py OUT                                  # talk; an empty line or Ctrl-D ends it
    python examples/genai_chat.py OUT --prompt "What is a list?"       # one turn and out
    python examples/genai_chat.py OUT --temperature 0                  # greedy

OUT is a folder that `sparsegate convert` wrote. The native kernels run where they can; `sparsegate.runtime_onnx.load`
says which way it goes.
"""

from __future__ import annotations

import argparse
import logging

import onnxruntime_genai as og

from sparsegate.runtime_onnx.generate import end_tokens, load
from sparsegate.runtime_onnx.text import Tokenizer


def encode(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the conversation in the model's own chat template, or as plain text for a base model
    that has none.
    """
    if tokenizer.template is None:
        return tokenizer.encode("\n".join(message["content"] for message in messages))
    return tokenizer.encode_chat(messages)


def answer(model: og.Model, tokenizer: Tokenizer, messages: list[dict[str, str]], arguments: argparse.Namespace) -> str:
    """Print the model's answer as it comes and return it."""
    ids = encode(tokenizer, messages)
    parameters = og.GeneratorParams(model)
    length = min(len(ids) + arguments.tokens, int(parameters.get_search_options()["max_length"]))
    if len(ids) >= length:
        raise SystemExit(f"The conversation must be shorter than {length} tokens, got {len(ids)}. Start a new one.")
    sampling = {
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "random_seed": arguments.seed,
    }
    parameters.set_search_options(
        max_length=length, do_sample=arguments.temperature > 0, **(sampling if arguments.temperature else {})
    )
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    stream, pieces, ends = tokenizer.stream(skip_special_tokens=True), [], end_tokens(arguments.model)
    while not generator.is_done():
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        if token not in ends:
            pieces.append(stream.put(token))
            print(pieces[-1], end="", flush=True)
    pieces.append(stream.end())
    print(pieces[-1])
    return "".join(pieces)


def main() -> None:
    """Parse the command line, then answer one prompt or talk until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder")
    parser.add_argument("--prompt", help="one turn, not interactive")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = load(arguments.model)
    tokenizer, messages = Tokenizer(arguments.model), []
    for text in [arguments.prompt] if arguments.prompt else iter(lambda: input("> ").strip(), ""):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, arguments)})


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        print()

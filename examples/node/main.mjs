// Greedy decoding of a sparse checkpoint in JavaScript.
//
//     npm install                                    # onnxruntime-node, tokenizers and jinja, once
//     node main.mjs OUT/onnx "What is a list?" 32    # ONNX folder, what to say, how many tokens to generate (default 16): an answer in the chat template
//     node main.mjs OUT/onnx "def f(x):" 32 --raw    # the text goes on as it is, the default for a model without a template
//
// onnxruntime-node has no way to register a custom-op library, so every GatedMLP runs as its function body in standard ONNX ops: right, but not faster
// than the dense model.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";

const words = process.argv.slice(2).filter((word) => word !== "--raw");
const [folder, prompt, count = "16"] = words;
if (!folder || !prompt || !/^\d+$/.test(count) || words.length > 3) {
  console.error('The arguments must be an ONNX folder, a text and a number of tokens. Do: node main.mjs OUT/onnx "What is a list?" 32');
  process.exit(2);
}

const json = (name) => JSON.parse(readFileSync(join(folder, name), "utf8"));
const settings = json("tokenizer_config.json");
const tokenizer = new Tokenizer(json("tokenizer.json"), settings);
const template = join(folder, "chat_template.jinja");
const chat = existsSync(template) && !process.argv.includes("--raw");
let text = prompt;
if (chat) {
  const special = Object.fromEntries(Object.entries(settings).filter(([name, token]) => name.endsWith("_token") && typeof token === "string"));
  const messages = [{ role: "user", content: prompt }];
  text = new Template(readFileSync(template, "utf8")).render({ ...special, messages, add_generation_prompt: true });
}
// A template writes the special tokens itself; before plain text the tokenizer puts its own.
const ids = tokenizer.encode(text, { add_special_tokens: !chat }).ids;

const { model } = JSON.parse(readFileSync(join(folder, "genai_config.json"), "utf8"));
const { num_key_value_heads: heads, head_size: size } = model.decoder;
const ends = [model.eos_token_id].flat();
const session = await ort.InferenceSession.create(join(folder, "model.onnx"));
const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

let cache = {};
for (const name of session.inputNames.filter((name) => name.startsWith("past_key_values."))) {
  cache[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
}

const generated = [];
let step = ids.slice(); // the whole prompt first, then one token at a time
while (generated.length < Number(count) && ids.length < model.context_length) {
  const feeds = { input_ids: int64(step), attention_mask: int64(ids.map(() => 1)), ...cache };
  if (session.inputNames.includes("position_ids")) {
    feeds.position_ids = int64(step.map((_, i) => ids.length - step.length + i));
  }
  const results = await session.run(feeds);
  for (const name of Object.keys(cache)) {
    cache[name] = results[name.replace("past_key_values", "present")];
  }
  const vocabulary = results.logits.dims[2];
  const last = results.logits.data.subarray((step.length - 1) * vocabulary); // [T, vocabulary]: the last row
  const token = last.reduce((best, value, index) => (value > last[best] ? index : best), 0);
  if (ends.includes(token)) break;
  ids.push(token);
  generated.push(token);
  step = [token];
}
console.log(tokenizer.decode(chat ? generated : ids, { skip_special_tokens: true }));

// Greedy decoding of a sparse checkpoint in JavaScript: token ids in, token ids out.
//
//     npm install                                # onnxruntime-node, once
//     node main.mjs OUT/onnx 12,7,99 32          # ONNX folder, prompt as token ids, how many to generate (default 16)
//
// onnxruntime-node has no way to register a custom-op library, so every GatedMLP runs as its function body in standard ONNX ops: right, but not faster
// than the dense model. Token ids come from the tokenizer.json in the folder, e.g. with a tokenizer package from npm.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import ort from "onnxruntime-node";

const [folder, prompt, count = "16"] = process.argv.slice(2);
if (!folder || !/^\d+(,\d+)*$/.test(prompt ?? "")) {
  console.error("The arguments must be an ONNX folder and token ids. Do: node main.mjs OUT/onnx 12,7,99 32");
  process.exit(2);
}

const { model } = JSON.parse(readFileSync(join(folder, "genai_config.json"), "utf8"));
const { num_key_value_heads: heads, head_size: size } = model.decoder;
const ends = [model.eos_token_id].flat();
const session = await ort.InferenceSession.create(join(folder, "model.onnx"));
const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

let cache = {};
for (const name of session.inputNames.filter((name) => name.startsWith("past_key_values."))) {
  cache[name] = new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
}

const ids = prompt.split(",").map(Number);
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
console.log(generated.join(","));

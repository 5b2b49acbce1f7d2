// node ask.mjs BASE_URL < asked.json: {name: [method, arguments]}. What the openai package reads of
// each whole answer, of each piece where the answer can come in pieces, and of the models.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "x", maxRetries: 0 });
const usage = { stream: true, stream_options: { include_usage: true } };
const methods = {
  "chat.completions": (asked) => client.chat.completions.create(asked),
  completions: (asked) => client.completions.create(asked),
  embeddings: (asked) => client.embeddings.create(asked),
};
const say = (name, method, streamed, value) =>
  console.log(JSON.stringify({ name, method, streamed, value }));

for (const [name, [method, asked]] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  say(name, method, false, await methods[method](asked));
  if (method === "embeddings") continue;
  for await (const piece of await methods[method]({ ...asked, ...usage })) say(name, method, true, piece);
}
for await (const model of client.models.list()) say("models", "models", false, model);

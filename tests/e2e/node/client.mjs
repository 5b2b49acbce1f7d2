// node client.mjs BASE_URL MODE: what the openai package makes of the answers, as JSON lines.
import OpenAI, { APIError } from "openai";

const [baseURL, mode] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "x", maxRetries: 0 });
const ask = {
  model: "gpt-4o-mini",
  messages: [{ role: "user", content: [{ type: "text", text: "Name two fruits." }] }],
  max_tokens: 8,
  temperature: 0,
};
const say = (value) => console.log(JSON.stringify(value));

const modes = {
  async whole() {
    say(await client.chat.completions.create(ask));
  },
  async stream() {
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create({ ...ask, ...options })) say(chunk);
  },
  async helper() {
    const runner = client.chat.completions.stream({ ...ask, stop: " " });
    say(await runner.finalChatCompletion());
  },
  async models() {
    for await (const model of client.models.list()) say(model);
  },
  async refused() {
    try {
      await client.chat.completions.create({ ...ask, messages: [] });
    } catch (error) {
      if (!(error instanceof APIError)) throw error;
      say({ status: error.status, type: error.type, param: error.param, message: error.message });
    }
  },
  // Both leave when the first text is there: one through the signal, one by ending its loop.
  async abort() {
    const controller = new AbortController();
    const endless = { ...ask, max_tokens: 400, logit_bias: { 2: -100 }, stream: true };
    const { signal } = controller;
    let finish = null;
    // This package ends the loop without an error when its own signal was used.
    for await (const chunk of await client.chat.completions.create(endless, { signal })) {
      finish = chunk.choices[0].finish_reason;
      if (chunk.choices[0].delta.content) controller.abort();
    }
    say(finish === null ? "aborted" : "answered");
  },
  async leave() {
    const endless = { ...ask, max_tokens: 400, logit_bias: { 2: -100 }, stream: true };
    for await (const chunk of await client.chat.completions.create(endless)) {
      if (chunk.choices[0].delta.content) break;
    }
    say("left");
  },
};

await modes[mode]();

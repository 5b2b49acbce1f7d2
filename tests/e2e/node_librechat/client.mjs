// node client.mjs: LibreChat's own client, driven by JSON lines on stdin, one for each turn:
//   {baseURL, model, user, messages: [[role, text, thoughts?], ...], instructions?, limit?, summarise?, temperature?, extra?,
//    summary?, title?: "completion" | "structured", stop?: "answer", maxTokens?, headers?}
// and one JSON line back: {text, reasoning?, usage?, error?, title?, summary?, dropped, stopped, aborted_s?}
// `dropped` messages were left out by the client, to keep its limit.
// A line {stop_now: true} is the user's Stop. aborted_s is the machine's monotonic clock, as Python reads it.
import readline from "node:readline";
import { AIMessage, HumanMessage } from "@langchain/core/messages";
import { formatAgentMessages, GraphEvents, Run } from "@librechat/agents";

const provider = "openAI";
const parts = (text) => [{ type: "text", text }];
// An answer is kept with its thoughts, and what of it is sent again is LibreChat's own decision.
const withThoughts = (text, think) =>
  formatAgentMessages([{ role: "assistant", content: [{ type: "think", think }, ...parts(text)] }]).messages;
const message = ([role, text, thoughts]) => {
  if (role === "user") return new HumanMessage({ content: parts(text) });
  return thoughts ? withThoughts(text, thoughts) : new AIMessage({ content: parts(text) });
};
const textOf = (content) =>
  typeof content === "string" ? content : (content ?? []).map((part) => part.text ?? "").join("");
const tokensOf = (message) => Math.ceil(textOf(message.content).length / 4) + 3;

let stop = () => undefined;

async function turn(ask) {
  const { baseURL, model = "local-model", user = "65b0c0ffee65b0c0ffee65b0" } = ask;
  const said = { text: "", usage: undefined, summary: undefined, dropped: 0 };
  const counting = (url, init) => {
    const { stream, messages } = JSON.parse(init.body);
    // Without the system message. The last stream is the chat's own: before it may come a checkpoint's.
    if (stream) said.dropped = ask.messages.length - messages.filter((it) => it.role !== "system").length;
    return fetch(url, init);
  };
  const clientOptions = {
    model,
    user,
    streaming: true,
    streamUsage: true,
    apiKey: "none",
    maxTokens: ask.maxTokens,
    temperature: ask.temperature ?? 0,
    modelKwargs: ask.extra,
    configuration: { baseURL, defaultHeaders: ask.headers, fetch: counting },
  };
  const controller = new AbortController();
  stop = () => {
    if (controller.signal.aborted) return;
    said.aborted_s = Number(process.hrtime.bigint()) / 1e9;
    controller.abort();
  };
  const customHandlers = {
    [GraphEvents.ON_MESSAGE_DELTA]: {
      handle: (_, data) => {
        said.text += textOf(data.delta?.content);
        if (ask.stop === "answer" && said.text.length > 8) stop();
      },
    },
    [GraphEvents.ON_REASONING_DELTA]: {
      handle: (_, data) => {
        for (const part of data.delta?.content ?? []) said.reasoning = (said.reasoning ?? "") + (part.think ?? "");
      },
    },
    [GraphEvents.CHAT_MODEL_END]: {
      handle: (_, data) => {
        said.usage = data.output?.usage_metadata ?? said.usage;
      },
    },
    [GraphEvents.ON_SUMMARIZE_COMPLETE]: {
      handle: (_, data) => {
        if (data.summary) said.summary = textOf(data.summary.content);
      },
    },
  };
  const messages = ask.messages.flatMap(message);
  const agent = {
    agentId: "agent",
    provider,
    clientOptions,
    instructions: ask.instructions,
    maxContextTokens: ask.limit,
    summarizationEnabled: Boolean(ask.summarise),
    initialSummary: ask.summary ? { text: ask.summary, tokenCount: Math.ceil(ask.summary.length / 4) } : undefined,
  };
  const run = await Run.create({
    runId: crypto.randomUUID(),
    graphConfig: { type: "standard", agents: [agent] },
    tokenCounter: tokensOf,
    indexTokenCountMap: Object.fromEntries(messages.map((it, index) => [String(index), tokensOf(it)])),
    returnContent: true,
    skipCleanup: true,
    customHandlers,
  });
  const configurable = { thread_id: "thread", user_id: user };
  // As since 0.8.7: the title is asked for at once, beside the answer.
  const titled = ask.title
    ? run.generateTitle({
        provider,
        inputText: ask.messages.at(-1)[1],
        contentParts: [],
        titleMethod: ask.title,
        clientOptions: { ...clientOptions, streaming: false, maxTokens: undefined, temperature: undefined },
        chainOptions: { configurable },
      })
    : undefined;
  titled?.catch(() => undefined);
  try {
    const options = { configurable, streamMode: "values", version: "v2", signal: controller.signal };
    await run.processStream({ messages }, options);
  } catch (error) {
    if (!controller.signal.aborted) said.error = String(error?.message ?? error);
  }
  said.stopped = controller.signal.aborted;
  try {
    said.title = (await titled)?.title;
  } catch (error) {
    said.title_error = String(error?.message ?? error);
  }
  return said;
}

process.on("unhandledRejection", () => undefined);
let last = Promise.resolve();
for await (const line of readline.createInterface({ input: process.stdin })) {
  const ask = JSON.parse(line);
  if (ask.stop_now) stop();
  else
    last = last
      .then(() => turn(ask))
      .catch((error) => ({ error: String(error?.stack ?? error) }))
      .then((answer) => process.stdout.write(`${JSON.stringify(answer)}\n`));
}
await last;

// npm: ai@6.0.326 @ai-sdk/openai-compatible @ai-sdk/openai zod
// title: Vercel AI SDK
// runs: a chat, a stream, and a forced tool, by its providers `openai-compatible` and `openai` (/v1/responses)
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.env.QUANTGATE_URL}/v1`;
const id = process.env.QUANTGATE_MODEL;
const models = [
  createOpenAICompatible({ name: "quantgate", baseURL, apiKey: "any" })(id),
  createOpenAI({ baseURL, apiKey: "any" })(id),
];
const echo = tool({ description: "Repeats.", inputSchema: z.object({ heard: z.string() }), execute: async (x) => x.heard });
for (const model of models) {
  const given = { model, prompt: "say hello", maxRetries: 0 };
  assert.match((await generateText(given)).text, /heard say hello/);
  let streamed = "";
  for await (const part of streamText(given).textStream) streamed += part;
  assert.match(streamed, /heard say hello/);
  const called = await generateText({ ...given, tools: { echo }, toolChoice: "required" });
  assert.equal(called.toolResults[0].output, "say hello");
}

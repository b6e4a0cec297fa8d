// npm: @langchain/openai@1.5.8 @langchain/core
// title: LangChain (JS)
// runs: a chat, a stream, and a forced tool
import assert from "node:assert";
import { ChatOpenAI } from "@langchain/openai";

const configuration = { baseURL: `${process.env.QUANTGATE_URL}/v1` };
const chat = new ChatOpenAI({ model: process.env.QUANTGATE_MODEL, apiKey: "any", configuration, maxRetries: 0 });
assert.match((await chat.invoke("say hello")).text, /heard say hello/);
let streamed = "";
for await (const part of await chat.stream("say hello")) streamed += part.text;
assert.match(streamed, /heard say hello/);
const parameters = { type: "object", properties: { heard: { type: "string" } } };
const tools = [{ type: "function", function: { name: "echo", parameters } }];
const called = await chat.bindTools(tools, { tool_choice: "echo" }).invoke("say hello");
assert.equal(called.tool_calls[0].args.heard, "say hello");

// OpenAI's official JavaScript client against a bootstrap peer: one line of JSON for what each call came to.
import OpenAI, { toFile } from "openai";

let text = "";
for await (const piece of process.stdin) text += piece;
const { baseURL, apiKey, picture } = JSON.parse(text);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const said = {};

const messages = [{ role: "user", content: "Hello!" }];
said.chat = (await client.chat.completions.create({ model: "Llama3-8B", messages })).choices[0].message.content;

said.stream = "";
for await (const chunk of await client.chat.completions.create({ model: "Llama3-8B", messages, stream: true }))
  said.stream += chunk.choices[0].delta.content ?? "";

const { data: long, response } = await client.chat.completions
  .create({ model: "slow-stream", messages, stream: true })
  .withResponse();
said.cancelled = response.headers.get("ngpu-task-id");
for await (const _ of long) break;

said.images = (await client.images.generate({ model: "SuperImage", prompt: "an otter", n: 2 })).data.map((one) => one.url);
const image = await toFile(Buffer.from(picture, "base64"), "otter.png", { type: "image/png" });
said.edit = (await client.images.edit({ model: "SuperEdit", image, prompt: "a beret" })).data[0].url;
said.models = (await client.models.list()).data.map((one) => one.id);
said.embedding = (
  await client.embeddings.create({ model: "embedder", input: "a", encoding_format: "float" })
).data[0].embedding;

const failed = async (call) => {
  try {
    const answer = await call;
    for await (const _ of answer);
    return null;
  } catch (error) {
    return { name: error.constructor.name, status: error.status ?? null, code: error.code ?? null };
  }
};
said.unknown = await failed(client.chat.completions.create({ model: "gpt-9", messages }));
said.broken = await failed(client.chat.completions.create({ model: "broken-stream", messages, stream: true }));
said.event = await failed(client.chat.completions.create({ model: "error-event", messages, stream: true }));
said.gone = await failed(client.chat.completions.create({ model: "gone", messages }));
console.log(JSON.stringify(said));

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

// and by the signal that applications use
const leaving = new AbortController();
const aborted = await client.chat.completions
  .create({ model: "slow-stream", messages, stream: true }, { signal: leaving.signal })
  .withResponse();
said.aborted = aborted.response.headers.get("ngpu-task-id");
try {
  for await (const _ of aborted.data) leaving.abort();
} catch (error) {
  said.abortedWith = error.constructor.name; // some versions end the loop instead
}

said.images = (await client.images.generate({ model: "SuperImage", prompt: "an otter", n: 2 })).data.map((one) => one.url);
const image = await toFile(Buffer.from(picture, "base64"), "otter.png", { type: "image/png" });
said.edit = (await client.images.edit({ model: "SuperEdit", image, prompt: "a beret" })).data[0].url;
said.picture = Buffer.from(await (await fetch(said.edit)).arrayBuffer()).toString("base64");
said.models = (await client.models.list()).data.map((one) => one.id);
said.model = (await client.models.retrieve("Llama3-8B")).owned_by;
said.completion = (await client.completions.create({ model: "Llama3-8B", prompt: "Hello" })).choices[0].text;
const speech = await client.audio.speech.create({ model: "speaker", input: "a", voice: "alloy" });
said.speech = [speech.headers.get("content-type"), (await speech.arrayBuffer()).byteLength];
const recording = await toFile(Buffer.concat([Buffer.from("RIFF"), Buffer.alloc(300_000)]), "a.wav");
said.transcription = (await client.audio.transcriptions.create({ model: "speaker", file: recording })).text;
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
const stranger = new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0 });
said.stranger = await failed(stranger.models.retrieve("Llama3-8B"));
said.unknown = await failed(client.chat.completions.create({ model: "gpt-9", messages }));
said.broken = await failed(client.chat.completions.create({ model: "broken-stream", messages, stream: true }));
said.event = await failed(client.chat.completions.create({ model: "error-event", messages, stream: true }));
said.gone = await failed(client.chat.completions.create({ model: "gone", messages }));
console.log(JSON.stringify(said));

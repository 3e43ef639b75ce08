// The server's API: the model's card, answers as streams, feedback. Texts go in and out as JSON, never as HTML.

const KEY = "papagaio.key";
export const key = () => localStorage.getItem(KEY) ?? "";
export const setKey = (text) => (text ? localStorage.setItem(KEY, text) : localStorage.removeItem(KEY));

export class APIError extends Error {
  constructor(status, content) {
    super(content?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = content?.code ?? null;
  }
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new APIError(0, { message: "the server cannot be reached" });
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => null);
  throw new APIError(response.status, content?.error);
}

export async function card() {
  return (await (await request("v1/models")).json()).data[0];
}

export const feedback = (body) => request("feedback", { method: "POST", body: JSON.stringify(body) });

// The file that codes stand for, and what is wrong with them.
export async function decode(model, text) {
  const response = await request("decode", { method: "POST", body: JSON.stringify({ model, text }) });
  return { file: await response.blob(), remark: response.headers.get("X-Remark") ?? "" };
}

// Yields { text, tokens, finish, usage } for each event of an answer.
export async function* answer(path, body, signal) {
  const sent = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request(path, { method: "POST", body: JSON.stringify(sent), signal });
  let rest = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + part).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new APIError(500, content.error);
      const choice = content.choices[0];
      yield {
        text: choice?.delta?.content ?? choice?.text ?? "",
        tokens: choice?.logprobs?.content ?? [],
        finish: choice?.finish_reason ?? null,
        usage: content.usage,
      };
    }
  }
  throw new APIError(0, { message: "the connection broke off" });
}

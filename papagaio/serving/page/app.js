// The page: conversations with a chat model, or a notebook whose text a base model continues.

import * as api from "./api.js";
import { know, plain, shown } from "./senses.js";
import * as store from "./store.js";
import { inspect, moveFocus, reader, tokenElement } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const { settings } = store;
const TOP = 10; // alternatives that are asked for
let model = null;
let running = null; // AbortController of the answer that is being written

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function button(text, action, properties = {}) {
  const made = element("button", { type: "button", textContent: text, ...properties });
  made.addEventListener("click", action);
  return made;
}

// Drawing

function draw() {
  $("conversations").replaceChildren(
    ...store.conversations.map((each) => {
      const open = button(plain(store.title(each)), () => show(each.id));
      if (each === store.current) open.setAttribute("aria-current", "true");
      return element("li", {}, open);
    }),
  );
  $("log").replaceChildren(...store.current.turns.map(article));
  $("system").value = store.current.system;
  document.title = store.current.turns.length ? `${plain(store.title(store.current))} - papagaio` : "papagaio";
  $("log").scrollTop = $("log").scrollHeight;
}

function article(turn, index) {
  const isUser = turn.role === "user";
  const name = isUser ? (model?.chat === false ? "Text" : "You") : "Model";
  const text = element("div", { className: "text" });
  const actions = element("div", { className: "row" });
  const made = element("article", { className: turn.role }, element("h2", { textContent: name }), text, actions);
  made.setAttribute("aria-label", name);
  if (isUser) {
    text.replaceChildren(plain(turn.text), ...shown(turn.text));
    actions.append(button("Edit", () => edit(index, made)));
    return made;
  }
  fill(text, turn, index);
  actions.append(...answerActions(turn, index));
  return made;
}

// The tokens of an answer as buttons, and the whole text for screen readers.
function fill(text, turn, index) {
  if (!turn.tokens?.length) {
    text.replaceChildren(plain(turn.text), ...shown(turn.text));
    return;
  }
  const tokens = element("div", {}, ...turn.tokens.map((token, i) => tokenElement(token, i, settings.colours)));
  tokens.setAttribute("role", "group");
  tokens.setAttribute("aria-label", "Tokens of the answer: arrow keys move, Enter shows what else was probable");
  text.replaceChildren(element("p", { className: "hidden-text", textContent: plain(turn.text) }), tokens, ...shown(turn.text));
  text.onclick = (event) => open(event.target);
  text.onkeydown = (event) => {
    moveFocus(event);
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open(event.target);
    }
  };
  function open(target) {
    const at = target.closest(".token")?.dataset.index;
    if (at !== undefined && !running) inspect(turn.tokens[at], (other) => branch(index, Number(at), other));
  }
}

function answerActions(turn, index) {
  const last = index === store.current.turns.length - 1;
  const found = [];
  if (last) found.push(button("Retry", () => retry()));
  if (last && turn.finish === "length") found.push(button("Continue", () => proceed(index)));
  // Browsers offer the clipboard only to this machine's own pages and those that come with TLS.
  if (navigator.clipboard) found.push(button("Copy", () => navigator.clipboard.writeText(turn.text).then(() => say("Copied."))));
  if (model?.feedback && model.chat) {
    for (const [label, good] of [["Good", true], ["Bad", false]]) {
      const rate = button(label, () => rateAnswer(index, good));
      rate.setAttribute("aria-pressed", String(turn.rating === good));
      found.push(rate);
    }
    if (last) found.push(button("Compare", () => compare(index)));
  }
  return found;
}

// Answers

// The request for the answer after `turns`; `first` are tokens with which it begins, `skip` the turns that are left out.
function body(turns, first, skip, more) {
  const found = { model: model.id, continue_ids: first.length ? first.map(([id]) => id) : null, ...more };
  for (const name of ["temperature", "top_p", "min_p", "top_k", "max_tokens"]) found[name] = settings[name];
  if (settings.seed !== "" && found.seed === undefined) found.seed = Number(settings.seed);
  if (model.chat) {
    return ["v1/chat/completions", { ...found, messages: store.messages(store.current, turns.slice(skip)), logprobs: true, top_logprobs: TOP }];
  }
  return ["v1/completions", { ...found, prompt: turns.map((turn) => turn.text).join(""), logprobs: TOP }];
}

// Write an answer into `turn` and `place` as it comes. Returns the usage. Throws APIError.
async function write(turn, place, before, first, more = {}) {
  for (let skip = 0; ; skip += 2) {
    Object.assign(turn, { text: first.map((token) => token[1]).join(""), tokens: [...first], finish: null });
    place.replaceChildren(...turn.tokens.map((token, i) => tokenElement(token, i, settings.colours)));
    let usage = null;
    const canSkip = model.chat && skip + 2 < before.length;
    try {
      const read = reader();
      for await (const event of api.answer(...body(before, first, skip, more), running.signal)) {
        turn.text += event.text;
        turn.finish = event.finish ?? turn.finish;
        usage = event.usage ?? usage;
        for (const entry of event.tokens) {
          const token = read(entry);
          place.append(tokenElement(token, turn.tokens.length, settings.colours));
          turn.tokens.push(token);
        }
        const log = $("log");
        if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
      }
    } catch (error) {
      if (error.code === "context_length_exceeded" && canSkip) continue;
      throw error;
    }
    const full = turn.finish === "length" && usage?.total_tokens >= model.context_length;
    if (full && canSkip) continue; // once more, with the oldest turns left out
    return { usage, skip };
  }
}

// Run one answer: the buttons, the status, and what happens at its end or when it is stopped.
async function run(work) {
  if (running || !model) return;
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  $("log").setAttribute("aria-busy", "true");
  say("Writing ...");
  const begin = performance.now();
  let end = "";
  let failed = false;
  try {
    const { usage, skip } = await work();
    const seconds = (performance.now() - begin) / 1000;
    const known = usage?.prompt_tokens_details.cached_tokens ?? 0;
    if (usage) end = `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s; ${usage.prompt_tokens - known} of ${usage.prompt_tokens} read`;
    if (skip) end += `; the context is full: the first ${skip} messages were left out`;
  } catch (error) {
    failed = error.name !== "AbortError";
    end = failed ? `Error: ${error.message}` : "Stopped.";
    if (error.status === 401) $("key").focus();
  }
  running = null;
  $("log").removeAttribute("aria-busy");
  $("send").hidden = false;
  $("stop").hidden = true;
  const turn = store.current.turns.at(-1);
  if (turn?.role === "assistant" && !turn.tokens?.length && !turn.text && failed) store.current.turns.pop();
  if (!store.save()) end += " This browser's store is full: the conversation is not kept.";
  draw();
  say(failed || !turn ? end : `${end}`, failed);
  if (!failed && turn?.role === "assistant") $("status").append(element("span", { className: "hidden-text", textContent: ` Answer: ${plain(turn.text)}` }));
}

// The last answer, after the turns before it; `first`: tokens that it begins with.
function generate(first = [], more = {}) {
  return run(() => {
    const turn = { role: "assistant", text: "", tokens: [] };
    const before = [...store.current.turns];
    store.current.turns.push(turn);
    draw();
    return write(turn, $("log").lastElementChild.querySelector(".text"), before, first, more);
  });
}

function send(text) {
  if (running || !model || (model.chat && !text.trim())) return;
  if (!model.chat && !text && !store.current.turns.length) return;
  const last = store.current.turns.at(-1);
  if (last?.role === "user") store.current.turns.pop(); // its answer failed: it is asked anew
  store.current.turns.push({ role: "user", text });
  $("question").value = "";
  generate();
}

function retry() {
  if (running) return;
  store.current.turns.pop();
  generate([], { seed: Math.floor(Math.random() * 2 ** 31) });
}

function proceed(index) {
  const { tokens } = store.current.turns[index];
  if (running || !tokens?.length) return;
  store.current.turns.splice(index);
  generate(tokens);
}

// Continue an answer from another token than the one at `at`. What followed is dropped.
function branch(index, at, [id, text, probability, special]) {
  const turn = store.current.turns[index];
  const first = turn.tokens.slice(0, at);
  if (special) {
    store.current.turns.splice(index + 1);
    Object.assign(turn, { tokens: first, text: first.map((token) => token[1]).join(""), finish: "stop" });
    store.save();
    draw();
    return;
  }
  first.push([id, text, probability, turn.tokens[at][3]]);
  store.current.turns.splice(index);
  generate(first);
}

function edit(index, place) {
  if (running) return;
  const box = element("textarea", { value: store.current.turns[index].text, rows: 3 });
  box.setAttribute("aria-label", "Edited question");
  const done = () => {
    if (running || (model.chat && !box.value.trim())) return;
    store.current.turns.splice(index, Infinity, { role: "user", text: box.value });
    generate();
    $("question").focus();
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      done();
    } else if (event.key === "Escape") draw();
  });
  place.replaceChildren(box, element("div", { className: "row" }, button("Send", done), button("Cancel", draw)));
  box.focus();
}

// From talk to training

async function rateAnswer(index, good) {
  const turn = store.current.turns[index];
  if (turn.rating === good) return;
  try {
    await api.feedback({ model: model.id, messages: store.messages(store.current, store.current.turns.slice(0, index + 1)), good });
    turn.rating = good;
    store.save();
    draw();
    say("Kept for training.");
  } catch (error) {
    say(`Error: ${error.message}`, true);
  }
}

// A second answer beside the last one; the better one stays, and both are kept as a preference.
function compare(index) {
  const turn = store.current.turns[index];
  const other = { role: "assistant", text: "", tokens: [] };
  const before = store.current.turns.slice(0, index);
  run(async () => {
    const box = $("log").lastElementChild;
    const sides = [turn, other].map((each, i) => {
      const text = element("div", { className: "text" });
      text.replaceChildren(plain(each.text), ...shown(each.text));
      return element("div", {}, element("h2", { textContent: `Answer ${i + 1}` }), text);
    });
    box.replaceChildren(element("div", { className: "pair" }, ...sides));
    return write(other, sides[1].querySelector(".text"), before, [], { seed: Math.floor(Math.random() * 2 ** 31) });
  }).then(() => {
    if (!other.finish) return;
    if (other.text === turn.text) {
      say("Both answers are the same; a higher temperature gives others.");
      return;
    }
    const pair = element("div", { className: "pair" });
    [turn, other].forEach((each, i) => {
      const text = element("div", { className: "text" }, plain(each.text), ...shown(each.text));
      pair.append(element("div", {}, element("h2", { textContent: `Answer ${i + 1}` }), text, button(`Answer ${i + 1} is better`, () => prefer(each))));
    });
    $("log").lastElementChild.replaceChildren(pair, button("Neither", draw));
    pair.querySelector("button").focus();
  });
  async function prefer(better) {
    const worse = better === turn ? other : turn;
    try {
      await api.feedback({ model: model.id, messages: store.messages(store.current, before), chosen: better.text, rejected: worse.text });
      store.current.turns[index] = better;
      store.save();
      draw();
      say("Kept for training.");
    } catch (error) {
      say(`Error: ${error.message}`, true);
    }
  }
}

function exportConversation() {
  const line = `${JSON.stringify({ messages: store.messages(store.current) })}\n`;
  const link = element("a", { href: URL.createObjectURL(new Blob([line], { type: "application/jsonl" })), download: "conversation.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// The rest of the page

function show(id) {
  if (running) return;
  store.choose(id);
  openMenu(false);
  draw();
  say("");
  $("question").focus();
}

function openMenu(open) {
  $("side").classList.toggle("open", open);
  $("menu").setAttribute("aria-expanded", String(open));
}

function setTheme() {
  const dark = settings.theme ? settings.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  $("theme").textContent = dark ? "Light" : "Dark";
  return dark;
}

function bindSettings() {
  for (const name of ["temperature", "top_p", "min_p", "top_k", "max_tokens", "seed"]) {
    const input = $(name);
    const update = () => $(`${name}-value`) && ($(`${name}-value`).textContent = input.value);
    input.value = settings[name];
    update();
    input.addEventListener("input", () => {
      update();
      if (!input.checkValidity() || (name !== "seed" && input.value === "")) return;
      settings[name] = name === "seed" ? input.value : Number(input.value);
      store.saveSettings();
    });
  }
  $("colours").checked = settings.colours;
  $("colours").addEventListener("change", () => {
    settings.colours = $("colours").checked;
    store.saveSettings();
    if (!running) draw();
  });
  $("system").addEventListener("change", () => {
    store.current.system = $("system").value.trim();
    store.save();
  });
  $("key").value = api.key();
  $("key").addEventListener("change", () => {
    api.setKey($("key").value.trim());
    connect();
  });
}

async function connect() {
  try {
    model = await api.card();
  } catch (error) {
    say(error.status === 401 ? "The server asks for an API key: see the settings." : `Error: ${error.message}`, true);
    return;
  }
  know(model);
  $("model").textContent = `${model.id}, context of ${model.context_length} tokens`;
  if (!model.chat) {
    $("question-label").textContent = "Text to continue";
    $("send").textContent = "Continue";
    $("new").textContent = "New text";
    $("system").disabled = true;
  }
  draw();
  say("");
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("question").value);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send($("question").value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("inspector").open) running.abort();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  $("question").focus();
});
$("new").addEventListener("click", () => {
  if (running) return;
  store.start(store.current.system);
  show(store.current.id);
});
$("delete").addEventListener("click", () => {
  if (running) return;
  store.remove();
  draw();
  say("Deleted.");
});
$("export").addEventListener("click", exportConversation);
$("menu").addEventListener("click", () => openMenu($("menu").getAttribute("aria-expanded") !== "true"));
$("theme").addEventListener("click", () => {
  settings.theme = setTheme() ? "light" : "dark";
  setTheme();
  store.saveSettings();
});
$("inspector-close").addEventListener("click", () => $("inspector").close());

if (matchMedia("(max-width: 48rem)").matches) $("settings").open = true;
setTheme();
bindSettings();
draw();
connect();
$("question").focus();

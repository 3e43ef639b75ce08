// Tokens of an answer, coloured by probability; and what else was probable at each of them.

import { marked } from "./senses.js";

const BOUNDS = [0.9, 0.6, 0.3, 0.1]; // a token below the n-th has the class pn

export function percent(probability) {
  if (probability < 0.0001) return "< 0.01 %";
  return `${probability >= 0.0995 ? (100 * probability).toFixed(0) : (100 * probability).toPrecision(2)} %`;
}

// Characters whose bytes are spread over several tokens appear with the last of them.
export function reader() {
  const decoder = new TextDecoder();
  return (entry) => [
    entry.id,
    decoder.decode(new Uint8Array(entry.bytes), { stream: true }),
    Math.exp(entry.logprob),
    entry.top_logprobs.map((top) => [top.id, top.token, Math.exp(top.logprob), top.special ?? ""]),
  ];
}

// An element for a token. One of an answer can be reached with Tab, the others with the arrow keys.
export function tokenElement(token, index, colours) {
  const element = document.createElement("span");
  const level = BOUNDS.filter((bound) => token[2] < bound).length;
  element.className = `token${colours ? ` p${level}` : ""}${token[1].includes("\n") ? " line" : ""}`;
  element.textContent = marked(token[1]);
  element.setAttribute("role", "button");
  element.setAttribute("aria-label", `${visible(token[1])}, ${percent(token[2])}`);
  element.title = percent(token[2]);
  element.tabIndex = index === 0 ? 0 : -1;
  element.dataset.index = index;
  return element;
}

export function moveFocus(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
  const here = event.target.closest(".token");
  if (!here || !(event.key in steps)) return;
  const next = steps[event.key] > 0 ? here.nextElementSibling : here.previousElementSibling;
  if (next?.classList.contains("token")) {
    here.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  event.preventDefault();
}

const visible = (text) => JSON.stringify(marked(text)).slice(1, -1).replaceAll(" ", "␣") || "part of a character";

// Show the alternatives to a token; choose(alternative) is called for the one that is chosen.
export function inspect(token, choose) {
  const dialog = document.getElementById("inspector");
  const list = document.getElementById("alternatives");
  const shown = token[3].some(([id]) => id === token[0]) ? token[3] : [...token[3], [token[0], token[1], token[2], ""]];
  document.getElementById("inspector-help").textContent =
    "Before temperature and the other settings. Choose another token to continue from there.";
  list.replaceChildren(
    ...shown.map((other) => {
      const [id, text, probability, special] = other;
      const button = document.createElement("button");
      button.type = "button";
      const name = document.createElement("code");
      name.textContent = special ? `${text} (${special})` : visible(text);
      button.disabled = special === "never drawn";
      const bar = document.createElement("meter");
      bar.value = probability;
      bar.setAttribute("aria-hidden", "true");
      const number = document.createElement("span");
      number.textContent = percent(probability);
      button.append(name, bar, number);
      if (id === token[0]) button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        dialog.close();
        if (id !== token[0]) choose(other);
      });
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  dialog.showModal();
}

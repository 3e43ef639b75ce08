// Conversations and settings, kept in this browser.

const PLACE = "papagaio.conversations";
const SETTINGS = "papagaio.settings";
const read = (place, otherwise) => {
  try {
    return JSON.parse(localStorage.getItem(place)) ?? otherwise;
  } catch {
    return otherwise;
  }
};

export const settings = { temperature: 0.7, top_p: 1, min_p: 0, top_k: 0, max_tokens: 256, seed: "", colours: true, theme: "", ...read(SETTINGS, {}) };
export const saveSettings = () => localStorage.setItem(SETTINGS, JSON.stringify(settings));

// A conversation: { id, system, turns: [{ role, text, tokens, finish, rating }] }, the newest first.
// A token: [id, text, probability, [[id, text, probability, special], ...]].
export const conversations = read(PLACE, []);
export let current = conversations[0];
if (!current) start();

export function start(system = "") {
  const fresh = { id: crypto.randomUUID?.() ?? String(Math.random()), system, turns: [] };
  conversations.unshift(fresh);
  current = fresh;
  return fresh;
}

export function choose(id) {
  current = conversations.find((each) => each.id === id) ?? current;
}

export function remove() {
  conversations.splice(conversations.indexOf(current), 1);
  current = conversations[0] ?? start();
  save();
}

// Probabilities take most of the room: when it is full, the oldest conversations lose theirs. Returns whether all is kept.
export function save() {
  const kept = conversations.filter((each) => each.turns.length || each === current);
  const withTokens = kept.flatMap((each) => each.turns).filter((turn) => turn.tokens);
  for (;;) {
    try {
      localStorage.setItem(PLACE, JSON.stringify(kept));
      return true;
    } catch {
      if (!withTokens.length) return false;
      delete withTokens.pop().tokens;
    }
  }
}

export const title = (conversation) => conversation.turns[0]?.text.slice(0, 60) || "New conversation";

export function messages(conversation, turns = conversation.turns) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...turns.map(({ role, text }) => ({ role, content: text }))];
}

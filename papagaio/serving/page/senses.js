// Pictures and sounds, which arrive as characters of Unicode's private use areas: the server makes files of them.

import * as api from "./api.js";

const CODED = /([\u{F0000}-\u{FFFFD}][\uE000-\uF8FF]+)/u;
const CODE = /[\u{F0000}-\u{FFFFD}\uE000-\uF8FF]/gu;
const files = new Map(); // an address for each text of codes
let model = null; // the name of a model with codebooks; without them these characters are ordinary ones

export const know = (card) => (model = card.codes ? card.id : null);

export const marked = (text) => (model ? text.replace(CODE, "▪") : text);

// The text for a screen reader, a title or a list.
export const plain = (text) => (model ? text.split(CODED).map((part) => (CODED.test(part) ? "[picture or sound]" : part)).join("") : text);

// Elements that show the pictures and play the sounds of a text, empty until the server has made them.
export function shown(text) {
  const codes = model ? text.split(CODED).filter((part) => CODED.test(part)) : [];
  return codes.map((each) => {
    const place = document.createElement("figure");
    fill(place, each);
    return place;
  });
}

async function fill(place, codes) {
  try {
    if (!files.has(codes)) files.set(codes, api.decode(model, codes));
    const { file, remark } = await files.get(codes);
    const isPicture = file.type === "image/png";
    const made = document.createElement(isPicture ? "img" : "audio");
    made.src = URL.createObjectURL(file);
    if (isPicture) made.alt = "picture";
    else made.controls = true;
    place.replaceChildren(made, remark);
  } catch (error) {
    files.delete(codes);
    place.replaceChildren(`Error: ${error.message}`);
  }
}

/* Elements and texts. What a run says is only ever text: there is no markup from data anywhere. */

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/* A number in few characters: 12.3k, 0.0123, 4e-6. */
function short(value) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return String(Number((value / (unit === "k" ? 1e3 : limit)).toPrecision(3))) + unit;
  }
  return String(Number(value.toPrecision(size >= 1000 ? 4 : 3)));
}

function share(value) {
  if (value === null || value === undefined) return "none";
  const percent = value * 100;
  if (percent === 0) return "0%";
  if (Math.abs(percent) < 0.1) return (percent < 0 ? "-" : "") + "<0.1%";
  return `${Number(percent.toPrecision(percent >= 99.95 ? 3 : percent >= 10 ? 3 : 2))}%`;
}

/* 12 345: the thin space is the same for every reader. */
function whole(value) {
  return String(value).replace(/\B(?=(\d{3})+(?!\d))/g, "\u2009");
}

const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

/* Characters that one cannot see, or that turn what is around them about, are spelled out. */
function spelled(text) {
  return text.replace(UNSEEN, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

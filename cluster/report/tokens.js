/* One response, token by token: who sampled each, and how likely it was. */

const RARE_NATS = 7; // a token with a probability below e^-7 = 0.1% is as rare as the colours tell

/* 0 for a certain token, 1 for a very rare one; the root tells likely ones apart, too. */
function rarity(logprob) {
  return Math.sqrt(Math.min(-Math.min(logprob, 0), RARE_NATS) / RARE_NATS);
}

/* Of each kept token: its place in the whole response, version and lag. */
function places(rollout) {
  const [from, to] = rollout.cut ?? [rollout.length, rollout.length];
  const given = new Set(rollout.given ?? []);
  let run = 0;
  return rollout.tokens.map((text, kept) => {
    const place = kept < from ? kept : kept + to - from;
    while (run < rollout.versions.length - 1 && place >= rollout.versions[run][2]) run += 1;
    return {
      text, place, run, version: rollout.versions[run]?.[0], lag: rollout.lags?.[run] ?? rollout.lag,
      logprob: rollout.logprobs[kept], given: given.has(kept),
    };
  });
}

/* What a token says, line ends and all; "" is a part of a character. */
function legible(text) {
  if (text === "") return [make("span", { class: "mark" }, "\u25cc")];
  return spelled(text).split(/(\n|\t)/).filter(Boolean).map((part) => {
    if (part === "\n") return make("span", { class: "mark" }, "\u21b5\n");
    if (part === "\t") return make("span", { class: "mark" }, "\u21e5\t");
    return document.createTextNode(part);
  });
}

function versionColours(tokens) {
  const versions = [...new Set(tokens.map((token) => token.version))];
  return new Map(versions.map((version, at) => [version, `c${at % 7}`]));
}

function fixed(value, digits) {
  const text = value.toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : text;
}

function nats(logprob) {
  return logprob !== 0 && Math.abs(logprob) < 1e-3 ? logprob.toExponential(2) : fixed(logprob, 4);
}

function chance(logprob) {
  const percent = Math.exp(logprob) * 100;
  if (percent >= 99.995 && logprob < 0) return ">99.99%";
  return percent < 0.01 ? `${percent.toExponential(1)}%` : `${fixed(percent, percent < 10 ? 3 : 2)}%`;
}

/* As in code, and not too long. */
function quoted(text) {
  const shown = text.length > 200 ? `${text.slice(0, 200)}\u2026` : text;
  return JSON.stringify(spelled(shown)).replaceAll("\\\\u", "\\u");
}

const tip = {
  element: null,
  owner: null,

  show(span, token, of) {
    this.hide();
    const rows = [
      ["token", `${token.place + 1} of ${of}`],
      ["version", token.version ?? "unknown"],
      ["lag", token.lag ?? "unknown"],
      ["log-probability", token.given ? "not sampled" : `${nats(token.logprob)} nats`],
      ["probability", token.given ? "not sampled" : chance(token.logprob)],
    ];
    const what = token.text === "" ? "part of a character: the token that ends it has all of it" : quoted(token.text);
    this.element = make(
      "div", { class: "tip", role: "tooltip", id: "tip" },
      make("p", { class: "what mono" }, what),
      make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    );
    document.body.append(this.element);
    span.setAttribute("aria-describedby", "tip");
    this.owner = span;
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const own = this.element.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - own.width - 8));
    const above = at.bottom + own.height + 10 > window.innerHeight && at.top > own.height + 10;
    this.element.style.left = `${left + window.scrollX}px`;
    this.element.style.top = `${(above ? at.top - own.height - 6 : at.bottom + 6) + window.scrollY}px`;
  },

  hide() {
    this.owner?.removeAttribute("aria-describedby");
    this.element?.remove();
    this.element = this.owner = null;
  },
};

function tokenSpan(token, colours, before) {
  const classes = ["token", colours.get(token.version)];
  if (token.given) classes.push("given");
  if (before && before.run !== token.run && before.version !== token.version) classes.push("first-of-version");
  const span = make("span", { class: classes.join(" "), tabindex: before ? -1 : 0, "data-place": token.place }, ...legible(token.text));
  span.style.setProperty("--rare", rarity(token.logprob).toFixed(3));
  return span;
}

/* The token under the pointer or with the focus explains itself; arrow keys go from one to the next. */
function listen(box, tokens, spans, of) {
  const index = new Map(spans.map((span, at) => [span, at]));
  const shown = (event) => {
    const span = event.target.closest(".token");
    if (span && index.has(span)) tip.show(span, tokens[index.get(span)], of);
  };
  box.addEventListener("pointerover", shown);
  box.addEventListener("focusin", shown);
  box.addEventListener("pointerout", () => tip.hide());
  box.addEventListener("focusout", () => tip.hide());
  box.addEventListener("scroll", () => tip.hide());
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") tip.hide();
    if (!(event.key in moves) || !index.has(event.target)) return;
    event.preventDefault();
    const next = spans[Math.max(0, Math.min(spans.length - 1, index.get(event.target) + moves[event.key]))];
    event.target.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}

function key(colouring, tokens, colours) {
  if (colouring === "logprob") {
    const marks = [1, 0.5, 0.1, 0.01, 0.001].map((probability) => {
      const mark = make("span", { class: "token mono" }, probability === 0.001 ? "\u22640.001" : probability);
      mark.style.setProperty("--rare", rarity(Math.log(probability)).toFixed(3));
      return mark;
    });
    return ["probability when sampled", ...marks];
  }
  const lags = new Map(tokens.map((token) => [token.version, token.lag]));
  return ["version", ...[...colours].map(([version, colour]) => make("span", { class: `token mono ${colour}` }, `${version} (lag ${lags.get(version)})`))];
}

function showTokens(rollout, colouring, choose) {
  const tokens = places(rollout);
  const colours = versionColours(tokens);
  const spans = tokens.map((token, at) => tokenSpan(token, colours, tokens[at - 1]));
  const shown = [...spans];
  if (rollout.cut) {
    const [from, to] = rollout.cut;
    shown.splice(from, 0, make("span", { class: "left-out" }, `${whole(to - from)} tokens are left out here`));
  }
  const box = make("div", { class: "tokens", role: "group", "aria-label": "Response, token by token", dir: "auto" }, ...shown);
  listen(box, tokens, spans, rollout.length);
  const legend = make("div", { class: "key" });
  const frame = make("div");
  const buttons = [["logprob", "log-probability"], ["version", "version"]].map(([name, said]) =>
    make("button", { type: "button", "data-colour": name, onclick: () => colour(name) }, said));
  function colour(name) {
    choose(name);
    frame.className = `by-${name}`;
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.colour === name)));
    legend.replaceChildren(...key(name, tokens, colours));
  }
  frame.append(
    make("div", { class: "tools" }, make("h4", {}, "Response"), make("div", { class: "switches", role: "group", "aria-label": "Colour tokens by" }, ...buttons)),
    box,
    make("div", { class: "tools" }, legend),
  );
  colour(colouring);
  return frame;
}

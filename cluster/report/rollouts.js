/* The table of sampled rollouts: filtered, sorted, a page at a time, each opening into its tokens. */

const PAGE_ROWS = 25;
const PREVIEW = 200; // characters

const COLUMNS = [
  { id: "step", said: "Step", number: true, of: (row) => row.step },
  { id: "prompt", said: "Prompt", of: (row) => row.prompt },
  { id: "response", said: "Response", of: (row) => response(row) },
  { id: "reward", said: "Reward", number: true, of: (row) => row.reward },
  { id: "lag", said: "Lag", number: true, of: (row) => row.lag },
  { id: "length", said: "Length", number: true, of: (row) => row.length },
  { id: "finish", said: "Finish", of: (row) => row.finish_reason },
];

const RANGES = [
  { id: "reward", said: "Reward", step: "any" },
  { id: "step", said: "Step", step: 1 },
  { id: "lag", said: "Lag", step: 1 },
];

const texts = new WeakMap();

function response(row) {
  if (!texts.has(row)) texts.set(row, row.tokens.join(""));
  return texts.get(row);
}

function preview(text) {
  const shown = spelled(text.slice(0, PREVIEW).replace(/\s+/g, " ").trim());
  return text.length > PREVIEW ? `${shown}\u2026` : shown;
}

/* Whether a row is within every range and holds the searched text; an empty field asks nothing. */
function passes(row, filters) {
  for (const { id } of RANGES) {
    const value = row[id];
    if (filters[id].from !== null && !(value >= filters[id].from)) return false;
    if (filters[id].to !== null && !(value <= filters[id].to)) return false;
  }
  if (!filters.text) return true;
  return row.prompt.toLowerCase().includes(filters.text) || response(row).toLowerCase().includes(filters.text);
}

function compared(column, descending) {
  const sign = descending ? -1 : 1;
  return (a, b) => {
    const [x, y] = [column.of(a), column.of(b)];
    if (x === y) return 0;
    return sign * (column.number ? x - y : String(x) < String(y) ? -1 : 1);
  };
}

class Rollouts {
  constructor(rows) {
    this.rows = rows;
    this.filters = Object.fromEntries(RANGES.map(({ id }) => [id, { from: null, to: null }]));
    this.filters.text = "";
    this.sorting = { column: COLUMNS[0], descending: true };
    this.page = 0;
    this.open = null;
    this.colouring = "logprob";
    this.body = make("tbody");
    this.count = make("span", { class: "count", role: "status" });
    this.back = make("button", { type: "button", id: "back", onclick: () => this.turn(-1) }, "Back");
    this.next = make("button", { type: "button", id: "next", onclick: () => this.turn(1) }, "Next");
    this.heads = COLUMNS.map((column) => make(
      "th", { scope: "col", class: column.number ? "number" : null, "data-column": column.id },
      make("button", { type: "button", onclick: () => this.sort(column) }, column.said),
    ));
    const widths = { step: "col-short", prompt: "col-prompt", reward: "col-number", lag: "col-short", length: "col-number", finish: "col-number" };
    this.element = make(
      "div", { class: "card" }, this.form(), make("div", { class: "pager" }, this.count, this.back, this.next),
      make(
        "table", { class: "rollouts", "aria-label": "Sample rollouts" },
        make("colgroup", {}, ...COLUMNS.map(({ id }) => make("col", { class: widths[id] ?? null }))),
        make("thead", {}, make("tr", {}, ...this.heads)), this.body,
      ),
    );
    this.select();
  }

  form() {
    const limits = (id) => this.rows.reduce(([low, high], row) => [Math.min(low, row[id]), Math.max(high, row[id])], [Infinity, -Infinity]);
    const ranges = RANGES.map(({ id, said, step }) => {
      const [low, high] = limits(id);
      const field = (end, hint) => make("input", {
        type: "number", step, id: `${id}-${end}`, placeholder: short(hint), "aria-label": `${said}, ${end}`,
        oninput: (event) => this.filter(id, end, event.target),
      });
      return make("fieldset", {}, make("legend", {}, said), make("div", { class: "range" }, field("from", low), "to", field("to", high)));
    });
    const search = make("input", { type: "search", id: "text", placeholder: "in prompt or response", oninput: (event) => this.search(event.target.value) });
    return make(
      "form", { class: "filters", onsubmit: (event) => event.preventDefault(), onreset: () => this.reset() },
      ...ranges,
      make("div", { class: "text" }, make("label", { class: "caption", for: "text" }, "Text"), search),
      make("button", { type: "reset" }, "Reset"),
    );
  }

  filter(id, end, input) {
    this.filters[id][end] = input.value === "" || Number.isNaN(input.valueAsNumber) ? null : input.valueAsNumber;
    this.select();
  }

  search(text) {
    this.filters.text = text.toLowerCase();
    this.select();
  }

  reset() {
    for (const { id } of RANGES) this.filters[id] = { from: null, to: null };
    this.search("");
  }

  sort(column) {
    const again = this.sorting.column === column;
    this.sorting = { column, descending: again ? !this.sorting.descending : Boolean(column.number) };
    this.select();
  }

  turn(pages) {
    this.page += pages;
    this.open = null;
    this.show();
  }

  /* Which rows there are, after a filter or the order has changed. */
  select() {
    this.found = this.rows.filter((row) => passes(row, this.filters)).sort(compared(this.sorting.column, this.sorting.descending));
    this.page = 0;
    this.open = null;
    this.show();
  }

  show() {
    tip.hide();
    const first = this.page * PAGE_ROWS;
    const rows = this.found.slice(first, first + PAGE_ROWS);
    const of = this.found.length === this.rows.length ? whole(this.rows.length) : `${whole(this.found.length)} (of ${whole(this.rows.length)})`;
    this.count.textContent = rows.length ? `${whole(first + 1)} to ${whole(first + rows.length)} of ${of}` : `none of ${whole(this.rows.length)}`;
    this.back.disabled = this.page === 0;
    this.next.disabled = first + PAGE_ROWS >= this.found.length;
    this.heads.forEach((head, at) => {
      const own = COLUMNS[at] === this.sorting.column;
      if (own) head.setAttribute("aria-sort", this.sorting.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.firstChild.textContent = COLUMNS[at].said + (own ? (this.sorting.descending ? " \u25be" : " \u25b4") : "");
    });
    const lines = rows.map((row) => this.line(row));
    if (!lines.length) lines.push(make("tr", {}, make("td", { class: "none", colspan: COLUMNS.length }, "No rollout passes these filters.")));
    this.body.replaceChildren(...lines);
  }

  line(row) {
    const button = make("button", { type: "button", "aria-expanded": "false", "aria-label": `step ${row.step}, show tokens` }, whole(row.step));
    const cells = COLUMNS.map(({ id, said, number, of }) => {
      const label = { "data-label": said.toLowerCase(), "data-column": id };
      if (id === "step") return make("td", { class: "number", ...label }, button);
      if (number) return make("td", { class: "number", ...label }, id === "reward" ? short(of(row)) : whole(of(row)));
      if (id === "finish") return make("td", label, row.finish_reason);
      return make("td", { class: "text mono", dir: "auto", ...label }, preview(of(row)));
    });
    const line = make("tr", { class: "row", onclick: () => this.toggle(row, line) }, ...cells);
    button.addEventListener("keydown", (event) => this.walk(event, line));
    return line;
  }

  /* Up and down from row to row. */
  walk(event, line) {
    const lines = [...this.body.querySelectorAll("tr.row")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = step && lines[lines.indexOf(line) + step];
    if (!next) return;
    event.preventDefault();
    next.querySelector("button").focus();
  }

  toggle(row, line) {
    tip.hide();
    const before = this.open;
    this.close();
    if (before === row) return;
    this.open = row;
    line.classList.add("open");
    line.querySelector("button").setAttribute("aria-expanded", "true");
    line.after(make("tr", { class: "detail" }, make("td", { colspan: COLUMNS.length }, this.detail(row))));
  }

  close() {
    this.open = null;
    this.body.querySelector("tr.detail")?.remove();
    const line = this.body.querySelector("tr.open");
    line?.classList.remove("open");
    line?.querySelector("button").setAttribute("aria-expanded", "false");
  }

  detail(row) {
    const verdict = row.verdict ?? {};
    const said = [
      `${row.group}${row.member === undefined ? "" : `, rollout ${row.member}`}`,
      `prompt ${row.prompt_id}`,
      `reward ${short(row.reward)}`,
      row.advantage === null || row.advantage === undefined ? null : `advantage ${short(row.advantage)}`,
      `${whole(row.length)} tokens, ${row.finish_reason}`,
      verdict.kind ? `verdict ${verdict.kind.replaceAll("_", " ")}${verdict.score === null ? "" : ` ${short(verdict.score)}`}` : null,
      ...Object.entries(verdict.components ?? {}).map(([name, value]) => `${name} ${short(value)}`),
    ].filter(Boolean);
    return make(
      "div", {},
      make("div", { class: "about-rollout" }, ...said.map((text) => make("span", {}, spelled(text)))),
      verdict.feedback ? make("p", {}, "The judge said: ", spelled(verdict.feedback)) : null,
      make("h4", {}, "Prompt"),
      make("div", { class: "prompt mono", dir: "auto", tabindex: 0, role: "group", "aria-label": "Prompt" }, ...legible(row.prompt)),
      showTokens(row, this.colouring, (name) => { this.colouring = name; }),
    );
  }
}

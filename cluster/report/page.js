/* Puts the page together from the numbers in it. */

const data = JSON.parse(document.getElementById("data").textContent);

function top() {
  const when = new Date(data.made_s * 1000).toISOString().slice(0, 19).replace("T", " ");
  const parts = [make("div", { class: "title" }, make("h1", {}, data.name), make("span", { class: `state ${data.tone}` }, data.state))];
  if (data.error) parts.push(make("p", { class: data.error.includes("\n") ? "banner bad mono" : "banner bad", role: "alert" }, spelled(data.error)));
  if (data.missing.length) parts.push(make("ul", { class: "notes" }, ...data.missing.map((text) => make("li", {}, spelled(text)))));
  document.getElementById("top").append(...parts);
  document.getElementById("end").append(`millrace report, made ${when} UTC. One file; it loads nothing.`);
}

function summary() {
  const tiles = data.tiles.map(({ label, value, first }) => make(
    "div", { class: "tile" },
    make("div", { class: "label" }, label),
    make("div", { class: "value" }, first ? make("span", { class: "first" }, `${first} \u2192 `) : null, value),
  ));
  const facts = data.facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", { class: name === "Formula" ? "mono" : null }, spelled(value))]);
  const cards = [make("div", { class: "card" }, make("h3", {}, "The run"), make("dl", { class: "facts" }, ...facts))];
  if (data.waste.length) cards.push(make("div", { class: "card" }, make("h3", {}, "Where the generated tokens went"), ledger()));
  document.getElementById("summary").append(make("div", { class: "tiles" }, ...tiles), make("div", { class: "pair" }, ...cards));
}

function ledger() {
  const rows = data.waste.map(({ name, about, tokens, share: part }) => {
    const wrong = name === "unaccounted" && tokens !== 0;
    return make(
      "tr", { class: name === "generated" ? "whole" : wrong ? "wrong" : null, "data-row": name },
      make("th", { scope: "row" }, name, about ? make("span", { class: "about" }, about) : null),
      make("td", { class: "number" }, whole(tokens)),
      make("td", { class: "number" }, share(part)),
    );
  });
  return make("table", { class: "ledger" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""), make("th", { scope: "col", class: "number" }, "tokens"), make("th", { scope: "col", class: "number" }, "share"))), make("tbody", {}, ...rows));
}

function samples() {
  const place = document.getElementById("samples");
  if (!data.rollouts.length) {
    place.append(make("p", { class: "soft" }, "None were recorded."));
    return;
  }
  place.append(
    make("p", { class: "soft" }, "Of each step one of the best rollouts, one of the worst, and others by chance: enough to read, not to count. Choose a row to see its tokens."),
    new Rollouts(data.rollouts).element,
  );
}

function more() {
  if (!data.events.length) return;
  const rows = data.events.map(({ time, kind, facts }) => make("tr", {}, make("td", {}, time), make("td", {}, kind), make("td", {}, spelled(facts))));
  document.getElementById("more").append(make("details", { class: "card" }, make("summary", {}, `Events (${data.events.length}, the last first, UTC)`), make("table", { class: "events" }, make("tbody", {}, ...rows))));
}

top();
summary();
if (data.charts.length) showCharts(document.querySelector(".charts"), data.charts);
else document.querySelector(".charts").append(make("p", { class: "soft" }, "No step has been made yet."));
showIncidents(document.getElementById("incidents"), data.incidents);
samples();
more();

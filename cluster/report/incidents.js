/* What was lost and came back: a time line over the steps, recovery by role, and prompts that were given up. */

const LANE = 24;

class TimeLine {
  constructor({ steps, lost }) {
    this.steps = Math.max(1, steps);
    this.lost = lost;
    this.names = [...new Set(lost.map(({ component }) => component))].sort();
    this.svg = draw("svg", { role: "img", "aria-label": `Incidents of ${this.names.join(", ")} by step; the table below has them all.` });
    this.element = make("div", { class: "timeline" }, this.svg);
    this.width = 0;
  }

  fit(width) {
    if (width === this.width || !width) return;
    this.width = width;
    const left = Math.min(130, width / 3);
    const high = this.names.length * LANE;
    const toX = (step) => left + (step / this.steps) * (width - left - 14);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${high + 34}`);
    this.svg.style.height = `${high + 34}px`;
    const marks = ticks(0, this.steps, Math.max(2, Math.floor(width / 110))).filter(Number.isInteger);
    const parts = marks.flatMap((step) => [
      draw("path", { class: "rule", d: `M${toX(step)} 0V${high}` }),
      draw("text", { x: toX(step), y: high + 16, "text-anchor": "middle" }, step),
    ]);
    this.names.forEach((name, at) => parts.push(
      draw("path", { class: "axis", d: `M${left} ${(at + 0.5) * LANE}H${width - 14}` }),
      draw("text", { class: "name", x: 0, y: (at + 0.5) * LANE + 4 }, name),
    ));
    parts.push(draw("text", { x: width - 14, y: high + 31, "text-anchor": "end" }, "step"));
    parts.push(...this.lost.map((each) => this.mark(each, toX)));
    this.svg.replaceChildren(...parts);
  }

  /* From where it was lost to where it served again; at least wide enough to be seen. */
  mark({ component, cause, step, back, down }, toX) {
    const y = (this.names.indexOf(component) + 0.5) * LANE;
    const from = toX(step);
    const to = Math.max(from + 6, toX(back ?? step));
    const said = spelled(`${component} at step ${Math.floor(step)}: ${cause}${down ? `; ${back === null ? down : `back after ${down}`}` : ""}`);
    return draw("rect", { class: back === null ? "incident open" : "incident", x: from, y: y - 7, width: to - from, height: 14, rx: 3 }, draw("title", {}, said));
  }
}

function grid(head, rows, columns) {
  const cells = (row) => row.map((each, at) => make("td", { class: columns[at], "data-label": head[at] }, each));
  return make(
    "table", { class: "grid" },
    make("thead", {}, make("tr", {}, ...head.map((each, at) => make("th", { scope: "col", class: columns[at] }, each)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row)))),
  );
}

function showIncidents(place, { steps, lost, roles, quarantined }) {
  if (!lost.length && !quarantined.length) return;
  place.hidden = false;
  if (lost.length) {
    const line = new TimeLine({ steps, lost });
    const recovery = grid(["part", "lost", "back after", "at most"], roles.map(({ role, lost: many, mean, most }) => [role, many, mean || "not back", most]), ["name", "number", "number", "number"]);
    const rows = lost.map(({ time, step, component, cause, back, down }) => [time, Math.floor(step), component, spelled(cause), back === null ? down || "not back" : `back after ${down}`]);
    place.append(
      make("div", { class: "card" }, make("h3", {}, "Lost and restarted"), line.element, recovery,
        make("details", {}, make("summary", {}, `All ${lost.length}, in order, UTC`), grid(["time", "step", "component", "cause", "outcome"], rows, ["", "number", "", "", ""]))),
    );
    new ResizeObserver(([entry]) => line.fit(Math.round(entry.contentRect.width))).observe(line.element);
  }
  if (quarantined.length) {
    const rows = quarantined.map(({ prompt, cause, times, traceback }) => [
      spelled(prompt), times ?? "",
      make("div", {}, spelled(cause), traceback ? make("details", {}, make("summary", {}, "traceback"), make("pre", {}, spelled(traceback))) : null),
    ]);
    place.append(make("div", { class: "card" }, make("h3", {}, "Prompts that were given up"), grid(["prompt", "times", "cause"], rows, ["", "number", ""])));
  }
}

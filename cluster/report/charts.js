/* Line charts and stacked bars in SVG. Each knows its numbers; the pointer or the arrow keys read them off. */

const HEIGHT = 220;
const MARGIN = { left: 50, right: 14, top: 24, bottom: 34 };

/* Round numbers between low and high, about `wanted` of them. */
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) found.push(Number((at * step).toPrecision(12)));
  return found;
}

function decades(low, high) {
  const found = [];
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const step = Math.max(1, Math.ceil((last - first) / 5));
  for (let power = first; power <= last; power += step) found.push(10 ** power);
  return found;
}

/* Where the vertical axis begins and ends. */
function extent(spec) {
  const shown = (y) => y !== null && (!spec.log || y > 0);
  const ys = spec.stack ? spec.tops : spec.series.flatMap((series) => series.y.filter(shown));
  let low = Math.min(...ys);
  let high = Math.max(...ys);
  if (!ys.length) [low, high] = spec.log ? [0.1, 1] : [0, 1];
  if (spec.log) return [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high) + 1e-9)];
  if (spec.zero || spec.stack) low = Math.min(low, 0);
  if (spec.stack && spec.percent && high > 0.5) high = 1;
  if (high === low) [low, high] = spec.zero ? [0, high || 1] : [low - (Math.abs(low) * 0.05 || 0.5), high + (Math.abs(high) * 0.05 || 0.5)];
  const room = spec.stack ? 0 : (high - low) * 0.05;
  const floor = spec.zero || low === 0 ? low : low - room;
  const ceiling = spec.percent && high <= 1 ? Math.min(1, high + room) : high + room;
  return [floor, ceiling];
}

function bars(spec) {
  const x = spec.series.length ? spec.series[0].x : [];
  spec.tops = x.map((_, at) => spec.series.reduce((sum, series) => sum + (series.y[at] ?? 0), 0));
  /* A bar reaches back to the one before it, the first one to the start of the run. */
  spec.from = x.map((_, at) => (at ? x[at - 1] : 0));
}

class Chart {
  constructor(spec, steps) {
    this.spec = spec;
    this.steps = steps; // the axes of all charts end there
    if (spec.stack) bars(spec);
    this.stops = [...new Set(spec.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    this.at = null;
    this.svg = draw("svg", {
      role: "img", tabindex: 0, "aria-label": `${spec.title}, ${spec.unit}, by step. Arrow keys read the values.`,
      onpointermove: (event) => this.point(event), onpointerleave: () => this.look(null),
      onkeydown: (event) => this.key(event), onblur: () => this.look(null),
    });
    this.where = make("li", { class: "at" });
    this.outputs = spec.series.map(() => make("output"));
    const items = spec.series.map((series, at) => make("li", {}, swatch(series, spec.stack), series.name, this.outputs[at]));
    this.element = make(
      "figure", { class: "card chart", id: `chart-${spec.id}` },
      make("figcaption", {}, make("h3", {}, spec.title), make("p", {}, spec.about)),
      this.svg,
      make("ul", { class: "legend" }, this.where, ...items),
    );
    this.look(null);
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || !this.stops.length) return;
    event.preventDefault();
    const from = this.at === null ? this.stops.length - (moves[event.key] < 0 ? 0 : 1) : this.at;
    this.look(Math.max(0, Math.min(this.stops.length - 1, from + moves[event.key])));
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const x = this.toStep(event.clientX - box.left);
    const within = this.stops.findIndex((stop) => stop >= x);
    if (this.spec.stack) this.look(within < 0 ? this.stops.length - 1 : within);
    else this.look(nearest(this.stops, x));
  }

  /* The numbers at one step, or, when nobody points, the last ones. */
  look(at) {
    this.at = at;
    const step = at === null ? this.stops.at(-1) : this.stops[at];
    const say = this.spec.percent ? share : short;
    this.where.textContent = step === undefined ? "no data" : `${at === null ? "last, " : ""}step ${whole(step)}`;
    this.spec.series.forEach((series, index) => {
      const here = nearest(series.x, step);
      const elsewhere = here >= 0 && series.x[here] !== step && series.style !== "dash";
      this.outputs[index].textContent = here < 0 ? "none" : say(series.y[here]) + (elsewhere ? ` @${whole(series.x[here])}` : "");
    });
    this.drawCursor(at === null ? null : step);
  }

  drawCursor(step) {
    this.cursor?.remove();
    if (step === null || !this.toX) return;
    const bar = this.spec.stack ? this.spec.from[this.spec.series[0]?.x.indexOf(step)] : undefined;
    const x = this.toX(bar === undefined ? step : (bar + step) / 2);
    const line = (name) => draw("line", { class: name, x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    const marks = [line("halo"), line("cursor")];
    if (!this.spec.stack) {
      for (const series of this.spec.series) {
        const here = nearest(series.x, step);
        if (here < 0 || series.style === "dash" || series.y[here] === null || (this.spec.log && series.y[here] <= 0)) continue;
        marks.push(draw("circle", { class: `dot ${series.colour}`, cx: this.toX(series.x[here]), cy: this.toY(series.y[here]), r: 4 }));
      }
    }
    this.cursor = draw("g", { "aria-hidden": "true" }, ...marks);
    this.svg.append(this.cursor);
  }

  /* Draws anew for the width that there is. */
  fit(width) {
    if (!width || width === this.width) return;
    this.width = width;
    const { spec } = this;
    const [y0, y1] = extent(spec);
    const [left, right] = [0, this.steps];
    const high = HEIGHT - MARGIN.bottom;
    this.toX = (step) => MARGIN.left + ((step - left) / (right - left)) * (width - MARGIN.left - MARGIN.right);
    this.toStep = (x) => left + ((x - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (right - left);
    const scale = spec.log ? Math.log10 : (y) => y;
    this.toY = (y) => high - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (high - MARGIN.top);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const shapes = spec.stack ? this.layers() : spec.series.flatMap((series) => this.lines(series));
    this.svg.replaceChildren(...this.axes(left, right, y0, y1, high), ...shapes);
    this.drawCursor(this.at === null ? null : this.stops[this.at]);
  }

  axes(left, right, y0, y1, high) {
    const { spec, width } = this;
    const say = spec.percent ? share : short;
    const marks = [];
    for (const y of spec.log ? decades(y0, y1) : ticks(y0, y1, 4)) {
      marks.push(draw("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.toY(y), y2: this.toY(y) }));
      marks.push(draw("text", { x: MARGIN.left - 7, y: this.toY(y) + 4, "text-anchor": "end" }, say(y)));
    }
    marks.push(draw("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: high, y2: high }));
    for (const x of ticks(left, right, Math.max(2, Math.floor(width / 70))).filter(Number.isInteger)) {
      marks.push(draw("line", { class: "axis", x1: this.toX(x), x2: this.toX(x), y1: high, y2: high + 4 }));
      marks.push(draw("text", { x: this.toX(x), y: high + 16, "text-anchor": "middle" }, short(x)));
    }
    marks.push(draw("text", { x: (width - MARGIN.right + MARGIN.left) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, "step"));
    marks.push(draw("text", { x: 0, y: 11 }, spec.unit));
    return marks;
  }

  lines(series) {
    let path = "";
    let pen = "M";
    const dots = [];
    series.x.forEach((x, at) => {
      const y = series.y[at];
      if (y === null || (this.spec.log && y <= 0)) {
        pen = "M";
        return;
      }
      path += `${pen}${this.toX(x).toFixed(1)} ${this.toY(y).toFixed(1)}`;
      pen = "L";
      const alone = (series.y[at - 1] ?? null) === null && (series.y[at + 1] ?? null) === null;
      if (series.style === "dots" || alone) dots.push(draw("circle", { class: `dot ${series.colour}`, cx: this.toX(x), cy: this.toY(y), r: 4 }));
    });
    return [draw("path", { class: `path ${series.style} ${series.colour}`, d: path, "data-series": series.name }), ...dots];
  }

  layers() {
    const { spec } = this;
    const below = spec.tops.map(() => 0);
    return spec.series.map((series) => {
      let path = "";
      series.y.forEach((y, at) => {
        const [low, high] = [below[at], below[at] + (y ?? 0)];
        below[at] = high;
        if (high === low) return;
        const [x0, x1, y0, y1] = [this.toX(spec.from[at]), this.toX(series.x[at]), this.toY(low), this.toY(high)];
        path += `M${x0.toFixed(1)} ${y0.toFixed(1)}H${x1.toFixed(1)}V${y1.toFixed(1)}H${x0.toFixed(1)}Z`;
      });
      return draw("path", { class: `layer ${series.colour}`, d: path, "data-series": series.name });
    });
  }
}

/* Where in ascending xs the value next to x is; -1 if there is none. */
function nearest(xs, x) {
  let best = -1;
  xs.forEach((each, at) => {
    if (best < 0 || Math.abs(each - x) < Math.abs(xs[best] - x)) best = at;
  });
  return best;
}

function swatch(series, stack) {
  const mark = stack
    ? draw("rect", { class: `layer ${series.colour}`, x: 3, y: 0, width: 12, height: 12, rx: 2 })
    : draw("path", { class: `path ${series.style} ${series.colour}`, d: "M1 6H17" });
  const dot = series.style === "dots" ? [draw("circle", { class: `dot ${series.colour}`, cx: 9, cy: 6, r: 4 })] : [];
  return draw("svg", { viewBox: "0 0 18 12", "aria-hidden": "true" }, mark, ...dot);
}

function showCharts(place, specs) {
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.chart.fit(Math.round(entry.contentRect.width))));
  const steps = Math.max(1, ...specs.flatMap((spec) => spec.series.map((series) => series.x.at(-1) ?? 0)));
  for (const spec of specs) {
    const chart = new Chart(spec, steps);
    place.append(chart.element);
    chart.svg.chart = chart;
    watch.observe(chart.svg);
  }
}

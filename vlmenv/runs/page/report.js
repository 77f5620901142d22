// Everything from the data goes into the page as text nodes and attributes of fixed names: nothing of it is ever markup.
const data = await unpacked(document.getElementById("data").textContent);
const runs = data.runs;
const SVG = "http://www.w3.org/2000/svg";
const WHEN = ["before training", "evaluation on the way", "after training", "training"];
const PAGE = 24; // cards at a time
const COLOURS = 7;

async function unpacked(text) {
  if (!("DecompressionStream" in window)) {
    document.getElementById("subtitle").textContent = "This report needs a browser of 2023 or later.";
    throw new Error("DecompressionStream is missing");
  }
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function node(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const h = (tag, attributes, ...children) => node(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => node(document.createElementNS(SVG, tag), attributes, children);
const at = (id) => document.getElementById(id);
const known = (value) => value !== null && value !== undefined;
const written = (value, digits = 3) => {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(2) : value.toFixed(size >= 100 ? 1 : digits);
};
const spread = (one, sign) => {
  if (!known(one)) return "–";
  const plus = sign && one[0] > 0 ? "+" : "";
  return plus + written(one[0]) + (known(one[1]) ? ` (${written(one[1])} to ${written(one[2])})` : "");
};
const table = (head, rows, caption, numbers = false) =>
  h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {},
      h("caption", { class: "quiet" }, caption),
      h("thead", {}, h("tr", {}, ...head.map((one, i) => h("th", { scope: "col", class: i && numbers ? "number" : null }, one)))),
      h("tbody", {}, ...rows)));

// --- result ---------------------------------------------------------------------------------------------------------

function showResult() {
  const one = runs[0];
  at("title").textContent = runs.length === 1 ? one.name : `${runs.length} runs`;
  document.title = `${at("title").textContent} – vlmenv report`;
  const told = ["env", "algo", "model"].map((name) => one.options[name]).filter(Boolean);
  at("subtitle").textContent = runs.length === 1 ? `${told.join(", ")}; ${progress(one)}` : runs.map((r) => r.name).join(", ");
  at("made").textContent = `Made on ${data.made} by vlmenv ${data.version}.` + (data.live ? " This page follows the run." : "");
  const section = at("result");
  if (runs.length === 1) section.append(headline(one));
  else section.append(comparison());
  for (const run of runs) {
    for (const [step, kind, message] of run.warnings) {
      section.append(h("p", { class: "warning" }, h("strong", {}, `Warning, step ${written(step)}: ${kind}. `), message,
        runs.length > 1 ? ` (${run.name})` : null));
    }
  }
  if (runs.every((run) => run.warnings.length === 0)) section.append(h("p", { class: "quiet" }, "No warnings."));
}

function progress(run) {
  const steps = run.curves.step;
  const done = steps.length ? steps[steps.length - 1] : 0;
  return run.options.steps && Number(run.options.steps) !== done ? `${done} of ${run.options.steps} steps` : `${done} steps`;
}

function headline(run) {
  if (!run.headline.length) return h("p", { class: "quiet" }, "Nothing was measured before or after training.");
  const rows = run.headline.map(([name, before, after, change], i) =>
    h("tr", { class: i === 0 ? "main" : null }, h("th", { scope: "row" }, name),
      ...[spread(before), spread(after), change ? spread(change, true) : plain(before, after)].map((text) =>
        h("td", { class: "number" }, text))));
  return table(["metric", "before", "after", "change"], rows,
    "Held-out metrics of greedy answers, with 95 % intervals; the change is of the same samples", true);
}
const plain = (before, after) => (before && after ? written(after[0] - before[0]) : "–");

function comparison() {
  const names = [...new Set(runs.flatMap((run) => run.headline.map((row) => row[0])))];
  const of = (run, name) => run.headline.find((row) => row[0] === name) || [name, null, null, null];
  const rows = names.map((name, i) =>
    h("tr", { class: i === 0 ? "main" : null }, h("th", { scope: "row" }, name),
      ...runs.map((run) => h("td", { class: "number" }, `${spread(of(run, name)[1])} → ${spread(of(run, name)[2])}`))));
  return table(["metric", ...runs.map((run) => run.name)], rows, "Held-out metrics before → after, with 95 % intervals", true);
}

// --- curves ---------------------------------------------------------------------------------------------------------

const NO_TERMS = ["reward/mean", "reward/std", "reward/zero_std_groups"];
const has = (prefix) => (name) => name.startsWith(prefix);
const PANELS = [
  ["Reward", "mean over completions", (n) => n === "reward/mean"],
  ["Reward terms", "mean, before weighting", (n) => n.startsWith("reward/") && !NO_TERMS.includes(n)],
  ["Groups that teach nothing", "share whose rewards are all equal", (n) => n === "reward/zero_std_groups"],
  ["Loss", "", (n) => n === "loss"],
  ["Entropy", "nats per token", (n) => n === "policy/entropy"],
  ["KL divergence", "nats per token", (n) => n === "policy/kl" || n === "policy/approx_kl"],
  ["Length", "tokens per completion", (n) => ["completion/length", "completion/min_length", "completion/max_length"].includes(n)],
  ["Truncated and repeated", "share", (n) => n === "completion/truncated" || n === "completion/repetition"],
  ["Boxes and other traits", "", (n) => n.startsWith("completion/")],
  ["Spread of rewards", "standard deviation", (n) => n === "reward/std"],
  ["Gradient norm", "before clipping", (n) => n === "policy/grad_norm"],
  ["Learning rate", "", (n) => n === "lr"],
  ["Tokens per second", "", (n) => n === "tokens_per_second"],
  ["Time of a step", "seconds by phase", has("time/")],
  ["Memory", "GiB, largest so far", has("memory/")],
];

function showCurves() {
  const section = at("curves");
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves.values)))].filter((n) => !n.startsWith("eval/"));
  if (data.groups.length > 1) {
    section.append(h("ul", { class: "legend", "aria-label": "Runs" }, ...data.groups.map((group, i) =>
      h("li", {}, swatch(i % COLOURS, 0), group.name))));
  }
  const main = h("div", { class: "grid" });
  for (const name of heldOutNames()) main.append(heldOutPanel(name));
  const taken = new Set();
  for (const [title, unit, belongs] of PANELS) {
    const own = names.filter((name) => belongs(name) && !taken.has(name));
    own.forEach((name) => taken.add(name));
    if (own.length) main.append(panel(title, unit, lines(own)));
  }
  section.append(main);
  const rest = names.filter((name) => !taken.has(name));
  if (rest.length) {
    section.append(h("details", {}, h("summary", {}, `${rest.length} more metrics`),
      h("div", { class: "grid" }, ...rest.map((name) => panel(name, "", lines([name]))))));
  }
  if (!names.length) section.append(h("p", { class: "quiet" }, "No step has been finished yet."));
}

function heldOutNames() {
  const names = runs.flatMap((run) => run.held_out.flatMap(([, metrics]) => Object.keys(metrics)));
  return [...new Set(names)].filter((name) => !name.startsWith("accuracy/")).slice(0, 4);
}

/** The curves of metrics: one for each group of runs, with a band if it has several. */
function lines(names) {
  const short = (name) => name.replace(/^(reward|completion|policy|time|memory)\//, "");
  const made = [];
  data.groups.forEach((group, g) => names.forEach((name, n) => {
    const points = joined(group.runs.map((r) => runs[r].curves), name);
    if (!points.length) return;
    const many = data.groups.length > 1;
    const label = many ? (names.length > 1 ? `${short(name)}, ${group.name}` : group.name) : short(name);
    const weight = runs[0].terms.find((term) => `reward/${term[0]}` === name);
    made.push({ label: weight && known(weight[1]) && !many ? `${label} (weight ${written(weight[1])})` : label, points,
      colour: (many ? g : n) % COLOURS, dash: (many ? n : Math.floor(n / COLOURS)) % 4, smooth: true,
      band: group.runs.length > 1 });
  }));
  return made;
}

/** Points [step, mean, least, largest] over runs. */
function joined(curves, name) {
  const steps = new Map();
  for (const curve of curves) {
    (curve.values[name] || []).forEach((value, i) => {
      if (!known(value)) return;
      const step = curve.step[i];
      if (!steps.has(step)) steps.set(step, []);
      steps.get(step).push(value);
    });
  }
  return [...steps].sort((a, b) => a[0] - b[0]).map(([step, values]) =>
    [step, values.reduce((a, b) => a + b, 0) / values.length, Math.min(...values), Math.max(...values)]);
}

function heldOutPanel(name) {
  const series = [];
  data.groups.forEach((group, g) => group.runs.forEach((r, i) => {
    const points = runs[r].held_out.filter(([, metrics]) => metrics[name])
      .map(([step, metrics]) => [step, metrics[name][0], metrics[name][1] ?? metrics[name][0], metrics[name][2] ?? metrics[name][0]]);
    if (points.length) {
      series.push({ label: data.groups.length > 1 || group.runs.length > 1 ? runs[r].name : name, points,
        colour: g % COLOURS, dash: i % 4, smooth: false, bars: true });
    }
  }));
  return panel(`Held-out ${name}`, "with 95 % intervals", series);
}

const swatch = (colour, dash) => s("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" },
  s("line", { x1: 0, x2: 26, y1: 5, y2: 5, class: `curve c${colour} d${dash}` }));

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function smoothed(points) {
  const reach = Math.floor(Math.max(1, points.length / 20) / 2);
  return points.map((point, i) => {
    const near = points.slice(Math.max(0, i - reach), i + reach + 1);
    return [point[0], near.reduce((sum, one) => sum + one[1], 0) / near.length];
  });
}

function panel(title, unit, series) {
  const [W, H, L, R, T, B] = [360, 210, 50, 10, 10, 26];
  const all = series.flatMap((one) => one.points);
  const steps = [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b);
  const [first, last] = [steps[0], steps[steps.length - 1]];
  let low = Math.min(...all.map((p) => (p[2] ?? p[1])));
  let high = Math.max(...all.map((p) => (p[3] ?? p[1])));
  const margin = Math.abs(high) * 0.1;
  if (low === high) [low, high] = high === 0 ? [0, 1] : [low - margin, high + margin];
  const x = (step) => L + (W - L - R) * (last === first ? 0.5 : (step - first) / (last - first));
  const y = (value) => H - B - (H - B - T) * (value - low) / (high - low);
  const path = (points) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
  const ends = series.map((one) => `${one.label} from ${written(one.points[0][1])} to ${written(one.points[one.points.length - 1][1])}`);
  const picture = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}, steps ${first} to ${last}: ${ends.join("; ")}` });
  for (const value of ticks(low, high, 4)) {
    picture.append(s("line", { x1: L, x2: W - R, y1: y(value), y2: y(value), class: "tick" }),
      s("text", { x: L - 5, y: y(value) + 4, "text-anchor": "end" }, value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(value)));
  }
  for (const value of ticks(first, last, 5).filter(Number.isInteger)) {
    picture.append(s("text", { x: x(value), y: H - 10, "text-anchor": "middle" }, String(value)));
  }
  picture.append(s("text", { x: W - R, y: H - 2, "text-anchor": "end" }, "step"));
  for (const [step, kind] of data.groups.length === 1 ? runs.flatMap((run) => run.warnings) : []) {
    if (known(step) && step >= first && step <= last) {
      picture.append(s("line", { x1: x(step), x2: x(step), y1: T, y2: H - B, class: "warned" }, s("title", {}, `warning: ${kind}`)));
    }
  }
  for (const one of series) {
    const drawn = one.smooth ? smoothed(one.points) : one.points;
    if (one.band) {
      const edge = one.points.map((p) => [p[0], p[3]]).concat(one.points.map((p) => [p[0], p[2]]).reverse());
      picture.append(s("path", { d: `${path(edge)}Z`, class: `band f${one.colour}` }));
    } else if (one.smooth) picture.append(s("path", { d: path(one.points), class: `raw c${one.colour}` }));
    picture.append(s("path", { d: path(drawn), class: `curve c${one.colour} d${one.dash}` }));
    for (const p of one.bars || one.points.length === 1 ? one.points : []) {
      picture.append(s("line", { x1: x(p[0]), x2: x(p[0]), y1: y(p[2] ?? p[1]), y2: y(p[3] ?? p[1]), class: `bar c${one.colour}` }),
        s("circle", { cx: x(p[0]), cy: y(p[1]), r: 3, class: `f${one.colour}` }));
    }
  }
  const cursor = s("line", { y1: T, y2: H - B, class: "cursor", visibility: "hidden" });
  picture.append(cursor);
  const outputs = series.map(() => h("span", { class: "value" }));
  const range = h("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": `Step of ${title}` });
  const stepText = h("span", { class: "quiet" }, "");
  const show = () => {
    const step = steps[Number(range.value)];
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    cursor.setAttribute("visibility", "visible");
    stepText.textContent = ` step ${step}`;
    const told = series.map((one, i) => {
      const point = one.points.find((p) => p[0] === step);
      outputs[i].textContent = point ? written(point[1]) : "–";
      return `${one.label} ${outputs[i].textContent}`;
    });
    range.setAttribute("aria-valuetext", `step ${step}: ${told.join(", ")}`);
  };
  range.addEventListener("input", show);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const wanted = first + ((event.clientX - box.left) / box.width * W - L) / (W - L - R) * (last - first);
    let best = 0;
    steps.forEach((step, i) => { if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = i; });
    range.value = best;
    show();
  });
  const items = series.map((one, i) => h("li", {}, swatch(one.colour, one.dash), h("span", {}, one.label), outputs[i]));
  return h("figure", { class: "panel" }, h("figcaption", {}, h("h3", {}, title), h("span", { class: "quiet" }, unit), stepText),
    picture, range, h("ul", { class: "legend" }, ...items));
}

// --- answers --------------------------------------------------------------------------------------------------------

const answers = runs.flatMap((run, r) => run.completions.map((values, i) =>
  Object.assign(Object.fromEntries(run.fields.map((name, f) => [name, values[f]])), { run: r, order: i })));
const sampleOf = (answer) => runs[answer.run].samples[answer.sample];
const whole = (text) => (Array.isArray(text) ? text[0] + text[2] : text);
const sizeOf = (text) => (Array.isArray(text) ? text[0].length + text[1] + text[2].length : text.length);

function pairs() {
  const found = new Map();
  for (const answer of answers.filter((one) => one.when === 0 || one.when === 2)) {
    const key = `${answer.run} ${answer.sample}`;
    if (!found.has(key)) found.set(key, {});
    found.get(key)[answer.when === 0 ? "before" : "after"] ??= answer;
  }
  return [...found.values()].filter((one) => one.before && one.after).map((one) => ({
    ...one, run: one.after.run, change: (merit(one.after) ?? 0) - (merit(one.before) ?? 0),
  }));
}
const merit = (answer) => answer.score ?? answer.reward;

const VERDICTS = {
  all: ["all", () => true],
  right: ["right", (one) => one.right === true],
  wrong: ["wrong", (one) => one.right === false],
  unreadable: ["unreadable", (one) => one.readable === false],
  truncated: ["truncated", (one) => one.truncated],
  fixed: ["fixed: wrong before, right after", (one, pair) => pair && pair.before.right === false && one.right === true],
  broken: ["broken: right before, wrong after", (one, pair) => pair && pair.before.right === true && one.right === false],
};
const ORDERS = {
  change: ["largest change", (a, b) => Math.abs(b.pair?.change ?? 0) - Math.abs(a.pair?.change ?? 0)],
  better: ["what got better", (a, b) => (b.pair?.change ?? 0) - (a.pair?.change ?? 0)],
  worse: ["what got worse", (a, b) => (a.pair?.change ?? 0) - (b.pair?.change ?? 0)],
  order: ["as they came", () => 0],
  high: ["highest reward", (a, b) => (b.one.reward ?? -Infinity) - (a.one.reward ?? -Infinity)],
  low: ["lowest reward", (a, b) => (a.one.reward ?? Infinity) - (b.one.reward ?? Infinity)],
  long: ["longest", (a, b) => sizeOf(b.one.text) - sizeOf(a.one.text)],
};

function showAnswers() {
  const section = at("answers");
  const beside = pairs();
  if (!answers.length) {
    section.append(h("p", { class: "quiet" }, "The run has no completions that a report can show."));
    return;
  }
  const asked = new URLSearchParams(location.hash.startsWith("#!") ? location.hash.slice(2) : "");
  const choice = (name, label, options, first) => {
    const select = h("select", { name, id: `filter-${name}` }, ...options.map(([value, text]) => h("option", { value }, text)));
    select.value = options.some(([value]) => value === asked.get(name)) ? asked.get(name) : first;
    return [labelled(name, label, select), select];
  };
  const entry = (name, label, type) => {
    const input = h("input", { name, id: `filter-${name}`, type, step: type === "number" ? "any" : null });
    input.value = asked.get(name) ?? "";
    return [labelled(name, label, input), input];
  };
  const labelled = (name, label, field) => h("div", {}, h("label", { for: `filter-${name}` }, label), field);
  const views = [...(beside.length ? [["beside", "before and after, side by side"]] : []), ["single", "one by one"]];
  const fields = {
    view: choice("view", "Show", views, views[0][0]),
    run: choice("run", "Run", [["", "all"], ...runs.map((run, r) => [String(r), run.name])], ""),
    when: choice("when", "From", [["", "all"], ...WHEN.map((text, i) => [String(i), text]).filter(([i]) => answers.some((a) => a.when === Number(i)))], ""),
    from: entry("from", "Steps from", "number"),
    to: entry("to", "Steps to", "number"),
    least: entry("least", "Reward from", "number"),
    most: entry("most", "Reward to", "number"),
    verdict: choice("verdict", "Verdict", Object.entries(VERDICTS).map(([name, [text]]) => [name, text]), "all"),
    text: entry("text", "Text contains", "search"),
    sort: choice("sort", "Order", Object.entries(ORDERS).map(([name, [text]]) => [name, text]), beside.length ? "change" : "order"),
  };
  if (runs.length === 1) fields.run[0].hidden = true;
  const form = h("form", { class: "filters", role: "search", "aria-label": "Filters of answers" }, ...Object.values(fields).map((one) => one[0]));
  const value = (name) => fields[name][1].value;
  const status = h("p", { role: "status", class: "quiet" });
  const list = h("ul", { class: "cards", "aria-label": "Answers" });
  const more = h("button", { type: "button" }, "Show more");
  let found = [];
  const grow = () => {
    const next = found.slice(list.children.length, list.children.length + PAGE);
    list.append(...next.map(({ one, pair }) => (pair ? pairCard(pair) : card(one))));
    more.hidden = list.children.length >= found.length;
  };
  const update = () => {
    const isBeside = value("view") === "beside";
    for (const name of ["when", "from", "to"]) fields[name][0].hidden = isBeside;
    const bound = (name, missing) => (value(name) === "" ? missing : Number(value(name)));
    const [from, to, least, most] = [bound("from", -Infinity), bound("to", Infinity), bound("least", -Infinity), bound("most", Infinity)];
    const words = value("text").toLowerCase();
    const matches = VERDICTS[value("verdict")][1];
    const rows = isBeside ? beside.map((pair) => ({ one: pair.after, pair })) : answers.map((one) => ({ one, pair: null }));
    found = rows.filter(({ one, pair }) =>
      (value("run") === "" || one.run === Number(value("run"))) &&
      (isBeside || value("when") === "" || one.when === Number(value("when"))) &&
      (isBeside || (one.step >= from && one.step <= to)) &&
      (value("least") === "" || (known(one.reward) && one.reward >= least)) &&
      (value("most") === "" || (known(one.reward) && one.reward <= most)) &&
      matches(one, pair) && (words === "" || contains(one, pair, words)));
    found.sort(ORDERS[value("sort")][1]);
    status.textContent = `${found.length} of ${rows.length} ${isBeside ? "samples" : "completions"}`;
    list.replaceChildren();
    grow();
    const kept = Object.keys(fields).map((name) => [name, value(name)]).filter(([, one]) => one !== "");
    if (form.dataset.touched) history.replaceState(null, "", `#!${new URLSearchParams(kept)}`);
  };
  form.addEventListener("input", () => { form.dataset.touched = "yes"; update(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const next = list.children.length;
    grow();
    list.children[next]?.querySelector("h3")?.focus();
  });
  section.append(...runs.map(shownOf), legend(), form, status, list, more);
  update();
}

function contains(one, pair, words) {
  const sample = sampleOf(one);
  return [one.text, pair?.before.text, sample.question, sample.id, sample.truth].some((text) => known(text) && whole(text).toLowerCase().includes(words));
}

function shownOf(run) {
  const shown = (whens) => run.completions.filter((values) => whens.includes(values[run.fields.indexOf("when")])).length;
  const parts = [
    [shown([0, 2]), run.totals.measured, "measured before and after"],
    [shown([3]), run.totals.training, "in training"],
    [shown([1]), run.totals.on_the_way, "of evaluations on the way"],
  ].filter((part) => part[1]).map(([some, all, what]) => `${some} of ${all} ${what}`);
  const missing = run.without_picture ? ` ${run.without_picture} pictures had no room or are missing.` : "";
  return h("p", { class: "quiet" }, `${runs.length > 1 ? `${run.name}: ` : ""}Completions in this report: ${parts.join(", ")}. All are in the run's folder.${missing}`);
}

const legend = () => h("p", { class: "facts" }, h("span", { class: "key true", "aria-hidden": "true" }), "true (solid) ",
  h("span", { class: "key answered", "aria-hidden": "true" }), "answered (dashed)");

function verdict(answer) {
  if (answer.readable === false) return h("span", { class: "verdict wrong" }, "✗ unreadable");
  if (!known(answer.right)) return null;
  return h("span", { class: `verdict ${answer.right ? "right" : "wrong"}` }, answer.right ? "✓ right" : "✗ wrong");
}

function pairCard(pair) {
  const sample = sampleOf(pair.after);
  return h("li", {}, h("h3", { tabindex: "-1" }, longText(sample.question, 160)), identity(sample),
    h("div", { class: "sides" }, ...[pair.before, pair.after].map((one) =>
      h("div", {}, h("strong", {}, one.when === 0 ? "before" : "after"), " ", verdict(one), pictureOf(sample, one), longText(one.text, 300), facts(one)))),
    truthOf(sample));
}

function card(one) {
  const sample = sampleOf(one);
  return h("li", {}, h("h3", { tabindex: "-1" }, longText(sample.question, 160)), identity(sample),
    h("p", { class: "facts" }, `${one.when === 3 ? "training, " : one.when === 1 ? "evaluation, " : ""}${one.when === 0 ? "before training" : `step ${one.step}`} `, verdict(one)),
    pictureOf(sample, one), longText(one.text, 300), facts(one), truthOf(sample));
}

const identity = (sample) => h("p", { class: "facts quiet" }, [sample.id, sample.subject].filter(Boolean).join(", "));

function truthOf(sample) {
  const parts = [];
  if (sample.truth) parts.push(h("p", { class: "facts text", dir: "auto" }, h("strong", {}, "truth: "), sample.truth));
  if (sizeOf(sample.prompt)) parts.push(h("details", { class: "facts" }, h("summary", {}, "prompt"), longText(sample.prompt, 2000)));
  return parts.length ? h("div", {}, ...parts) : null;
}

function facts(one) {
  const terms = runs[one.run].terms.map(([name], i) => (known(one.terms[i]) ? `${name} ${written(one.terms[i])}` : null)).filter(Boolean);
  const told = [`reward ${written(one.reward)}`, terms.length ? `(${terms.join(", ")})` : null,
    known(one.advantage) ? `advantage ${written(one.advantage)}` : null,
    known(one.score) ? `${runs[one.run].right[0]} ${written(one.score)}` : null, one.truncated ? "truncated" : null];
  return h("p", { class: "facts" }, told.filter(Boolean).join(" "));
}

/** A text that shows its beginning, and the rest on request. */
function longText(text, length) {
  const full = Array.isArray(text) ? `${text[0]}\n[… ${text[1]} characters are left out of this report …]\n${text[2]}` : text;
  const shown = h("span", { class: "text", dir: "auto" }, full.length > length ? `${full.slice(0, length)}…` : full);
  if (full.length <= length) return shown;
  const button = h("button", { type: "button", "aria-expanded": "false" }, "Show all");
  button.addEventListener("click", () => {
    const isOpen = button.getAttribute("aria-expanded") === "true";
    shown.textContent = isOpen ? `${full.slice(0, length)}…` : full;
    button.setAttribute("aria-expanded", String(!isOpen));
    button.textContent = isOpen ? "Show all" : "Show less";
  });
  return h("span", {}, shown, " ", button);
}

function pictureOf(sample, answer) {
  if (!sample.images.length) return null;
  const pictures = sample.images.map((image, i) => {
    const told = `picture ${i + 1} of ${sample.id || "the sample"}`;
    const drawn = i === sample.asked ? marks(sample, answer, image) : null;
    const frame = h("div", { class: "picture" });
    if (image.src && image.src.startsWith("data:image/webp;base64,")) {
      const small = image.w * image.h <= 128 * 128;
      frame.append(h("img", { src: image.src, alt: told, width: image.w, height: image.h, loading: "lazy", class: small ? "small" : null }));
    } else {
      frame.style.aspectRatio = `${image.w} / ${image.h}`;
      frame.append(h("span", { class: "quiet" }, "picture not in this report"));
    }
    if (drawn) frame.append(drawn);
    return frame;
  });
  const rest = sample.left_out ? h("figcaption", { class: "facts quiet" }, `${sample.left_out} more images are not shown`) : null;
  return h("figure", {}, ...pictures, rest);
}

function marks(sample, answer, image) {
  const made = [...sample.true.map((one) => [...one, "true"]), ...answer.places.map((one) => [...one, "answered"])]
    .map(([label, place, kind]) => mark(label, place, kind, image));
  return made.length ? s("svg", { viewBox: `0 0 ${image.w} ${image.h}`, preserveAspectRatio: "none" }, ...made) : null;
}

function mark(label, place, kind, image) {
  const [xs, ys] = [place.filter((_, i) => i % 2 === 0), place.filter((_, i) => i % 2 === 1)];
  const [left, top] = [Math.min(...xs), Math.min(...ys)];
  const unit = Math.max(image.w, image.h);
  const shape = (kinds) => {
    if (place.length === 2) return s("circle", { class: kinds, cx: xs[0], cy: ys[0], r: unit / 60 });
    if (place.length === 4) return s("rect", { class: kinds, x: left, y: top, width: Math.abs(xs[1] - xs[0]), height: Math.abs(ys[1] - ys[0]) });
    return s("polygon", { class: kinds, points: xs.map((x, i) => `${x},${ys[i]}`).join(" ") });
  };
  const told = `${kind}${label ? ` ${label}` : ""}: ${place.map((value) => Math.round(value * 10) / 10).join(", ")} pixels`;
  const size = unit / 18;
  const name = label ? s("text", { class: `name ${kind}`, x: Math.max(0, left), y: kind === "true" ? Math.max(size, top - size / 4) : Math.min(image.h - 1, Math.max(...ys) + size),
    "font-size": size, "stroke-width": size / 5 }, label.slice(0, 40)) : null;
  return s("g", { class: "place", tabindex: "0", role: "img", "aria-label": told }, s("title", {}, told), shape(`rim ${kind}`), shape(`mark ${kind}`), name);
}

// --- options, time and memory ---------------------------------------------------------------------------------------

function showOptions() {
  const section = at("options");
  const row = (name, values) => h("tr", {}, h("th", { scope: "row" }, name), ...values.map((value) => h("td", { class: "text" }, value ?? "–")));
  if (runs.length > 1) {
    section.append(h("h3", {}, "What differs"), data.differences.length
      ? table(["option", ...runs.map((run) => run.name)], data.differences.map(([name, values]) => row(name, values)), "Options whose values differ")
      : h("p", {}, "All options are the same."));
  }
  for (const run of runs) {
    const rows = Object.entries(run.options).map(([name, value]) => row(name, [value]));
    section.append(h("details", {}, h("summary", {}, runs.length > 1 ? `All options of ${run.name}` : "All options"),
      rows.length ? table(["option", "value"], rows, `Options of ${run.name}, as resolved.yaml has them`) : h("p", {}, "The run has no record of its options.")));
    for (const change of run.changes) section.append(h("p", { class: "facts text" }, h("strong", {}, "Changed when resumed: "), change));
  }
}

function showMachine() {
  const section = at("machine");
  for (const run of runs) {
    const { seconds, tokens_per_second: speed, memory } = run.machine;
    const sum = Object.values(seconds).reduce((a, b) => a + (b ?? 0), 0);
    const rows = Object.entries(seconds).map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name),
      h("td", { class: "number" }, duration(value)), h("td", { class: "number" }, `${written(100 * value / (sum || 1), 1)} %`)));
    const origin = Object.entries(run.origin).filter(([, value]) => value && value !== "null").map(([name, value]) => `${name} ${value}`);
    section.append(runs.length > 1 ? h("h3", {}, run.name) : "",
      rows.length ? table(["phase", "time", "share"], rows, `Time of all steps, ${duration(sum)} together`, true) : h("p", {}, "No time was recorded."),
      h("p", { class: "facts" }, [known(speed) ? `${written(speed, 0)} tokens per second, mean over steps` : null,
        known(memory) ? `largest memory ${written(memory, 2)} GiB` : null, ...origin].filter(Boolean).join("; ")));
  }
}

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 100) return `${written(seconds, 1)} s`;
  return seconds < 6000 ? `${written(seconds / 60, 1)} min` : `${written(seconds / 3600, 1)} h`;
}

// --- a run that goes on ---------------------------------------------------------------------------------------------

function follow() {
  const box = h("input", { type: "checkbox", checked: true });
  at("subtitle").after(h("p", {}, h("label", {}, box, " reload when the run has new results")));
  let now = null;
  setInterval(async () => {
    try {
      const reply = await fetch("version", { cache: "no-store" });
      const version = reply.ok ? await reply.text() : now;
      if (now !== null && version !== now && box.checked) location.reload();
      now = version;
    } catch { /* the server has ended: the page stays as it is */ }
  }, 10000);
}

showResult();
showCurves();
showAnswers();
showOptions();
showMachine();
if (data.live) follow();

// The arena's page: draws what the server says, and sends what a person chooses. Plain DOM, no library.
//
// A choice goes into a queue in localStorage before it is sent, and leaves it when the server has said that it is saved;
// until then it is sent again with the same id, and the server takes an id once. HTML comes from the server alone, which
// renders Markdown without raw HTML; everything else is set as text.

const READ_MS = 250; // a choice sooner than this after a new pair is none: nobody has read it
const MEASURED = 5; // labels that an accuracy has to rest on before it is shown
const TIMEOUT_MS = 15000;
const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const LETTERS = { left: "A", right: "B" };
const WORDS = { left: "A is better", right: "B is better", tie: "a tie", bad: "both bad", skip: "skipped" };
const KEYS = {
  ArrowLeft: "left",
  ArrowRight: "right",
  ArrowUp: "tie",
  t: "tie",
  ArrowDown: "bad",
  b: "bad",
  s: "skip",
};

const at = (id) => document.getElementById(id);
const percent = (share) => `${Math.round(100 * share)}%`;
const decimal = (value) =>
  value
    .toFixed(2)
    .replace(/^-(?!0\.00$)/, "−")
    .replace("-", "");
const seconds = () => performance.now() / 1000;

let session = null;
let ask = null; // the pair on the screen
let busy = false; // a choice or an undo is on its way
let dimensions = {};
let armed = null; // the dimension that the next arrow key answers
let shownAt = 0;
let readAfter = 0;
let before = 0; // seconds that the pair was seen before the page was hidden
let retry = null;
let failures = 0;
let beta = null; // the slider's, once it was moved
let driftAsked = 0;

class Unreachable extends Error {}
class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function call(path, body) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...(body && post), cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  } catch {
    throw new Unreachable("Offline: the server does not answer.");
  }
  const answer = await response.json().catch(() => undefined);
  if (response.status >= 500 || (response.ok && answer === undefined)) {
    throw new Unreachable(`The server has failed: ${answer?.error ?? response.status}.`);
  }
  if (!response.ok) throw new Refused(response.status, answer?.error ?? `the server said ${response.status}`);
  return answer;
}

// ---- Elements

function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function prose(html, dir) {
  const element = make("div", { class: "prose", dir: dir ?? "auto" });
  setProse(element, html, dir);
  return element;
}

function setProse(element, html, dir) {
  element.innerHTML = html;
  element.dir = dir ?? "auto";
  if (!element.textContent.trim()) element.replaceChildren(make("span", { class: "muted" }, "(no visible text)"));
}

function say(text, kind = "", unseen = "") {
  const shown = make("span", { class: kind }, (kind === "saved" ? "✓ " : "") + text);
  at("status").replaceChildren(shown, unseen ? make("span", { class: "unseen" }, ` ${unseen}`) : "");
}

// ---- The queue

const queueName = () => `arena ${session.title} ${session.stage} ${session.person}`;
const queue = () => (session ? JSON.parse(localStorage.getItem(queueName()) ?? "[]") : []);
const keep = (waiting) => localStorage.setItem(queueName(), JSON.stringify(waiting));

function newId() {
  // crypto.randomUUID is missing on a page that came over plain HTTP from another machine.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}

function choose(choice) {
  if (!ask || busy || seconds() < readAfter) return;
  const reason = at("reason").value.trim();
  enqueue("/api/label", { id: newId(), ask: ask.id, choice, dimensions, reason, seconds: timeSeen() });
}

function undo() {
  if (busy || at("undo").hidden) return;
  // With its id, a request that is repeated takes back no second label; a new window does not know the id.
  const [label] = made().slice(-1);
  enqueue("/api/undo", label ? { label } : {});
}

const made = () => JSON.parse(sessionStorage.getItem(`made ${queueName()}`) ?? "[]"); // ids of labels, the last one last
const setMade = (ids) => sessionStorage.setItem(`made ${queueName()}`, JSON.stringify(ids.slice(-500)));

function enqueue(path, body) {
  keep([...queue(), { path, body }]);
  say(path === "/api/label" ? "Saving…" : "Taking it back…");
  send();
}

async function send() {
  clearTimeout(retry);
  const [first] = queue();
  if (!first) return;
  const { path, body } = first;
  setBusy(true, ask && body.ask === ask.id ? body.choice : null);
  try {
    const answer = await call(path, body);
    settle(first);
    setMade(path === "/api/undo" ? made().slice(0, -1) : [...made(), body.id]);
    if (answer.saved) {
      after(answer, body.choice ? body : null);
      send();
    } else {
      setMade([]);
      await start();
      say(
        body.label
          ? "The last choice was made in another window: undo again to take that back."
          : "There is nothing to undo.",
      );
    }
  } catch (error) {
    const repeatable = body.id || body.label;
    if (error instanceof Unreachable && repeatable) return waitAndSend(error);
    if (error instanceof Refused && [401, 403].includes(error.status)) {
      return showBanner(`This browser is no longer let in: open the link that the command printed. ${waitingWords()}`);
    }
    settle(first);
    await start();
    say(
      error.status === 409
        ? "That pair was answered in another window; here is the next."
        : `Not saved: ${error.message}`,
      "bad",
    );
  }
}

// The server has answered: it is sent no more.
function settle(first) {
  keep(queue().filter((one) => JSON.stringify(one) !== JSON.stringify(first)));
  connected();
}

function waitAndSend(error) {
  showBanner(`${error.message} ${waitingWords()}`);
  say("Not saved yet");
  retry = setTimeout(queue().length ? send : start, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
}

function waitingWords() {
  const waiting = queue().length;
  if (!waiting) return "The page tries again by itself.";
  return `${waiting === 1 ? "1 choice waits" : `${waiting} choices wait`} in this browser, and will be sent when the server is back.`;
}

function showBanner(text) {
  at("banner-text").textContent = text;
  at("banner").hidden = false;
}

function connected() {
  failures = 0;
  at("banner").hidden = true;
}

// What a click has changed, in the order in which a person looks for it.
function after(answer, label) {
  Object.assign(session, { progress: answer.progress, learner: answer.learner });
  setBusy(false);
  showProgress(answer.progress);
  showLearner(answer.learner);
  showBelief(answer.belief, label?.choice);
  if (label) showOrAskDrift(answer.drift);
  if (label) sessionStorage.removeItem(`draft ${label.ask}`);
  showAsk(answer.ask);
  const next = answer.ask ? `Pair ${answer.ask.number} is shown.` : "";
  if (label) {
    const saved = label.choice === "skip" ? "Skipped" : `Saved: ${WORDS[label.choice]}`;
    say(
      saved,
      "saved",
      `${answer.progress.text}. ${label.choice === "skip" ? "" : at("belief-text").textContent} ${next}`,
    );
  } else {
    say("Taken back: choose again.", "", next);
  }
}

// ---- The pair

function showAsk(next) {
  ask = next;
  disarm();
  at("pair").hidden = !ask;
  document.querySelector(".bar").classList.toggle("without", !ask);
  for (const button of document.querySelectorAll("[data-choice]")) button.hidden = !ask;
  showEnd();
  if (!ask) return;
  at("number").textContent = `pair ${ask.number}`;
  const turns = ask.turns?.length ? ask.turns : [{ role: "user", html: ask.prompt }];
  at("prompt").replaceChildren(
    ...turns.map((turn) => {
      const role = turns.length > 1 ? make("span", { class: "role" }, turn.role) : null;
      return make("div", { class: `turn ${turn.role}` }, role, prose(turn.html, ask.dir.prompt));
    }),
  );
  at("prompt").scrollTop = at("prompt").scrollHeight; // the last turn is what the replies answer
  for (const side of ["left", "right"]) {
    setProse(at(side), ask[side], ask.dir[side]);
    at(side).scrollTop = 0;
    at(side).parentElement.classList.remove("all", "chosen");
  }
  const draft = JSON.parse(sessionStorage.getItem(`draft ${ask.id}`) ?? "{}");
  dimensions = draft.dimensions ?? {};
  at("reason").value = draft.reason ?? "";
  openReason(Boolean(draft.reason));
  showDimensions();
  measure();
  window.scrollTo(0, 0);
  shownAt = seconds();
  before = 0;
  readAfter = shownAt + READ_MS / 1000;
}

function timeSeen() {
  return Math.round(10 * (before + (shownAt ? seconds() - shownAt : 0))) / 10;
}

function keepDraft() {
  if (ask) sessionStorage.setItem(`draft ${ask.id}`, JSON.stringify({ dimensions, reason: at("reason").value }));
}

// Which texts are longer than their boxes: they get a button, and Tab stops at those that scroll.
function measure() {
  for (const id of ["left", "right"]) {
    const box = at(id);
    const reply = box.parentElement;
    const button = reply.querySelector(".whole");
    const whole = reply.classList.contains("all");
    const long = whole || box.scrollHeight > box.clientHeight + 4;
    reply.classList.toggle("long", long);
    button.hidden = !long;
    button.textContent = whole ? "Show less" : `Show all ${ask.lengths[id].toLocaleString("en")} characters`;
    button.setAttribute("aria-expanded", String(whole));
    button.setAttribute("aria-controls", id);
  }
  for (const box of document.querySelectorAll(".prose, .turns, .prose pre, .prose table")) {
    const scrolls = box.scrollHeight > box.clientHeight + 4 || box.scrollWidth > box.clientWidth + 4;
    if (scrolls || box.id) box.tabIndex = 0;
  }
}

function toggleWhole(replies) {
  const open = !replies.some((reply) => reply.classList.contains("all"));
  for (const reply of replies) reply.classList.toggle("all", open && reply.classList.contains("long"));
  measure();
}

function setBusy(now, choice = null) {
  busy = now;
  at("pair").classList.toggle("waiting", now);
  for (const button of at("choices").querySelectorAll("button")) {
    button.setAttribute("aria-disabled", String(now));
    button.classList.toggle("pressed", now && button.dataset.choice === choice);
  }
  for (const reply of document.querySelectorAll(".reply"))
    reply.classList.toggle("chosen", now && reply.dataset.side === choice);
}

function showEnd() {
  const { progress, mode } = session;
  at("reached").hidden = !progress.reached || mode !== "label";
  const go = make("code", {}, session.command ?? "rlhf-pipeline run RECIPE");
  at("reached-text").replaceChildren(
    `${progress.text}. `,
    go,
    " goes on from here with these labels. ",
    ask ? "More labels are welcome until then." : "",
  );
  at("nothing").hidden = Boolean(ask);
  if (ask) return;
  const empty = !progress.labels && !progress.mine && !progress.skipped;
  at("nothing-title").textContent = empty ? "There is nothing to label yet" : "Nothing is left for you";
  at("nothing-text").textContent = empty
    ? "No prompt here has two replies that differ."
    : `You have seen every pair that there is for you: ${count(progress.mine, "label")}. Thank you.` +
      (progress.reached || mode !== "label" || !progress.wanted ? "" : " Labels of other people are still missing.");
}

const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;

// ---- Dimensions and the reason

function makeDimensions() {
  const names = session.dimensions;
  at("dimensions").replaceChildren(
    ...names.map((name, i) => {
      const key = i < 9 ? make("kbd", { "aria-hidden": "true" }, String(i + 1)) : null;
      const three = [
        ["left", "A"],
        ["tie", "="],
        ["right", "B"],
      ].map(([side, letter]) => {
        const words = `${name}: ${WORDS[side]}`;
        const kind = side === "left" ? "a" : side === "right" ? "b" : "";
        const button = make(
          "button",
          { type: "button", class: kind, "aria-pressed": "false", "aria-label": words, "data-side": side },
          letter,
        );
        button.addEventListener("click", () => answerDimension(name, side));
        return button;
      });
      const label = make("span", {}, key, key ? " " : "", name);
      return make(
        "div",
        { class: "dimension", role: "group", "aria-label": name, "data-name": name },
        label,
        make("div", { class: "three" }, ...three),
      );
    }),
  );
  const last = Math.min(9, names.length);
  at("more-keys").replaceChildren(
    ...(last
      ? [make("kbd", {}, "1"), last > 1 ? "…" : "", last > 1 ? make("kbd", {}, String(last)) : "", " then an arrow"]
      : []),
  );
  at("more-title").parentElement.hidden = !last;
  const help = at("help-dimensions");
  help.hidden = !last;
  help.cells[0].replaceChildren(
    ...(last > 1 ? [make("kbd", {}, "1"), " … ", make("kbd", {}, String(last))] : [make("kbd", {}, "1")]),
  );
  help.cells[1].textContent = `${names.slice(0, 9).join(", ")}: then ←, → or ↑ says which reply is better in this; the same again takes it back`;
}

function showDimensions() {
  for (const group of at("dimensions").children) {
    group.classList.toggle("armed", group.dataset.name === armed);
    for (const button of group.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(dimensions[group.dataset.name] === button.dataset.side));
    }
  }
}

function answerDimension(name, side) {
  if (busy) return;
  const same = dimensions[name] === side;
  if (same) delete dimensions[name];
  else dimensions[name] = side;
  armed = null;
  showDimensions();
  keepDraft();
  say(same ? `${name}: taken back.` : `${name}: ${WORDS[side]}.`);
}

function arm(name) {
  armed = armed === name ? null : name;
  showDimensions();
  if (armed) at("dimensions").querySelector(".armed").scrollIntoView({ block: "nearest" });
  say(armed ? `${armed}: ← A, → B, ↑ the same` : "");
}

function disarm() {
  armed = null;
  showDimensions();
}

function openReason(open, focus = false) {
  at("reason-box").hidden = !open;
  at("open-reason").setAttribute("aria-expanded", String(open));
  at("open-reason").hidden = open;
  if (open && focus) at("reason").focus();
}

function closeReason() {
  if (!at("reason").value.trim()) openReason(false);
  at("reason").blur();
}

// ---- Progress and what was learnt

function showProgress(progress) {
  const { per_item: items, wanted } = progress;
  const parts = wanted ? [[progress.labels, wanted]] : [];
  if (wantedAccuracy()) parts.push([session.learner?.accuracy ?? 0, wantedAccuracy()]);
  if (items && (session.target?.per_item || !parts.length)) parts.push([items.done, items.of]);
  const [done, of] = parts.sort((one, other) => one[0] / one[1] - other[0] / other[1])[0] ?? [0, 0];
  at("done-so-far").hidden = false;
  at("progress-text").textContent = progress.text;
  at("progress-mine").textContent =
    `yours ${progress.mine}` + (progress.skipped ? `, skipped ${progress.skipped}` : "");
  at("progress").hidden = !of;
  meter(at("progress"), done, of || 1);
  at("progress").classList.toggle("full", progress.reached);
  at("undo").hidden = !progress.mine && !progress.skipped;
}

function meter(track, value, most) {
  track.setAttribute("aria-valuemax", String(most));
  track.setAttribute("aria-valuenow", String(Math.min(value, most)));
  track.firstElementChild.style.width = `${Math.min(100, (100 * value) / most)}%`;
}

function showLearner(learner) {
  const measured = Boolean(learner) && learner.accuracy !== null && learner.tested >= MEASURED;
  at("learnt").hidden = !measured;
  at("learnt-note").textContent = !session.has_features
    ? "The replies have no features here, so no reward model learns while you choose. Labels are kept all the same."
    : "A small Bayesian reward model over the frozen model's features, fitted again after each label." +
      (measured
        ? ""
        : ` Its accuracy is measured on pairs that were drawn at random: ${learner?.tested ?? 0} labels so far, and shown from ${MEASURED}.`);
  at("calibration").hidden = !measured || !learner.calibration?.some((bin) => bin.n);
  if (!measured) return;
  at("accuracy").textContent = learner.accuracy.toFixed(2);
  at("accuracy-interval").textContent =
    `${learner.low.toFixed(2)} to ${learner.high.toFixed(2)} (95%), ${count(learner.tested, "label")}, ties apart`;
  const points = remember(learner);
  at("history").replaceChildren(historyChart(points, wantedAccuracy()));
  if (!at("calibration").hidden)
    at("calibration-chart").replaceChildren(calibrationChart(learner.calibration.filter((bin) => bin.n)));
}

// The number in a target as `>= 0.7`.
function wantedAccuracy() {
  const found = /[\d.]+/.exec(session.target?.reward_accuracy ?? "");
  return found ? Number(found[0]) : null;
}

// The accuracy as this browser has seen it; an undo takes its point away again.
function remember(learner) {
  const name = `history ${queueName()}`;
  const known = JSON.parse(sessionStorage.getItem(name) ?? "[]").filter((point) => point.labels < learner.labels);
  const { labels, accuracy, low, high } = learner;
  const points = [...known, { labels, accuracy, low, high }].slice(-400);
  sessionStorage.setItem(name, JSON.stringify(points));
  return points;
}

function historyChart(points, wanted) {
  const [wide, high, left, right, top, bottom] = [310, 104, 26, 8, 8, 18];
  const first = points[0].labels;
  const last = Math.max(points.at(-1).labels, first + 1);
  const lowest = Math.min(0.4, ...points.map((point) => point.low));
  const floor = Math.max(0, Math.floor(10 * lowest) / 10);
  const x = (labels) =>
    points.length === 1 ? wide - right - 6 : left + ((labels - first) / (last - first)) * (wide - left - right);
  const y = (value) => top + ((1 - value) / (1 - floor)) * (high - top - bottom);
  const end = points.at(-1);
  const words =
    `Held-out accuracy by labels: ${points.length > 1 ? `${points[0].accuracy.toFixed(2)} at ${count(first, "label")}, now ` : ""}` +
    `${end.accuracy.toFixed(2)} at ${count(end.labels, "label")}${wanted ? `; ${wanted} is wanted` : ""}.`;
  const svg = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": words });
  for (const value of [0.5, 1]) {
    svg.append(
      draw("line", { class: "rule", x1: left, x2: wide - right, y1: y(value), y2: y(value) }),
      draw("text", { class: "end", x: left - 6, y: y(value) + 4 }, String(value)),
    );
  }
  if (wanted) {
    svg.append(
      draw("line", { class: "wanted", x1: left, x2: wide - right, y1: y(wanted), y2: y(wanted) }),
      draw("text", { class: "wanted", x: left + 4, y: y(wanted) - 4 }, `${wanted} wanted`),
    );
  }
  if (points.length > 1) {
    const up = points.map((point) => `${x(point.labels)},${y(point.high)}`);
    const down = points.map((point) => `${x(point.labels)},${y(point.low)}`).reverse();
    svg.append(draw("polygon", { class: "band", points: [...up, ...down].join(" ") }));
    svg.append(
      draw("polyline", {
        class: "line",
        points: points.map((point) => `${x(point.labels)},${y(point.accuracy)}`).join(" "),
      }),
    );
    svg.append(draw("text", { x: left, y: high - 3 }, count(first, "label")));
  }
  svg.append(draw("line", { class: "whisker", x1: x(end.labels), x2: x(end.labels), y1: y(end.low), y2: y(end.high) }));
  svg.append(draw("circle", { class: "dot", cx: x(end.labels), cy: y(end.accuracy), r: 4.5 }));
  svg.append(draw("text", { class: "end", x: wide - right, y: high - 3 }, count(end.labels, "label")));
  return svg;
}

function calibrationChart(bins) {
  const [wide, high, left, bottom] = [310, 128, 34, 30];
  const low = Math.min(0.5, ...bins.map((bin) => bin.true), ...bins.map((bin) => bin.from));
  const x = (value) => left + ((value - low) / (1 - low)) * (wide - left - 12);
  const y = (value) => high - bottom - ((value - low) / (1 - low)) * (high - bottom - 10);
  const words = bins.map((bin) => `said ${percent(bin.said)}, chosen ${percent(bin.true)} of ${bin.n}`).join("; ");
  const svg = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `Calibration: ${words}.` });
  for (const value of [low, 1]) {
    svg.append(draw("line", { class: "rule", x1: x(low), x2: x(1), y1: y(value), y2: y(value) }));
    svg.append(draw("text", { class: "end", x: left - 6, y: y(value) + 4 }, percent(value)));
    svg.append(draw("text", { class: value === 1 ? "end" : "", x: x(value), y: high - 14 }, percent(value)));
  }
  svg.append(draw("text", { class: "middle", x: (x(low) + x(1)) / 2, y: high - 14 }, "said"));
  svg.append(draw("text", { class: "end", x: left - 6, y: (y(low) + y(1)) / 2 + 4 }, "true"));
  svg.append(draw("line", { class: "diagonal", x1: x(low), y1: y(low), x2: x(1), y2: y(1) }));
  const most = Math.max(...bins.map((bin) => bin.n));
  for (const bin of bins) {
    svg.append(
      draw("circle", { class: "dot", cx: x(bin.said), cy: y(bin.true), r: 3 + 4.5 * Math.sqrt(bin.n / most) }),
    );
  }
  return svg;
}

function showBelief(belief, choice) {
  at("belief").hidden = !belief;
  if (!belief) return at("belief-text").replaceChildren();
  const side = belief.left >= 0.5 ? "left" : "right";
  const [share, low, high] =
    side === "left" ? [belief.left, belief.low, belief.high] : [1 - belief.left, 1 - belief.high, 1 - belief.low];
  const yours = choice === "skip" ? "You skipped it. " : choice ? `You said ${WORDS[choice]}. ` : "";
  const its =
    choice === side
      ? "So does the model now: "
      : choice in LETTERS
        ? `The model still says ${LETTERS[side]}: `
        : `The model says ${LETTERS[side]}: `;
  at("belief-text").replaceChildren(
    yours + its,
    make("b", {}, percent(share)),
    ` (${percent(low)} to ${percent(high)}).`,
  );
  const [wide, x] = [310, (value) => 24 + value * 262];
  const svg = draw("svg", {
    viewBox: `0 0 ${wide} 24`,
    role: "img",
    "aria-label": `Between A and B: ${percent(belief.left)} for A.`,
  });
  const place = 1 - belief.left; // towards A is to the left
  svg.append(draw("rect", { class: "side-a", x: x(0), y: 9, width: x(0.5) - x(0), height: 6, rx: 3, opacity: 0.45 }));
  svg.append(draw("rect", { class: "side-b", x: x(0.5), y: 9, width: x(1) - x(0.5), height: 6, rx: 3, opacity: 0.45 }));
  svg.append(draw("text", { x: 4, y: 16 }, "A"), draw("text", { x: wide - 12, y: 16 }, "B"));
  svg.append(draw("path", { class: "interval", d: `M${x(1 - belief.high)} 7v10m0-5H${x(1 - belief.low)}m0-5v10` }));
  svg.append(draw("circle", { class: "now", cx: x(place), cy: 12, r: 6 }));
  at("belief-bar").replaceChildren(svg);
}

// ---- Drift

async function showOrAskDrift(drift) {
  if (drift && (beta === null || Math.abs(Math.log(drift.beta / beta)) < 1e-6)) return showDrift(drift);
  const asked = ++driftAsked;
  try {
    const found = await call(beta === null ? "/api/drift" : `/api/drift?beta=${beta}`);
    if (asked === driftAsked) showDrift(found);
  } catch {
    if (asked === driftAsked && !at("drift").hidden) at("kl").textContent = "the server does not answer";
  }
}

function showBeta(value) {
  at("beta-value").textContent = value < 0.1 ? value.toFixed(3) : value < 1 ? value.toFixed(2) : value.toFixed(1);
  at("beta").setAttribute("aria-valuetext", at("beta-value").textContent);
}

function showDrift(drift) {
  at("drift").hidden = !drift?.candidates?.length;
  if (at("drift").hidden) return;
  if (beta === null) at("beta").value = String(Math.log10(drift.beta));
  showBeta(beta ?? drift.beta);
  at("expected").replaceChildren(make("span", {}, `${decimal(drift.base_reward)} → `), decimal(drift.expected_reward));
  const most = Math.max(...drift.candidates.map((one) => -Math.log(one.base_probability)));
  at("kl").replaceChildren(drift.kl.toFixed(2), make("span", {}, ` of at most ${most.toFixed(2)} nats`));
  meter(at("kl-meter"), Number(drift.kl.toFixed(3)), Number(most.toFixed(3)));
  at("kl-meter").setAttribute("aria-valuetext", at("kl").textContent);
  const largest = Math.max(...drift.candidates.flatMap((one) => [one.probability, one.base_probability]));
  const sorted = [...drift.candidates].sort((one, other) => other.reward - one.reward);
  const rows = at("candidates").children;
  sorted.forEach((one, i) => {
    const name = JSON.stringify([one.html, one.was]);
    const old = rows[i]?.dataset.name === name ? rows[i] : null; // it stays open where it is open
    const row = old ?? candidate(one, name);
    row.querySelector(".share").textContent = percent(one.probability);
    const [base, policy] = row.querySelectorAll(".bars i");
    base.style.width = `${(100 * one.base_probability) / largest}%`;
    policy.style.width = `${(100 * one.probability) / largest}%`;
    row.querySelector("small").textContent =
      `reward ${decimal(one.reward)}; ${percent(one.base_probability)} → ${percent(one.probability)}`;
    if (!old && rows[i]) rows[i].replaceWith(row);
    else if (!old) at("candidates").append(row);
  });
  while (rows.length > sorted.length) rows[sorted.length].remove();
}

function candidate(one, name) {
  const text = prose(one.html);
  const snippet = make("bdi", { class: "snippet" }, text.textContent.trim().replace(/\s+/g, " ").slice(0, 160));
  const letter = LETTERS[one.was] ?? null;
  const badge = letter
    ? make("span", { class: `letter ${letter.toLowerCase()}` }, make("span", { class: "unseen" }, "Reply "), letter)
    : make("span", { class: "letter none", "aria-hidden": "true" });
  const details = make("details", {}, make("summary", {}, badge, snippet, make("span", { class: "share" })), text);
  return make(
    "li",
    { "data-name": name },
    details,
    make("div", { class: "bars" }, make("i", { class: "base" }), make("i", { class: "policy" }), make("small")),
  );
}

// ---- People

async function showPeople() {
  let found;
  try {
    found = await call("/api/people");
  } catch (error) {
    at("people-note").textContent = error.message;
    return;
  }
  const number = (value) => (value === null || value === undefined ? "–" : decimal(value));
  const share = (right, of) => (of ? `${right} of ${of}` : "–");
  const alpha = found.alpha;
  at("people-note").textContent =
    alpha === null || alpha === undefined
      ? "Krippendorff's α compares what several people chose on the same pairs; so far no pair has been labelled by two."
      : "Krippendorff's α is 1 where all agree and 0 where they agree as often as by chance. Krippendorff asks for 0.8, and for 0.667 at the least.";
  const facts = [
    ["all choices, α", number(alpha)],
    ...Object.entries(found.dimensions ?? {}).map(([name, value]) => [`${name}, α`, number(value)]),
  ];
  at("alphas").replaceChildren(
    ...facts.map(([name, value], i) =>
      make("div", { class: i ? "" : "first" }, make("dt", {}, name), make("dd", {}, value)),
    ),
  );
  const row = (name, isLeftOut, cells) => {
    const named = cells.map(([column, value]) => make("td", { class: "n", "data-name": column }, value));
    const note = isLeftOut ? make("span", { class: "muted" }, " labels do not count") : null;
    return make("tr", {}, make("th", { scope: "row" }, make("bdi", {}, name), note), ...named);
  };
  at("people-rows").replaceChildren(
    ...found.people.map((one) =>
      row(one.name, found.left_out.includes(one.name), [
        ["labels", one.labels.toLocaleString("en")],
        ["time per label", one.seconds_median === null ? "–" : `${one.seconds_median.toFixed(1)} s`],
        ["checks right", share(one.checks.right, one.checks.of)],
        ["agreement", number(one.agreement)],
        ["consistency", share(one.consistency.same, one.consistency.of)],
      ]),
    ),
  );
  at("between").hidden = !found.pairs.length;
  at("between-rows").replaceChildren(
    ...found.pairs.map((one) =>
      row(`${one.a} and ${one.b}`, false, [
        ["Cohen's κ", number(one.kappa)],
        ["pairs", String(one.n)],
      ]),
    ),
  );
}

function showView() {
  const people = location.hash === "#people" && session.is_owner;
  at("label-view").hidden = people;
  at("people-view").hidden = !people;
  for (const [link, here] of [
    ["to-people", people],
    ["to-label", !people],
  ]) {
    if (here) at(link).setAttribute("aria-current", "page");
    else at(link).removeAttribute("aria-current");
  }
  if (people) showPeople();
  else if (ask) measure();
}

// ---- Keys

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || at("help").open || !session) return;
  if (event.target.closest("textarea, input, select")) {
    if (event.key === "Escape" && event.target.id === "reason") closeReason();
    return;
  }
  // On a keyboard of another script the place of the key decides.
  const typed = event.key.length === 1 && event.key > "~" ? event.code.replace(/^(Key|Digit)/, "") : event.key;
  const key = typed.length === 1 ? typed.toLowerCase() : typed;
  if (key === "?") return take(event, openHelp);
  if (!at("keys-on").checked || at("label-view").hidden) return;
  if (key === "u") return take(event, undo);
  if (!ask) return;
  const scrolled = event.target.closest(".prose, .turns, pre");
  const vertical = key === "ArrowUp" || key === "ArrowDown";
  if (scrolled && vertical && scrolled.scrollHeight > scrolled.clientHeight + 4) return; // it scrolls
  const choice = KEYS[key];
  if (armed && key === "Escape") return take(event, () => arm(armed));
  if (armed && choice)
    return take(event, () => ["left", "right", "tie"].includes(choice) && answerDimension(armed, choice));
  if (choice) return take(event, () => choose(choice));
  if (key === "r") return take(event, () => openReason(true, true));
  if (key === "x") return take(event, () => toggleWhole([...document.querySelectorAll(".reply")]));
  const name = /^[1-9]$/.test(key) ? session.dimensions[Number(key) - 1] : null;
  if (name) take(event, () => arm(name));
}

function take(event, action) {
  event.preventDefault();
  action();
}

function openHelp() {
  at("help").showModal();
}

// ---- Beginning

async function refresh() {
  session = await call("/api/session");
  const { title, stage, mode, person } = session;
  document.title = `${title} · ${mode}`;
  at("title").textContent = title;
  at("kicker").replaceChildren(
    `rlhf-pipeline ${mode}`,
    ...(mode === "label" && stage ? [" · ", make("bdi", {}, stage)] : []),
    ...(person ? [" · ", make("bdi", {}, person)] : []),
  );
  at("to-label").hidden = at("to-people").hidden = !session.is_owner;
  at("label-view").classList.toggle("alone", !session.has_features);
  makeDimensions();
  showView();
  showProgress(session.progress);
  showLearner(session.learner);
  setBusy(false);
  showAsk(session.ask);
}

async function start() {
  clearTimeout(retry);
  try {
    await refresh();
    connected();
    if (session.has_features) showOrAskDrift(null);
    send();
  } catch (error) {
    if (error instanceof Unreachable) return waitAndSend(error);
    if (error instanceof Refused) return showBanner(`${error.message} Open the link that the command printed.`);
    throw error;
  }
}

document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) before = timeSeen();
  shownAt = document.hidden ? 0 : seconds();
});
window.addEventListener("hashchange", () => session && showView());
window.addEventListener("online", () => at("banner").hidden || at("try-now").click());
new ResizeObserver(() => ask && !at("label-view").hidden && measure()).observe(at("replies"));
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => choose(button.dataset.choice));
for (const button of document.querySelectorAll(".whole"))
  button.addEventListener("click", () => toggleWhole([button.closest(".reply")]));
at("undo").addEventListener("click", undo);
at("try-now").addEventListener("click", () => (session && queue().length ? send() : start()));
at("look-again").addEventListener("click", start);
at("open-reason").addEventListener("click", () => openReason(true, true));
at("reason").addEventListener("input", keepDraft);
at("open-help").addEventListener("click", openHelp);
at("close-help").addEventListener("click", () => at("help").close());
at("keys-on").checked = localStorage.getItem("arena keys") !== "off";
at("keys-on").addEventListener("change", () =>
  localStorage.setItem("arena keys", at("keys-on").checked ? "on" : "off"),
);
at("beta").addEventListener("input", () => {
  beta = 10 ** Number(at("beta").value);
  showBeta(beta);
  showOrAskDrift(null);
});
start();

"use strict";
// A film: frames of [forwards, drafted, accepted, rejected text, changes, order of the elements or null]; a change is
// [element, text or null, who decided it, chance or null, frame]. Text enters the page as text only.
const film = JSON.parse(document.getElementById("film").textContent);
const frames = film.frames, last = frames.length - 1, $ = (id) => document.getElementById(id);
const WHO = { given: "given", open: "not decided yet", model: "the model's own", draft: "drafted, and it stood" };
const places = new Map(), spans = new Map();
let shown = -1, order = [], timer = 0;

function made(tag, text, css) {
  const node = document.createElement(tag);
  node.textContent = text;
  if (css) node.className = css;
  return node;
}

// ---- colours ------------------------------------------------------------------------------------------------------
const some = (test) => frames.some((f) => f[4].some(test));
const COLOURS = {
  step: {
    title: "by step",
    css: (p) => "c" + Math.min(7, Math.floor((8 * (p.frame - 1)) / Math.max(last, 1))),
    legend: [["c0", "first frames"], ["c2", ""], ["c4", ""], ["c6", ""], ["c7", "last frames"]],
  },
  chance: {
    title: "by confidence",
    css: (p) => (p.chance === null ? "" : "k" + Math.min(4, Math.floor(5 * p.chance))),
    legend: [["k0", "under 20%"], ["k1", "40%"], ["k2", "60%"], ["k3", "80%"], ["k4", "over 80%: the model's chance of the token"]],
    wanted: () => some((c) => c[3] !== null),
  },
  who: {
    title: "by who decided",
    css: (p) => (p.by === "draft" ? "d1" : "d0"),
    legend: [["d0", "the model's own"], ["d1 draft", "drafted, and it stood"]],
    wanted: () => frames.some((f) => f[1]),
  },
};
for (const [name, colour] of Object.entries(COLOURS)) {
  if (colour.wanted && !colour.wanted()) continue;
  const option = made("option", colour.title);
  option.value = name;
  $("colour").append(option);
}
if (frames.some((f) => f[1])) $("colour").value = "who";

function legend() {
  const rows = [...COLOURS[$("colour").value].legend];
  if (frames.some((f) => f[3])) rows.push(["gone", "drafted, and rejected in this frame"]);
  if (some((c) => c[2] === "open")) rows.push(["open", "not decided yet"]);
  $("legend").replaceChildren(...rows.map(([css, text]) => {
    const row = made("li", "");
    row.append(made("span", css === "open" ? "·" : css === "gone" ? "abc" : "", css), text);
    return row;
  }));
}

// ---- frames -------------------------------------------------------------------------------------------------------
function go(to) {
  to = Math.max(0, Math.min(last, to));
  if (to < shown) {
    places.clear();
    shown = -1;
  }
  while (shown < to) {
    shown += 1;
    for (const [element, text, by, chance, frame] of frames[shown][4]) places.set(element, { text, by, chance, frame });
    if (frames[shown][5] !== null) order = frames[shown][5];
  }
  paint();
}

function paint() {
  const colour = COLOURS[$("colour").value], nodes = [], [forwards, drafted, accepted, rejected] = frames[shown];
  let decided = 0, open = 0, newest = -1;
  for (const element of order) {
    const p = places.get(element), fresh = p.frame === shown && shown > 0;
    if (!spans.has(element)) spans.set(element, document.createElement("span"));
    const span = spans.get(element), text = p.by === "open" ? "·" : p.text, css = [p.by];
    if (p.by === "open") open += 1;
    else if (p.by !== "given") {
      decided += 1;
      css.push(colour.css(p));
      if (fresh) { css.push("new"); newest = nodes.length + (p.by === "draft"); }
    }
    if (p.by !== "given" && text.startsWith("\n")) css.push("line");
    if (span.textContent !== text) span.textContent = text;
    span.className = css.join(" ");
    const chance = p.chance === null ? "" : `, chance ${(100 * p.chance).toFixed(p.chance < 0.1 ? 1 : 0)}%`;
    span.title = WHO[p.by] + (p.by === "given" || p.by === "open" ? "" : `, in frame ${p.frame}${chance}`);
    nodes.push(span);
  }
  if (rejected) nodes.splice(newest < 0 ? nodes.length : newest, 0, made("span", rejected, "gone")); // then the correction
  $("text").replaceChildren(...nodes);
  const said = [`frame ${shown} of ${last}`, `${forwards} forward${forwards === 1 ? "" : "s"}`,
    `${decided} token${decided === 1 ? "" : "s"} decided` + (open ? `, ${open} open` : "")];
  if (forwards) said.push(`${(decided / forwards).toFixed(2)} tokens per forward`);
  if (frames.some((f) => f[1])) {
    const sum = (i) => frames.slice(0, shown + 1).reduce((n, f) => n + f[i], 0);
    said.push(`drafted ${drafted}, accepted ${accepted} (in all ${sum(2)} of ${sum(1)})`);
  }
  $("figures").textContent = said.join(" · ");
  $("at").value = shown;
  $("at").setAttribute("aria-valuetext", said[0]);
  $("back").disabled = shown === 0;
  $("on").disabled = shown === last;
}

// ---- playing ------------------------------------------------------------------------------------------------------
const playing = () => timer !== 0;

function pause() {
  clearTimeout(timer);
  timer = 0;
  $("play").textContent = "Play";
}

function step() {
  go(shown + 1);
  if (shown === last) pause();
  else timer = setTimeout(step, Math.max(40, Math.min(500, 10000 / frames.length)) / Number($("speed").value));
}

function play() {
  if (playing()) {
    pause();
    $("said").textContent = $("figures").textContent;
    return;
  }
  if (shown === last) go(0);
  $("play").textContent = "Pause";
  timer = setTimeout(step, 200);
}

function seek(to) {
  pause();
  go(to);
}

$("play").addEventListener("click", play);
$("back").addEventListener("click", () => seek(shown - 1));
$("on").addEventListener("click", () => seek(shown + 1));
$("at").addEventListener("input", () => seek(Number($("at").value)));
$("colour").addEventListener("change", () => { legend(); paint(); });
document.addEventListener("keydown", (event) => {
  if (event.target.closest("button, input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = { " ": play, ArrowLeft: () => seek(shown - 1), ArrowRight: () => seek(shown + 1), Home: () => seek(0), End: () => seek(last) };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});

// ---- beginning ----------------------------------------------------------------------------------------------------
document.title = $("title").textContent = film.title;
$("about").append(...film.about.map(([name, value]) => {
  const row = made("div", "");
  row.append(made("dt", name), made("dd", value));
  return row;
}));
$("at").max = last;
legend();
const asked = /^#(\d+|end)$/.exec(location.hash);
go(asked === null ? 0 : asked[1] === "end" ? last : Number(asked[1]));
if (asked === null && !matchMedia("(prefers-reduced-motion: reduce)").matches) play();

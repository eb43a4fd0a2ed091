// What a model writes reaches the page by textContent only, and pictures as data: never as markup.
"use strict";

const at = (id) => document.getElementById(id);
const FRAME = 160; // milliseconds that a step of a picture is shown
const models = new Map();
let running = null;

function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function headers() {
  const said = { "Content-Type": "application/json" };
  if (at("key").value) said.Authorization = "Bearer " + at("key").value;
  return said;
}

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

async function refusal(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return "the server answered " + answer.status;
  }
}

// ---- models -----------------------------------------------------------------------------------------------------

async function load() {
  let answer;
  try {
    answer = await fetch("v1/models", { headers: headers() });
  } catch {
    at("state").textContent = "not reached";
    return void setTimeout(load, 2000);
  }
  if (answer.status === 401) {
    at("key-box").hidden = false;
    at("state").textContent = "needs a key";
    return;
  }
  if (!answer.ok) {
    at("state").textContent = await refusal(answer);
    return void setTimeout(load, 1000);
  }
  const before = at("model").value;
  models.clear();
  at("model").replaceChildren();
  for (const model of (await answer.json()).data) {
    models.set(model.id, model.seriatim);
    const option = make("option", model.id);
    option.value = model.id;
    at("model").append(option);
  }
  if (models.has(before)) at("model").value = before;
  at("state").textContent = "ready";
  at("go").disabled = false;
  choose();
}

function choose() {
  const about = models.get(at("model").value);
  if (!about) return;
  const text = about.kind === "text";
  at("text-box").hidden = !text;
  at("image-box").hidden = text;
  at("runs-out").hidden = !text || !at("runs").children.length;
  if (text) {
    fill("decoder", about.decoders);
    at("chat-box").hidden = !about.chat;
  } else {
    fill("classes", about.classes);
    at("label").placeholder = about.classes[0] || "";
    if (!about.classes.includes(at("label").value)) at("label").value = about.classes[0] || "";
  }
}

function fill(id, names) {
  at(id).replaceChildren(...names.map((name) => {
    const option = make("option", name);
    option.value = name;
    return option;
  }));
}

// ---- asking -----------------------------------------------------------------------------------------------------

async function* events(path, body, signal) {
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!answer.ok) throw new Error(await refusal(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((one) => one.startsWith("data: "));
      if (!line || line === "data: [DONE]") continue;
      const said = JSON.parse(line.slice(6));
      if (said.error) throw new Error(said.error.message);
      yield said;
    }
  }
}

async function ask(event) {
  event.preventDefault();
  if (running) return;
  fail("");
  running = new AbortController();
  at("go").disabled = true;
  at("stop").disabled = false;
  try {
    const about = models.get(at("model").value);
    await (about.kind === "text" ? write(about, running.signal) : draw(running.signal));
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    running = null;
    at("go").disabled = false;
    at("stop").disabled = true;
  }
}

function number(id) {
  const value = at(id).value;
  return value === "" ? undefined : Number(value);
}

// ---- text -------------------------------------------------------------------------------------------------------

async function write(about, signal) {
  const talk = about.chat && at("chat").checked;
  const decoder = at("decoder").value, prompt = at("prompt").value;
  const body = {
    model: at("model").value, decoder, stream: true, drafted: true,
    max_tokens: number("tokens"), temperature: number("temperature"), seed: number("seed"),
  };
  if (talk) body.messages = [{ role: "user", content: prompt }];
  else body.prompt = prompt;
  at("image-out").hidden = true;
  at("text-out").hidden = false;
  at("text").replaceChildren(...(talk ? [] : [make("span", prompt, "prompt")]));
  const clock = new Clock();
  try {
    for await (const said of events(talk ? "v1/chat/completions" : "v1/completions", body, signal)) {
      if (!said.drafted) continue;
      for (const [text, drafted] of said.drafted.parts) append(text, drafted ? "drafted" : "own");
      clock.heard(said.drafted);
      at("figures").textContent = clock.said();
    }
  } finally {
    if (clock.first !== null) clock.keep(decoder);
  }
}

function append(text, kind) {
  const last = at("text").lastElementChild;
  if (last && last.className === kind) last.firstChild.appendData(text);
  else at("text").append(make("span", text, kind));
}

class Clock {
  constructor() {
    this.start = performance.now();
    this.first = null;
    this.tokens = this.accepted = 0;
  }

  heard(so_far) {
    this.now = performance.now();
    this.first ??= this.now;
    this.tokens = so_far.tokens;
    this.accepted = so_far.accepted;
  }

  get speed() {
    return (this.tokens / ((this.now - this.start) / 1000)).toFixed(1);
  }

  get share() {
    return Math.round(100 * this.accepted / Math.max(this.tokens, 1)) + "%";
  }

  said() {
    return this.first === null ? "" : `${this.tokens} tokens, ${this.speed} tokens/s, ${this.share} drafted`;
  }

  keep(decoder) {
    const wait = Math.round(this.first - this.start) + " ms";
    const row = make("tr");
    row.append(...[decoder, this.tokens, this.speed, this.share, wait].map((said) => make("td", String(said))));
    at("runs").prepend(row);
    at("runs-out").hidden = false;
  }
}

// ---- pictures ---------------------------------------------------------------------------------------------------

async function draw(signal) {
  const body = {
    model: at("model").value, prompt: at("label").value, stream: true, seed: number("picture-seed"),
    steps: number("steps"),
  };
  at("text-out").hidden = true;
  at("image-out").hidden = false;
  at("film").replaceChildren();
  at("picture").removeAttribute("src");
  at("caption").textContent = at("figures").textContent = "";
  for await (const said of events("v1/images/generations", body, signal)) {
    const source = "data:image/png;base64," + said.b64_json;
    at("picture").src = source;
    at("caption").textContent = said.caption || "finished";
    if (said.type.endsWith("completed")) return;
    const frame = make("li"), small = make("img");
    small.src = source;
    small.alt = said.caption;
    frame.append(small);
    at("film").querySelector(".now")?.classList.remove("now");
    frame.className = "now";
    at("film").append(frame);
    await new Promise((done) => setTimeout(done, FRAME));
    signal.throwIfAborted();
  }
}

at("ask").addEventListener("submit", ask);
at("stop").addEventListener("click", () => running?.abort());
at("model").addEventListener("change", choose);
at("key").addEventListener("change", load);
load();
